"""What an import brings along, seen from a fresh process."""

import subprocess
import sys

import pytest


def modules_after(statement):
    """The modules that a fresh process has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize("absent", ["torch", "cvxpy", "osqp", "sklearn", "retrain"])
def test_the_solvers_import_nothing_heavy(absent):
    assert absent not in modules_after("import solvers")


def test_the_check_can_fail():
    assert "osqp" in modules_after("import solvers, osqp")
