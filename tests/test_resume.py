"""Runs that are killed, interrupted, stopped by a full disk: the same command ends the same."""

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import command, start
from safetensors.torch import save_file
from small_case import network, samples, save_case

from retrain.runs.directory import read_record

DEEP = (24, 24, 24, 24, 24, 24, 10)
SCHEMES = {"one job": ("--scheme", "cascade"), "two jobs": ("--scheme", "parallel", "--jobs", "2")}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_case(folder, DEEP, rows=120)
    return folder


def arguments(jobs, out):
    common = (
        "--gap",
        "1e-3",
        "--violation",
        "1e-3",
        "--max-iterations",
        "20000",
        "--quiet",
        "--out",
        out,
    )
    return ("trim", "net.pth", "--data", "data.npz", *SCHEMES[jobs], *common)


@pytest.fixture(scope="module")
def whole(case):
    """Bytes of an uninterrupted run and its seconds, by the number of jobs."""
    command(case, "layers", "net.pth")  # so that what is timed does not wait for the first import
    runs = {}
    for jobs in SCHEMES:
        out = case / f"whole {jobs}"
        started = time.perf_counter()
        answer = command(case, *arguments(jobs, out))
        assert (answer.code, answer.err) == (0, "")
        seconds = time.perf_counter() - started
        runs[jobs] = ((out / "model.safetensors").read_bytes(), seconds)
    return runs


def finished_layers(out):
    return {path.name for path in (out / "layers").glob("0*.safetensors")}


@pytest.mark.parametrize("jobs", SCHEMES)
def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(case, whole, jobs, tmp_path):
    """One run, killed again and again on its way; what it had finished it never loses."""
    expected, seconds = whole[jobs]
    chance = random.Random(7)
    out, seen, cut = tmp_path / "out", set(), 0
    for _ in range(10):
        running = start(case, *arguments(jobs, out))
        time.sleep(chance.uniform(0.1, 0.8) * seconds)
        cut += running.running
        running.kill()
        orphans = running.group()
        left = finished_layers(out) if out.exists() else set()
        assert seen <= left
        if orphans:
            time.sleep(0.1)
            assert finished_layers(out) == left, "a worker wrote after its parent's death"
        running.sweep()
        seen = left
        if (out / "run.json").exists() and read_record(out)["state"] == "finished":
            (out / "run.json").unlink()  # it was too fast: begin again
            for path in (out / "layers").iterdir():
                path.unlink()
            (out / "model.safetensors").unlink(missing_ok=True)
            seen = set()
    assert cut >= 5, "hardly a kill came before the end"
    answer = command(case, *arguments(jobs, out))
    assert (answer.code, answer.err) == (0, "")
    assert (out / "model.safetensors").read_bytes() == expected
    names = {path.name for path in out.rglob("*")}
    assert not {name for name in names if name.endswith(".tmp")}


def test_killed_between_layers_it_does_only_the_rest(case, whole, tmp_path):
    """Killed as soon as a layer's file is there; that file is not written again."""
    expected, _ = whole["one job"]
    out = tmp_path / "out"
    running = start(case, *arguments("one job", out))
    first = out / "layers" / "000.safetensors"
    while not first.exists():
        assert running.running
        time.sleep(0.002)
    running.kill()
    stamp = first.stat().st_mtime_ns
    stale = out / "layers" / ".001.safetensors.4711.tmp"
    stale.write_bytes(b"half a layer")
    (out / ".model.safetensors.4711.tmp").write_bytes(b"half a network")
    mine = out / ".notes.tmp"
    mine.write_text("kept")
    answer = command(case, *arguments("one job", out))
    assert (answer.code, answer.err) == (0, "")
    assert first.stat().st_mtime_ns == stamp
    assert not stale.exists()
    assert mine.read_text() == "kept"
    assert (out / "model.safetensors").read_bytes() == expected


def test_killed_while_writing_its_first_record_the_directory_is_free(case, tmp_path):
    out = tmp_path / "out"
    (out / "layers").mkdir(parents=True)
    (out / "lock").touch()
    (out / ".run.json.4711.tmp").write_text("{")
    answer = command(case, *arguments("one job", out), "--layers", "0")
    assert (answer.code, answer.err) == (0, "")
    assert not (out / ".run.json.4711.tmp").exists()


@pytest.mark.parametrize("jobs", SCHEMES)
def test_ctrl_c_is_one_line_and_the_same_command_resumes(case, whole, jobs, tmp_path):
    expected, seconds = whole[jobs]
    for share in (0.4, 0.2, 0.1) if jobs == "two jobs" else (0.0,):
        out = tmp_path / f"out-{share}"
        running = start(case, *arguments(jobs, out))
        while not (out / "run.json").exists():
            assert running.running
            time.sleep(0.002)
        time.sleep(share * seconds)
        running.interrupt()
        answer = running.wait()
        running.sweep()
        # Finished already: the machine is less busy now than when the seconds were taken.
        if not (out / "model.safetensors").exists():
            break
    assert answer.code == 130, answer
    assert answer.err == "retrain: interrupted; the same command resumes\n"
    assert answer.out == ""
    answer = command(case, *arguments(jobs, out))
    assert (answer.code, answer.err) == (0, "")
    assert (out / "model.safetensors").read_bytes() == expected


