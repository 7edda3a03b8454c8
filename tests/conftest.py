"""Tests that need what a machine may lack: a CUDA device (`gpu`), real data (`shared_data`)."""

import pytest
from shared_data import missing

REASON = "no shared data: "
NEEDS = "shared data that is missing"  # the property of a marked test's report


def pytest_collection_modifyitems(items):
    for item in items:
        marks = list(item.iter_markers("shared_data"))
        if marks:
            lacking = [name for marked in marks for name in missing(marked)]
            item.user_properties.append((NEEDS, lacking))
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
    ran, skipped, lacking = set(), set(), set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, names in getattr(report, "user_properties", ()):
                if key == NEEDS:
                    (skipped if names else ran).add(report.nodeid)
                    lacking.update(names)
    if ran or skipped:
        said = f"tests on shared data: {len(ran | skipped)}, {len(ran)} ran, {len(skipped)} skipped"
        terminalreporter.write_line(
            said + (f" (missing: {', '.join(sorted(lacking))})" if lacking else "")
        )
