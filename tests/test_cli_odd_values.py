"""Every option of every command with odd values: exit code 2 and one line, before any solve."""

import contextlib
import io

import numpy as np
import pytest
import torch
from networks import dense, rows

import retrain.demo
import retrain.runs.drive
import retrain.runs.training
import retrain.verify.runner
from retrain.cli import build_parser, main
from retrain.cli.shared import FormerName

ODD = (
    "", "-1", "nan", "inf", "99999999999999999999", "x", "é→", "\udcff", "dir", "no/such", "=",
    "9" * 5000, "odd:own", "odd:leaves", "odd:none", "odd:spent", "odd:no", "raises:x", "leaves:x",
    "syntax:x", "torch.nn:Linear",
)  # fmt: skip
MODULES = {
    "odd": "import sys\n"
    "class Own(Exception): pass\n"
    "def own(): raise Own('mine')\n"
    "def leaves(): sys.exit(0)\n"
    "def none(): return None\n"
    "def spent():\n    yield 1 / 0\n",
    "raises": "class Own(Exception): pass\nraise Own('at import')\n",
    "leaves": "import sys\nsys.exit(0)\n",
    "syntax": "def (:\n",
}
RECIPE = """
[data]
train = "data.npz"
[model]
architecture = "dense"
widths = [6, 5, 3]
[training]
epochs = 1
[optimizer]
name = "sgd"
lr = 0.1
"""
COMMANDS = {
    "layers": ("layers", "net.pt"),
    "trim": ("trim", "net.pt", "--data", "data.npz", "--out", "out"),
    "lobs": ("lobs", "net.pt", "--data", "data.npz", "--out", "out", "--pattern", "1:2"),
    "train": ("train", "r.toml", "--out", "out"),
    "verify": ("verify", "net-trim/theorem-1"),
    "demo": ("demo", "--out", "out"),
}
HUGE = "99999999999999999999"
ALLOWED = {  # that mean what they say, however large or empty
    "--out": ODD[1:],
    "--limit": (HUGE,),
    "--skip": ("",),
    "--layers": (),
    "--memory": (HUGE, "inf", "9" * 5000),
    "--relative-epsilon": (HUGE,),
    "--epsilon": (HUGE,),
    "--inflation": (HUGE,),
    "--gap": (HUGE,),
    "--violation": (HUGE,),
    "--damping": (HUGE,),
    "--max-trials": (HUGE,),
}


class SolvedError(BaseException):
    """A command got as far as its work."""


@pytest.fixture
def case(tmp_path, monkeypatch):
    torch.save(dense(6, 5, 3).state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=rows(40, 6), y=np.arange(40) % 3)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "dir").mkdir()
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)

    def work(*arguments, **options):
        raise SolvedError

    for place, name in (
        (retrain.runs.drive, "_retrain"),
        (retrain.runs.training.TrainingRun, "fit"),
        (retrain.verify.runner, "_run"),
        (retrain.demo, "trained_network"),
    ):
        monkeypatch.setattr(place, name, work)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options_of(name):
    for action in build_parser()._subparsers._group_actions[0].choices[name]._actions:
        former = isinstance(action, FormerName)  # warns in a line of its own
        if action.option_strings and action.nargs != 0 and not former:
            yield action.option_strings[0]


def answer(arguments):
    """Exit code, standard output and error of a command; None where it got to its work."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        except SolvedError:
            code = None
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_values_are_told_in_one_line_before_any_work(case, name):
    there = sorted(case.iterdir())
    for option in [*options_of(name), *([1] if name != "demo" else [])]:
        for value in ODD:
            arguments = list(COMMANDS[name])
            if option == 1:
                arguments[1] = value
            elif option in arguments:
                arguments[arguments.index(option) + 1] = value
            else:
                arguments.append(f"{option}={value}")
            if value in ALLOWED.get(option, ()):
                continue
            code, out, err = answer(arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), (arguments, code, out, err)
            assert err.startswith("retrain"), (arguments, err)
            left = [path for path in sorted(case.iterdir()) if path.name != "__pycache__"]
            assert left == there, arguments


FACTORIES = {
    "odd:own": r"calling odd:own\(\) failed: Own: mine, odd.py line 3",
    "odd:leaves": r"calling odd:leaves\(\) failed: SystemExit: 0, odd.py line 4",
    "raises:x": r"importing raises failed: Own: at import, raises.py line 2",
    "leaves:x": r"importing leaves failed: SystemExit: 0, leaves.py line 2",
    "syntax:x": r"importing syntax failed: SyntaxError: ",
    "odd:no": r"module 'odd' has no 'no'",
    "torch.nn:Linear": r"calling torch.nn:Linear\(\) failed: TypeError: Linear.__init__",
}


@pytest.mark.parametrize("spec", FACTORIES)
def test_factories_that_fail_are_told_with_their_place(case, spec):
    for option, arguments in (
        ("arch", ("layers", "net.pt", "--arch", spec)),
        ("data", ("lobs", "net.pt", "--data", spec, "--sparsity", "0.5", "--out", "out")),
    ):
        _, _, err = answer(list(arguments))
        with pytest.raises(AssertionError, match=rf"{option}: .*{FACTORIES[spec]}"):
            raise AssertionError(err)
