"""What Newton's method keeps of the units of a layer: their data, where they stand, working sets.

A unit's own problem is over the inputs W near their bound and the ceilings K near to being met
(`newton_unit`); `newton_block` looks at all inputs and all samples, and tells which others belong
in. The Gram matrix of the fitted samples depends on W alone: it is kept and grows with W.

**Precision.** That matrix is only what F's quadratic part on Omega is predicted by from a round's
first point on; the gradient there is a product of its own, each round. With a matrix
off by E a round's solution is off by H^-1 D E (x - x0), so that rounds correct it as they correct
everything else, the faster the smaller E against G: 1e-7 in float32, which takes half the time to
make. Where that is not enough (a round that gains nothing, or tolerances near what it could leave
for good) the matrix is made again in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from solvers.newton.unit import Gram, Inner, minimise

_MARGIN = 0.1
"""Inputs with |c| above weight (1 - margin) join the working set. Twice as large makes larger
systems and fewer rounds. Tuned on the layers of the bench."""

_NEAR = 0.1
"""Ceilings closer than this share of the unit's root mean square distance to them join the working
set. As `_MARGIN`."""

CHUNK = 8192
"""Samples whose inputs are gathered at a time. Twice as many take that much more memory; the sums'
order, and their last bits, change."""

_FINE = 1e-9
"""Accuracy of the optimality conditions from which matrices are made in float64 at once. A larger
one makes more of them in float64 than need be."""

_SINGLE = 1e12
"""Largest magnitude, and its inverse the smallest, whose squares float32 holds with room for sums
(its range ends at 1e38). Larger ones would overflow in sums over samples."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What all units of a layer share.

    Attributes
    ----------
    inputs : array, shape (n_samples, n_in)
        X in float64.
    weight, ridge : array, shape (n_in,)
        The penalty of each input; both zero for a free one.
    box : array, shape (n_in,)
        What an input's dual is measured by: its weight, or the smallest weight for a free one.
    lengths : array, shape (n_in,)
        Norm of each input over the samples.
    exact : array, shape (n_samples, n_in)
        X in the data's dtype, to gather from.
    single : array, shape (n_samples, n_in), or None
        X in float32, where its range allows.
    gram : array, shape (n_in, n_in), or None
        X^T X, if it is worth its size: a unit that fits most samples subtracts the others' from it.
    """

    inputs: np.ndarray
    weight: np.ndarray
    ridge: np.ndarray
    box: np.ndarray
    lengths: np.ndarray
    exact: np.ndarray
    single: np.ndarray | None
    gram: np.ndarray | None

    @staticmethod
    def of(
        exact: np.ndarray,
        weight: np.ndarray,
        ridge: np.ndarray,
        gram: np.ndarray | None = None,
        *,
        single: bool = True,
    ) -> Shared:
        """Make the copies of X, that in float32 if it is wanted.

        Parameters
        ----------
        exact : ndarray, shape (n_samples, n_in), float64
            Inputs X.
        weight : ndarray, shape (n_in,)
            Weight of each input in the l1 norm.
        ridge : ndarray, shape (n_in,)
            Weight of each input in half the squared norm.
        gram : ndarray, shape (n_in, n_in), optional
            X^T X, where it is known.
        single : bool, optional
            Whether X is held in float32 too, where that can hold it.

        Returns
        -------
        Shared
            What all units use.
        """
        inputs = np.ascontiguousarray(exact, dtype=np.float64)
        lengths = np.sqrt(np.einsum("ji,ji->i", inputs, inputs))
        rough = exact.astype(np.float32, copy=False) if single else None
        # The projection that makes a free input's dual vanish moves the others' by as much.
        box = np.where(weight > 0, weight, weight[weight > 0].min(initial=math.inf))
        return Shared(inputs, weight, ridge, box, lengths, exact, rough, gram)


@dataclass(frozen=True, eq=False)
class Units:
    """The data of some units, each a row.

    Attributes
    ----------
    level, active : array, shape (units, n_samples)
        What to fit on Omega, the ceiling off it; Omega.
    allowed : bool array, shape (units, n_in)
        Inputs that may be nonzero.
    floor : array, shape (units,)
        A gap is relative to the objective or to this, whichever is larger.
    scale : array, shape (units,)
        What violations are relative to.
    """

    level: np.ndarray
    active: np.ndarray
    allowed: np.ndarray
    floor: np.ndarray
    scale: np.ndarray


@dataclass(eq=False)
class Points:
    """Where some units stand, each a row.

    Attributes
    ----------
    u, nu : array, shape (units, n_in), (units, n_samples)
        Weights, exactly zero off their support, and multipliers.
    sigma, tau : array, shape (units,)
        Proximal parameters to begin with.
    steps : int array, shape (units,)
        Newton steps so far.
    gap, violation, residual : array, shape (units,)
        By the units' own estimates; |(Xu - y)_Omega|.
    """

    u: np.ndarray
    nu: np.ndarray
    sigma: np.ndarray
    tau: np.ndarray
    steps: np.ndarray
    gap: np.ndarray
    violation: np.ndarray
    residual: np.ndarray

    @staticmethod
    def at(u: np.ndarray, nu: np.ndarray, sigma: np.ndarray, tau: np.ndarray) -> Points:
        """Points nothing is known of yet.

        Parameters
        ----------
        u : ndarray, shape (units, n_in)
            Weights.
        nu : ndarray, shape (units, n_samples)
            Multipliers.
        sigma, tau : ndarray, shape (units,)
            First weights of the two proximal terms.

        Returns
        -------
        Points
            With infinite gaps and no steps taken.
        """
        count, unknown = len(u), np.full(len(u), math.inf)
        steps = np.zeros(count, dtype=int)
        return Points(u, nu, sigma, tau, steps, unknown, unknown.copy(), unknown.copy())

    def take(self, rows: slice | np.ndarray) -> Points:
        """Copy some of them.

        Parameters
        ----------
        rows : slice or int array
            Which units.

        Returns
        -------
        Points
            A copy.
        """
        return Points(*(np.array(getattr(self, name)[rows]) for name in self.__annotations__))

    def put(self, rows: slice | np.ndarray, others: Points) -> None:
        """Write others over some of them; the first sigma and tau stay.

        Parameters
        ----------
        rows : slice or int array
            Which units.
        others : Points
            What to write there.
        """
        for name in ("u", "nu", "steps", "gap", "violation", "residual"):
            getattr(self, name)[rows] = getattr(others, name)


@dataclass(frozen=True, eq=False)
class Turn:
    """What one round asks of a unit's Newton steps.

    Attributes
    ----------
    z : array, shape (n_samples,)
        The unit's responses where the steps begin.
    gradient : array, shape (n_in,)
        X^T nu on Omega there.
    centre_u : array, shape (n_in,)
        The weights that the proximal term holds on to.
    centre_nu : array, shape (n_samples,)
        The multiplier at the centre.
    slack : float
        s of `solve_block`.
    accuracy : float
        Of the optimality conditions, relative to the inputs' boxes.
    max_steps : int
        Limit on all Newton steps of the unit so far and in this round.
    """

    z: np.ndarray
    gradient: np.ndarray
    centre_u: np.ndarray
    centre_nu: np.ndarray
    slack: float
    accuracy: float
    max_steps: int


@dataclass(eq=False)
class Work:
    """A unit's working sets and Gram matrices.

    Attributes
    ----------
    inputs : int array, shape (|W|,)
    fitted : array, shape (|W|, |W|)
        X_W^T X_W over Omega.
    over : Gram
        The same over the ceilings in play.
    extra : bool array, shape (n_samples,)
        Ceilings that turned out to belong in K.
    seen, responses : array, shape (|K|,)
        The K of the last run, and its responses after it.
    precision : type
        What `fitted` is made in, float32 or float64.
    """

    inputs: np.ndarray
    fitted: np.ndarray
    over: Gram
    extra: np.ndarray
    seen: np.ndarray
    responses: np.ndarray
    precision: Any

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return 16 * len(self.inputs) ** 2 + 2 * len(self.extra)

    @staticmethod
    def build(
        shared: Shared, units: Units, b: int, u: np.ndarray, c: np.ndarray, precision: Any
    ) -> Work:
        """Begin with the inputs that are nonzero or near their bound.

        Parameters
        ----------
        shared : Shared
            Inputs and penalty, the same for all units.
        units : Units
            Data of a block of units.
        b : int
            Number of the unit in the block.
        u : ndarray, shape (n_in,)
            The unit's weights.
        c : ndarray, shape (n_in,)
            X^T nu.
        precision : dtype
            Of the fitted samples' matrix.

        Returns
        -------
        Work
            The unit's working sets and their matrices.
        """
        near = (u != 0) | (shared.weight == 0) | (np.abs(c) > shared.weight * (1 - _MARGIN))
        inputs = np.flatnonzero(near & units.allowed[b])
        nothing = np.zeros(len(shared.inputs), dtype=bool)
        square = np.zeros((len(inputs), len(inputs)))
        none = np.zeros(0, dtype=int)
        fitted = fitted_matrix(shared, units.active[b], inputs, inputs, precision)
        over, extra = Gram(square, nothing), nothing.copy()
        return Work(inputs, fitted, over, extra, none, np.zeros(0), precision)

    def refine(self, shared: Shared, units: Units, b: int) -> bool:
        """Make the fitted samples' matrix in float64; tell if it was not.

        Parameters
        ----------
        shared : Shared
            Inputs and penalty, the same for all units.
        units : Units
            Data of a block of units.
        b : int
            Number of the unit in the block.

        Returns
        -------
        bool
            False where it was in float64 already.
        """
        if self.precision is np.float64:
            return False
        self.precision = np.float64
        self.fitted = fitted_matrix(shared, units.active[b], self.inputs, self.inputs, np.float64)
        return True

    def run(self, shared: Shared, units: Units, now: Points, b: int, turn: Turn) -> None:
        """Minimise the unit's F over W and K, and write the weights and the steps to `now`.

        Parameters
        ----------
        shared : Shared
            Inputs and penalty, the same for all units.
        units : Units
            Data of a block of units.
        now : Points
            Where the units stand; this unit's weights and steps are written.
        b : int
            Number of the unit in the block.
        turn : Turn
            What this turn asks of the unit.
        """
        level, tau, sigma = units.level[b], float(now.tau[b]), float(now.sigma[b])
        distance = np.where(units.active[b], 0.0, turn.z - level)
        width = _NEAR * math.sqrt(float(distance @ distance) / max(1, len(turn.z)))
        near = (distance > -width) | (turn.centre_nu + tau * distance > 0) | self.extra
        samples = np.flatnonzero((near & ~units.active[b]) | self.over.included)
        inner = Inner(
            samples,
            _gather(shared.exact, samples, self.inputs),
            level[samples],
            turn.centre_nu[samples],
            shared.weight[self.inputs],
            shared.ridge[self.inputs],
            shared.box[self.inputs],
            turn.centre_u[self.inputs],
            self.fitted,
            0.0 if math.isinf(turn.slack) else tau / (1 + tau * turn.slack),
            sigma,
            tau,
            float(units.floor[b]),
        )
        x, self.responses, steps = minimise(
            inner,
            self.over,
            now.u[b, self.inputs],
            turn.z[samples],
            turn.gradient[self.inputs],
            turn.accuracy,
            turn.max_steps - int(now.steps[b]),
        )
        now.u[b, self.inputs] = x
        now.steps[b] += steps
        self.seen = samples

    def enlarge(
        self,
        shared: Shared,
        units: Units,
        b: int,
        nu: np.ndarray,
        c: np.ndarray,
        accuracy: float,
    ) -> bool:
        """Take in the inputs and the ceilings that the last solution wants; tell if there are.

        Parameters
        ----------
        shared : Shared
            Inputs and penalty, the same for all units.
        units : Units
            Data of a block of units.
        b : int
            Number of the unit in the block.
        nu : ndarray, shape (n_samples,)
            The unit's multipliers.
        c : ndarray, shape (n_in,)
            X^T nu.
        accuracy : float
            How far beyond its bound an input may be and stay out.

        Returns
        -------
        bool
            Whether the working sets grew.
        """
        pushed = ~units.active[b] & (nu > 0)
        pushed[self.seen] = False
        self.extra |= pushed
        size = np.abs(c)
        outside = units.allowed[b] & (size > shared.weight + accuracy * shared.box)
        outside[self.inputs] = False
        if outside.any():
            near = units.allowed[b] & (size > shared.weight * (1 - _MARGIN))
            near[self.inputs] = False
            self._add(shared, np.flatnonzero(near), units.active[b])
        return bool(pushed.any() or outside.any())

    def _add(self, shared: Shared, new: np.ndarray, active: np.ndarray) -> None:
        """Let inputs join W: their rows of the Gram matrices beside the ones there are."""
        everything = np.concatenate([self.inputs, new])
        size = len(self.inputs)

        def widen(old: np.ndarray, rows: np.ndarray) -> np.ndarray:
            wider = np.empty((len(everything), len(everything)))
            wider[:size, :size] = old
            wider[size:] = rows
            wider[:size, size:] = wider[size:, :size].T
            return wider

        over = np.flatnonzero(self.over.included)
        fitted = fitted_matrix(shared, active, new, everything, self.precision)
        self.fitted = widen(self.fitted, fitted)
        pushed = _gram(shared.exact, over, new, everything, np.float64)
        self.over.matrix = widen(self.over.matrix, pushed)
        self.inputs = everything


def precision_for(shared: Shared, slack: float, accuracy: float) -> Any:
    """What to make the fitted samples' matrices in.

    Parameters
    ----------
    shared : Shared
        Inputs, also in float32 where that serves.
    slack : float
        s = 1 / (2 fit_weight); 0 fits exactly.
    accuracy : float
        Accuracy asked of the solve.

    Returns
    -------
    dtype
        numpy.float32 or numpy.float64.
    """
    rough = shared.single is not None and slack > 0 and accuracy >= _FINE
    return np.float32 if rough else np.float64


def holds_single(size: float) -> bool:
    """Tell whether float32 holds the squares of numbers of this magnitude.

    Parameters
    ----------
    size : float
        A magnitude, at least 0.

    Returns
    -------
    bool
        Whether its square neither vanishes nor overflows in float32.
    """
    return size == 0 or 1 / _SINGLE <= size <= _SINGLE


@njit(cache=True, nogil=True)
def _copy(inputs, samples, columns, out):  # type: ignore[no-untyped-def]
    for j in range(len(samples)):
        row = inputs[samples[j]]
        for i in range(len(columns)):
            out[j, i] = row[columns[i]]


def _gather(
    inputs: np.ndarray, samples: np.ndarray, columns: np.ndarray, dtype: Any = np.float64
) -> np.ndarray:
    """inputs[samples][:, columns], without the copy between."""
    out = np.empty((len(samples), len(columns)), dtype=dtype)
    _copy(inputs, samples, columns, out)
    return out


def fitted_matrix(
    shared: Shared, active: np.ndarray, left: np.ndarray, right: np.ndarray, precision: Any
) -> np.ndarray:
    """X_left^T X_right over Omega: the sum over it, or all but the sum over the rest.

    Parameters
    ----------
    shared : Shared
        Inputs, and X^T X where it is known.
    active : bool array, shape (n_samples,)
        Omega of the unit.
    left, right : int array
        Numbers of the inputs.
    precision : dtype
        Of the sums.

    Returns
    -------
    ndarray, shape (len(left), len(right))
        The product.
    """
    on, off = np.flatnonzero(active), np.flatnonzero(~active)
    if shared.gram is None or len(on) <= len(off):
        return _gram(shared.exact, on, left, right, precision)
    total = _gather(shared.gram, left, right)
    total -= _gram(shared.exact, off, left, right, precision)
    return total


def _gram(
    inputs: np.ndarray, samples: np.ndarray, left: np.ndarray, right: np.ndarray, precision: Any
) -> np.ndarray:
    """X_left^T X_right over some samples, a chunk of them at a time, summed in float64."""
    total = np.zeros((len(left), len(right)))
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        first = _gather(inputs, chunk, left, precision)
        second = first if left is right else _gather(inputs, chunk, right, precision)
        total += first.T @ second
    return total
