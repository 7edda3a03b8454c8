"""Tests that need what a machine may lack: a CUDA device (`gpu`), real data (`shared_data`)."""

import pytest
from shared_data import missing

REASON = "no shared data: "


def pytest_collection_modifyitems(items):
    for item in items:
        for marked in item.iter_markers("shared_data"):
            lacking = missing(marked)
            if lacking:
                item.add_marker(pytest.mark.skip(reason=REASON + ", ".join(lacking)))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Say how many tests need shared data, and what is missing."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    ran, skipped, lacking = set(), set(), set()
    for report in reports:
        if "shared_data" not in getattr(report, "keywords", {}):
            continue
        if getattr(report, "skipped", False) and REASON in str(report.longrepr):
            skipped.add(report.nodeid)
            lacking.update(str(report.longrepr[2]).split(REASON)[1].split(", "))
        else:
            ran.add(report.nodeid)
    if ran or skipped:
        said = f"tests on shared data: {len(ran)} ran, {len(skipped)} skipped"
        terminalreporter.write_line(
            said + (f" (missing: {', '.join(sorted(lacking))})" if lacking else "")
        )
