"""On LeNet-300-100: the L-OBS authors' own artefacts, and the figures of today's peers."""

import gzip
import json

import numpy as np
import pytest
import torch
from shared_data import AUTHORS, LENET, MNIST, SHARED

from solvers.obs import (
    add_rows,
    layer_problem,
    mean_hessian,
    n_of_m,
    pattern_support,
    per_layer,
    prune_large,
    prune_one_shot,
    prune_swaps,
    prune_sweep,
    removal_path,
    sensitivities,
)
from solvers.obs.swaps import improve

PEERS = "PEERS.json"


@pytest.fixture(scope="module")
def state():
    loaded = torch.load(SHARED / LENET, weights_only=True, map_location="cpu")
    return {name: value.double().numpy() for name, value in loaded.items()}


@pytest.fixture(scope="module")
def problems(state):
    with gzip.open(SHARED / MNIST[0]) as file:
        pixels = np.frombuffer(file.read(16 + 784 * 10_000), np.uint8, offset=16)
    inputs = (pixels.reshape(-1, 784) / 255 - 0.1307) / 0.3081
    made = {}
    for name in ("fc1", "fc2", "fc3"):
        weight = state[f"{name}.weight"].T
        made[name] = layer_problem(weight, mean_hessian(add_rows(None, inputs)))
        inputs = np.maximum(inputs @ weight + state[f"{name}.bias"], 0)
    return made


@pytest.mark.shared_data(AUTHORS, LENET)
@pytest.mark.parametrize("name", ["fc1", "fc2", "fc3"])
def test_rankings_and_updates_of_the_authors(name, state):
    """Their files: the Hessian with the bias last, rankings over (inputs + bias) x units.

    They rank and remove biases as well, invert by a pseudo-inverse, and update from the weights as
    they are by then. Where the Hessian has full rank (fc2, fc3) a little damping gives the same
    ranking, masks and weights. On fc1 it has rank 708 of 785 (constant pixels) and 70 diagonal
    entries of their inverse come out negative, so that the bottom of their ranking is rounding;
    the top and the masks are not.
    """
    theirs = np.load(SHARED / AUTHORS)
    weight = np.vstack([state[f"{name}.weight"].T, state[f"{name}.bias"]])
    problem = layer_problem(weight, theirs[f"hessian/{name}"].astype(np.float64))
    known = sensitivities(problem, damping=1e-7)
    ranking = np.argsort(known.saliency, axis=None)
    ten = len(ranking) // 10
    wanted = {"fc1": (0.8, 0.999), "fc2": (0.999, 0.999), "fc3": (1.0, 1.0)}[name]
    for part, least in zip((slice(None, ten), slice(-ten, None)), wanted, strict=True):
        overlap = np.intersect1d(ranking[part], theirs[f"sensitivity/{name}"][part]).size
        assert overlap >= least * ten
    for kept in (50, 20):
        result = prune_one_shot(problem, per_layer(1 - kept / 100), given=known)
        mask = theirs[f"mask/CR_{kept}/{name}.weight"].T
        assert np.mean(result.kept[:-1] == mask) > (0.99 if name == "fc3" else 0.9999)
        pruned = theirs[f"pruned_weight/CR_{kept}/{name}.weight"].T
        both = result.kept[:-1] & mask
        assert np.median(np.abs(result.weight[:-1] - pruned)[both]) < 1e-4


@pytest.mark.shared_data(LENET, MNIST[0], PEERS)
@pytest.mark.parametrize("name", ["fc3", "fc2"])
def test_below_every_peer(name, problems):
    peers = json.loads((SHARED / PEERS).read_text())[name]
    problem = problems[name]
    path = removal_path(problem, threads=2)
    for sparsity, margin in [(0.5, 1.0), (0.8, 0.97), (0.9, 0.97), (0.95, 0.97)]:
        pattern = per_layer(sparsity)
        ours = improve(problem, pattern_support(problem, path, pattern), pattern, threads=2)
        best = min(error for error, _ in peers[str(sparsity)].values())
        assert ours.removed == pattern.removed(problem.size)
        assert ours.relative_error <= margin * best
        large = prune_large(problem, pattern, threads=2)
        assert large.relative_error <= margin * best
    best = min(error for error, _ in peers["2:4"].values())
    assert prune_swaps(problem, n_of_m(2, 4), threads=2).relative_error <= best


@pytest.mark.shared_data(LENET, MNIST[0], PEERS)
def test_the_sweep_is_sparsegpt(problems):
    """Two implementations of one algorithm: the same errors, though counts differ by the ties."""
    peers = json.loads((SHARED / PEERS).read_text())
    for name in ("fc2", "fc3"):
        for pattern in (per_layer(0.5), per_layer(0.9), n_of_m(2, 4)):
            peer, _ = peers[name][str(pattern).removeprefix("layer ")]["sparsegpt"]
            ours = prune_sweep(problems[name], pattern).relative_error
            assert ours == pytest.approx(peer, rel=0.05)
