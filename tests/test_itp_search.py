"""Searches on fronts with a known knee; domination, knees and the lack of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.trainers.itp.knee import knee_by_chord, knee_by_trade_off
from retrain.trainers.itp.search import (
    Outcome,
    bisection,
    dichotomic,
    equal_slope,
    fixed_list,
    nondominated,
    normalised,
    stochastic_dichotomic,
)


class Hyperbola:
    """min (1 - l) E + l Omega on the front E = c / Omega: Omega = sqrt(c (1 - l) / l).

    The front is cut at Omega <= most, as a trained network's is; past `collapse` all weights are
    gone. Notes what was trained.
    """

    def __init__(self, c=1.0, most=100.0, collapse=1.0, noise=None):
        self.c, self.most, self.collapse, self.noise = c, most, collapse, noise
        self.calls = []

    def __call__(self, weights):
        self.calls.append(list(weights))
        return [self.outcome(weight) for weight in weights]

    def outcome(self, weight):
        if weight >= self.collapse:
            return Outcome(weight, 2.3, 0.0, "collapsed")
        size = self.most if weight == 0 else math.sqrt(self.c * (1 - weight) / weight)
        size = min(size, self.most)
        loss = self.c / size
        if self.noise is not None:
            loss *= 1 + 0.02 * self.noise.random()
        return Outcome(weight, loss, size)

    @property
    def trained(self):
        return [weight for call in self.calls for weight in call]


def corner(x=200.0, y=0.05, steps=9):
    """Two straight lines that meet at (complexity, loss) = (x, y): the knee is known exactly."""
    left = [Outcome(0.5 + i / 100, 1 - (1 - y) * i / steps, x * i / steps) for i in range(steps)]
    right = [
        Outcome(0.1 - i / 100, y * (1 - i / steps), x + (2000 - x) * i / steps)
        for i in range(steps + 1)
    ]
    return left + right


SEARCHES = {
    "dichotomic": dichotomic,
    "stochastic": lambda train, interval, **o: stochastic_dichotomic(
        train, interval, rng=np.random.default_rng(0), **o
    ),
    "bisection": bisection,
}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_nondominated_against_brute_force(pairs):
    outcomes = [Outcome(0.1, float(a), float(b)) for a, b in pairs]
    front = nondominated(outcomes)
    found = {(o.loss, o.complexity) for o in front}
    assert len(found) == len(front)
    wanted = {
        (a, b)
        for a, b in pairs
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in pairs)
    }
    assert found == wanted
    assert [o.complexity for o in front] == sorted(o.complexity for o in front)
    losses = [o.loss for o in front]
    assert losses == sorted(losses, reverse=True)


def test_diverged_outcomes_are_not_on_the_front():
    nan = float("nan")
    outcomes = [Outcome(0.1, nan, nan, "diverged"), Outcome(0.2, 1.0, 1.0)]
    assert nondominated(outcomes) == outcomes[1:]
    assert nondominated(outcomes[:1]) == []


def test_the_new_weight_makes_both_ends_equally_good():
    first, second = Outcome(0.3, 2.0, 10.0), Outcome(0.1, 0.5, 500.0)
    weight = equal_slope(first, second)
    values = [(1 - weight) * o.loss + weight * o.complexity for o in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-12) and 0 < weight < 1


def test_a_list_trains_what_it_is_given():
    front = Hyperbola()
    weights = [0.1, 0.2, 0.3]
    assert [o.weight for o in fixed_list(front, weights)] == weights
    assert front.calls == [weights]


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_come_near_a_known_knee(search):
    """By symmetry the knee of E = 1/Omega on [0.01, 100]^2 is (1, 1), where lambda = 1/2."""
    front = Hyperbola(most=100.0)
    outcomes = SEARCHES[search](front, (1e-4, 1 - 1e-4), levels=6, budget=20)
    for knee in (knee_by_chord(outcomes), knee_by_trade_off(outcomes)):
        assert knee.reason == ""
        best = min(abs(math.log(outcome.complexity)) for outcome in outcomes)
        assert abs(math.log(knee.outcome.complexity)) < 0.7, knee
        assert best < 0.7


@pytest.mark.parametrize("search", SEARCHES)
def test_only_what_is_new_is_trained_within_the_budget(search):
    front = Hyperbola(noise=np.random.default_rng(1))
    outcomes = SEARCHES[search](front, (1e-3, 0.9), levels=5, budget=9)
    assert len(outcomes) == len(front.trained) <= 9
    assert [o.weight for o in outcomes] == front.trained
    assert len(set(front.trained)) == len(front.trained)
    assert front.calls[0] == [1e-3, 0.9] and len(front.calls) <= 5
    one = Hyperbola()
    assert len(SEARCHES[search](one, (1e-3, 0.9), levels=1, budget=9)) == 2
    two = Hyperbola()
    assert len(SEARCHES[search](two, (1e-3, 0.9), levels=9, budget=2)) == 2


def test_algorithm_3_step_by_step():
    """Lines 9 to 15 by hand: the slope's weight where it is far from all, else a draw."""
    front, rng = Hyperbola(), np.random.default_rng(7)
    interval = (0.2, 0.4)
    outcomes = stochastic_dichotomic(front, interval, levels=3, budget=50, rng=rng, closeness=0.05)
    again, known = np.random.default_rng(7), list(interval)
    trained = front.outcome(0.2), front.outcome(0.4)
    drawn = 0
    for call in front.calls[1:]:
        ends = nondominated(trained)
        wanted = []
        for first, second in pairwise(ends):
            weight = equal_slope(first, second)
            near = [k for k in [*known, *wanted] if abs(k - weight) <= 0.05]
            if near:
                nearest = min(near, key=lambda k, w=weight: abs(k - w))
                weight = again.uniform(max(0.9 * nearest, 0.2), min(1.1 * nearest, 0.4))
                drawn += 1
            wanted.append(weight)
        assert call == pytest.approx(wanted, rel=1e-12)
        known += call
        trained = [front.outcome(weight) for weight in known]
    assert drawn > 0 and all(0.2 <= o.weight <= 0.4 for o in outcomes)


