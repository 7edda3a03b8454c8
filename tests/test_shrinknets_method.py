"""ShrinkNets and group sparsity as methods: from a recipe to a smaller network, and resumed."""

import copy
import json
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from command import command, start
from networks import dense
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam
from training_cases import same_runs, toml

import retrain
from retrain.runs.directory import read_record
from retrain.runs.training import train as train_recipe
from retrain.trainers.loop.states import mode, seeded
from retrain.trainers.loop.supervised import fit, train
from retrain.trainers.loop.training import Choice, Setting
from retrain.trainers.recipes.recipe import RECIPES, built_in, read_recipe
from retrain.trainers.shrinknets.cost import Costs, input_neurons
from retrain.trainers.shrinknets.fold import fold
from retrain.trainers.shrinknets.method import GroupSparsity, ShrinkNets
from retrain.trainers.shrinknets.regression import Regression, column_sparsity, shrink_objective
from retrain.trainers.shrinknets.regression_solvers import solve_group, solve_shrink
from retrain.trainers.shrinknets.switches import switches_of


def recipe(**changes):
    """The digits with a fast and strong shrinking."""
    tables = {
        "data": {"train": "digits", "test": "digits-test"},
        "model": {"architecture": "dense", "widths": [64, 40, 30, 10]},
        "training": {"epochs": 8, "batch_size": 64},
        "optimizer": {"name": "adam", "lr": 0.01},
        "method": {"name": "shrinknets", "strength": 0.03, "weight_strength": 1e-4},
    }
    for name, value in changes.items():
        tables[name] = {**tables[name], **value} if name != "method" else value
    return tables


def setting(optimizer=SGD, loss=functional.cross_entropy, samples=48, **options):
    choice = Choice("chosen", options or {"lr": 0.1}, optimizer)
    return Setting(samples, 16, 1, 0, torch.device("cpu"), choice, loss=loss)


def network():
    return dense(6, 8, 5, 3)


