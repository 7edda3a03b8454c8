"""Each example runs in a fresh process, says its key line, and leaves nothing in the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

KEY_LINES = {
    "net_trim_from_python": "all layers certified: True",
    "your_own_cnn": "loaded network gives the same outputs: True",
    "certify_a_solution": "  certified to 1e-6: True",
    "a_solver_of_your_own": "certified 40 of 40 units",
    "train_with_gates": "of 9 dense layers left",
    "resume_a_run": "same model bytes: True",
}


def test_every_example_has_a_key_line():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(KEY_LINES)


@pytest.mark.parametrize("name", KEY_LINES)
def test_example(name, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    answer = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert KEY_LINES[name] in answer.stdout
    assert list(tmp_path.iterdir()) == [scratch]
    assert not list(scratch.glob("tmp*")), "an example left its temporary directory behind"
