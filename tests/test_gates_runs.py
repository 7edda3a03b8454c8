"""Gates in training runs: recipes, resuming, loading without the trainer, two processes."""

import subprocess
import sys
from pathlib import Path

import gated_joint
import pytest
import torch
from networks import same, weights
from shared_data import MNIST, SHARED
from torchrun import torchrun

import retrain
from retrain.trainers.gates.network import gates_of
from retrain.trainers.recipes.recipe import built_in, read_recipe

HERE = Path(__file__).parent
FOLDER = SHARED / "data" / "mnist"


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["first order", "linear skips"])
def test_a_run_prunes_resumes_to_the_same_and_loads_plainly(name, tmp_path):
    tables = gated_joint.RECIPES[name]
    whole = retrain.train(tables, out=tmp_path / "whole")
    blocks = [len(line["method"]["theta"]) + len(line["method"]["kept"]) for line in whole.history]
    assert blocks[0] == 4 and blocks == sorted(blocks, reverse=True) and blocks[-1] < 4
    assert whole.test_accuracy > 0.8
    last = whole.history[-1]
    assert last["load"] < last["dense_load"] and 0 < last["parameters_pruned"] < 1
    assert last["learning_rate"] == 0.001 and last["method"]["rounded"] == 5

    first = next(epoch for epoch, count in enumerate(blocks, 1) if count < 4)
    for stop in {first, 7}:

        def interrupt(line, _, stop=stop):
            if line["epoch"] == stop:
                raise Interrupted

        out = tmp_path / f"stopped after {stop}"
        with pytest.raises(Interrupted):
            retrain.train(tables, out=out, on_epoch=interrupt)
        again = retrain.train(tables, out=out)
        assert same(weights(again.model), weights(whole.model))
        keys = ("loss", "method", "load", "test_accuracy")
        assert [[line[k] for k in keys] for line in again.history] == [
            [line[k] for k in keys] for line in whole.history
        ]

    program = (
        "import sys, torch, retrain\n"
        "run = retrain.load(sys.argv[1])\n"
        "assert not [name for name in sys.modules if name.startswith('retrain.trainers')]\n"
        "torch.save(run.model(torch.ones(2, 1, 8, 8)), sys.argv[2])\n"
    )
    output = tmp_path / "output.pt"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "whole"), str(output)], check=True, cwd=HERE
    )
    wanted = whole.model(torch.ones(2, 1, 8, 8))
    assert torch.equal(torch.load(output), wanted) and not gates_of(whole.model)


def test_a_gated_network_trained_without_pruning_is_saved_plain(tmp_path):
    tables = {**gated_joint.recipe(1), "method": {"name": "plain"}}
    run = retrain.train(tables, out=tmp_path)
    assert not gates_of(run.model)
    again = retrain.load(tmp_path).model(torch.ones(2, 1, 8, 8))
    assert torch.equal(again, run.model(torch.ones(2, 1, 8, 8)))


def test_two_processes_train_as_one(tmp_path):
    joint = tmp_path / "joint"
    torchrun(HERE / "gated_joint.py", joint, folder=HERE, seconds=200)
    for name, tables in gated_joint.RECIPES.items():
        alone = retrain.train(tables)
        together = retrain.load(joint / name)
        assert alone.history[-1]["method"]["removed"]
        assert alone.history[-1]["method"]["removed"] == together.history[-1]["method"]["removed"]
        for one, other in zip(alone.history, together.history, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["method"]["theta"] == pytest.approx(one["method"]["theta"], abs=1e-5)
        for a, b in zip(weights(alone.model), weights(together.model), strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


def test_the_built_in_recipes_are_whole_and_their_networks_can_be_made():
    names = [name for name in built_in() if name.startswith("gates-")]
    assert len(names) >= 15
    for name in names:
        recipe = read_recipe(name)
        method = recipe.make_method()
        assert recipe.training.epochs > method.fine_tune_epochs
        with torch.device("meta"):
            model = recipe.architecture()(**recipe.model.options)
        assert len(gates_of(model)) >= 8


def test_the_papers_settings_are_in_the_recipes():
    dense = read_recipe("gates-mnist-dense-50")
    method = dense.make_method()
    assert (dense.training.epochs, dense.training.batch_size) == (60, 64)
    assert (method.log_gamma, method.decay, method.theta) == (-200.0, 1.0, 0.75)
    assert dense.optimizer.options["lr"] == 1e-3 and method.fine_tune_rate == 1e-4
    assert read_recipe("gates-mnist-conv-40").make_method().log_gamma == -50.0
    resnet = read_recipe("gates-cifar10-resnet110")
    method = resnet.make_method()
    assert (resnet.training.epochs, method.warmup, method.fine_tune_epochs) == (182, 105, 32)
    assert (method.decay, method.theta_rate, method.round_below) == (1.5, 1e-4, 0.1)
    vgg = read_recipe("gates-cifar10-vgg16")
    assert vgg.make_method().decay == 150.0 and vgg.optimizer.options["lr"] == 0.01
    assert read_recipe("gates-cifar100-resnet56").make_method().factors == {"stage3.*": 5.0}


@pytest.mark.shared_data(*MNIST)
def test_the_reduced_recipe_prunes_mnist():
    """On fewer images still, and with more pressure."""
    run = retrain.train(
        "gates-mnist-dense-small",
        changes={
            "data.train": f"mnist:{FOLDER}",
            "data.test": f"mnist-test:{FOLDER}",
            "data.limit": 3000,
            "data.test_limit": 1000,
            "method.log_gamma": -3000.0,
            "method.theta_rate": 0.04,
        },
    )
    last = run.history[-1]
    assert len(last["method"]["kept"]) < 9 and run.test_accuracy > 0.85