def samples(count=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


def run(training, data, epochs, batch_size=16):
    return fit(
        training.model,
        data,
        epochs=epochs,
        optimizer=training.optimizer,
        generator=torch.Generator().manual_seed(0),
        loss=training.loss,
        penalty=training.penalty,
        callbacks=training.callbacks,
        batch_size=batch_size,
    )


# From a recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return train_recipe(recipe(), out=out)


def test_a_smaller_network_that_still_knows_the_digits(whole):
    left = whole.record["method"]["neurons"]
    assert left["switch_3"] < 30 and left["switch_5"] < 25
    assert [type(module) for module in whole.model] == [
        *(nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear)
    ]
    assert whole.model[1].weight.shape == (left["switch_3"], 64)
    assert whole.model[3].weight.shape == (left["switch_5"], left["switch_3"])
    assert whole.test_accuracy > 0.93
    assert whole.record["parameters_pruned"] > 0.3


def test_the_costs_are_sums_over_the_epochs(whole):
    lines = [line["method"] for line in whole.history]
    sizes = [64 + sum(line["neurons"].values()) for line in lines]
    assert [line["input_neurons"] for line in lines] == sizes
    assert all(a >= b for a, b in pairwise(sizes)) and sizes[-1] < sizes[0]
    started_with = [64 + 40 + 30, *sizes[:-1]]
    assert [line["cost_neurons"] for line in lines] == np.cumsum(started_with).tolist()
    # The real ones: operations of the run, and seconds.
    assert whole.record["load"] < whole.record["dense_load"]
    assert whole.record["seconds"] > 0


def test_what_is_saved_is_the_network_that_was_trained(whole):
    again = retrain.load(whole.directory)
    x = torch.rand(20, 1, 8, 8)
    torch.testing.assert_close(again.model(x), whole.model(x), rtol=0, atol=0)
    assert not switches_of(again.model)
    checkpoint = torch.load(whole.directory / "checkpoint.pt", weights_only=True)
    assert checkpoint is not None


def stop_after(number):
    def on_epoch(line, epochs):
        if line["epoch"] == number:
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_an_interrupted_run_ends_the_same(whole, tmp_path, stop):
    """Among the epochs some fall before the first neuron goes, and some after."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe(), out=out, on_epoch=stop_after(stop))
    assert read_record(out).get("state") != "finished"
    again = train_recipe(recipe(), out=out)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole.directory / name).read_bytes()
    assert [line["method"] for line in again.history] == [line["method"] for line in whole.history]
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]


def test_a_killed_run_ends_the_same(tmp_path):
    """SIGKILL to the command line after neurons have gone."""
    tables = recipe(training={"epochs": 14})
    (tmp_path / "r.toml").write_text(toml(tables))
    call = ("train", "r.toml", "--quiet", "--threads", "1", "--out", "parts")
    running, limit = start(tmp_path, *call), time.monotonic() + 60
    history = tmp_path / "parts" / "history.jsonl"
    while running.running and time.monotonic() < limit:
        if history.exists() and len(history.read_text().splitlines()) >= 7:
            break
        time.sleep(0.005)
    assert running.running, running.read()
    running.kill()
    assert json.loads(history.read_text().splitlines()[-1])["method"]["input_neurons"] < 134
    assert command(tmp_path, *call).code == 0
    assert command(tmp_path, *call[:-1], "whole").code == 0
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("at", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("optimizer", "strength"),
    [({"name": "sgd", "lr": 0.1, "momentum": 0.9}, 0.02), ({"name": "rmsprop", "lr": 0.01}, 0.05)],
)
def test_other_optimisers_and_the_other_side_resume_too(tmp_path, at, optimizer, strength):
    method = {"name": "shrinknets", "strength": strength, "at": at, "inertia": 0.95, "power": 1}
    tables = recipe(method={**method, "weight_strength": 1e-5}, training={"epochs": 6})
    tables["optimizer"] = optimizer
    straight = train_recipe(tables, out=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(tables, out=tmp_path / "cut", on_epoch=stop_after(4))
    train_recipe(tables, out=tmp_path / "cut")
    names = [tmp_path / run / "model.safetensors" for run in ("straight", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert straight.history[3]["method"]["input_neurons"] < 134
    assert straight.test_accuracy > 0.8


def test_group_sparsity_by_a_recipe(tmp_path):
    method = {"name": "group-sparsity", "strength": 0.004}
    tables = recipe(method=method)
    tables["optimizer"] = {"name": "sgd", "lr": 0.3, "momentum": 0.9}
    straight = train_recipe(tables, out=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(tables, out=tmp_path / "cut", on_epoch=stop_after(4))
    train_recipe(tables, out=tmp_path / "cut")
    names = [tmp_path / run / "model.safetensors" for run in ("straight", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()
    left = straight.record["method"]["groups"]
    assert left["3"] < 40 and straight.model[3].weight.shape == (left["5"], left["3"])
    assert straight.test_accuracy > 0.9


def test_a_convolutional_recipe_shrinks_channels():
    tables = recipe(training={"epochs": 3}, optimizer={"lr": 0.03})
    tables["model"] = {"factory": f"{__name__}:convolutional"}
    tables["method"] = {"name": "shrinknets", "strength": 0.5, "inertia": 0.9}
    got = train_recipe(tables)
    left = got.record["method"]["neurons"]
    assert left["switch_5"] < 12
    assert got.model[0].weight.shape[0] == left["switch_5"]
    assert got.model[5].weight.shape[1] == 9 * left["switch_5"]


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2))),
        *(nn.Flatten(), nn.Linear(108, 10)),
    )


def test_the_built_in_recipes_are_read():
    mine = [name for name in built_in() if name.startswith("shrinknets-")]
    assert len(mine) == len(list(RECIPES.glob("shrinknets-*.toml"))) >= 5
    for name in mine:
        read = read_recipe(name)
        assert isinstance(read.make_method(), ShrinkNets | GroupSparsity) and read.title
        read.make_method().start(read.architecture()(**read.model.options), setting())


# The method itself ----------------------------------------------------------------------------


def test_no_penalty_and_switches_that_stand_still_is_the_plain_optimiser():
    training = ShrinkNets(strength=0, weight_strength=0).start(network(), setting(lr=0.1))
    training.optimizer.param_groups[1]["lr"] = 0.0
    run(training, samples(), 3)
    sgd = {"optimizer": lambda m: SGD(m.parameters(), lr=0.1)}
    plain = train(network(), samples(), epochs=3, batch_size=16, **sgd).model
    for a, b in zip(ShrinkNets().finish(training).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_finish_gives_the_outputs_that_were_trained_and_leaves_the_training():
    method = ShrinkNets(strength=0.05, inertia=0.9)
    training = method.start(network(), setting(Adam, lr=0.02))
    run(training, samples(), 20)
    with torch.no_grad():
        training.model.switch_4.beta[0] = 0
    before = copy.deepcopy(training.model.state_dict())
    plain = method.finish(training)
    x = samples()[0]
    with mode(training.model, training=False):
        torch.testing.assert_close(plain(x), training.model(x), rtol=1e-5, atol=1e-5)
    assert plain[4].in_features == training.model.switch_4.size - 1
    assert all(
        torch.equal(before[key], value) for key, value in training.model.state_dict().items()
    )


def test_weight_decay_is_not_for_the_switches():
    training = ShrinkNets().start(network(), setting(lr=0.1, weight_decay=0.3))
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in training.optimizer.param_groups) == 8


def test_removal_never_keeps_all():
    method = ShrinkNets(strength=1.0, removal="never")
    training = method.start(network(), setting(Adam, lr=0.05))
    run(training, samples(), 20)
    assert training.describe()["neurons"] == {"switch_2": 8, "switch_4": 5}
    assert all(s.beta.abs().max() < 0.2 for s in switches_of(training.model).values())


def test_a_penalty_that_kills_everything_is_survived_and_named():
    method = ShrinkNets(strength=10.0, inertia=0.9)
    training = method.start(network(), setting(lr=0.01))
    run(training, samples(), 60)
    described = training.describe()
    assert described["neurons"] == {"switch_2": 1, "switch_4": 1}
    assert sorted(described["survivors"]) == ["switch_2", "switch_4"]
    assert method.finish(training)(samples()[0]).isfinite().all()


def test_groups_that_are_all_zero_are_survived_and_named(caplog):
    method = GroupSparsity(strength=100.0)
    training = method.start(network(), setting(lr=0.1))
    run(training, samples(), 2)
    assert training.describe()["groups"] == {"2": 0, "4": 0}
    with caplog.at_level("WARNING", logger="retrain"):
        plain = method.finish(training)
    assert "all groups of '2' are zero: one neuron stays" in caplog.text
    assert [m.in_features for m in plain if isinstance(m, nn.Linear)] == [6, 1, 1]
    x = samples()[0]
    torch.testing.assert_close(plain(x), training.model(x))


def test_nan_is_told():
    training = ShrinkNets().start(network(), setting(lr=1e9))
    with pytest.raises(FloatingPointError, match=r"is (nan|inf)|not finite"):
        run(training, samples(), 5)


def test_the_networks_inputs_are_selected_and_said():
    x, _ = samples(200)
    y = (x[:, 1] - x[:, 4] > 0).long()
    method = ShrinkNets(strength=0.05, layers=("0",), inertia=0.95)
    training = method.start(network(), setting(Adam, lr=0.01, samples=200))
    run(training, (x, y), 60)
    kept = training.describe()["inputs_kept"]["switch_0"]
    assert {1, 4} <= set(kept) and len(kept) < 6
    plain = method.finish(training)
    assert plain[0].in_features == 6
    gone = [i for i in range(6) if i not in kept]
    assert (plain[0].weight[:, gone] == 0).all()


def test_reshape_takes_a_fresh_training_to_the_description():
    method = ShrinkNets(layers=("0", "2", "4"))
    training = method.start(network(), setting())
    method.reshape(training, {"neurons": {"switch_0": 2, "switch_2": 3, "switch_4": 5}})
    assert [tuple(m.weight.shape) for m in training.model if isinstance(m, nn.Linear)] == [
        *((3, 2), (5, 3), (3, 5))
    ]
    assert training.model(samples()[0]).shape == (48, 3)
    for sizes in ({"switch_2": 3}, {"switch_0": 9, "switch_2": 3, "switch_4": 5}, {}):
        with pytest.raises(
            ValueError, match=r"description: it has .* they are of different models"
        ):
            method.reshape(method.start(network(), setting()), {"neurons": sizes})
    with pytest.raises(ValueError, match="description: it has 7 input neurons, but the model"):
        group = GroupSparsity()
        group.reshape(group.start(network(), setting()), {"input_neurons": 7})


def test_a_trained_linear_regression_comes_to_the_proximal_methods_value():
    """Section 6.1's form, by switches, Adam and removal, against alternating proximal steps."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 10)).astype(np.float32)
    Y = X @ (rng.standard_normal((3, 10)) * (np.arange(10) < 4)).T
    Y += 0.1 * rng.standard_normal(Y.shape)
    Y = Y.astype(np.float32)
    problem = Regression(X.astype(float), Y.astype(float), "linear")
    wanted = solve_shrink(problem, 0.3, 0.03, tolerance=1e-9, start=solve_group(problem, 0).A)

    def loss(outputs, targets):
        return (outputs - targets).square().sum(1).mean()

    method = ShrinkNets(strength=0.3, weight_strength=0.03, layers=("0",))
    with seeded(0, torch.device("cpu")):
        model = nn.Sequential(nn.Linear(10, 3, bias=False))
    training = method.start(model, setting(Adam, loss, lr=0.003, samples=80))
    run(training, (X, Y), 2500, batch_size=80)
    switch = training.model.switch_0
    A = training.model.get_submodule("0").weight.detach().double().numpy()
    beta = switch.beta.detach().double().numpy()
    reached = shrink_objective(
        Regression(X[:, switch.kept.numpy()].astype(float), Y.astype(float), "linear"),
        *(A, beta, 0.3, 0.03, 2),
    )
    assert reached == pytest.approx(wanted.objective, rel=1e-2)  # Adam balances A and beta slowly
    plain = fold(training.model)[0].weight.detach().numpy()
    np.testing.assert_allclose(plain, wanted.A, atol=0.03)
    assert column_sparsity(plain) == column_sparsity(wanted.A) == 0.6


def test_costs_start_with_the_whole_network():
    model = network()
    assert input_neurons(model) == 6 + 8 + 5
    assert input_neurons(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3))) == 38
    costs = Costs(input_neurons(model))
    costs(None, nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3)), None)
    assert (costs.neurons, costs.now) == (19, 8)
    again = Costs(0)
    again.load_state_dict(costs.state_dict())
    assert again == costs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShrinkNets(strength=-1), "strength: got -1, want a finite number >= 0"),
        (
            lambda: ShrinkNets(weight_strength=float("inf")),
            "weight_strength: got inf, want a finite number >= 0",
        ),
        (lambda: ShrinkNets(power=3), "power: got 3, want one of 1, 2"),
        (lambda: ShrinkNets(at="left"), "at: got 'left', want one of inputs, outputs"),
        (lambda: ShrinkNets(removal="now"), "removal: got 'now', want 'sign-variance' or 'never'"),
        (lambda: ShrinkNets(inertia=1), "inertia: got 1, want at least 0 and below 1"),
        (lambda: ShrinkNets(threshold=2), r"threshold: got 2, want a number in \(0, 1\)"),
        (lambda: ShrinkNets(layers="fc1"), "layers: got 'fc1', want a list of at least one name"),
        (lambda: GroupSparsity(layers=()), r"layers: got \(\), want a list of at least one name"),
        (
            lambda: GroupSparsity(strength=float("nan")),
            "strength: got nan, want a finite number >= 0",
        ),
        (lambda: ShrinkNets(layers=("9",)).start(network(), setting()), "no layer '9'"),
        (
            lambda: GroupSparsity(at="outputs").start(
                nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3)), setting()
            ),
            "makes something else than 0 of 0",
        ),
    ],
)
def test_wrong_options_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