def test_bisection_goes_on_where_a_midpoint_was_dominated():
    """Between 0 and 0.8 the half is no good: both halves of it are next, the smaller first."""

    def train(weights):
        return [Outcome(w, 1.0 if w == 0.4 else w, 1 - w) for w in weights]

    outcomes = bisection(train, (0.0, 0.8), levels=3, budget=5)
    assert [o.weight for o in outcomes] == [0.0, 0.8, 0.4, 0.2, pytest.approx(0.6)]


def test_draws_repeat_by_their_seed():
    found = []
    for seed in (1, 1, 2):
        front = Hyperbola(c=1e-6)
        stochastic_dichotomic(
            front, (1e-5, 0.01), levels=4, budget=12, rng=np.random.default_rng(seed)
        )
        found.append(front.calls)
    assert found[0] == found[1] != found[2]


def test_dichotomic_search_ends_when_nothing_is_new():
    """Two outcomes on a straight front: the third has the slope of both pairs."""

    def train(weights):
        return [Outcome(w, 1 - w, w) for w in weights]

    outcomes = dichotomic(train, (0.25, 0.75), levels=9, budget=100)
    assert [o.weight for o in outcomes] == [0.25, 0.75, 0.5]


def test_a_search_on_collapsed_or_diverged_networks_ends_and_names_why():
    collapsed = Hyperbola(collapse=0.0)
    nan = float("nan")
    for search in SEARCHES.values():
        outcomes = search(collapsed, (0.1, 0.2), levels=5, budget=9)
        assert len(outcomes) == 2
        for knee in (knee_by_chord(outcomes), knee_by_trade_off(outcomes)):
            assert knee.outcome is None and "0 trained networks on the front" in knee.reason
        outcomes = search(
            lambda ws: [Outcome(w, nan, nan, "diverged") for w in ws],
            (0.1, 0.2),
            levels=5,
            budget=9,
        )
        assert len(outcomes) == 2 and nondominated(outcomes) == []


@pytest.mark.parametrize("search", SEARCHES)
def test_collapse_at_one_end_leads_the_search_inward(search):
    """About the paper's numbers: the critical weight in [1e-5, 0.1], collapse at 0.005.

    Algorithm 3 does so with a closeness of the critical weights' own size; the next test says why.
    """
    front = Hyperbola(c=10.0, most=1e4, collapse=0.005)
    finer = {"closeness": 1e-5} if search == "stochastic" else {}
    outcomes = SEARCHES[search](front, (1e-5, 0.1), levels=12, budget=15, **finer)
    assert sum(o.status == "collapsed" for o in outcomes) < 12
    knee = knee_by_chord(outcomes)
    assert knee.outcome is not None and knee.outcome.status == "trained"
    assert 5e-5 < knee.outcome.weight < 1e-3


def test_with_the_papers_closeness_small_weights_are_all_near_each_other():
    """0.001 is several times the critical weight: most draws fall around lambda_1."""
    front = Hyperbola(c=10.0, most=1e4, collapse=0.005)
    SEARCHES["stochastic"](front, (1e-5, 0.1), levels=12, budget=15)
    assert sum(weight < 2e-5 for weight in front.trained) >= 8


