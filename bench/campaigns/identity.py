"""The identity of a run: one thing is changed; bytes stay equal, or the resume is refused by name.

For each row of `bench.campaigns.identity_cases` (every option of every command, the environment, a
network's code) four things happen: the command runs to its end; it runs and is killed after its
first layer or epoch; the changed command runs to its end; and the changed command is to resume the
killed run. It may go on only where both ends have equal bytes; otherwise the refusal must name what
was changed. A refusal where bytes are equal is harmless and marked ``strict``.

Options and code are changed in processes forked off one that has imported everything; variables of
the environment in fresh ones. Exit code 1 where a row is violated or an option has no row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.campaigns.identity_cases import (
    COMMANDS,
    EDITS,
    HELPERS,
    NETWORK,
    TRAINED,
    VARIABLES,
    Row,
    forgotten,
    options,
)

WIDTHS = (16, 12, 8, 6)
MODEL = "model.safetensors"
CHAIN = """from torch import nn


def relu_net():
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
"""
RECIPE = """[data]
train = "data.npz"
test = "test.npz"
[model]
architecture = "dense"
widths = [16, 12, 6]
[training]
epochs = 3
batch_size = 20
[optimizer]
name = "adam"
lr = {rate}
[method]
name = "shrinknets"
strength = 0.01
"""
_SERVER = {"OMP_NUM_THREADS": "1", "LOKY_MAX_CPU_COUNT": "1"}  # forked: threads do not survive that


@dataclass(frozen=True)
class Outcome:
    """What became of a row: equal bytes or not, accepted or refused, and whether that is right."""

    row: Row
    equal: bool | None
    accepted: bool
    right: bool
    said: str

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.right:
            return "VIOLATED"
        return "strict" if self.equal and not self.accepted else "ok"


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code (None when killed), and what it said on stderr."""

    code: int | None
    said: str


Session = Callable[[Path, list[list[str]], bool], list[Answer]]
"""Runs commands one after the other in a process of their own, in a folder; killed or not."""


def main(arguments: list[str]) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="bench campaigns.identity", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression: rows to run")
    parser.add_argument("--skip-environment", action="store_true", help="no fresh processes")
    given = parser.parse_args(arguments)
    missing = forgotten()
    for name in missing:
        print(f"no row changes {name}: add one to bench/campaigns/identity_cases.py")
    wrong = 0
    print(HEADINGS)
    with tempfile.TemporaryDirectory() as folder:
        for outcome in campaign(Path(folder), given.only, environment=not given.skip_environment):
            print(line(outcome), flush=True)
            wrong += outcome.verdict == "VIOLATED"
    print(f"{wrong} violated, {len(missing)} options without a row")
    return int(bool(wrong or missing))


HEADINGS = "| what | from | to | bytes | resume | verdict | said |\n|---|---|---|---|---|---|---|"


def line(outcome: Outcome) -> str:
    """Return a row of the table."""
    row = outcome.row
    size = {True: "equal", False: "differ", None: "no run"}[outcome.equal]
    cells = (
        f"{row.command} {row.option}",
        row.before or "none",
        row.after or "none",
        size,
        "accepted" if outcome.accepted else "refused",
        outcome.verdict,
        outcome.said,
    )
    return (
        f"| {' | '.join(cell.strip().replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
    )


def campaign(folder: Path, only: str = "", *, environment: bool = True) -> Iterator[Outcome]:
    """Run the rows whose command and option match `only`, in a folder for their files."""
    write_files(folder)
    kept: dict[tuple[str, ...], tuple[bytes, Path]] = {}
    for row in options():
        if re.search(only, f"{row.command} {row.option}"):
            yield changed_option(folder, row, kept)
    for edits, common in ((EDITS, ""), (TRAINED, "--fine-tune 1")):
        for what, before, after, said in edits:
            for command in ("trim", "lobs"):
                row = Row(command, what, before, after, said, common)
                if re.search(only, f"{row.command} {row.option}"):
                    yield changed_code(folder, row, kept)
    for name, value, said in VARIABLES if environment else ():
        for command in COMMANDS:
            row = Row(command, name, "", value, said)
            if re.search(only, f"{row.command} {row.option}"):
                yield changed_variable(folder, row, kept)


# --- rows -----------------------------------------------------------------------------------------


