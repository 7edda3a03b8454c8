"""Net-Trim to a sparsity, and to a drop of accuracy: options, runs, resume, the terminal."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from command import command, start
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import dense, rows
from small_case import network, samples, save_case
from torch import nn

import retrain
from retrain.report.terminal import asked_lines, trial_line
from retrain.runs.directory import read_record
from retrain.runs.epsilon_search import LARGEST, SMALLEST, Goal, Trial, choose, next_epsilon
from solvers import Group

SIZES = {"0": 16 * 12, "2": 12 * 8, "4": 8 * 6}


def wanted(name, share):
    return math.floor(share * SIZES[name] + 0.5)


# --- each layer's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("form", ["constrained", "regularised"])
@pytest.mark.parametrize("solver", ["admm", "newton"])
def test_every_layer_has_its_sparsity_and_certificate(tmp_path, scheme, form, solver):
    run = retrain.net_trim(
        network(),
        samples(200),
        sparsity=0.5,
        scheme=scheme,
        form=form,
        solver=solver,
        out=tmp_path / "run",
    )
    assert run.certified
    for report in run.layers:
        assert report.details.asked_zeros == wanted(report.name, 0.5)
        # Layers as small as these may have no solution with the very count.
        assert abs(report.zeros - report.details.asked_zeros) <= 4
        assert report.details.gap <= 1e-2
        assert report.details.epsilon > 0
    record = read_record(tmp_path / "run")
    assert [entry["details"]["asked_zeros"] for entry in record["layers"]] == [96, 48, 24]
    assert record["options"]["sparsity"] == 0.5
    state = run.model.state_dict()
    for report, line in zip(run.layers, asked_lines(record, run.layers), strict=True):
        assert int((state[f"{report.name}.weight"] == 0).sum()) == report.zeros
        exact = report.zeros == report.details.asked_zeros
        assert ("met exactly" if exact else f"got {report.zeros}, the nearest") in line


def test_the_epsilon_found_is_that_of_a_run_of_its_own():
    """Its optimum is no more than the tolerance below what the search returned."""
    data = samples(200)
    found = retrain.net_trim(network(), data, sparsity=0.6, scheme="parallel", solver="newton")
    for report in found.layers:
        again = retrain.net_trim(
            network(),
            data,
            layers=report.name,
            scheme="parallel",
            epsilon=report.details.epsilon,
            solver="newton",
            tolerance=1e-4,
        )
        objective = again.layers[0].details.objective
        assert report.details.objective == pytest.approx(objective, rel=1.1e-2)


def test_a_mapping_chooses_the_layers(tmp_path):
    run = retrain.net_trim(network(), samples(200), sparsity={"0": 0.5, "4": 0.25}, out=tmp_path)
    assert [(report.name, report.zeros) for report in run.layers] == [("0", 96), ("4", 12)]
    assert read_record(tmp_path)["options"]["sparsity"] == {"0": 0.5, "4": 0.25}
    with pytest.raises(ValueError, match="sparsity: none given for layer '2', only for 0"):
        retrain.net_trim(network(), samples(200), sparsity={"0": 0.5}, layers="0,2")


def test_groups_share_the_zeros_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 9, 2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    x = rows(40, 6, 3, 3)
    options = {"solver": "newton", "layers": "0", "tolerance": 0.05, "violation_tolerance": 0.05}
    run = retrain.net_trim(model, x, sparsity=35 / 72, **options)
    assert run.layers[0].details.asked_zeros == 35
    assert run.layers[0].zeros == 35
    assert [int((part == 0).sum()) for part in run.model[0].weight.chunk(3)] == [11, 12, 12]


def test_whole_inputs_are_met_to_the_nearest_and_said_so():
    model = network()
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.2, 2, 16)  # inputs that matter more and less
    run = retrain.net_trim(
        model, samples(200), sparsity={"0": 0.45}, penalty=Group(), tolerance=1e-2
    )
    report = run.layers[0]
    assert report.details.asked_zeros == 86
    assert report.zeros % 12 == 0  # inputs leave together, many at once here
    line = asked_lines(run.record, run.layers)[0]
    assert f"asked for 86 zeros (44.79 %): got {report.zeros}, the nearest that was found" in line


def test_a_layer_with_nothing_to_fit_does_not_end_the_run():
    model = network()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    run = retrain.net_trim(model, samples(100), sparsity=0.5, scheme="parallel")
    assert run.layers[0].zeros == SIZES["0"]
    assert run.layers[0].certified


# --- one epsilon --------------------------------------------------------------------------------


def trial(epsilon, zeros=0, drop=None, weights=10**4):
    return Trial(epsilon, zeros, weights, drop, True, 1.0)


def run_search(goal, answer, first=0.05):
    trials = []
    epsilon = first
    while epsilon is not None:
        trials.append(answer(epsilon))
        epsilon = next_epsilon(goal, trials)
    return trials


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.05, 0.95), middle=st.floats(0.005, 0.3), power=st.floats(0.5, 3))
def test_a_sparsity_is_found_in_few_trials(share, middle, power):
    def answer(epsilon):
        return trial(epsilon, round(10_000 / (1 + (middle / epsilon) ** power)))

    goal = Goal(sparsity=share, max_trials=30)
    trials = run_search(goal, answer)
    best = trials[choose(goal, trials)]
    reachable = answer(SMALLEST).zeros <= round(1e4 * share) <= answer(LARGEST).zeros
    assert not reachable or abs(best.zeros - round(1e4 * share)) <= 1
    assert len(trials) <= 15
    assert all(SMALLEST <= each.relative_epsilon <= LARGEST for each in trials)


@settings(max_examples=50, deadline=None)
@given(allowed=st.floats(0, 5), limit=st.floats(0.002, 0.8))
def test_a_drop_is_bracketed_to_five_per_cent(allowed, limit):
    def answer(epsilon):
        drop = allowed * (epsilon / limit) if epsilon <= limit else allowed + epsilon - limit + 0.01
        return trial(epsilon, round(1e6 * epsilon), drop, 10**6)

    goal = Goal(max_drop=allowed, max_trials=30)
    trials = run_search(goal, answer)
    best = trials[choose(goal, trials)]
    assert best.drop <= allowed
    assert limit / 1.05 <= best.relative_epsilon <= limit
    assert len(trials) <= 12


def test_the_sparsest_within_the_drop_is_chosen_and_else_the_smallest_drop():
    goal = Goal(max_drop=1)
    trials = [trial(0.1, 10, 0.9), trial(0.2, 30, 0.95), trial(0.3, 20, 1.0), trial(0.4, 40, 1.1)]
    assert choose(goal, trials) == 1
    assert choose(Goal(max_drop=0.5), trials) == 0
    assert choose(Goal(sparsity=0.0021), trials) == 2
    assert next_epsilon(Goal(max_drop=1, max_trials=4), trials) is None
    assert next_epsilon(Goal(max_drop=100), [trial(LARGEST, 10, 5.0)]) is None
    # Without an accuracy nothing is within any drop.
    assert next_epsilon(goal, [trial(0.1, 10, None)]) == 0.05


def test_one_epsilon_for_the_network(tmp_path):
    tried = []
    run = retrain.net_trim(
        network(),
        samples(200),
        sparsity=0.6,
        sparsity_of="network",
        solver="newton",
        out=tmp_path / "run",
        on_trial=lambda trial, goal: tried.append(trial),
    )
    search = run.record["search"]
    assert search["asked"] == {"sparsity": 0.6, "zeros": 202}
    assert search["got"]["zeros"] == sum(report.zeros for report in run.layers)
    assert abs(search["got"]["zeros"] - 202) <= 4
    assert [entry["zeros"] for entry in search["trials"]] == [trial.zeros for trial in tried]
    nearest = min(abs(trial.zeros - 202) for trial in tried)
    assert abs(search["got"]["zeros"] - 202) == nearest
    assert run.record["options"]["relative_epsilon"] == search["relative_epsilon"]
    assert run.layers[0].details.relative_epsilon == pytest.approx(search["relative_epsilon"])
    assert run.certified
    loaded = retrain.load(tmp_path / "run")
    assert loaded.record["search"] == json.loads(json.dumps(search))
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    # Each trial is a run of its own, and the outcome is the chosen one's.
    chosen = retrain.load(tmp_path / "run" / "layers" / f"trial-{search['chosen']}")
    assert chosen.record["totals"] == run.record["totals"]
    assert "asked for 202 zeros (60.00 %), got" in "\n".join(asked_lines(run.record, run.layers))


@pytest.fixture(scope="module")
def trained():
    """A network that tells three classes apart, and data."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16)) * 0.8
    model = dense(16, 24, 3)
    labels = rng.integers(0, 3, 600)
    x = (centres[labels] + rng.normal(size=(600, 16))).astype(np.float32)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.tensor(x[:300])), torch.tensor(labels[:300]))
        loss.backward()
        optimizer.step()
    return model, (x[:300], labels[:300]), (x[300:], labels[300:])


