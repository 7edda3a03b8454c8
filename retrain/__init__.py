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
    from retrain.api import Run, net_trim
    from retrain.chain import Chain
    from retrain.data import load_data
    from retrain.loading import load
    from retrain.second_order import lobs
    from retrain.trained import TrainedRun
    from retrain.training_run import train

__all__ = ["Chain", "Run", "TrainedRun", "load", "load_data", "lobs", "net_trim", "train"]

# Imported when asked for, so that `retrain --help` answers at once.
_HOMES = {
    "Chain": "retrain.chain",
    "Run": "retrain.api",
    "load": "retrain.loading",
    "load_data": "retrain.data",
    "lobs": "retrain.second_order",
    "net_trim": "retrain.api",
    "TrainedRun": "retrain.trained",
    "train": "retrain.training_run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'retrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
