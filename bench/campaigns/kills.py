"""Kills: SIGKILL any command at any moment; the same command again gives the same bytes.

For each command a run that nobody disturbs is the reference. Then the command is killed: before,
in the midst of (a write) or after its n-th event in the run directory (files created, written,
synchronised, renamed, removed; folders made), at its n-th import, and at random times, there also
with its whole group or by its worker alone. What came before the kill is drawn by seed, spread
evenly over the run. After each kill the same command runs again, and then

- every file equals the reference's, but for the seconds that records hold;
- no other file is there, temporary ones included;
- what was finished before the kill (layers, epochs, rows) is not done again: at most what was in
  hand is lost.

Rows go to a file as they come, and the same call resumes.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.campaigns._kill import VARIABLE, Plan, install

ROOT = Path(__file__).parents[2]
WIDTHS = (16, 12, 8, 6)
TRIM = (
    "trim",
    "net.pth",
    "--data",
    "data.npz",
    "--gap",
    "1e-2",
    "--violation",
    "1e-3",
    "--out",
    "out",
)
LOBS = ("lobs", "net.pth", "--data", "data.npz", "--out", "out")
PARALLEL = ("--scheme", "parallel", "--jobs", "2")
TUNED = ("--evaluate", "test.npz", "--fine-tune", "1")
STATEMENTS = ("net-trim/proposition-1", "net-trim/theorem-1")

COMMANDS: dict[str, tuple[str, ...]] = {
    "trim": TRIM,
    "trim, two jobs": (*TRIM, *PARALLEL),
    "trim to a sparsity": (*TRIM, "--sparsity", "0.6"),
    "trim, one epsilon": (
        *(*TRIM, "--sparsity", "0.5", "--sparsity-of", "network"),
        *("--max-trials", "3"),
    ),
    "trim within a drop": (*TRIM, "--max-drop", "5", "--max-trials", "3", *TUNED),
    "lobs": (*LOBS, "--sparsity", "0.6"),
    "lobs, two jobs": (*LOBS, "--sparsity", "0.6", "--jobs", "2"),
    "lobs, two stages": (*LOBS, "--sparsity", "0.6", "--stages", "2", *TUNED),
    "train": ("train", "plain.toml", "--out", "out", "--threads", "1"),
    "train, gates": ("train", "gates.toml", "--out", "out", "--threads", "1"),
    "train, itp": ("train", "itp.toml", "--out", "out", "--threads", "1"),
    "train, shrinknets": ("train", "shrinknets.toml", "--out", "out", "--threads", "1"),
    "train, export": ("train", "plain.toml", "--out", "out", "--threads", "1", "--export"),
    "knee search": ("knee search",),
    "verify": ("verify", *STATEMENTS, "--out", "out"),
    "verify, two jobs": ("verify", STATEMENTS[0], "--out", "out", "--jobs", "2"),
    "demo": ("demo", "--out", "out"),
}
TIMED = {"parent": 2, "group": 2, "worker": 2}
"""Kills at random times; of the group and of a worker only where there are workers."""
IMPORTS = 2
EVENTS = 8
"""Kills at events, for each command but `trim`, which is killed at all of its events."""

METHODS = {
    "plain": "",
    "gates": '[method]\nname = "gates"\nlog_gamma = -40.0\ntheta = 0.6\ntheta_rate = 0.05\n',
    "itp": '[method]\nname = "itp"\ntrade_off = 0.001\nthreshold = 0.02\n',
    "shrinknets": '[method]\nname = "shrinknets"\nstrength = 0.2\ninertia = 0.5\n',
}
RECIPE = """[data]
train = "data.npz"
test = "test.npz"

[model]
architecture = "dense"
widths = [16, 12, 8, 6]

[training]
epochs = 3
batch_size = 16
seed = 5

[optimizer]
name = "adam"
lr = 0.02

"""


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes
    ----------
    command : str
        A key of `COMMANDS`.
    kind : str
        Before, torn or after an event of some kind; import; or whom a kill at some time hits.
    event, imports : int or None
        Number of the event or the import.
    share : float or None
        Time of the kill over the reference's seconds.
    """

    command: str
    kind: str
    event: int | None = None
    imports: int | None = None
    share: float | None = None

    @property
    def key(self) -> str:
        """What identifies it in the file of rows."""
        return json.dumps(asdict(self))


def main(arguments: list[str]) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m bench campaigns.kills", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", choices=COMMANDS, help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the kills; 0.05 tries it out")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")
    options = parser.parse_args(arguments)
    names = options.commands or list(COMMANDS)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows_file = out / "rows.jsonl"
    if not options.table:
        preload()
        prepare(out / "inputs")
        for name in names:
            campaign(name, out, rows_file, options.seed, options.share)
    return table([row for row in read_rows(rows_file).values() if row["command"] in names])