def test_bisection_closes_in_on_the_smallest_weight_that_collapses():
    """Collapsed networks differ in their biases, so in a last digit of the loss: no matter."""
    noise = np.random.default_rng(5)

    def train(weights):
        return [
            Outcome(w, 2.3 + 1e-6 * noise.random(), 0.0, "collapsed")
            if w > 0.005
            else Outcome(w, 0.05 + w, 1 / (w + 1e-3))
            for w in weights
        ]

    outcomes = bisection(train, (0.0, 0.1), levels=9, budget=7)
    wanted = [0.0, 0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]
    assert [o.weight for o in outcomes] == pytest.approx(wanted)


def test_a_draw_that_has_no_room_is_left_out():
    """lambda_1 = 0: around it there is nothing to draw from."""
    front = Hyperbola(c=1e-8, most=100.0)
    outcomes = stochastic_dichotomic(
        front, (0.0, 1e-4), levels=3, budget=9, rng=np.random.default_rng(0)
    )
    assert len({o.weight for o in outcomes}) == len(outcomes)


@pytest.mark.parametrize("knee", [knee_by_chord, knee_by_trade_off])
def test_the_corner_of_two_lines_is_the_knee(knee):
    found = knee(corner())
    assert (found.outcome.complexity, found.outcome.loss) == pytest.approx((200.0, 0.05))
    assert found.reason == ""


@settings(deadline=None, max_examples=100)
@given(a=st.floats(1e-6, 1e6), b=st.floats(1e-6, 1e6))
def test_knees_do_not_depend_on_units(a, b):
    scaled = [Outcome(o.weight, a * o.loss, b * o.complexity) for o in corner()]
    for knee in (knee_by_chord, knee_by_trade_off):
        assert knee(scaled).outcome.weight == knee(corner()).outcome.weight
        assert knee(scaled).value == pytest.approx(knee(corner()).value, rel=1e-6)


def test_values_of_the_two_criteria_by_hand():
    """Ends (0, 1) and (1, 0), and (0.2, 0.1): 0.7/sqrt 2 below the chord; slopes 4.5 and 1/8."""
    outcomes = [Outcome(0.9, 1.0, 0.0), Outcome(0.5, 0.1, 0.2), Outcome(0.1, 0.0, 1.0)]
    assert knee_by_chord(outcomes).value == pytest.approx(0.7 / math.sqrt(2))
    bend = math.degrees(math.atan(4.5) - math.atan(1 / 8))
    assert knee_by_trade_off(outcomes).value == pytest.approx(bend)
    assert normalised(outcomes)[:, 1].tolist() == [0, 0.2, 1]


def test_dominated_and_collapsed_outcomes_do_not_move_the_knee():
    others = [Outcome(0.01, 0.5, 1999.0), Outcome(0.9, 2.3, 0.0, "collapsed")]
    for knee in (knee_by_chord, knee_by_trade_off):
        assert knee(corner() + others).outcome == knee(corner()).outcome


def test_fronts_without_a_knee_say_so():
    straight = [Outcome(0.1, 1 - i / 9, i / 9) for i in range(10)]
    bulging = [Outcome(0.1, math.sqrt(1 - (i / 9) ** 2), i / 9) for i in range(10)]
    for front in (straight, bulging):
        found = knee_by_chord(front)
        assert found.outcome is None and "no point lies 0.05 below the chord" in found.reason
        found = knee_by_trade_off(front)
        assert found.outcome is None and "bends by less than 10 degrees anywhere" in found.reason
    for front in ([], straight[:1], straight[:2]):
        for knee in (knee_by_chord, knee_by_trade_off):
            assert f"{len(front)} trained networks on the front" in knee(front).reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bisection(Hyperbola(), (0.2, 0.1), levels=2, budget=9),
            r"interval: got 0\.2, 0\.1, want lambda_1 < lambda_2",
        ),
        (
            lambda: bisection(Hyperbola(), (0.2, 1.0), levels=2, budget=9),
            r"high: got 1\.0, want at least 0 and below 1",
        ),
        (
            lambda: bisection(Hyperbola(), (0.1, 0.2), levels=0, budget=9),
            "levels: got 0, want a whole number >= 1",
        ),
        (
            lambda: bisection(Hyperbola(), (0.1, 0.2), levels=2, budget=1),
            "budget: got 1, want 2 trainings or more",
        ),
        (
            lambda: fixed_list(Hyperbola(), [-0.1]),
            r"weight: got -0\.1, want at least 0 and below 1",
        ),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
