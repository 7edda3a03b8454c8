"""Two processes that cut neurons while they train: both cut the same, and as one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shrinknets_joint
import torch

import retrain

HERE = Path(__file__).parent


def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(HERE / "shrinknets_joint.py"), str(tmp_path / "joint")],
        env=environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = retrain.train(shrinknets_joint.RECIPE)
    together = retrain.load(tmp_path / "joint")
    # Sums in another order: the last bits differ, and what comes of them grows.
    assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-4)
    sizes = [
        [sum(line["method"]["neurons"].values()) for line in run.history]
        for run in (alone, together)
    ]
    assert sizes[0][-1] < 32 and sizes[1][-1] < 32
    assert all(abs(a - b) <= 2 for a, b in zip(*sizes, strict=True))
    assert together.test_accuracy == pytest.approx(alone.test_accuracy, abs=0.03)
    assert together.model(torch.rand(2, 1, 8, 8)).isfinite().all()