# --- what is run -------------------------------------------------------------------------------


def preload() -> None:
    """Import what a command needs, so that those forked off this process need not."""
    # A process that is forked should have no threads. MKL, which otherwise takes its number from
    # whatever was computed before, has the same in a forked process and in a fresh one.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    import retrain.api.lobs
    import retrain.api.net_trim
    import retrain.demo
    import retrain.report.terminal
    import retrain.runs.epsilon_search
    import retrain.runs.training
    import retrain.verify
    from retrain.trainers import gates, itp, shrinknets

    assert all((retrain.api.net_trim, retrain.demo, gates, itp, shrinknets))


def prepare(inputs: Path) -> None:
    """Write a small network, data and recipes, by seed."""
    import numpy as np
    import torch
    from torch import nn

    inputs.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for width, following in pairwise(WIDTHS):
        linear = nn.Linear(width, following)
        with torch.no_grad():
            for tensor in linear.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / width**0.5)
        layers += [linear, nn.ReLU()]
    torch.save(nn.Sequential(*layers[:-1]).state_dict(), inputs / "net.pth")
    for number, name in enumerate(("data", "test")):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(80, WIDTHS[0])).astype(np.float32)
        np.savez(inputs / f"{name}.npz", x=x, y=rng.integers(0, WIDTHS[-1], 80))
    for name, method in METHODS.items():
        recipe = RECIPE
        if name == "gates":
            recipe = RECIPE.replace('architecture = "dense"\nwidths = [16, 12, 8, 6]', GATED)
        (inputs / f"{name}.toml").write_text(recipe + method)
    (inputs / "gated.py").write_text(GATED_MODULE)


GATED = 'factory = "gated:network"'
GATED_MODULE = '''"""A network with gates on two blocks."""

from torch import nn

from retrain.trainers.gates.block import Gated


def network():
    """Two blocks around which there is an identity."""
    blocks = [
        Gated(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16)), None) for _ in range(2)
    ]
    return nn.Sequential(*blocks, nn.Linear(16, 6))
'''


def call(name: str) -> int:
    """Run a command in this process, in the folder it is in."""
    if name == "knee search":
        return knee_search()
    from retrain.cli import main as command

    return command(list(COMMANDS[name]))


def knee_search() -> int:
    """The one verb that has no command: what `python -m bench papers.itp` calls."""
    from retrain.runs.knee_search import search_knee
    from retrain.trainers.itp.search import bisection
    from retrain.trainers.recipes.recipe import read_recipe

    strategy = partial(bisection, interval=(1e-4, 0.5), levels=2, budget=3)
    search_knee(read_recipe("itp.toml"), "out", strategy, epochs=1)
    return 0


# --- one run -----------------------------------------------------------------------------------


@dataclass
class Running:
    """A command under way in a process of its own."""

    pid: int
    started: float

    def wait(self, until: float) -> int | None:
        """Return how it ended, as `subprocess` has it; None if it has not by then."""
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.perf_counter() >= until:
                return None
            time.sleep(0.002)

    def workers(self) -> list[int]:
        """Processes of its group but itself."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                with contextlib.suppress(OSError, IndexError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found

    def sweep(self) -> int:
        """End what is left of its group; return how many there were."""
        left = self.workers()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.workers():
            time.sleep(0.01)
        return len(left)


def start(name: str, folder: Path, plan: Plan, *, fresh: bool = False) -> Running:
    """Start a command: forked off this process, or in a fresh interpreter."""
    started = time.perf_counter()
    said = folder.parent / f"{folder.name}.said"
    if fresh:
        hook = folder.parent / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(
            "from bench.campaigns._kill import install_from_environment\n"
            "install_from_environment()\n"
        )
        environment = {**os.environ, VARIABLE: plan.environment()}
        environment["PYTHONPATH"] = os.pathsep.join([str(hook), str(ROOT)])
        program = "import sys; from bench.campaigns.kills import call; sys.exit(call(sys.argv[1]))"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", program, name],
                cwd=folder,
                env=environment,
                start_new_session=True,
                stdout=file,
                stderr=file,
            )
        return Running(process.pid, started)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(name, folder, plan, said)
    return Running(pid, started)


def _child(name: str, folder: Path, plan: Plan, said: Path) -> None:
    """Become the command; does not return."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        install(plan)
        try:
            code = call(name)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        # The end of an interpreter, in its order.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - an interpreter's last resort
        traceback.print_exception(error)
    finally:
        os._exit(code)