def changed_option(folder: Path, row: Row, kept: dict[Any, Any]) -> Outcome:
    """Change an option."""
    first, second = command_of(row, row.before), command_of(row, row.after)
    place = folder / "work"
    if not row.runs:
        _, begun = begin(folder, place, first, kept, forked)
        shutil.rmtree(folder / "resumed", ignore_errors=True)
        shutil.copytree(begun, folder / "resumed")
        (answer,) = forked(place, [[*second, "--out", str(folder / "resumed")]], False)
        same = {p.name for p in begun.rglob("*")} == {
            p.name for p in (folder / "resumed").rglob("*")
        }
        shutil.rmtree(folder / "resumed")
        return Outcome(row, None, True, answer.code == 0 and same, "")
    return judged(row, folder, place, first, second, kept, (forked, forked))


def changed_code(folder: Path, row: Row, kept: dict[Any, Any]) -> Outcome:
    """Change the code of the network."""
    arguments = ["--arch", "net:Net", *row.common.split()]
    command = [*COMMANDS[row.command], *arguments]
    command[1] = "conv.pth"
    before, after = folder / "code", folder / "changed"
    shutil.rmtree(after, ignore_errors=True)
    shutil.copytree(before, after, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("net.py", "helpers.py"):
        text = (after / name).read_text()
        (after / name).write_text(text.replace(row.before, row.after, 1))
    first: tuple[str, ...] = tuple(command)
    return judged(row, folder, before, first, first, kept, (forked, forked), after)


def changed_variable(folder: Path, row: Row, kept: dict[Any, Any]) -> Outcome:
    """Change a variable of the environment."""
    command = command_of(row, "")
    if row.command == "trim":
        command = ("trim", "conv.pth", "--data", "data.npz", "--arch", "net:Net")
    plain = fresh({})
    return judged(
        row,
        folder,
        folder / "code",
        command,
        command,
        kept,
        (plain, fresh({row.option: row.after})),
    )


def command_of(row: Row, value: str) -> tuple[str, ...]:
    """Return the row's command with one value of what it changes."""
    base = list(COMMANDS[row.command])
    parts = value.split()
    if not row.option.startswith("--") and parts:  # a positional argument
        base[1] = parts[0]
        parts = []
    elif row.option in base:
        where = base.index(row.option)
        del base[where : where + 2]
    if {"--layer-error", "--tolerance"} & set(parts) and row.command == "lobs":
        where = base.index("--sparsity")
        del base[where : where + 2]
    if row.option == "--arch" or "chain:relu_net" in row.common:
        base[1] = "net.pth"
    if row.option == "--key":
        base[1] = "nested.pth"
    return (*base, *row.common.split(), *parts)


def judged(
    row: Row,
    folder: Path,
    place: Path,
    first: tuple[str, ...],
    second: tuple[str, ...],
    kept: dict[Any, Any],
    sessions: tuple[Session, Session],
    other_place: Path | None = None,
) -> Outcome:
    """Run what there is to run for a row, and judge."""
    base, begun = begin(folder, place, first, kept, sessions[0])
    new, resumed = folder / "new", folder / "resumed"
    for path in (new, resumed):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(begun, resumed)
    commands = [[*second, "--out", str(path)] for path in (new, resumed)]
    whole, answer = sessions[1](other_place or place, commands, False)
    if whole.code not in (0, 1):
        return Outcome(row, False, False, False, f"the changed command failed: {whole.said}")
    wanted = (new / MODEL).read_bytes()
    equal = wanted == base
    if answer.code in (0, 1):
        right = equal and (resumed / MODEL).read_bytes() == wanted
        return Outcome(row, equal, True, right, "")
    refused = answer.code == 2 and "belongs to another run" in answer.said
    told = re.search(r"another run \((.*)\); repeat", answer.said)
    said = told[1] if told else answer.said
    right = refused and row.said is not None and re.search(row.said, said) is not None
    return Outcome(row, equal, False, right, said)


def begin(
    folder: Path, place: Path, command: tuple[str, ...], kept: dict[Any, Any], session: Session
) -> tuple[bytes, Path]:
    """Return the bytes of a whole run, and the directory of one killed after its first layer."""
    key = (str(place), session is forked, *command)
    if key not in kept:
        whole, begun = (folder / f"{what}-{len(kept)}" for what in ("whole", "begun"))
        (answer,) = session(place, [[*command, "--out", str(whole)]], False)
        if answer.code not in (0, 1):
            raise RuntimeError(f"{command}: {answer}")
        (answer,) = session(place, [[*command, "--out", str(begun)]], True)
        if answer.code is not None:
            raise RuntimeError(f"{command}: was to be killed, but {answer}")
        kept[key] = (whole / MODEL).read_bytes(), begun
    return kept[key]


# --- processes ------------------------------------------------------------------------------------

_FORKS = multiprocessing.get_context("forkserver")


def forked(place: Path, commands: list[list[str]], killed: bool) -> list[Answer]:
    """Run commands in a process forked off one that has imported everything."""
    before = {name: os.environ.get(name) for name in _SERVER}
    os.environ.update(_SERVER)  # for the server, which the first call starts
    _FORKS.set_forkserver_preload(
        [
            "retrain.api.net_trim",
            "retrain.api.lobs",
            "retrain.report.terminal",
            "retrain.runs.training",
        ]
    )
    with tempfile.NamedTemporaryFile() as file:
        process = _FORKS.Process(target=work, args=(str(place), commands, killed, file.name))
        process.start()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        process.join()
        return _answers(Path(file.name), len(commands))


def fresh(variables: dict[str, str]) -> Session:
    """Return a session of fresh processes with variables of the environment."""

    def session(place: Path, commands: list[list[str]], killed: bool) -> list[Answer]:
        clean = {k: v for k, v in os.environ.items() if k not in {name for name, *_ in VARIABLES}}
        clean["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with tempfile.NamedTemporaryFile() as file:
            given = json.dumps([str(place), commands, killed, file.name])
            code = "import json, sys; from bench.campaigns.identity import work; "
            code += "work(*json.loads(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", code, given], env={**clean, **variables})
            return _answers(Path(file.name), len(commands))

    return session


