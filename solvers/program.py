"""The two programs of Net-Trim, which judge any solver's answer from their own data.

With inputs X (P, N), a set of fitted entries Omega (`active`) and one array `level` that holds what
to fit on Omega (y) and the ceiling off it (v), find weights U (N, M):

    constrained, (4)-(6):  minimise  penalty(U)
                           subject to  |(XU - y)_Omega|_F <= epsilon,   XU <= v off Omega

    regularised, (11):     minimise  penalty(u) + fit_weight |(Xu - y)_Omega|^2
                           subject to  Xu <= v off Omega                for each unit u

**Dual bound.** Take a multiplier nu (P, M) for z = XU, nu >= 0 off Omega, and c = X^T nu. The
Lagrangian penalty(U) + g(z) + <nu, XU - z>, minimised over U and z, bounds the optimum below by

    constrained:  D = -<nu, y>_Omega - <nu, v>_off - epsilon |nu_Omega|_F - conjugate(-c)
    regularised:  D = -<nu, y>_Omega - <nu, v>_off - |nu_Omega|^2 / (4 fit_weight) - conjugate(-c)

No primal feasibility is needed. nu may be scaled by any s >= 0, and `Penalty.scale_dual` takes the
best. Two kinds of weights change c. An entry held at zero (`support` False) is no variable: its c
drops out. A free row (the bias) has no penalty, so its c must vanish: for a row with samples x, nu
is replaced by its Euclidean projection onto {x^T nu = 0, nu >= 0 off Omega}, which is nu - t x on
Omega and (nu - t x)_+ off it, t the root of x^T nu(t) = 0. (Clipping and then centring is wrong,
and leaving the row out gives no bound at all.)

Everything here is computed in float64 by blocks of units, whatever the data's dtype, in the data's
own array namespace, and is written apart from the solvers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, device

from solvers import checks
from solvers.arrays import like, to_numpy
from solvers.free_row import orthogonalise
from solvers.penalties import L1, Penalty
from solvers.result import Certificate

Array = Any

_BLOCK_ENTRIES = 4_000_000
"""Entries of a float64 block of samples times units, 32 MB. Twice as many take twice the memory; no
result depends on it."""

_ROWS = 8192
"""Samples whose inputs are cast to float64 at a time. Twice as many take more memory; sums over
them change their last bits."""

_SMALLEST, _LARGEST = 1e-150, 1e150
"""Magnitudes between which data must lie: float64 holds their squares, summed over any number of
samples. Derived from its range."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerProgram:
    """The data both programs share. Use `ConstrainedProgram` or `RegularisedProgram`.

    Attributes
    ----------
    inputs : array, shape (n_samples, n_in), float32 or float64
        X, one sample a row. A column of ones, if there is a bias, is the caller's.
    active : bool array, shape (n_samples, n_out)
        Omega: the fitted entries.
    level : array, shape (n_samples, n_out)
        What to fit on Omega, the ceiling off it.
    penalty : Penalty
        l1 by default.
    free_rows : tuple of int
        Rows of the weights without penalty: none, or one (the bias).
    support : bool array, shape (n_in, n_out), or None
        Weights that may be nonzero; None: all.
    old_weight : array, shape (n_in, n_out), or None
        The weights before retraining: a first point, and the scale below which a gap is rounding.
    """

    inputs: Array
    active: Array
    level: Array
    penalty: Penalty = field(default_factory=L1)
    free_rows: tuple[int, ...] = ()
    support: Array | None = None
    old_weight: Array | None = None

    def __post_init__(self) -> None:
        _check_data(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n_samples, n_in, n_out)."""
        return (*self.inputs.shape, self.level.shape[1])

    @property
    def penalised(self) -> np.ndarray:
        """Indices of the rows under the penalty."""
        return np.setdiff1d(np.arange(self.inputs.shape[1]), self.free_rows)

    def penalty_value(self, weight: Array) -> Array:
        """Penalty of `weight` (n_in, n_out) in float64: (n_out,) if separable, () if not.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights; free rows do not count.

        Returns
        -------
        array, shape (n_out,) or (), float64
            The penalty.
        """
        xp = array_namespace(self.inputs)
        rows = like(self.penalised, self.inputs)
        return self.penalty.value(xp.take(xp.astype(weight, xp.float64), rows, axis=0))

    def fitted_norms(self) -> np.ndarray:
        """Norm of each unit's fitted entries |y|_Omega in float64, shape (n_out,).

        Returns
        -------
        ndarray, shape (n_out,), float64
            The norms.
        """
        xp = array_namespace(self.inputs)
        squares = []
        for block in self._blocks():
            level = xp.astype(self.level[:, block], xp.float64)
            fitted = xp.where(self.active[:, block], level, xp.zeros_like(level))
            squares.append(xp.sum(fitted * fitted, axis=0))
        return to_numpy(xp.sqrt(xp.concat(squares)))

    def _blocks(self) -> Iterator[slice]:
        n_samples, _, n_out = self.shape
        width = max(1, _BLOCK_ENTRIES // n_samples)
        for start in range(0, n_out, width):
            yield slice(start, min(start + width, n_out))

    def forward(self, weight: Array) -> Array:
        """Return X weight in float64.

        Parameters
        ----------
        weight : array, shape (n_in, k)
            Weights of any number of units.

        Returns
        -------
        array, shape (n_samples, k), float64
            The units' responses.
        """
        xp = array_namespace(self.inputs)
        wide = xp.astype(weight, xp.float64)
        parts = [xp.astype(part, xp.float64) @ wide for part in self._chunks(self.inputs)]
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)

    def _adjoint(self, multiplier: Array) -> Array:
        """X^T multiplier in float64."""
        xp = array_namespace(self.inputs)
        total = None
        for part, nu in zip(self._chunks(self.inputs), self._chunks(multiplier), strict=True):
            term = xp.astype(part, xp.float64).T @ nu
            total = term if total is None else total + term
        return total

    @staticmethod
    def _chunks(array: Array) -> Iterator[Array]:
        for start in range(0, array.shape[0], _ROWS):
            yield array[start : start + _ROWS, ...]

    def _primal_sums(self, weight: Array) -> dict[str, Array]:
        """Sums over samples, unit by unit, that the objective and the violations are made of."""
        xp = array_namespace(self.inputs)
        sums: dict[str, list[Array]] = {"residual": [], "over": [], "largest": [], "scale": []}
        for block in self._blocks():
            active = self.active[:, block]
            level = xp.astype(self.level[:, block], xp.float64)
            difference = self.forward(weight[:, block]) - level
            nothing = xp.zeros_like(level)
            residual = xp.where(active, difference, nothing)
            over = xp.where(active, nothing, xp.maximum(difference, nothing))
            fitted = xp.where(active, level, nothing)
            sums["residual"].append(xp.sum(residual * residual, axis=0))
            sums["over"].append(xp.sum(over * over, axis=0))
            sums["largest"].append(xp.max(over, axis=0))
            sums["scale"].append(xp.sum(fitted * fitted, axis=0))
        return {name: xp.concat(parts) for name, parts in sums.items()}

    def _dual_sums(self, multiplier: Array) -> dict[str, Array]:
        """`linear` = -<nu, level>, `square` = |nu_Omega|^2, unit by unit, and c = X^T nu."""
        xp = array_namespace(self.inputs)
        linear, square, dual = [], [], []
        for block in self._blocks():
            nu = self._admissible(multiplier[:, block], block)
            fitted = xp.where(self.active[:, block], nu, xp.zeros_like(nu))
            linear.append(-xp.sum(nu * xp.astype(self.level[:, block], xp.float64), axis=0))
            square.append(xp.sum(fitted * fitted, axis=0))
            dual.append(self._adjoint(nu))
        c = xp.concat(dual, axis=1)
        if self.support is not None:
            c = xp.where(self.support, c, xp.zeros_like(c))
        return {
            "linear": xp.concat(linear),
            "square": xp.concat(square),
            "dual": -xp.take(c, like(self.penalised, self.inputs), axis=0),  # minimised over u
        }

    def _admissible(self, multiplier: Array, block: slice) -> Array:
        """Project a block of multipliers onto nu >= 0 off Omega and x^T nu = 0 for a free row."""
        xp = array_namespace(self.inputs)
        nu = xp.astype(multiplier, xp.float64)
        active = self.active[:, block]
        nu = xp.where(active, nu, xp.maximum(nu, xp.zeros_like(nu)))
        for row in self.free_rows:
            x = xp.astype(self.inputs[:, row], xp.float64)[:, None]
            moved = orthogonalise(nu, x, active)
            if self.support is not None:
                moved = xp.where(self.support[row, block], moved, nu)
            nu = moved
        return nu

    def old_penalty(self) -> Array:
        """Return the penalty of the old weights in float64; zero without any.

        Returns
        -------
        array, shape (n_out,) or ()
            One number a unit where the penalty is separable, else one for the layer.
        """
        xp = array_namespace(self.inputs)
        if self.old_weight is None:
            shape = (self.shape[2],) if self.penalty.separable else ()
            return xp.zeros(shape, dtype=xp.float64, device=device(self.inputs))
        return self.penalty_value(self.old_weight)

    def scale_floor(self) -> float:
        """Return a response norm for units that have nothing to fit.

        The violations are relative to |Y|; where a unit (or the layer) has no active entry, the
        ceilings' own size stands in, and 1 where these are zero too.

        Returns
        -------
        float
            |level|_F / sqrt(n_out), or 1.
        """
        xp = array_namespace(self.inputs)
        total = float(xp.sqrt(xp.sum(xp.astype(self.level, xp.float64) ** 2)))
        return total / math.sqrt(self.shape[2]) if total > 0 else 1.0

    def _check_weight(self, weight: Array) -> None:
        want = self.shape[1:]
        if tuple(weight.shape) != want:
            raise ValueError(f"weight: got {tuple(weight.shape)}, want shape {want}")

    def _check_multiplier(self, multiplier: Array) -> None:
        want = tuple(self.level.shape)
        if tuple(multiplier.shape) != want:
            raise ValueError(f"multiplier: got {tuple(multiplier.shape)}, want shape {want}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConstrainedProgram(LayerProgram):
    """Net-Trim's program (4), in the cascade (6): all units share one Frobenius ball.

    ::

        minimise    penalty(U)
        subject to  |(XU - y)_Omega|_F <= epsilon
                    XU <= v off Omega

    Attributes
    ----------
    epsilon : float
        Radius of the ball, >= 0, in the units of the responses.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equations (3)-(6).
    """

    epsilon: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.not_negative(epsilon=self.epsilon)

    def objective(self, weight: Array) -> np.ndarray:
        """Return penalty(weight), shape ().

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.

        Returns
        -------
        ndarray, shape (), float64
            The objective.
        """
        self._check_weight(weight)
        return to_numpy(array_namespace(weight).sum(self.penalty_value(weight)))

    def dual_bound(self, multiplier: Array) -> np.ndarray:
        """Return the lower bound on the optimum that `multiplier` proves, shape ().

        Each unit is first brought into its own box, where it has one; one factor, up or down, then
        scales the whole, since the ball ties the units together.

        Parameters
        ----------
        multiplier : array, shape (n_samples, n_out)
            Any numbers: they are made admissible first.

        Returns
        -------
        ndarray, shape (), float64
            At most the optimum.
        """
        self._check_multiplier(multiplier)
        xp = array_namespace(self.inputs)
        sums = self._dual_sums(multiplier)
        linear, square, dual = sums["linear"], sums["square"], sums["dual"]
        shrink = self.penalty.shrink_units(dual)
        linear, square, dual = linear * shrink, square * shrink**2, dual * shrink
        value = xp.sum(linear) - self.epsilon * xp.sqrt(xp.sum(square))
        if self.penalty.separable:
            # One ball: the scale is shared, so all units' duals count as one column.
            dual = xp.reshape(dual, (-1, 1))
        value = xp.reshape(value, (1,)) if self.penalty.separable else value
        scale = self.penalty.scale_dual(dual, value, xp.zeros_like(value))
        bound = scale * value - self.penalty.conjugate(scale * dual)
        return to_numpy(xp.reshape(bound, ()))

    def certificate(self, weight: Array, multiplier: Array) -> Certificate:
        """Judge a pair of weights (n_in, n_out) and multiplier (n_samples, n_out).

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.
        multiplier : array, shape (n_samples, n_out)
            Multiplier.

        Returns
        -------
        Certificate
            Objective, bound, gap and violations.
        """
        return self.certificate_beside(weight, self.dual_bound(multiplier))

    def certificate_beside(self, weight: Array, bound: np.ndarray) -> Certificate:
        """Judge weights (n_in, n_out) beside a bound that `dual_bound` has given.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.
        bound : ndarray, shape ()
            Lower bound on the optimum.

        Returns
        -------
        Certificate
            Objective, bound, gap and violations.
        """
        xp = array_namespace(self.inputs)
        objective = self.objective(weight)
        sums = {name: to_numpy(value) for name, value in self._primal_sums(weight).items()}
        residual = np.sqrt(np.sum(sums["residual"]))
        scale = np.sqrt(np.sum(sums["scale"]))
        if scale == 0:
            scale = self.scale_floor() * math.sqrt(self.shape[2])
        if self.epsilon > 0:
            ball = max(residual - self.epsilon, 0.0) / self.epsilon
        else:
            ball = residual / scale
        return Certificate(
            objective=objective,
            dual_bound=bound,
            gap=_gap(objective, bound, to_numpy(xp.sum(self.old_penalty()))),
            ball_violation=np.asarray(ball),
            ceiling_violation=np.sqrt(np.sum(sums["over"])) / scale,
            largest_violation=np.max(sums["largest"]),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class RegularisedProgram(LayerProgram):
    """Net-Trim's program (11): the fit in the objective, so that the units decouple.

    ::

        minimise    penalty(u) + fit_weight |(Xu - y)_Omega|^2      for each unit u
        subject to  Xu <= v off Omega

    Attributes
    ----------
    fit_weight : float
        lambda of (11), > 0, in units of weight / response^2.

    Raises
    ------
    ValueError
        Also if the penalty couples the units (group): this form exists because they decouple.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equation (11).
    """

    fit_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive(fit_weight=self.fit_weight)
        if not self.penalty.separable:
            raise ValueError(
                f"penalty: the {self.penalty.name} penalty couples the units, which the "
                "regularised form (11) solves one by one; use the constrained form (epsilon)"
            )

    def objective(self, weight: Array) -> np.ndarray:
        """Return penalty + fit_weight * squared residual of each unit, shape (n_out,).

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.

        Returns
        -------
        ndarray, shape (n_out,), float64
            The objective.
        """
        self._check_weight(weight)
        residual = self._primal_sums(weight)["residual"]
        return to_numpy(self.penalty_value(weight) + self.fit_weight * residual)

    def dual_bound(self, multiplier: Array) -> np.ndarray:
        """Return the lower bound of each unit that `multiplier` proves, shape (n_out,).

        Parameters
        ----------
        multiplier : array, shape (n_samples, n_out)
            Any numbers: they are made admissible first.

        Returns
        -------
        ndarray, shape (n_out,), float64
            At most the optimum.
        """
        self._check_multiplier(multiplier)
        sums = self._dual_sums(multiplier)
        linear, dual = sums["linear"], sums["dual"]
        quadratic = sums["square"] / (4 * self.fit_weight)
        scale = self.penalty.scale_dual(dual, linear, quadratic)
        bound = scale * linear - scale**2 * quadratic - self.penalty.conjugate(scale * dual)
        return to_numpy(bound)

    def penalty_floor(self) -> Array:
        """Return the old penalty of each unit, below a millionth of which its gap is rounding.

        A unit whose old weights are all zero has none, and its optimum may be zero too, a bias
        alone fitting its targets. The mean over the layer's units stands in.

        Returns
        -------
        array, shape (n_out,)
            In float64.
        """
        xp = array_namespace(self.inputs)
        old = self.old_penalty()
        return xp.where(old > 0, old, xp.mean(old))

    def certificate(self, weight: Array, multiplier: Array) -> Certificate:
        """Judge a pair of weights (n_in, n_out) and multiplier (n_samples, n_out), by unit.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.
        multiplier : array, shape (n_samples, n_out)
            Multiplier.

        Returns
        -------
        Certificate
            Objective, bound, gap and violations.
        """
        return self.certificate_beside(weight, self.dual_bound(multiplier))

    def certificate_beside(self, weight: Array, bound: np.ndarray) -> Certificate:
        """Judge weights (n_in, n_out) beside the units' bounds that `dual_bound` has given.

        Parameters
        ----------
        weight : array, shape (n_in, n_out)
            Weights.
        bound : ndarray, shape (n_out,)
            Lower bound on the optimum.

        Returns
        -------
        Certificate
            Objective, bound, gap and violations.
        """
        self._check_weight(weight)
        sums = {name: to_numpy(value) for name, value in self._primal_sums(weight).items()}
        objective = to_numpy(self.penalty_value(weight)) + self.fit_weight * sums["residual"]
        scale = np.sqrt(sums["scale"])
        scale = np.where(scale > 0, scale, self.scale_floor())
        return Certificate(
            objective=objective,
            dual_bound=bound,
            gap=_gap(objective, bound, to_numpy(self.penalty_floor())),
            ball_violation=np.zeros_like(scale),
            ceiling_violation=np.sqrt(sums["over"]) / scale,
            largest_violation=sums["largest"],
        )


Program = ConstrainedProgram | RegularisedProgram


def trim_program(
    inputs: Array,
    targets: Array,
    *,
    epsilon: float | None = None,
    fit_weight: float | None = None,
    activation: Literal["relu", "linear"] = "relu",
    ceilings: Array | None = None,
    penalty: Penalty | None = None,
    free_rows: tuple[int, ...] = (),
    support: Array | None = None,
    old_weight: Array | None = None,
) -> Program:
    """State TRIM(X, Y, V, epsilon) of the paper for one layer.

    Parameters
    ----------
    inputs : array, shape (n_samples, n_in)
        The layer's inputs X.
    targets : array, shape (n_samples, n_out)
        What the layer should give after its activation, Y.
    epsilon, fit_weight : float
        Exactly one of them: the ball's radius of (4)/(6), or lambda of (11).
    activation : {"relu", "linear"}
        With a ReLU the positive targets are fitted and the others lie under a ceiling. A layer
        without activation has every entry fitted and no ceiling.
    ceilings : array, shape (n_samples, n_out), optional
        V; zero by default. In the cascade the old weights' responses on the retrained inputs (6).
    penalty : Penalty, optional
        l1 by default.
    free_rows : tuple of int, optional
        Rows of the weights without penalty: the bias's.
    support : bool array, shape (n_in, n_out), optional
        Mask: False where a weight must be zero.
    old_weight : array, shape (n_in, n_out), optional
        Weights that the layer has; the scale of the gap, and where solvers begin.

    Returns
    -------
    ConstrainedProgram or RegularisedProgram

    Raises
    ------
    ValueError
        If not exactly one of `epsilon` and `fit_weight` is given, or an argument is malformed.

    Notes
    -----
    Costs nothing but a check of the arrays, which are not copied.

    References
    ----------
    Aghasi et al., Net-Trim (2017), equations (4)-(6) and (11).

    Examples
    --------
    >>> import numpy as np
    >>> from solvers import trim_program
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((50, 10)), rng.standard_normal((10, 3))
    >>> Y = np.maximum(X @ W, 0)
    >>> program = trim_program(X, Y, epsilon=0.1 * np.linalg.norm(Y), old_weight=W)
    >>> program.shape
    (50, 10, 3)
    >>> bool(program.certificate(W, np.zeros_like(Y)).ball_violation == 0)
    True
    """
    if (epsilon is None) == (fit_weight is None):
        raise ValueError("epsilon, fit_weight: want exactly one of the two")
    if activation not in ("relu", "linear"):
        raise ValueError(f"activation: got {activation!r}, want 'relu' or 'linear'")
    xp = array_namespace(inputs)
    if activation == "linear":
        if ceilings is not None:
            raise ValueError("ceilings: a layer without activation has none")
        active, level = xp.ones_like(targets, dtype=xp.bool), targets
    else:
        active = targets > 0
        level = xp.where(active, targets, xp.zeros_like(targets) if ceilings is None else ceilings)
    data: dict[str, Any] = {
        "inputs": inputs,
        "active": active,
        "level": level,
        "penalty": L1() if penalty is None else penalty,
        "free_rows": free_rows,
        "support": support,
        "old_weight": old_weight,
    }
    if epsilon is not None:
        return ConstrainedProgram(**data, epsilon=epsilon)
    assert fit_weight is not None
    return RegularisedProgram(**data, fit_weight=fit_weight)


def _gap(objective: np.ndarray, bound: np.ndarray, old_penalty: np.ndarray) -> np.ndarray:
    """|f - D| / max(|f|, |D|, 1e-6 penalty(old)), 0 where both are zero."""
    scale = np.maximum(np.maximum(np.abs(objective), np.abs(bound)), 1e-6 * old_penalty)
    return np.abs(objective - bound) / np.where(scale > 0, scale, 1.0)


def _check_data(program: LayerProgram) -> None:
    """Raise ValueError, naming the argument, for data that is no program."""
    inputs, active, level = program.inputs, program.active, program.level
    xp = array_namespace(inputs)
    for name, array in (("inputs", inputs), ("active", active), ("level", level)):
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, want a nonempty matrix")
    if inputs.dtype not in (xp.float32, xp.float64):
        raise ValueError(f"inputs: got {inputs.dtype}, want float32 or float64")
    if level.dtype != inputs.dtype:
        raise ValueError(f"level: got {level.dtype}, want the inputs' dtype {inputs.dtype}")
    if active.dtype != xp.bool:
        raise ValueError(f"active: got {active.dtype}, want bool")
    n_samples, n_in = inputs.shape
    n_out = level.shape[1]
    if level.shape[0] != n_samples:
        raise ValueError(f"level: got {level.shape[0]}, want {n_samples} rows, one a sample")
    if tuple(active.shape) != tuple(level.shape):
        raise ValueError(f"active: got {tuple(active.shape)}, want shape {tuple(level.shape)}")
    for name, array in (("inputs", inputs), ("level", level)):
        if not bool(xp.all(xp.isfinite(array))):
            raise ValueError(f"{name}: got NaN or infinity, want finite numbers")
        largest = float(xp.max(xp.abs(array)))
        if largest and not _SMALLEST <= largest <= _LARGEST:
            raise ValueError(
                f"{name}: want a largest magnitude from {_SMALLEST:g} to {_LARGEST:g}, "
                f"got {largest:g}"
            )
    if n_in <= len(program.free_rows):
        raise ValueError("inputs: want at least one column under the penalty")
    if len(program.free_rows) > 1 or any(not 0 <= row < n_in for row in program.free_rows):
        raise ValueError(
            f"free_rows: got {program.free_rows}, want at most one row number from 0 to {n_in - 1}"
        )
    for name in ("support", "old_weight"):
        array = getattr(program, name)
        if array is not None and tuple(array.shape) != (n_in, n_out):
            raise ValueError(f"{name}: got {tuple(array.shape)}, want shape {(n_in, n_out)}")
    if program.support is not None and program.support.dtype != xp.bool:
        raise ValueError(f"support: got {program.support.dtype}, want bool")
    if program.old_weight is not None and not bool(xp.all(xp.isfinite(program.old_weight))):
        raise ValueError("old_weight: got NaN or infinity, want finite numbers")
