"""A killed command takes everything along that it started, and leaves nothing in shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from command import start
from small_case import network, samples
from torchrun import HERE
from training_cases import save_data, tables, toml

from solvers.workers import workers

SECONDS = 10
WIDTHS = (100, 80, 80, 80, 80, 80, 10)
COMMON = ("net.pth", "--data", "data.npz", "--jobs", "2", "--quiet", "--out")
HARD = (
    "--scheme",
    "parallel",
    "--gap",
    "1e-6",
    "--violation",
    "1e-6",
    "--max-iterations",
    "200000",
)
COMMANDS = {
    "trim": ("trim", *COMMON, "out", *HARD),
    "lobs": ("lobs", *COMMON, "out", "--sparsity", "0.5", "--method", "best"),
    "verify": ("verify", "net-trim", "--full", "--jobs", "2", "--quiet"),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A network whose layers take the workers longer than the test, and arrays over 1 MB."""
    folder = tmp_path_factory.mktemp("workers")
    torch.save(network(WIDTHS).state_dict(), folder / "net.pth")
    x, y = samples(6000, WIDTHS[0], WIDTHS[-1])
    np.savez(folder / "data.npz", x=x, y=y)
    return folder


def loky_workers(running):
    found = []
    for pid in set(running.group()) - {running.process.pid}:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"LokyProcess" in line:
            found.append(pid)
    return found


def shared_memory(pid):
    """Names in shared memory that bear a process number."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if f"-{pid}-" in name or f"_{pid}_" in name}


def assert_ends(alive, seconds=SECONDS):
    """`alive` returns what has not ended."""
    until = time.monotonic() + seconds
    while alive():
        assert time.monotonic() < until, f"alive after {seconds} s: {alive()}"
        time.sleep(0.05)


# How long after its first worker has been started a command is killed: while that is not even an
# interpreter, while it imports, while it works.
@pytest.mark.parametrize(
    ("name", "after"),
    [*(("trim", after) for after in (0.0, 0.3, 1.0, 4.0)), ("lobs", 0.5), ("verify", 2.0)],
)
def test_workers_end_with_a_killed_command(case, name, after, tmp_path):
    for file in ("net.pth", "data.npz"):
        (tmp_path / file).symlink_to(case / file)
    before = {path.name for path in Path("/dev/shm").iterdir()}
    running = start(tmp_path, *COMMANDS[name])
    until = time.monotonic() + 60
    while not loky_workers(running):
        assert running.running and time.monotonic() < until
        time.sleep(0.005)
    time.sleep(after)
    assert running.running, "it was done before it could be killed"
    try:
        running.kill()
        assert_ends(running.group)
    finally:
        running.sweep()
    # A name that was there before is of another process, which had the same number.
    assert shared_memory(running.process.pid) <= before


def test_the_check_can_fail(case, tmp_path):
    """Without the watch, workers are still there."""
    running = start(case, *COMMANDS["trim"][:-1], "200000", prepare=watch_nothing)
    while not loky_workers(running):
        assert running.running
        time.sleep(0.005)
    time.sleep(2)
    running.kill()
    time.sleep(3)
    left = loky_workers(running)
    running.sweep()
    assert left


def watch_nothing():
    import retrain.methods.pool as pool

    pool.workers = lambda jobs, **options: joblib.Parallel(n_jobs=jobs, **options)


LOADER = """
import sys, time
import torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 10_000
    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.zeros(16), 0

if __name__ == "__main__":
    import retrain
    from small_case import network
    print("begun", flush=True)
    retrain.net_trim(network(), DataLoader(Slow(), batch_size=8, num_workers=2))
"""


def descendants(pid):
    """Children of a process that are alive, and theirs; torchrun's have sessions of their own."""
    alive = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                alive[int(entry.name)] = int(fields[1])
    found, among = set(), {pid}
    while among:
        among = {child for child, parent in alive.items() if parent in among}
        found |= among
    return found, set(alive)


def launch(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_with(process, wanted):
    """Kill a process when it has so many children, and see them end."""
    found = set()
    try:
        until = time.monotonic() + 60
        while len(descendants(process.pid)[0]) < wanted:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        time.sleep(1)
        assert process.poll() is None
        found = descendants(process.pid)[0]
        process.kill()
        process.wait()
        assert_ends(lambda: found & descendants(process.pid)[1])
    finally:
        process.kill()
        for pid in found & descendants(process.pid)[1]:
            os.kill(pid, signal.SIGKILL)


def test_a_loaders_workers_end_too(tmp_path):
    (tmp_path / "loader.py").write_text(LOADER)
    kill_with(launch(tmp_path, "loader.py"), wanted=2)


def test_what_torchrun_started_ends_with_it(tmp_path):
    save_data(tmp_path)
    (tmp_path / "r.toml").write_text(toml(tables(training={"epochs": 100_000})))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "retrain", "train", "r.toml", "--out", "out", "--threads", "1"]
    process = launch(tmp_path, *torchrun, *command)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "out" / "history.jsonl").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    except AssertionError:
        process.kill()
        raise
    kill_with(process, wanted=2)


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_every_backend_works(backend):
    with joblib.parallel_config(backend=backend):
        for jobs in (1, 2):
            assert workers(jobs)(joblib.delayed(abs)(-i) for i in range(4)) == [0, 1, 2, 3]
