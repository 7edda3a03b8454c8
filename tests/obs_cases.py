"""Problems and oracles that the tests of solvers.obs share."""

from itertools import combinations, pairwise, product

import numpy as np

from solvers.obs import layer_problem


def correlated(seed, *, samples=60, n_in=8, n_out=3, bias=False):
    """Make (inputs, weight): correlated inputs, a column of ones last where there is a bias."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((samples, n_in)) @ rng.standard_normal((n_in, n_in))
    if bias:
        inputs = np.hstack([inputs, np.ones((samples, 1))])
    return inputs, rng.standard_normal((inputs.shape[1], n_out))


def problem_of(inputs, weight, **options):
    return layer_problem(weight, inputs.T @ inputs / len(inputs), **options)


def exact_unit_loss(inputs, weight, kept):
    """(1/n) min ||X(w - w0)||^2 over weights on a support, by least squares on the inputs."""
    target = inputs @ weight
    support = np.flatnonzero(kept)
    if support.size == 0:
        return float(target @ target) / len(inputs)
    solution = np.linalg.lstsq(inputs[:, support], target, rcond=None)[0]
    residual = target - inputs[:, support] @ solution
    return float(residual @ residual) / len(inputs)


def exact_loss(inputs, weight, kept):
    return sum(exact_unit_loss(inputs, weight[:, u], kept[:, u]) for u in range(kept.shape[1]))


def best_layer_loss(inputs, weight, removed):
    """Least loss over all supports with so many zeros in the layer, by enumeration."""
    n_in, n_out = weight.shape
    by_unit = []
    for unit in range(n_out):
        best = np.full(n_in + 1, np.inf)
        for gone in product((False, True), repeat=n_in):
            loss = exact_unit_loss(inputs, weight[:, unit], ~np.array(gone))
            best[sum(gone)] = min(best[sum(gone)], loss)
        by_unit.append(best)
    return best_split(np.array(by_unit), removed)


def best_split(losses, removed):
    """Least sum of losses[u, k_u] over sum k_u = removed, by dynamic programming."""
    table = np.full(removed + 1, np.inf)
    table[0] = 0.0
    for row in losses:
        new = np.full(removed + 1, np.inf)
        for k in range(min(len(row) - 1, removed) + 1):
            new[k:] = np.minimum(new[k:], table[: removed + 1 - k] + row[k])
        table = new
    return float(table[removed])


def best_grouped_loss(inputs, weight, keep, group):
    """Least loss of one unit (n_in,) over all N:M supports, by enumeration."""
    n_in = len(weight)
    edges = [*range(0, n_in, group), n_in]
    choices = [list(combinations(range(a, b), min(keep, b - a))) for a, b in pairwise(edges)]
    best = np.inf
    for chosen in product(*choices):
        kept = np.zeros(n_in, dtype=bool)
        kept[[i for part in chosen for i in part]] = True
        best = min(best, exact_unit_loss(inputs, weight, kept))
    return best
