"""Knee searches with real trainings: directories, resuming after SIGKILL, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from retrain.runs.knee_search import search_knee, trainer
from retrain.runs.training import run_training
from retrain.trainers.itp.objectives import convex_weight
from retrain.trainers.itp.search import bisection, fixed_list, stochastic_dichotomic
from retrain.trainers.recipes.recipe import built_in, parse_recipe, read_recipe

INTERVAL = (1e-5, 0.025)


def recipe(**changes):
    tables = {
        "data": {"train": "digits", "test": "digits-test", "limit": 256},
        "model": {"architecture": "dense", "widths": [64, 12, 10]},
        "training": {"epochs": 4, "batch_size": 8},
        "optimizer": {"name": "adam", "lr": 0.02},
        "method": {"name": "itp", "trade_off": 0.0, "threshold": 0.01},
    }
    return parse_recipe(tables).changed(changes)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A search that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight")
    strategy = partial(bisection, interval=INTERVAL, levels=4, budget=6)
    return search_knee(recipe(), out, strategy, epochs=2), out


def test_a_search_trains_in_directories_and_fully_at_the_knees(straight):
    found, out = straight
    assert len(found.outcomes) == 6
    assert files(out / "trials") == sorted(repr(o.weight) for o in found.outcomes)
    record = json.loads((out / "search.json").read_text())
    assert [o["weight"] for o in record["outcomes"]] == [o.weight for o in found.outcomes]
    for outcome in found.outcomes:
        run = json.loads((out / "trials" / repr(outcome.weight) / "run.json").read_text())
        assert run["epochs"] == 2 and run["train"]["loss"] == outcome.loss
        trade_off = run["recipe"]["method"]["trade_off"]
        assert convex_weight(trade_off) == pytest.approx(outcome.weight, rel=1e-12)
    knees = {k.outcome.weight for k in (found.by_trade_off, found.by_chord) if k.outcome}
    assert knees and knees == set(found.runs)
    assert all(run.record["epochs"] == 4 for run in found.runs.values())
    assert files(out / "knees") == sorted(map(repr, knees))


def test_a_finished_search_is_read_again(straight, monkeypatch):
    found, out = straight

    def forbidden(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("retrain.runs.training.fit", forbidden)
    strategy = partial(bisection, interval=INTERVAL, levels=4, budget=6)
    again = search_knee(recipe(), out, strategy, epochs=2)
    assert again.outcomes == found.outcomes and again.by_chord == found.by_chord


def test_parallel_trainings_are_the_same(straight, tmp_path):
    found, _ = straight
    strategy = partial(bisection, interval=INTERVAL, levels=3, budget=4)
    parallel = search_knee(recipe(), tmp_path, strategy, epochs=2, jobs=2)
    assert parallel.outcomes == found.outcomes[:4]


SCRIPT = """
import sys
from functools import partial
import numpy as np
from retrain.runs.knee_search import search_knee
from retrain.trainers.itp.search import stochastic_dichotomic
sys.path.insert(0, {tests!r})
from test_itp_runs import INTERVAL, recipe
strategy = partial(stochastic_dichotomic, interval=INTERVAL, levels=3, budget=6,
                   rng=np.random.default_rng(3))
search_knee(recipe(**{{"training.epochs": {epochs}}}), sys.argv[1], strategy, epochs={epochs})
"""


def killed(script, out, condition):
    """Run a script until a condition holds, and kill it: there is no time to tidy up."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_search_goes_on_to_the_same(tmp_path):
    epochs = 3
    script = SCRIPT.format(tests=str(Path(__file__).parent), epochs=epochs)
    out, other = tmp_path / "killed", tmp_path / "straight"
    trials = out / "trials"

    def third_has_begun():
        return trials.is_dir() and len(list(trials.glob("*/checkpoint.pt"))) >= 3

    killed(script, out, third_has_begun)
    assert not (out / "search.json").exists()

    def search(where):
        strategy = partial(
            stochastic_dichotomic,
            interval=INTERVAL,
            levels=3,
            budget=6,
            rng=np.random.default_rng(3),
        )
        return search_knee(recipe(**{"training.epochs": epochs}), where, strategy, epochs=epochs)

    resumed, wanted = search(out), search(other)
    assert resumed.outcomes == wanted.outcomes and set(resumed.runs) == set(wanted.runs)
    for weight, run in resumed.runs.items():
        assert torch.equal(weights(run.model), weights(wanted.runs[weight].model))
    assert (out / "search.json").read_bytes() == (other / "search.json").read_bytes()