def test_the_drop_is_kept_and_the_next_trial_would_not_keep_it(trained, tmp_path):
    model, data, held_out = trained
    run = retrain.net_trim(
        model, data, evaluate=held_out, max_drop=2.0, solver="newton", out=tmp_path / "run"
    )
    search = run.record["search"]
    accuracy = run.record["accuracy"]["held_out"]
    assert search["met"]
    assert search["got"]["drop"] == pytest.approx(100 * (accuracy["before"] - accuracy["after"]))
    assert search["got"]["drop"] <= 2.0
    within = [entry for entry in search["trials"] if entry["drop"] <= 2.0]
    beyond = [entry for entry in search["trials"] if entry["drop"] > 2.0]
    assert search["got"]["sparsity"] == max(entry["sparsity"] for entry in within)
    assert min(entry["relative_epsilon"] for entry in beyond) <= 1.05 * max(
        entry["relative_epsilon"] for entry in within
    )
    with torch.no_grad():
        hits = run.model(torch.tensor(held_out[0])).argmax(1).numpy() == held_out[1]
    assert hits.mean() == pytest.approx(accuracy["after"])


def test_fine_tuned_accuracies_count(trained):
    model, data, held_out = trained
    run = retrain.net_trim(
        model, data, evaluate=held_out, max_drop=2.0, fine_tune=1, max_trials=2, solver="newton"
    )
    accuracy = run.record["accuracy"]["held_out"]
    expected = 100 * (accuracy["before"] - accuracy["fine_tuned"])
    assert run.record["search"]["got"]["drop"] == pytest.approx(expected)