def test_a_directory_in_use_refuses_until_its_process_is_gone(case, tmp_path):
    out = tmp_path / "out"
    running = start(case, *arguments("one job", out))
    while not (out / "run.json").exists():
        assert running.running
        time.sleep(0.002)
    refused = command(case, *arguments("one job", out))
    alive = running.running
    running.kill()
    if alive:
        assert "is in use by another process" in refused.error()
    assert command(case, *arguments("one job", out)).code == 0


@pytest.fixture(scope="module")
def begun(case):
    """A run of two layers of six, and how to say it again with something else."""
    out = case / "begun"
    assert command(case, *arguments("one job", out), "--layers", "0,2").code == 0
    changed = network(DEEP, seed=5).state_dict()
    save_file(changed, case / "other.safetensors")
    x, y = samples(120, DEEP[0], DEEP[-1], seed=9)
    np.savez(case / "other.npz", x=x, y=y)
    torch.save(network(DEEP).state_dict(), case / "again.pth")
    return out


CHANGES = {
    "weights": ({"model": "other.safetensors"}, (), "network and data was"),
    "data": ({"data": "other.npz"}, (), "network and data was"),
    "fewer data": ({}, ("--limit", "90"), "network and data was"),
    "activation": ({}, ("--activation", "tanh"), "network and data was"),
    "epsilon": ({}, ("--relative-epsilon", "0.1"), "relative_epsilon was 0.05, is 0.1"),
    "penalty": ({}, ("--penalty", "elastic:0.1"), "options.penalty"),
    "threads": ({}, ("--threads", "1"), "options.threads was"),
    "layers": ({}, ("--layers", "0"), "layers was"),
    "fine-tune": ({}, ("--fine-tune", "1"), "fine_tune was 0, is 1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_command_refuses_with_the_way_out(case, begun, name):
    files, options, said = CHANGES[name]
    model, data = files.get("model", "net.pth"), files.get("data", "data.npz")
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    common = arguments("one job", begun)[4:]
    layers = () if "--layers" in options else ("--layers", "0,2")
    answer = command(case, "trim", model, "--data", data, *common, *layers, *options)
    line = answer.error()
    assert "belongs to another run" in line
    assert said in line
    assert "repeat that run's command to resume it, or choose another directory" in line
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_the_same_network_and_data_from_elsewhere_are_the_same_run(case, begun):
    """The files' names are not in the fingerprint, what they hold is."""
    expected = (begun / "model.safetensors").read_bytes()
    common = arguments("one job", begun)[2:]
    answer = command(case, "trim", "again.pth", *common, "--layers", "0,2")
    assert (answer.code, answer.err) == (0, "")
    assert (begun / "model.safetensors").read_bytes() == expected


def limit_files():
    """No file beyond 16 KiB, which the first records keep to and a wide layer does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))


def test_a_file_too_large_is_one_line_and_the_directory_is_free(tmp_path):
    save_case(tmp_path, (120, 60, 6), rows=40)
    options = ("trim", "net.pth", "--data", "data.npz", "--quiet", "--out")
    answer = command(tmp_path, *options, "out", prepare=limit_files)
    assert "File too large" in answer.error()
    assert "000.safetensors" in answer.error()
    assert not (tmp_path / "out").exists()
    assert command(tmp_path, *options, "out").code == 0
    assert command(tmp_path, *options, "again").code == 0
    networks = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert networks[0] == networks[1]


def fill_the_disk_after_two_layers():
    """From the third layer's file on, fsync says that the disk is full."""
    fsync = os.fsync

    def full(handle):
        name = str(Path(f"/proc/self/fd/{handle}").readlink())
        if ".002.safetensors" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = full


def test_a_full_disk_keeps_finished_layers_and_resumes(case, whole, tmp_path):
    out = tmp_path / "out"
    answer = command(case, *arguments("one job", out), prepare=fill_the_disk_after_two_layers)
    line = answer.error()
    assert "No space left on device" in line
    assert "finished layers are kept, and the same command resumes" in line
    assert finished_layers(out) == {"000.safetensors", "001.safetensors"}
    assert sorted(path.name for path in (out / "layers").iterdir()) == sorted(finished_layers(out))
    assert command(case, *arguments("one job", out)).code == 0
    assert (out / "model.safetensors").read_bytes() == whole["one job"][0]


def test_a_worker_that_is_killed_is_one_line(case, tmp_path):
    """As the system does when memory runs out."""
    out = tmp_path / "out"
    running = start(case, *arguments("two jobs", out))
    killed = False
    while running.running and not killed:
        for pid in set(running.group()) - {running.process.pid}:
            try:
                worker = b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if worker:
                os.kill(pid, signal.SIGKILL)
                killed = True
                break
        time.sleep(0.01)
    answer = running.wait()
    running.sweep()
    assert killed
    assert "a worker ended before its time" in answer.error()
    assert command(case, *arguments("two jobs", out)).code == 0
