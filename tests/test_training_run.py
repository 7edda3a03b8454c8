"""Training runs: the plain loop, resumed bitwise, saved plain, every mishap named and survived."""

import copy
import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from command import command, start
from torch import nn
from torch.nn import functional
from training_cases import (
    Stopped,
    assert_resumes,
    same_runs,
    samples,
    save_data,
    stop_after,
    tables,
    timeless,
    toml,
)

import retrain
from retrain.runs.directory import read_record
from retrain.trainers.loop.checkpoints import read_checkpoint, write_checkpoint
from retrain.trainers.loop.states import seeded


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plain_training_is_the_loop_people_write(folder):
    """Not one of this package's loops: torch alone, seeded as the recipe says."""
    x, y = samples(120, 1)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    with seeded(5, torch.device("cpu")):
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(12, 16),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(16, 8),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Linear(8, 4),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        order = torch.Generator().manual_seed(5)
        losses = []
        for _ in range(6):
            total = 0.0
            for rows in torch.randperm(120, generator=order).split(16):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            schedule.step()
            losses.append(total / 120)
    run = retrain.train(tables())
    assert [line["loss"] for line in run.history] == losses
    assert run.model.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name]), name
    model.eval()
    right = (
        model(torch.from_numpy(samples(60, 2)[0])).argmax(1).numpy() == samples(60, 2)[1]
    ).mean()
    assert run.test_accuracy == pytest.approx(right)


def test_global_generators_stay(folder):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    retrain.train(tables(training={"epochs": 1}))
    assert torch.equal(before, torch.get_rng_state())


