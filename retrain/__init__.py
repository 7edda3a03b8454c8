"""Convex and second-order retraining of trained networks, with certificates.

run = retrain.net_trim(model, data, relative_epsilon=0.05, out="runs/a")
run = retrain.lobs(model, data, sparsity=0.93, out="runs/b")
run.model, run.layers, run.bound, run.measured
run = retrain.train("mnist-dense-10", out="runs/c")          # trains, and prunes meanwhile
retrain.load("runs/a")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrain.api.load import load
    from retrain.api.lobs import lobs
    from retrain.api.net_trim import net_trim
    from retrain.data.sources import load_data
    from retrain.runs.outcome import Run
    from retrain.runs.trained import TrainedRun
    from retrain.runs.training import train
    from retrain.stream.chain import Chain

__all__ = ["Chain", "Run", "TrainedRun", "load", "load_data", "lobs", "net_trim", "train"]

# Imported when asked for, so that `retrain --help` answers at once.
_HOMES = {
    "Chain": "retrain.stream.chain",
    "Run": "retrain.runs.outcome",
    "load": "retrain.api.load",
    "load_data": "retrain.data.sources",
    "lobs": "retrain.api.lobs",
    "net_trim": "retrain.api.net_trim",
    "TrainedRun": "retrain.runs.trained",
    "train": "retrain.runs.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'retrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