def work(place: str, commands: list[list[str]], killed: bool, file: str) -> None:
    """Run commands in this process, note exit codes and stderr; or be killed on the way."""
    from retrain.cli import main

    os.chdir(place)
    sys.dont_write_bytecode = True
    if killed:
        _kill_early()
    answers = []
    for command in commands:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code: Any = main([*command])
            except SystemExit as end:
                code = end.code
            except Exception:  # noqa: BLE001 - an interpreter's last resort
                said.write(traceback.format_exc())
                code = 70
        answers.append([code, said.getvalue().strip()])
    Path(file).write_text(json.dumps(answers))


def _answers(file: Path, count: int) -> list[Answer]:
    text = file.read_text()
    return [Answer(*entry) for entry in json.loads(text)] if text else [Answer(None, "")] * count


def _kill_early() -> None:
    """Have this process killed as soon as its first layer, or its first epoch, is written."""
    from retrain.runs import training as training_run
    from retrain.runs.directory import RunDirectory

    def deadly(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    RunDirectory.write_layer = deadly(RunDirectory.write_layer)  # type: ignore[method-assign]
    training_run.write_checkpoint = deadly(training_run.write_checkpoint)


# --- files ----------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    """Write networks, data, recipes and code."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    work = folder / "work"
    (work / "elsewhere").mkdir(parents=True)
    for seed, name in ((0, "data"), (1, "test")):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(60, WIDTHS[0])).astype(np.float32)
        np.savez(work / f"{name}.npz", x=x, y=rng.integers(0, WIDTHS[-1], 60))
    shutil.copy(work / "data.npz", work / "elsewhere" / "data.npz")
    layers = [nn.Linear(*size) for size in pairwise(WIDTHS)]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    state = network.state_dict()
    nested = {}
    for seed, names in enumerate((("net.pth", "elsewhere/net.pth"), ("other.pth",))):
        _fill(state, seed)
        nested["average" if seed else "net"] = {key: value.clone() for key, value in state.items()}
        for name in names:
            torch.save(state, work / name)
        if seed == 0:
            save_file(state, work / "net.safetensors")
            torch.save(
                {f"module.{key}": value for key, value in state.items()}, work / "prefixed.pth"
            )
    torch.save(nested, work / "nested.pth")
    for name, rate in (
        ("recipe.toml", 0.01),
        ("elsewhere/recipe.toml", 0.01),
        ("slower.toml", 0.001),
    ):
        (work / name).write_text(RECIPE.format(rate=rate))
    (work / "chain.py").write_text(CHAIN)
    shutil.copytree(work, folder / "code")
    for name, text in (("net.py", NETWORK), ("helpers.py", HELPERS)):
        (folder / "code" / name).write_text(text)
    scope: dict[str, Any] = {}
    exec(NETWORK.replace("import helpers", ""), scope)  # our own text, a few lines above
    state = scope["Net"]().state_dict()
    _fill(state, 2)
    state["norm.running_var"].abs_().add_(0.5)
    torch.save(state, folder / "code" / "conv.pth")


def _fill(state: dict[str, Any], seed: int) -> None:
    """Fill tensors with seeded numbers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for value in state.values():
        if value.is_floating_point():
            value.copy_(
                torch.randn(value.shape, generator=generator) / max(value.shape[-1:] or [1]) ** 0.5
            )