RUN = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_itp_runs import variant
from retrain.runs.training import run_training
run_training(variant({name!r}), sys.argv[1])
"""

VARIANTS = {
    "batch": {"method.trade_off": 1e-3},
    "multi-gradient": {
        "method.trade_off": None,
        "method.descent": "multi-gradient",
        "method.decay": 0.01,
        "method.threshold": 0.02,
        "method.pruning": "epoch",
        "method.zeros": "hard",
    },
}


def variant(name):
    return recipe(**VARIANTS[name], **{"training.epochs": 20})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_goes_on_bitwise(name, tmp_path):
    out = tmp_path / "killed"
    history = out / "history.jsonl"

    def third_epoch_is_done():
        return history.exists() and len(history.read_text().splitlines()) >= 3

    killed(RUN.format(tests=str(Path(__file__).parent), name=name), out, third_epoch_is_done)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, wanted = run_training(variant(name), out), run_training(variant(name))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weights(resumed.model), weights(wanted.model))
    assert resumed.record["method"] == wanted.record["method"]
    assert len(resumed.history) == 20
    for one, other in zip(resumed.history, wanted.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_run_that_diverges_or_collapses_is_an_outcome(tmp_path):
    """At a rate of 1e30 the loss is not finite; a threshold of 1e3 prunes everything."""
    diverging = recipe(**{"optimizer.name": "sgd", "optimizer.lr": 1e30, "method.trade_off": 1.0})
    strategy = partial(fixed_list, weights=(0.1, 0.2, 0.3))
    found = search_knee(diverging, tmp_path / "diverged", strategy, epochs=2)
    assert [o.status for o in found.outcomes] == ["diverged"] * 3
    assert all(np.isnan(o.loss) for o in found.outcomes)
    assert found.runs == {} and "0 trained networks" in found.by_chord.reason
    record = json.loads((tmp_path / "diverged" / "search.json").read_text())
    assert record["outcomes"][0] == {
        "weight": 0.1,
        "loss": None,
        "complexity": None,
        "status": "diverged",
    }
    pruned = recipe(**{"method.threshold": 1e3})
    found = search_knee(pruned, tmp_path / "collapsed", strategy, epochs=1)
    assert [(o.status, o.complexity) for o in found.outcomes] == [("collapsed", 0.0)] * 3
    assert found.by_trade_off.outcome is None and found.runs == {}


def test_wrong_arguments_are_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe: \[method\]: want weighted intra-training pruning"
    ):
        trainer(recipe(**VARIANTS["multi-gradient"]), tmp_path)
    plain = dict.fromkeys(("method.trade_off", "method.threshold"))
    with pytest.raises(
        ValueError, match=r"recipe: \[method\]: want weighted intra-training pruning"
    ):
        trainer(recipe(**plain, **{"method.name": "plain"}), tmp_path)
    with pytest.raises(ValueError, match="jobs: got 0, want 1 or more"):
        trainer(recipe(), tmp_path, jobs=0)
    with pytest.raises(ValueError, match="threads: got 0, want 1 or more"):
        trainer(recipe(), tmp_path, threads=0)


def test_the_built_in_recipes_are_the_papers():
    names = [name for name in built_in() if name.startswith("itp-")]
    assert set(names) == {"itp-mnist", "itp-mnist-small", "itp-mnist-madam", "itp-cifar10"}
    found = {name: read_recipe(name) for name in names}
    counts = {
        name: sum(p.numel() for p in r.architecture()().parameters()) for name, r in found.items()
    }
    assert counts["itp-mnist"] == 60_074 and counts["itp-cifar10"] == 308_394
    method = found["itp-mnist"].make_method()
    assert (method.trade_off, method.threshold, method.l2) == (3e-4, 1e-3, 1e-4)
    assert found["itp-mnist"].training.epochs == 30
    assert found["itp-mnist-small"].make_method() == method
    assert found["itp-mnist-madam"].make_method().descent == "multi-gradient"
    assert found["itp-cifar10"].make_method().trade_off == 0.03
    assert found["itp-cifar10"].training.epochs == 125


def test_a_run_by_a_built_in_recipe_and_its_last_pruning():
    """LeNet-5 on random images, pruned at the end only: what is saved has been pruned."""
    generator = np.random.default_rng(0)
    data = generator.random((64, 1, 28, 28), dtype=np.float32), generator.integers(0, 10, 64)
    changed = read_recipe("itp-mnist-small").changed(
        {"training.epochs": 1, "method.pruning": "end", "method.threshold": 0.05}
    )
    run = run_training(changed, data=data, test=data)
    flat = torch.cat([run.model.get_submodule(f"layer{i}").weight.flatten() for i in (1, 2, 3)])
    assert flat[flat != 0].abs().min() >= 0.05
    assert int(flat.count_nonzero()) == run.record["method"]["nonzero"]
