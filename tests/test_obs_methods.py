"""The methods by name, and the two that put others together."""

import numpy as np
import pytest
from obs_cases import correlated, problem_of

from solvers import Status
from solvers.obs import METHODS, n_of_m, per_layer, per_unit, prune, prune_best, prune_swaps


def problem(seed, n_in=16, n_out=4):
    return problem_of(*correlated(seed, n_in=n_in, n_out=n_out, samples=120))


@pytest.mark.parametrize("pattern", [per_layer(0.6), per_unit(0.5), n_of_m(2, 4)])
def test_best_without_kicks_is_the_default_and_all_is_done(pattern):
    for seed in range(4):
        given = problem(seed)
        best = prune_best(given, pattern)
        assert best.status is Status.SOLVED
        np.testing.assert_array_equal(best.weight, prune_best(given, pattern, kicks=0).weight)
        swaps = prune_swaps(given, pattern)
        assert swaps.status is Status.SOLVED
        np.testing.assert_array_equal(swaps.weight, prune_swaps(given, pattern, kicks=0).weight)
        assert best.error <= swaps.error * (1 + 1e-12)


def test_best_takes_the_better_of_both_starts():
    """Of the whole layer, or unit by unit where the pattern leaves the units independent."""
    from solvers.obs import admm_support, improve

    differing = 0
    for seed in range(12):
        given = problem(seed, n_in=24, n_out=5)
        for pattern in (per_layer(0.7), per_unit(0.7), n_of_m(1, 4)):
            first = prune_swaps(given, pattern)
            found = admm_support(given, pattern, pace=0.02, max_iterations=600)
            second = improve(given, found.kept, pattern)
            best = prune_best(given, pattern)
            assert best.history["error"] == [first.error, second.error]
            change = [p.weight - given.weight for p in (first, second, best)]
            losses = [np.einsum("ij,ij->j", d, given.hessian @ d) for d in change]
            if pattern.kind == "layer":
                assert best.error == pytest.approx(min(first.error, second.error), rel=1e-12)
            else:
                np.testing.assert_allclose(losses[2], np.minimum(losses[0], losses[1]), rtol=1e-9)
            differing += first.error != second.error
    assert differing > 0


def test_a_method_says_what_is_not_done():
    """A search cut short is told by every method that holds one."""
    from solvers.obs import prune_large

    given = problem(3, n_in=24)
    cut = prune_large(given, per_layer(0.7), max_iterations=3, max_swaps=1)
    assert "still moving after 3 iterations" in cut.note
    whole = prune_large(given, per_layer(0.7))
    assert "still moving" not in whole.note


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_line_and_does_what_its_patterns_say(method):
    entry = METHODS[method]
    assert len(entry.about) > 10
    given = problem(1)
    for pattern in (per_layer(0.5), per_unit(0.5), n_of_m(2, 4)):
        if pattern.kind in entry.patterns:
            result = prune(given, pattern, method)
            assert result.removed == 32
        else:
            with pytest.raises(ValueError, match="does not support"):
                prune(given, pattern, method)
