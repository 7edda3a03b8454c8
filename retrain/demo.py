"""`retrain demo`: train a small ReLU network on embedded digits, prune it both ways, compare."""

from __future__ import annotations

import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from retrain.adapters.files.load import load_model
from retrain.adapters.files.save import save_model
from retrain.api.net_trim import net_trim
from retrain.data.arrays import Data
from retrain.data.sources import load_data
from retrain.files import json_bytes
from retrain.methods.amounts import check_parallel
from retrain.methods.net_trim.options import Scheme
from retrain.report.terminal import bound_line, output
from retrain.runs.directory import check_out
from retrain.runs.outcome import Run
from retrain.runs.subject import check_device
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import train

_log = logging.getLogger(__name__)

WIDTHS = (64, 128, 64, 10)
EPOCHS = 30
RELATIVE_EPSILON = 0.05
SCHEMES: tuple[Scheme, ...] = ("cascade", "parallel")


def demo(
    out: str | Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Run the demonstration; return the exit code (0, or 1 if a layer is not certified).

    Parameters
    ----------
    out : path
        Directory for the trained network and one run directory a scheme.
    seed : int
        Of the network's initial weights and the order of its training samples.
    threads, device
        As of `retrain.net_trim`.
    quiet, as_json : bool
        Print nothing; print the two runs' records as JSON.
    """
    check_out(out)
    check_parallel(1, threads, seed)
    if device is not None:
        check_device(device)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    training, test = load_data("digits"), load_data("digits-test")
    model = folder / "dense.safetensors"
    _log.info("training: the demonstration's network")
    save_model(trained_network(training, seed), model)
    runs = {
        scheme: net_trim(
            load_model(model),
            training,
            evaluate=test,
            scheme=scheme,
            relative_epsilon=RELATIVE_EPSILON,
            out=folder / scheme,
            device=device,
            threads=threads,
        )
        for scheme in SCHEMES
    }
    if as_json:
        records = {str(scheme): run.record for scheme, run in runs.items()}
        sys.stdout.write(json_bytes(records).decode())
    elif not quiet:
        _show(model, runs)
    return 0 if all(run.certified and not run.defects for run in runs.values()) else 1


def trained_network(data: Data, seed: int) -> nn.Module:
    """Train the demonstration's network on the digits."""
    with seeded(seed, torch.device("cpu")):
        layers: list[nn.Module] = []
        for width, following in pairwise(WIDTHS):
            layers += [nn.Linear(width, following), nn.ReLU()]
        network = nn.Sequential(*layers[:-1])
    labels: Any = data.y
    return train(network, (data.flat.astype("float32"), labels), epochs=EPOCHS, seed=seed).model


def _show(model: Path, runs: dict[Scheme, Run]) -> None:
    console = output()
    shape = "-".join(map(str, WIDTHS))
    console.print(f"trained a {shape} ReLU network on scikit-learn's digits: {model}")
    table = Table(box=SIMPLE_HEAD)
    for title in ("Net-Trim", "zeros", "accuracy before", "after", "moved", "bound", "certified"):
        table.add_column(title, justify="left" if title == "Net-Trim" else "right")
    for scheme, run in runs.items():
        accuracy = run.record["accuracy"]["held_out"]
        certified = sum(report.certified for report in run.layers)
        table.add_row(
            scheme,
            f"{100 * run.record['totals']['sparsity']:.1f} %",
            f"{100 * accuracy['before']:.2f} %",
            f"{100 * accuracy['after']:.2f} %",
            f"{run.measured:.4g}",
            "none" if run.bound is None else f"{run.bound:.4g}",
            f"{certified} of {len(run.layers)} layers",
        )
    console.print(table)
    for scheme, run in runs.items():
        for name, bound in run.bounds.items():
            where = "calibration" if name == "calibration" else "held-out"
            console.print(f"{scheme}, {where} rows: outputs {bound_line(bound)}", markup=False)
    console.print(
        f"accuracies are on held-out digits; each run is in {model.parent}/{{{','.join(runs)}}}",
        markup=False,
    )
