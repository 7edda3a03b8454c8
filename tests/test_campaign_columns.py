"""Short form of the campaign of columns: what it draws, and that default options certify it."""

import numpy as np
import pytest

from bench.campaigns.columns import kept, measure, network, table


@pytest.mark.parametrize("seed", range(3))
def test_both_versions_compute_the_same_function(seed):
    _, (plain, scaled) = network(seed)
    outputs = []
    for chain, inputs in (plain, scaled):
        hidden = np.asarray(inputs, dtype=float)
        for weight, last in zip(chain.weights, (False, True), strict=True):
            hidden = hidden @ weight[:-1].astype(float) + weight[-1]
            hidden = hidden if last else np.maximum(hidden, 0)
        outputs.append(hidden)
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-4 * np.abs(outputs[0]).max()
    sizes = np.linalg.norm(scaled[1].astype(float), axis=0)
    assert sizes.max() / sizes.min() >= 1e7


def test_default_options_certify_columns_over_eight_decades():
    rows = [measure(seed, {}) for seed in range(4)]
    for row in rows:
        for name in ("plain", "scaled"):
            assert row[name]["certified"], (row["seed"], name)
            assert row[name]["statuses"] == ["solved", "solved"]
            assert row[name]["solvers"] == ["newton", "newton"]
    assert table(rows).splitlines()[-1].split()[:4] == ["all", "4", "4", "4"]


def test_a_layer_without_certificate_breaks_the_promise():
    row = measure(0, {})
    assert not kept([{**row, "scaled": {**row["scaled"], "certified": False}}])
    slow = {**row["scaled"], "seconds": 10 * row["plain"]["seconds"]}
    assert not kept([{**row, "scaled": slow}])
    assert kept([{**row, "scaled": {**row["scaled"], "seconds": row["plain"]["seconds"]}}])
