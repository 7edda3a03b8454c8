"""`retrain train` as a person meets it."""

import json
import subprocess
import sys
import time

import pytest
from command import command, start
from training_cases import save_data, tables, toml

from retrain.trainers.recipes.recipe import built_in


@pytest.fixture
def folder(tmp_path):
    save_data(tmp_path)
    (tmp_path / "r.toml").write_text(toml(tables()))
    return tmp_path


def run(folder, *arguments):
    return command(folder, "train", *arguments, "--threads", "1")


def test_it_trains_says_how_and_leaves_a_run(folder):
    answer = run(folder, "r.toml", "--out", "run", "--export")
    assert answer.code == 0
    lines = answer.err.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("epoch 1/6: loss ")
    assert ", test " in lines[0]
    assert "380 parameters" in lines[0]
    assert "training data (120 samples): accuracy " in answer.out
    assert "380 of 380 parameters left (pPR 0.00 %)" in answer.out
    assert "100.0 % of the dense network's" in answer.out
    assert answer.out.endswith("written to run\n")
    history = (folder / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2, 3, 4, 5, 6]
    assert (folder / "run" / "model.pt2").exists()


def test_json_and_quiet(folder):
    answer = run(folder, "r.toml", "--out", "run", "--json", "--epochs", "2", "--seed", "3")
    record = json.loads(answer.out)
    assert (answer.code, answer.err) == (0, "")
    assert {"format": 1, **record} == json.loads((folder / "run" / "run.json").read_text())
    assert record["identity"]["training"]["seed"] == 3
    assert record["epochs"] == 2
    answer = run(folder, "r.toml", "--out", "other", "--quiet", "--set", "training.epochs=1")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_the_options_change_the_recipe(folder):
    changes = ("--set", "optimizer.lr=0.01", "--set", "schedule.name=exponential")
    more = ("--set", "schedule.factor=0.5", "--limit", "40", "--evaluate", "train.npz")
    answer = run(folder, "r.toml", "--out", "run", "--json", "--epochs", "1", *changes, *more)
    record = json.loads(answer.out)
    assert record["identity"]["optimizer"]["options"] == {"lr": 0.01, "momentum": 0.9}
    assert record["identity"]["schedule"] == {"name": "exponential", "options": {"factor": 0.5}}
    assert (record["train"]["samples"], record["test"]["samples"]) == (40, 120)


def test_the_list(folder):
    answer = run(folder, "--list")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines() == [f"{name}: {title}" for name, title in built_in().items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "recipe: is missing"),
        (("r.toml",), "--out: is missing"),
        (("absent", "--out", "x"), "recipe: there is no file 'absent'; built in are"),
        (("r.toml", "--out", "x", "--set", "a"), "--set: got 'a', want TABLE.KEY=VALUE"),
        (("r.toml", "--out", "x", "--set", "a=1"), "recipe r.toml: 'a': want TABLE.KEY"),
        (("r.toml", "--out", "x", "--epochs", "-1"), "epochs: got -1, want a whole number >= 0"),
        (("r.toml", "--out", "x", "--data", "no.npz"), "no file 'no.npz'"),
        (("r.toml", "--out", "r.toml"), "out: 'r.toml' is a file"),
        (("r.toml", "--out", "x", "--device", "cuda:77"), "device: cannot compute on 'cuda:77'"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message):
    answer = run(folder, *arguments)
    assert message in answer.error()
    assert not (folder / "x").exists()


def test_interrupted_it_says_so_and_resumes(folder):
    (folder / "long.toml").write_text(toml(tables(training={"epochs": 2000})))
    running = start(folder, "train", "long.toml", "--out", "run", "--threads", "1")
    while not (folder / "run" / "checkpoint.pt").exists():
        assert running.running, running.read()
        time.sleep(0.05)
    running.interrupt()
    answer = running.wait()
    assert answer.code == 130
    assert "interrupted; the same command resumes" in answer.err
    again = start(folder, "train", "long.toml", "--out", "run", "--threads", "1")
    epochs = len((folder / "run" / "history.jsonl").read_text().splitlines())
    while len(again.read().err.splitlines()) < epochs:
        assert again.running, again.read()
        time.sleep(0.05)
    busy = run(folder, "long.toml", "--out", "run")
    assert "is in use by another process" in busy.error()
    again.kill()


@pytest.mark.parametrize("argument", ["--help", "--list"])
def test_help_and_list_import_no_torch(argument):
    code = f"""
import contextlib, sys
from retrain.cli import main
with contextlib.suppress(SystemExit):
    main(["train", "{argument}"])
assert not {{"torch", "numba", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_finished_run_is_a_model_of_the_other_commands(folder):
    recipe = tables(data={"normalise": "0.1,2"}, model={"dropout": 0.0}, training={"epochs": 2})
    (folder / "r.toml").write_text(toml(recipe))
    assert run(folder, "r.toml", "--out", "run").code == 0
    trim = ("trim", "run", "--data", "train.npz", "--out", "trimmed", "--threads", "1")
    answer = command(folder, *trim)
    assert answer.code == 0
    assert "read from the run run, which trained with --normalise 0.1,2" in answer.out
    other = ("trim", "trimmed", "--data", "train.npz", "--out", "again", "--normalise", "0.1,2")
    answer = command(folder, *other, "--threads", "1")
    assert answer.code == 0
    assert "read from the run trimmed\n" in answer.out
    record = json.loads((folder / "again" / "run.json").read_text())
    before = json.loads((folder / "trimmed" / "run.json").read_text())
    assert record["layers"][0]["zeros_before"] == before["layers"][0]["zeros"] > 0
    assert command(folder, "layers", "run").out.startswith("read from the run run")


def test_a_run_that_is_not_finished_is_no_model(folder):
    (folder / "run").mkdir()
    record = {"format": 1, "state": "running", "kind": "training"}
    (folder / "run" / "run.json").write_text(json.dumps(record))
    answer = command(folder, "trim", "run", "--data", "train.npz", "--out", "out")
    assert (answer.code, answer.out) == (2, "")
    assert "'run' is not finished" in answer.err
