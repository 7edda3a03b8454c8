"""Tests marked `gpu` want a CUDA device: they are skipped where torch sees none."""

from dataclasses import replace

import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def no_float64(monkeypatch):
    """A function from whose call on ADMM iterates on float32 data in float32 to the end."""
    from solvers.admm.splitting import advance

    def stays(splitting, progress, *arguments):
        if splitting.inputs.dtype == np.float32:
            begun.append(splitting)
        elif begun:
            splitting = begun[-1]
            progress = replace(progress, state=progress.state.astype(np.float32))
        return advance(splitting, progress, *arguments)

    begun = []
    return lambda: monkeypatch.setattr("solvers.admm.solve.advance", stays)