def finish(
    name: str, folder: Path, log: Path, *, imports: int | None = None
) -> tuple[int | None, str]:
    """Run a command to its end; return its exit code and what it said."""
    plan = Plan(str(folder / "out"), str(log), imports=imports)
    running = start(name, folder, plan, fresh=imports is not None)
    code = running.wait(time.perf_counter() + 300)
    if code is None:
        os.kill(running.pid, signal.SIGKILL)
        os.waitpid(running.pid, 0)
    running.sweep()
    return code, (folder.parent / f"{folder.name}.said").read_text(errors="replace")


# --- what is left ------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, Any]:
    """Every file of a run directory by name, records without the seconds that they hold."""
    return {
        path.relative_to(out).as_posix(): _content(path)
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> Any:
    """What has to be the same: all bytes but for seconds."""
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        # Rows of parallel checks come in any order.
        lines = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return sorted(json.dumps(line) for line in lines)
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        report = header.get("__metadata__", {}).pop("report", None)
        report = None if report is None else timeless(json.loads(report))
        if report is not None:
            report.pop("sha256", None)  # of the report, seconds and all, and the weights
        return header, report, data[8 + length :]
    return data


def timeless(value: Any) -> Any:
    """Leave out seconds, wherever a record holds them."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if "seconds" not in key}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def differences(out: Path, wanted: dict[str, Any]) -> list[str]:
    """What a run directory has that the reference has not, lacks, or has otherwise."""
    got = contents(out)
    return [
        *(f"missing {name}" for name in wanted.keys() - got.keys()),
        *(f"left over {name}" for name in got.keys() - wanted.keys()),
        *(
            f"other bytes {name}"
            for name in got.keys() & wanted.keys()
            if got[name] != wanted[name]
        ),
    ]


def units_done(out: Path) -> int:
    """How many layers, epochs and rows of checks are finished and kept."""
    if not out.is_dir():
        return 0
    from retrain.trainers.loop.checkpoints import read_checkpoint

    layers = sum(1 for path in out.rglob("layers/*.safetensors") if path.name[0] != ".")
    trained = [read_checkpoint(path) for path in out.rglob("checkpoint.pt")]
    epochs = sum(found.epochs for found in trained if found is not None)
    rows = 0
    for path in out.glob("rows/*.jsonl"):
        rows += sum(line.endswith("\n") for line in path.read_text().splitlines(keepends=True))
    return layers + epochs + rows


def units_written(log: Path) -> int:
    """How many layers, epochs and rows of checks a process finished, by its log of events."""
    count = 0
    for line in log.read_text().splitlines() if log.exists() else ():
        kind, _, path = line.partition("\t")
        place = Path(path)
        layer = place.parent.name == "layers" and place.suffix == ".safetensors"
        count += kind == "replace" and (layer or place.name == "checkpoint.pt")
        appended = place.parent.name == "rows" and place.suffix == ".jsonl"
        count += kind == "write" and appended
    return count


# --- the campaign ------------------------------------------------------------------------------


def campaign(name: str, out: Path, rows_file: Path, seed: int, share: float) -> None:
    """Kill one command again and again."""
    reference, wanted, events, seconds, imports = _reference(name, out)
    rows = read_rows(rows_file)
    cases = drawn(name, events, imports, seed, share)
    for number, case in enumerate(cases):
        if case.key in rows:
            continue
        folder = reference.with_name(f"{reference.name}-{number}")
        row = one(case, folder, out / "inputs", wanted, units_written(_log(reference)), seconds)
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["faults"]:
            print(f"{name}: {case}: {'; '.join(row['faults'])}", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{name}: {len(cases)} kills", flush=True)


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def _reference(name: str, out: Path) -> tuple[Path, dict[str, Any], list[str], float, int]:
    """Run a command twice without a kill; return what it leaves, its events, seconds, imports."""
    place = out / "".join(c if c.isalnum() else "-" for c in name)
    found, seconds = [], 0.0
    for again in (False, True):  # the second in a fresh interpreter
        folder = place.with_name(f"{place.name}-again") if again else place
        log = _log(folder)
        log.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out / "inputs", folder)
        started = time.perf_counter()
        code, said = finish(name, folder, log, imports=-1 if again else None)
        seconds = time.perf_counter() - started if not again else seconds
        if code not in (0, 1):
            raise SystemExit(f"kills: {name!r} ended with {code}: {said[-2000:]}")
        found.append(contents(folder / "out"))
    unlike = differences(folder / "out", found[0])
    if unlike:
        raise SystemExit(f"kills: {name!r} is not the same twice without a kill: {unlike}")
    shutil.rmtree(folder)
    lines = log.read_text().splitlines()
    imports = next(int(line.split("\t")[1]) for line in lines if line.startswith("imports"))
    events = [line for line in lines if not line.startswith("imports")]
    return place, found[0], events, seconds, imports


def drawn(name: str, events: list[str], imports: int, seed: int, share: float) -> list[Case]:
    """Draw the kills of one command."""
    chance = random.Random(f"{seed} {name}")
    places = []
    for number, line in enumerate(events):
        kind = line.partition("\t")[0]
        for when in ("before", "torn", "after") if kind == "write" else ("before", "after"):
            places.append(Case(name, f"{when} {kind}", event=number))
    if name != "trim":
        places = _spread(places, EVENTS, chance)
    cases = places + [
        Case(name, "import", imports=chance.randrange(imports)) for _ in range(IMPORTS)
    ]
    for whom, count in TIMED.items():
        if whom == "parent" or "jobs" in name:
            cases += [
                Case(name, whom, share=round(chance.uniform(0.05, 0.95), 3)) for _ in range(count)
            ]
    return cases if share == 1 else _spread(cases, max(1, round(share * len(cases))), chance)


def _spread(places: list[Case], count: int, chance: random.Random) -> list[Case]:
    """Choose so many, one of each equal stretch of the run."""
    if len(places) <= count:
        return places
    edges = [len(places) * i // count for i in range(count + 1)]
    return [places[chance.randrange(low, high)] for low, high in pairwise(edges)]


def one(
    case: Case, folder: Path, inputs: Path, wanted: dict[str, Any], units: int, seconds: float
) -> dict[str, Any]:
    """Kill, run again, compare; return the row."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder)
    log = _log(folder)
    log.unlink(missing_ok=True)
    when = case.kind.split()[0]
    plan = Plan(
        str(folder / "out"),
        str(log),
        event=case.event,
        when=when if case.event is not None else "before",
        imports=case.imports,
    )
    running = start(case.command, folder, plan, fresh=case.imports is not None)
    killed, code = False, None
    if case.share is None:
        code = running.wait(running.started + 300)
        killed = code == -signal.SIGKILL
    elif case.kind == "worker":
        killed, code = _kill_a_worker(running, case.share * seconds)
    else:
        code = running.wait(running.started + case.share * seconds)
        killed = code is None
        if case.kind == "group" and killed:
            os.killpg(running.pid, signal.SIGKILL)
        elif killed:
            os.kill(running.pid, signal.SIGKILL)
        if killed:
            os.waitpid(running.pid, 0)
    orphans = running.sweep()
    done = units_done(folder / "out")
    lost = units_written(log) - done  # renamed or appended after the event that is its last
    log.unlink(missing_ok=True)
    again, said = finish(case.command, folder, log)
    faults = differences(folder / "out", wanted) if again in (0, 1) else []
    if again not in (0, 1):
        faults = [f"the same command again ended with {again}: {said[-500:]}"]
    elif done + units_written(log) != units:
        faults.append(f"{done} of {units} were done, and {units_written(log)} were done again")
    log.unlink(missing_ok=True)
    return {
        **asdict(case),
        "key": case.key,
        "killed": killed,
        "code": code,
        "orphans": orphans,
        "done": done,
        "units": units,
        "in_hand": lost,
        "faults": faults,
    }


def _kill_a_worker(running: Running, delay: float) -> tuple[bool, int | None]:
    """Kill the first worker there is after some time, and wait for the command's own end."""
    code = running.wait(running.started + delay)
    while code is None:
        for pid in running.workers():
            with contextlib.suppress(OSError):
                if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return True, running.wait(time.perf_counter() + 300)
        code = running.wait(time.perf_counter() + 0.005)
    return False, code


# --- results -----------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read rows by case."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the line that a crash cut short
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


def table(rows: list[dict[str, Any]]) -> int:
    """Print kills by command and kind, and the faults; return 1 if there are any."""
    order = ["before", "torn", "after", "import", "parent", "group", "worker"]
    kinds: Callable[[dict[str, Any]], str] = lambda row: row["kind"].split()[0]  # noqa: E731
    print(f"{'command':20}" + "".join(f"{kind:>8}" for kind in order) + "   kills  faults")
    for name in [*COMMANDS, "all"]:
        mine = [row for row in rows if name in ("all", row["command"])]
        if not mine:
            continue
        counts = Counter(kinds(row) for row in mine if row["killed"])
        faults = sum(bool(row["faults"]) for row in mine)
        cells = "".join(f"{counts[kind]:8}" for kind in order)
        print(f"{name:20}{cells}{sum(counts.values()):8}{faults:8}")
    whats = Counter(row["kind"].split()[1] for row in rows if " " in row["kind"] and row["killed"])
    print("events: " + ", ".join(f"{kind} {count}" for kind, count in sorted(whats.items())))
    late = sum(not row["killed"] for row in rows)
    if late:
        print(f"{late} commands had ended before their kill; they are not counted")
    for row in rows:
        for fault in row["faults"]:
            print(f"{row['command']}, {row['kind']} {row['event']}: {fault}")
    return int(any(row["faults"] for row in rows))
