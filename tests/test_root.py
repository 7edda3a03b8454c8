"""Searches for the root of an increasing step function."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.path.root import next_place


def search(function, place, **options):
    """Trials until the search ends, at most 100."""
    trials = [(place, function(place))]
    while len(trials) < 100:
        place = next_place(trials, **{"stride": 1.0, "nearest": 1e-6, **options})
        if place is None:
            break
        trials.append((place, function(place)))
    return trials


@settings(max_examples=60, deadline=None)
@given(
    root=st.floats(-6, 6),
    start=st.floats(-6, 6),
    steepness=st.floats(0.3, 3),
    size=st.integers(5, 10**6),
    slope=st.none() | st.floats(0.1, 1e6),
)
def test_a_smooth_staircase_is_met_or_stepped_over(root, start, steepness, size, slope):
    def function(x):
        return round(size * (math.tanh(steepness * (x - root))))

    trials = search(function, start, slope=slope)
    below = max((x for x, over in trials if over < 0), default=-math.inf)
    above = min((x for x, over in trials if over > 0), default=math.inf)
    assert trials[-1][1] == 0 or above - below <= 1e-6
    assert len(trials) <= 40


@settings(max_examples=60, deadline=None)
@given(root=st.floats(-3, 3), low=st.integers(1, 10**5), high=st.integers(1, 10**5))
def test_a_jump_over_the_root_is_pinned_down(root, low, high):
    trials = search(lambda x: high if x > root else -low, 0.0)
    below = max(x for x, over in trials if over < 0)
    above = min(x for x, over in trials if over > 0)
    assert below <= root <= above
    assert above - below <= 1e-6
    assert len(trials) <= 90


def test_every_place_follows_from_the_trials_alone():
    trials = search(lambda x: round(1000 * math.sinh(x - 1.23)), -2.0)
    for number in range(1, len(trials)):
        again = next_place(trials[:number], stride=1.0, nearest=1e-6)
        assert again == trials[number][0]
    assert next_place(trials, stride=1.0, nearest=1e-6) is None


def test_a_known_slope_gives_the_first_step():
    assert next_place([(2.0, -10)], stride=5.0, nearest=1e-6) == 7.0
    assert next_place([(2.0, -10)], stride=5.0, nearest=1e-6, slope=13) == pytest.approx(3.0)
    assert next_place([(2.0, 10)], stride=5.0, nearest=1e-6, slope=13) == pytest.approx(1.0)


def test_a_function_that_is_not_monotone_ends_the_search():
    assert next_place([(0.0, -5), (1.0, 3), (2.0, -4)], stride=1.0, nearest=1e-6) is None
