"""What each trainer leaves is a plain network: loaded without trainers, and pruned further."""

import subprocess
import sys
from pathlib import Path

import gated_joint
import numpy as np
import pytest
import torch
from torch import nn

import retrain
from retrain.adapters.files.blocks import PadChannels, StackChannels, Sum
from retrain.adapters.files.description import describe_module
from retrain.data.sources import load_data

HERE = Path(__file__).parent
DIGITS = {"train": "digits", "test": "digits-test"}


def images():
    """Make a small convolutional network for the digits."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


def recipe(method, model=None, epochs=6, lr=0.01, optimizer="adam"):
    return {
        "data": DIGITS,
        "model": model or {"architecture": "dense", "widths": [64, 32, 24, 10]},
        "training": {"epochs": epochs, "batch_size": 64, "seed": 3},
        "optimizer": {"name": optimizer, "lr": lr},
        "method": method,
    }


CONVOLUTIONAL = {"factory": f"{__name__}:images"}
SHRINK = {"name": "shrinknets", "strength": 0.03, "inertia": 0.95}
RECIPES = {
    "plain": recipe({"name": "plain"}),
    "itp": recipe({"name": "itp", "trade_off": 0.001, "threshold": 0.005}),
    "itp, convolutional": recipe({"name": "itp", "trade_off": 0.001}, CONVOLUTIONAL),
    "shrinknets": recipe(SHRINK),
    "shrinknets, outputs": recipe({**SHRINK, "at": "outputs"}, CONVOLUTIONAL),
    "shrinknets, inputs too": recipe({**SHRINK, "layers": ["1", "3", "5"]}),
    "group sparsity": recipe({"name": "group-sparsity", "strength": 0.002}, None, 8, 0.5, "sgd"),
    "gates": gated_joint.recipe(epochs=4),
    "gates, linear skips": gated_joint.recipe(linear_skips=True, norm=True),
}
OWN = (Sum, PadChannels, StackChannels)  # the package's own containers of plain layers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train each when it is asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in done:
            done[name] = retrain.train(RECIPES[name], out=folder / name)
        return done[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_loaded_is_what_was_trained(runs, name):
    run = runs(name)
    loaded = retrain.load(run.directory)
    x = torch.from_numpy(load_data("digits-test", limit=50).x).float()
    assert torch.equal(loaded.model(x), run.model(x))
    assert not loaded.model.training
    assert loaded.history == run.history and loaded.test_accuracy == run.test_accuracy
    right = (loaded.model(x).argmax(1).numpy() == load_data("digits-test", limit=50).y).mean()
    assert right > 0.75
    assert describe_module(loaded.model) == loaded.record["model"]["description"]
    for module in loaded.model.modules():
        assert type(module).__module__.startswith("torch.nn.") or isinstance(module, OWN)
    final = loaded.record["cost"]["final"]
    assert final["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    if name not in ("plain", "itp", "itp, convolutional", "shrinknets, inputs too"):
        assert 0 < loaded.record["parameters_pruned"] < 1
    if name.startswith("itp"):
        weights = np.concatenate([p.detach().numpy().ravel() for p in loaded.model.parameters()])
        assert (weights == 0).mean() > 0.1


def test_a_process_that_loads_them_imports_no_trainer(runs):
    paths = [str(runs(name).directory) for name in RECIPES]
    program = (
        "import sys, retrain\n"
        "for path in sys.argv[1:]:\n"
        "    assert retrain.load(path).model is not None\n"
        "assert not [name for name in sys.modules if name.startswith('retrain.trainers')]\n"
    )
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=HERE)


@pytest.mark.parametrize("name", ["itp", "shrinknets", "group sparsity"])
def test_what_was_pruned_while_training_is_pruned_further(runs, name):
    """A loaded network is an input of Net-Trim and L-OBS like any other."""
    model = retrain.load(runs(name).directory).model
    data = load_data("digits", limit=150)
    before = sum(int((p != 0).sum()) for n, p in model.named_parameters() if "weight" in n)
    trimmed = retrain.net_trim(model, data.x, relative_epsilon=0.2)
    after = sum(int((p != 0).sum()) for n, p in trimmed.model.named_parameters() if "weight" in n)
    assert after < before
    pruned = retrain.lobs(model, data.x, sparsity=0.8).model
    zeros = [float((p == 0).float().mean()) for n, p in pruned.named_parameters() if "weight" in n]
    assert all(0.75 < share < 0.999 for share in zeros)


@pytest.mark.parametrize("name", RECIPES)
def test_each_can_be_exported(runs, name):
    run = runs(name)
    retrain.train(RECIPES[name], out=run.directory, export=True)
    program = torch.export.load(run.directory / "model.pt2").module()
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(program(x), run.model(x), rtol=1e-5, atol=1e-5)
