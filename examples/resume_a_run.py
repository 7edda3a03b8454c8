"""Kill a run, repeat the call, and get the same bytes as from a run that nobody disturbed.

The same function is called three times: once undisturbed, once in a process that is killed after
the first layer, once more on what the killed process left. A run directory holds each finished
layer, and the identity of the run: everything that could change a weight.
"""

import json
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

import retrain
from retrain.stream.layer_report import LayerReport


def timeless(value: object) -> object:
    """Leave out how long things took."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def prune(out: Path, *, kill_after_first: bool = False) -> None:
    """Prune a small chain of weight matrices, the same one at each call."""
    rng = np.random.default_rng(0)
    widths = (30, 40, 30, 10)
    chain = retrain.Chain([rng.standard_normal((a, b)) / a**0.5 for a, b in pairwise(widths)])
    data = np.maximum(rng.standard_normal((400, 30)), 0)

    def after_layer(report: LayerReport, layers: int) -> None:
        print(f"  layer {report.name} of {layers}: {report.zeros} zeros", flush=True)
        if kill_after_first:
            signal.raise_signal(signal.SIGKILL)  # no clean-up of any kind runs

    retrain.net_trim(chain, data, relative_epsilon=0.1, out=out, on_layer=after_layer)


if len(sys.argv) > 1:  # this is the process that is to be killed
    prune(Path(sys.argv[1]), kill_after_first=True)

with tempfile.TemporaryDirectory() as folder:
    whole, killed = Path(folder) / "whole", Path(folder) / "killed"

    print("undisturbed:")
    prune(whole)

    print("killed after the first layer:", flush=True)
    child = subprocess.run([sys.executable, __file__, str(killed)], check=False)
    state = json.loads((killed / "run.json").read_text())["state"]
    layers = len(list((killed / "layers").glob("*.safetensors")))
    print(f"  exit code {child.returncode}, state {state!r}, {layers} layer on disk")

    print("the same call again:")
    prune(killed)

    same = (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    print(f"same model bytes: {same}")
    records = [timeless(json.loads((run / "run.json").read_text())) for run in (whole, killed)]
    print(f"same record, but for the seconds: {records[0] == records[1]}")

    # Another option is another run: it is refused, and the message names what differs.
    try:
        retrain.net_trim(
            retrain.load(whole).model,
            np.ones((400, 30)),
            relative_epsilon=0.2,
            out=killed,
        )
    except ValueError as error:
        print(f"refused: {str(error)[:88]}...")