def test_a_drop_that_no_trial_keeps_is_said_so(trained):
    model, data, held_out = trained
    run = retrain.net_trim(
        model, data, evaluate=held_out, max_drop=0.0, relative_epsilon=0.9, max_trials=1
    )
    assert not run.record["search"]["met"]
    assert "NOT within it; no trial is" in asked_lines(run.record, run.layers)[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sparsity": 1.2}, r"sparsity: got 1.2, want a number in \[0, 1\]"),
        ({"sparsity": {}}, "sparsity: got a mapping without layers"),
        ({"sparsity": 0.5, "epsilon": 1.0}, "epsilon: a sparsity finds its own"),
        ({"sparsity_of": "all"}, "sparsity_of: got 'all', want 'layer' or 'network'"),
        ({"sparsity_of": "network"}, "sparsity_of: the network's wants one sparsity, a number"),
        ({"sparsity_of": "network", "sparsity": {"0": 0.5}}, "wants one sparsity, a number"),
        ({"max_drop": 1.0}, "max_drop: wants held-out data"),
        (
            {"max_drop": -1.0, "evaluate": samples()},
            r"max_drop: got -1\.0, want points from 0 to 100",
        ),
        ({"max_drop": 1.0, "sparsity": 0.5}, "max_drop: finds the sparsity; want one of the two"),
        ({"max_drop": 1.0, "epsilon": 0.5}, "max_drop: searches for one relative epsilon"),
        ({"max_drop": 1.0, "max_trials": 0}, "max_trials: got 0, want a whole number >= 1"),
        (
            {"max_drop": 1.0, "form": "regularised", "fit_weight": 1.0},
            "max_drop: searches for one epsilon, which a fit_weight does not heed",
        ),
        ({"max_drop": 1.0, "evaluate": samples()[0]}, "with a class for each sample"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        retrain.net_trim(network(), samples(), **arguments)


def test_a_goal_is_one_of_the_two():
    with pytest.raises(ValueError, match="sparsity, max_drop: want exactly one of the two"):
        Goal()
    with pytest.raises(ValueError, match=r"sparsity: got 2, want a number in \[0, 1\]"):
        Goal(sparsity=2)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparsity")
    save_case(folder, rows=200)
    x, _ = samples(200, seed=1)
    with torch.no_grad():
        np.savez(folder / "test.npz", x=x, y=network()(torch.tensor(x)).argmax(1).numpy())
    return folder


def trim(case, *arguments, out="out"):
    files = ("net.safetensors", "--data", "data.npz", "--evaluate", "test.npz", "--out", out)
    return command(case, "trim", *files, *arguments)


def test_the_command_says_what_was_asked_and_got(case, tmp_path):
    answer = trim(case, "--sparsity", "0=0.5,4=0.25", out=tmp_path / "layers")
    assert answer.code == 0
    assert "0: asked for 96 zeros (50.00 %): met exactly, at relative epsilon" in answer.out
    assert "4: asked for 12 zeros (25.00 %): met exactly" in answer.out
    options = ("--sparsity", "0.6", "--sparsity-of", "network", "--max-trials", "3")
    answer = trim(case, *options, out=tmp_path / "network")
    assert answer.code == 0
    assert "asked for 202 zeros (60.00 %), got" in answer.out
    assert "tried relative epsilon 0.05: " in answer.err


def test_the_command_searches_for_a_drop(case, tmp_path):
    options = ("--max-drop", "5", "--max-trials", "4", "--relative-epsilon", "0.1")
    answer = trim(case, *options, out=tmp_path / "out")
    assert answer.code == 0
    assert "asked for a drop of at most 5 points on held-out data, got a drop of" in answer.out
    assert len(read_record(tmp_path / "out")["search"]["trials"]) <= 4
    options = ("--max-drop", "0", "--max-trials", "1", "--relative-epsilon", "0.9")
    answer = trim(case, *options, out=tmp_path / "beyond")
    assert answer.code == 1
    assert "no trial is" in " ".join(answer.out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sparsity", "half"), "--sparsity: got 'half', want a number, or NAME=NUMBER"),
        (("--sparsity", "0.5", "--epsilon", "1"), "not allowed with"),
        (("--sparsity", "0.5", "--max-drop", "1"), "max_drop: finds the sparsity"),
        (("--sparsity", "9=0.5"), "no layer matches '9'"),
    ],
)
def test_bad_options_are_one_line(case, tmp_path, options, said):
    assert said in trim(case, *options, out=tmp_path / "out").error()
    assert not (tmp_path / "out").exists()


def test_a_killed_search_goes_on_with_the_trials_it_has(case, tmp_path):
    options = ("--sparsity", "0.6", "--sparsity-of", "network", "--max-trials", "4")
    whole = tmp_path / "whole"
    assert trim(case, *options, "--quiet", out=whole).code == 0
    out = tmp_path / "out"
    arguments = ("trim", "net.safetensors", "--data", "data.npz", "--evaluate", "test.npz")
    running = start(case, *arguments, "--out", out, "--quiet", *options)
    second = out / "layers" / "trial-2" / "run.json"
    while not second.exists():
        assert running.running
    running.kill()
    running.sweep()
    first = out / "layers" / "trial-1" / "run.json"
    stamp = first.stat().st_mtime_ns
    answer = trim(case, *options, "--quiet", out=out)
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert first.stat().st_mtime_ns == stamp
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    other = trim(case, "--sparsity", "0.7", "--sparsity-of", "network", out=out)
    assert "belongs to another run" in other.error()


def test_a_killed_layer_search_is_repeated_to_the_same_bytes(case, tmp_path):
    options = ("--sparsity", "0.5", "--quiet")
    assert trim(case, *options, out=tmp_path / "whole").code == 0
    out = tmp_path / "out"
    arguments = ("trim", "net.safetensors", "--data", "data.npz", "--evaluate", "test.npz")
    running = start(case, *arguments, "--out", out, *options)
    while not (out / "layers" / "000.safetensors").exists():
        assert running.running
    running.kill()
    assert trim(case, *options, out=out).code == 0
    names = ("model.safetensors", "layers/001.safetensors")
    for name in names[:1]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_reports_of_layers_that_kept_their_weights(case):
    run = retrain.net_trim(network(), samples(100), layers=["0"], sparsity=0.5)
    (report,) = run.layers
    (line,) = asked_lines(run.record, [replace(report, zeros=0, dense_units=12)])
    assert "got 0: dense weights were kept" in line
    assert ", held-out accuracy +0.00 points, 1.0 s" in trial_line(asdict(trial(0.1, 5, 0.0)))


# --- zeros that the dense network has -------------------------------------------------------------


def sparse_network():
    model = network()
    with torch.no_grad():
        for layer in model[::2]:
            drawn = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0))
            layer.weight[drawn < 0.6] = 0
    return model