CASES = {
    "momentum, dropout, cosine": {},
    "adam, milestones": {
        "optimizer": {"name": "adam", "lr": 0.01, "momentum": None},
        "schedule": {"name": "multistep", "epochs": [2, 4], "factor": 0.1},
    },
    "bfloat16, inverse": {
        "training": {"precision": "bfloat16"},
        "schedule": {"name": "inverse", "decay": 0.1},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_it_is_the_same_run(folder, case):
    recipe = tables(**CASES[case])
    recipe = {t: {k: v for k, v in e.items() if v is not None} for t, e in recipe.items()}
    run = assert_resumes(recipe, folder)
    assert len(run.history) == 6
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def images(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 4),
    )


def test_batch_norm_and_augmented_images_resume_too(tmp_path, monkeypatch):
    save_data(tmp_path, shape=(1, 9, 9))
    monkeypatch.chdir(tmp_path)
    recipe = tables(data={"augment": "flip-crop"}, training={"epochs": 3})
    recipe["model"] = {"factory": "test_training_run:images", "width": 5}
    assert_resumes(recipe, tmp_path, after=(1, 2))
    other = copy.deepcopy(recipe)
    del other["data"]["augment"]
    with pytest.raises(ValueError, match=r"out: .* belongs to another run \(augment was \"flip-cr"):
        retrain.train(other, out=tmp_path / "parts")


DENSE = {"architecture": "dense", "widths": [12, 16, 8, 4]}
ADAM = {"name": "adam", "lr": 0.01}
METHODS = {
    "plain": tables(training={"epochs": 25}),
    "gates": {
        **tables(training={"epochs": 25}),
        "model": {"architecture": "gated-dense", "layers": 5, "inputs": 12, "width": 8},
        "optimizer": ADAM,
        "method": {"name": "gates", "log_gamma": -20, "theta_rate": 0.03, "fine_tune_epochs": 5},
    },
    "itp": {
        **tables(training={"epochs": 25}, optimizer=ADAM),
        "model": DENSE,
        "optimizer": ADAM,
        "method": {"name": "itp", "descent": "multi-gradient", "threshold": 0.01},
    },
    "shrinknets": {
        **tables(training={"epochs": 25}),
        "model": DENSE,
        "optimizer": ADAM,
        "method": {"name": "shrinknets", "strength": 0.1, "inertia": 0.8},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(folder, method):
    (folder / "r.toml").write_text(toml(METHODS[method]))
    call = ("train", "r.toml", "--quiet", "--threads", "1", "--out")
    command(folder, "train", "--list")  # what is timed shall not wait for the first import
    started = time.perf_counter()
    answer = command(folder, *call, "whole")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    seconds = time.perf_counter() - started
    chance, cut, epochs = random.Random(3), 0, 0
    for _ in range(3):
        running = start(folder, *call, "parts")
        time.sleep(chance.uniform(0.3, 0.7) * seconds)
        cut += running.running
        running.kill()
        kept = folder / "parts" / "history.jsonl"
        now = len(kept.read_text().splitlines()) if kept.exists() else 0
        assert now >= epochs - 1, "epochs were lost"
        epochs = now
    assert cut >= 1, "no kill came before the end"
    assert command(folder, *call, "parts").code == 0
    same_runs(folder / "whole", folder / "parts")
    if method != "plain":
        shapes = [(line["parameters"], line["method"]) for line in retrain.load("whole").history]
        assert shapes[0] != shapes[-1], "nothing was pruned"


def test_a_finished_run_is_returned_as_it_is(folder):
    first = retrain.train(tables(), out="run")
    stamp = (folder / "run" / "model.safetensors").stat().st_mtime_ns
    lines = []
    again = retrain.train(tables(), out="run", on_epoch=lambda line, total: lines.append(line))
    assert (folder / "run" / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.record["test"] == first.record["test"]
    assert lines == first.history == again.history


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.seed": 6}, r"training.seed was 5, is 6"),
        ({"optimizer.lr": 0.2}, r"optimizer.options.lr was 0.1, is 0.2"),
        ({"data.limit": 100}, r"data.train was"),
        ({"model.dropout": 0.5}, r"model.options.dropout was 0.25, is 0.5"),
    ],
)
def test_another_recipe_does_not_get_the_directory(folder, changes, message):
    retrain.train(tables(), out="run")
    with pytest.raises(ValueError, match=message):
        retrain.train(tables(), out="run", changes=changes)


def test_a_training_that_diverges_says_so_and_keeps_what_it_had(folder):
    recipe = tables(schedule={"name": "step", "every": 2, "factor": 1e30})
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+ \(epoch \d\)"):
        retrain.train(recipe, out="run")
    kept = (folder / "run" / "checkpoint.pt").read_bytes()
    assert torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["epochs"] >= 1
    with pytest.raises(FloatingPointError, match=r"the checkpoint after epoch \d stays in run"):
        retrain.train(recipe, out="run")
    assert (folder / "run" / "checkpoint.pt").read_bytes() == kept
    (folder / "r.toml").write_text(toml(recipe))
    answer = command(folder, "train", "r.toml", "--threads", "1", "--quiet", "--out", "other")
    assert "the loss is" in answer.error()


def test_a_description_of_another_model_is_refused(folder):
    recipe = METHODS["gates"]
    with pytest.raises(Stopped):
        retrain.train(recipe, out="run", on_epoch=stop_after(2))
    path = folder / "run" / "checkpoint.pt"
    found = read_checkpoint(path)
    write_checkpoint(path, replace(found, description={}))
    with pytest.raises(ValueError, match=r"checkpoint: its description does not fit \(KeyError"):
        retrain.train(recipe, out="run")


def test_one_that_diverges_at_once_leaves_nothing(folder):
    with pytest.raises(FloatingPointError):
        retrain.train(tables(optimizer={"lr": 1e30}), out="run")
    assert not (folder / "run").exists()


@pytest.fixture
def stopped(folder):
    with pytest.raises(Stopped):
        retrain.train(tables(), out="run", on_epoch=stop_after(3))
    return folder / "run"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "a bit flipped":
        content[content.index(b"PK", 2) - 40] ^= 1
    elif how == "empty":
        content.clear()
    else:
        content = bytearray(b"not a checkpoint at all")
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "empty", "something else"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(stopped, how):
    content = damage(stopped / "checkpoint.pt", how)
    history = (stopped / "history.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"checkpoint.pt is damaged \(.*\); delete it, and the sam"
    ):
        retrain.train(tables(), out=stopped)
    assert (stopped / "checkpoint.pt").read_bytes() == content
    assert (stopped / "history.jsonl").read_bytes() == history
    (stopped / "checkpoint.pt").unlink()
    retrain.train(tables(), out=stopped)
    retrain.train(tables(), out=stopped.parent / "whole")
    same_runs(stopped, stopped.parent / "whole")


def test_a_write_that_is_cut_off_leaves_the_checkpoint_before(stopped, monkeypatch):
    """Killed between writing beside and moving there: a temporary file, swept away later."""
    kept = (stopped / "checkpoint.pt").read_bytes()
    (stopped / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    (stopped / ".history.jsonl.123.tmp").write_bytes(b"half")
    with pytest.raises(Stopped):
        retrain.train(tables(), out=stopped, on_epoch=stop_after(3))
    assert (stopped / "checkpoint.pt").read_bytes() == kept
    retrain.train(tables(), out=stopped)
    assert {path.name for path in stopped.iterdir()} == {
        "lock",
        "run.json",
        "history.jsonl",
        "checkpoint.pt",
        "model.safetensors",
    }


def test_a_line_more_than_the_checkpoint_is_dropped(stopped):
    path = stopped / "history.jsonl"
    with path.open("a") as file:
        file.write('{"epoch": 4, "loss": 99}\n{"epo')
    run = retrain.train(tables(), out=stopped)
    assert [line["epoch"] for line in run.history] == [1, 2, 3, 4, 5, 6]
    assert run.history[3]["loss"] != 99


def test_a_history_with_lines_missing_is_named(stopped):
    path = stopped / "history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match=r"history.jsonl is damaged: want a line for each of 3"):
        retrain.train(tables(), out=stopped)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"history.jsonl is damaged"):
        retrain.train(tables(), out=stopped)


def test_what_cannot_be_trained_is_refused_before_a_directory_is_made(folder):
    x = np.zeros((8, 12), np.float32)
    cases = [
        (tables(), {"data": x}, r"has no labels to train on"),
        (tables(), {"data": (x, np.full(8, 0.5))}, r"wants a class number for each sample"),
        (tables(), {"data": (x, np.full(8, 4))}, r"outputs of shape \(4,\), but the labels are 4"),
        (tables(), {"data": (x, np.full(8, -1))}, r"the labels are -1 to -1"),
        (
            tables(),
            {"data": (x[:, :5], np.zeros(8, int))},
            r"does not take samples of shape \(5,\)",
        ),
        (tables(), {"test": (x[:, :5], np.zeros(8, int))}, r"the test samples have shape \(5,\)"),
        (
            tables(training={"loss": "mse"}),
            {"data": (x, np.zeros((8, 3)))},
            r"targets are of shape",
        ),
        (tables(model={"widths": [12]}), {}, r"\[model\] widths: .*want two or more"),
        (tables(model={"widths": ["a", 4]}), {}, r"\[model\] widths: .*want two or more"),
        (tables(optimizer={"lr": -1}), {}, r"\[optimizer\] .*learning rate"),
        (tables(optimizer={"lr": "fast"}), {}, r"\[optimizer\] "),
        (tables(optimizer={"speed": 1}), {}, r"\[optimizer\] .*speed"),
        (
            tables(schedule={"epochs": 0}),
            {},
            r"\[schedule\] epochs: got 0, want",
        ),
        (tables(schedule={"length": 0}), {}, r"\[schedule\] .*length"),
        (tables(data={"train": None}), {}, r"\[data\] lacks train"),
        (tables(data={"train": "absent.npz"}), {}, r"no file 'absent.npz'"),
        (tables(training={"device": "cuda:9"}), {}, r"device: cannot compute on 'cuda:9'"),
        (tables(training={"device": "gpu"}), {}, r"device: cannot compute on 'gpu'"),
        (tables(data={"augment": "flip-crop"}), {}, r"augment: flip-crop wants images"),
    ]
    for recipe, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            retrain.train(recipe, out="run", **options)
        assert not (folder / "run").exists(), message


def test_no_epochs_give_the_network_as_it_was_made(folder):
    run = retrain.train(tables(training={"epochs": 0}), out="run")
    assert run.history == retrain.load("run").history == []
    assert run.record["load"] == run.record["seconds"] == 0
    other = retrain.train(tables(training={"epochs": 0, "seed": 6}))
    assert not torch.equal(run.model[1].weight, other.model[1].weight)


def test_regression_has_no_accuracy(folder):
    x, _ = samples(50, 3)
    targets = np.stack([x[:, 0], x[:, 1] + x[:, 2]], 1)
    recipe = tables(model={"widths": [12, 8, 2]}, training={"loss": "mse"}, optimizer={"lr": 0.01})
    run = retrain.train(recipe, data=(x, targets), test=(x, targets))
    assert run.history[-1]["accuracy"] is run.test_accuracy is None
    assert run.history[-1]["test_loss"] < run.history[0]["test_loss"]
    assert run.record["test"]["loss"] == pytest.approx(
        float(np.mean((run.model(torch.from_numpy(x)).detach().numpy() - targets) ** 2))
    )


def test_what_is_saved_is_loaded_and_exported_without_trainers(folder):
    run = retrain.train(tables(), out="run", export=True)
    x = torch.from_numpy(samples(7, 9)[0])
    wanted = run.model(x)
    loaded = retrain.load("run")
    assert torch.equal(loaded.model(x), wanted)
    assert timeless(loaded.record) == timeless(json.loads((folder / "run/run.json").read_text()))
    program = torch.export.load("run/model.pt2").module()
    torch.testing.assert_close(program(x), wanted)
    torch.testing.assert_close(program(x[:1]), wanted[:1])
    (folder / "run/model.pt2").unlink()
    retrain.train(tables(), out="run", export=True)  # asked for later
    assert (folder / "run/model.pt2").exists()
    code = (
        "import sys, retrain; retrain.load('run'); "
        "sys.exit(any(name.startswith('retrain.trainers') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Own(nn.Module):
    """A module that JSON cannot describe."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x):
        return self.layer(x) * 2


def test_a_module_of_the_users_own_is_loaded_into_its_architecture(folder):
    recipe = tables()
    recipe["model"] = {"factory": "test_training_run:Own"}
    run = retrain.train(recipe, out="run")
    assert "Own" in run.record["model"]["reason"]
    with pytest.raises(ValueError, match=r"could not describe its network \(the model \(Own\)"):
        retrain.load("run")
    x = torch.zeros(2, 12)
    assert torch.equal(retrain.load("run", Own()).model(x), run.model(x))
    assert torch.equal(retrain.train(recipe, out="run").model(x), run.model(x))


def test_loading_what_is_not_there_or_not_whole(folder, stopped):
    with pytest.raises(ValueError, match="is not finished; repeat its command"):
        retrain.load(stopped)
    retrain.train(tables(), out=stopped)
    record = read_record(stopped)
    (stopped / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "model"}))
    with pytest.raises(ValueError, match=r"run.json: lacks `model`; repeat its command"):
        retrain.load(stopped)
    (stopped / "model.safetensors").unlink()
    (stopped / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        retrain.load(stopped)