def test_more_zeros_than_asked_for_stay_and_the_report_says_why():
    run = retrain.net_trim(sparse_network(), samples(100), sparsity={"0": 0.4}, solver="newton")
    (report,) = run.layers
    assert report.zeros >= report.zeros_before > report.details.asked_zeros
    line = asked_lines(run.record, run.layers)[0]
    assert (
        f"got {report.zeros}: {report.zeros_before} are zero in the dense network and stay" in line
    )


def test_a_network_sparsity_below_its_own_is_refused_before_the_first_solve(tmp_path):
    case = sparse_network(), samples(100)
    said = r"sparsity: got 0.4, but 0.6\d* of the weights .*zeros='free'"
    with pytest.raises(ValueError, match=said):
        retrain.net_trim(*case, sparsity=0.4, sparsity_of="network", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    free = {"zeros": "free", "max_trials": 1}
    assert retrain.net_trim(*case, sparsity=0.4, sparsity_of="network", **free).layers


def test_groups_of_a_convolution_keep_their_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 9, 2, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        model[0].weight[torch.rand(model[0].weight.shape) < 0.3] = 0
    zero = model[0].weight == 0
    x = rows(40, 6, 3, 3)
    run = retrain.net_trim(model, x, relative_epsilon=0.1)
    assert torch.all(run.model[0].weight[zero] == 0)
    assert run.layers[0].certified
