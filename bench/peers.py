"""The general solvers, called by their own interfaces on the form each is fastest with.

Each is given an accuracy of its own. What that is worth to the certificate differs between them, so
`solve_unit` goes down a ladder of accuracies until the certificate, recomputed by us, holds, and
the time is that of the one run that did. Setting a solver up counts, stating the form for it does
not.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from bench.forms import FORMS, Form, multiplier
from solvers import Certificate, RegularisedProgram
from solvers.program import Program

Limits = tuple[float, float]  # what a gap and a violation must be within
TIME_LIMIT = 60.0
"""Seconds for one run, which a failure is counted as."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver gives: point, dual values of G x <= h and A x = b, what it says of itself."""

    x: np.ndarray
    below: np.ndarray
    equal: np.ndarray
    iterations: int
    status: str


@dataclass(frozen=True)
class Peer:
    """A solver: the package to import, how to call it, the forms to try, its accuracies."""

    package: str
    solve: Callable[[Form, float], Solution]
    forms: tuple[str, ...]
    ladder: tuple[float, ...]
    ball: bool = False

    @property
    def available(self) -> bool:
        """Whether the package can be imported."""
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True, eq=False)
class Attempt:
    """One run at one accuracy of the solver's own, judged by the program."""

    accuracy: float
    weight: np.ndarray
    certificate: Certificate
    certified: bool
    iterations: int
    status: str
    seconds: float
    cpu_seconds: float


def by_clarabel(form: Form, accuracy: float) -> Solution:
    """Interior points; the only one here besides SCS that takes a ball."""
    import clarabel

    below, under = form.rows_below
    rows, bound, cones = [form.equal, below], [form.equal_to, under], []
    if form.equal.shape[0]:
        cones.append(clarabel.ZeroConeT(form.equal.shape[0]))
    cones.append(clarabel.NonnegativeConeT(len(under)))
    if form.ball is not None:
        matrix, right = _ball_rows(form)
        rows.append(matrix)
        bound.append(right)
        cones.append(clarabel.SecondOrderConeT(len(right)))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.time_limit = TIME_LIMIT
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = accuracy
    solver = clarabel.DefaultSolver(
        sp.csc_matrix(sp.triu(form.quadratic)),
        form.linear,
        sp.csc_matrix(sp.vstack(rows)),
        np.concatenate(bound),
        cones,
        settings,
    )
    answer = solver.solve()
    equal = form.equal.shape[0]
    z = np.asarray(answer.z)
    return Solution(
        np.asarray(answer.x), z[equal:], z[:equal], int(answer.iterations), str(answer.status)
    )


def by_scs(form: Form, accuracy: float) -> Solution:
    """Splitting on a homogeneous embedding, one sparse factorisation."""
    import scs

    below, under = form.rows_below
    rows, bound = [form.equal, below], [form.equal_to, under]
    cone: dict[str, Any] = {"z": form.equal.shape[0], "l": len(under)}
    if form.ball is not None:
        matrix, right = _ball_rows(form)
        rows.append(matrix)
        bound.append(right)
        cone["q"] = [len(right)]
    data = {
        "P": sp.csc_matrix(sp.triu(form.quadratic)),
        "A": sp.csc_matrix(sp.vstack(rows)),
        "b": np.concatenate(bound),
        "c": form.linear,
    }
    solver = scs.SCS(
        data,
        cone,
        eps_abs=accuracy,
        eps_rel=accuracy,
        max_iters=1_000_000,
        time_limit_secs=TIME_LIMIT,
        verbose=False,
    )
    answer = solver.solve()
    equal, y = form.equal.shape[0], np.asarray(answer["y"])
    info = answer["info"]
    return Solution(np.asarray(answer["x"]), y[equal:], y[:equal], info["iter"], info["status"])


def by_osqp(form: Form, accuracy: float) -> Solution:
    """Splitting with one sparse factorisation, polished at the end."""
    import osqp

    equal = form.equal.shape[0]
    below, under = form.rows_below
    solver = osqp.OSQP()
    solver.setup(
        sp.csc_matrix(sp.triu(form.quadratic)),
        form.linear,
        sp.csc_matrix(sp.vstack([form.equal, below])),
        np.concatenate([form.equal_to, np.full(len(under), -np.inf)]),
        np.concatenate([form.equal_to, under]),
        eps_abs=accuracy,
        eps_rel=accuracy,
        max_iter=1_000_000,
        time_limit=TIME_LIMIT,
        polishing=True,
        verbose=False,
    )
    answer = solver.solve(raise_error=False)
    x, y = np.asarray(answer.x, dtype=float), np.asarray(answer.y, dtype=float)
    return Solution(x, y[equal:], y[:equal], int(answer.info.iter), str(answer.info.status))


def by_piqp(form: Form, accuracy: float) -> Solution:
    """Interior points with proximal terms; dense or sparse as the form is."""
    import piqp

    dense = form.name in ("gram", "doubled")
    solver = piqp.DenseSolver() if dense else piqp.SparseSolver()
    settings = solver.settings
    settings.verbose = False
    settings.eps_abs = settings.eps_rel = accuracy
    settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = accuracy
    has_equal = form.equal.shape[0] > 0
    matrices = [form.quadratic, form.equal if has_equal else None, form.below]
    if dense:
        matrices = [None if m is None else np.asfortranarray(m.toarray()) for m in matrices]
    quadratic, equal, below = matrices
    unbounded = np.full(len(form.bound), -np.inf)
    solver.setup(
        quadratic,
        form.linear,
        equal,
        form.equal_to if has_equal else None,
        below,
        unbounded,
        form.bound,
        form.lower,
        None,
    )
    status = solver.solve()
    result = solver.result
    return Solution(
        np.asarray(result.x),
        np.asarray(result.z_u),
        np.asarray(result.y),
        int(result.info.iter),
        str(status),
    )


def by_proxqp(form: Form, accuracy: float) -> Solution:
    """Proximal augmented Lagrangian; dense or sparse as the form is."""
    from proxsuite import proxqp

    dense = form.name in ("gram", "doubled")
    sizes = len(form.linear), form.equal.shape[0], form.below.shape[0]
    bounded = form.lower is not None
    solver = proxqp.dense.QP(*sizes, bounded) if dense else proxqp.sparse.QP(*sizes)
    solver.settings.eps_abs = accuracy
    solver.settings.eps_rel = 0.0
    matrices = [form.quadratic, form.equal, form.below]
    if dense:
        matrices = [matrix.toarray() for matrix in matrices]
    quadratic, equal, below = matrices
    unbounded = np.full(len(form.bound), -1e20)
    bounds = (form.lower, np.full(sizes[0], 1e20)) if bounded else ()
    solver.init(quadratic, form.linear, equal, form.equal_to, below, unbounded, form.bound, *bounds)
    solver.solve()
    result = solver.results
    return Solution(
        np.asarray(result.x),
        np.asarray(result.z),
        np.asarray(result.y),
        int(result.info.iter),
        str(result.info.status),
    )


_INTERIOR = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_FIRST_ORDER = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
# The first form of each is its fastest on 784 inputs and 2000 samples (--forms).
PEERS = {
    "clarabel": Peer(
        "clarabel", by_clarabel, ("gram", "folded", "lifted", "doubled"), _INTERIOR, True
    ),
    "scs": Peer("scs", by_scs, ("gram", "folded", "lifted", "doubled"), _FIRST_ORDER, True),
    "osqp": Peer("osqp", by_osqp, ("gram", "lifted", "folded", "doubled"), _FIRST_ORDER),
    "piqp": Peer("piqp", by_piqp, ("doubled", "gram", "folded", "lifted"), _INTERIOR),
    "proxqp": Peer("proxsuite", by_proxqp, ("doubled", "gram", "folded"), _FIRST_ORDER),
}
"""In the constrained form the balls are stated lifted, which ties all units."""


def attempts(
    peer: Peer, form: Form, program: Program, limits: Limits, first: float | None = None
) -> Iterator[Attempt]:
    """Run a solver at one accuracy after another until the certificate is within the limits.

    `first` is where to begin: the accuracy that was enough before. A run that takes the time limit
    is the last.
    """
    for accuracy in peer.ladder:
        if first is not None and accuracy > first:
            continue
        started, used = time.perf_counter(), time.process_time()
        solution = peer.solve(form, accuracy)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        yield judged(program, form, solution, accuracy, limits, (seconds, cpu))
        if cpu >= TIME_LIMIT:
            return


def judged(
    program: Program,
    form: Form,
    solution: Solution,
    accuracy: float,
    limits: Limits,
    times: tuple[float, float],
) -> Attempt:
    """The certificate of what a solver gave, from the program's data."""
    weight = form.weight(solution.x)
    off = int((~program.active).sum())
    linked = None if isinstance(program, RegularisedProgram) else solution.equal
    nu = multiplier(program, weight, solution.below[:off], linked)
    finite = bool(np.isfinite(weight).all() and np.isfinite(nu).all())
    certificate = program.certificate(weight, nu)
    certified = finite and bool(np.all(certificate.within(*limits)))
    return Attempt(
        accuracy,
        weight,
        certificate,
        certified,
        solution.iterations,
        solution.status,
        *times,
    )


def solve_unit(
    name: str, program: Program, limits: Limits, form: str, first: float | None = None
) -> Attempt:
    """The first attempt of a peer that is certified, or its last."""
    stated = FORMS[form](program)
    last: Attempt | None = None
    for attempt in attempts(PEERS[name], stated, program, limits, first):
        last = attempt
        if attempt.certified:
            break
    assert last is not None
    return last


def absent() -> list[str]:
    """Peers whose package cannot be imported."""
    return [name for name, peer in PEERS.items() if not peer.available]


def _ball_rows(form: Form) -> tuple[sp.csc_matrix, np.ndarray]:
    """Rows and right side of the cone |F x - f| <= epsilon: s = (epsilon, F x - f)."""
    assert form.ball is not None
    ball = form.ball
    top = sp.csc_matrix((1, ball.matrix.shape[1]))
    return sp.vstack([top, -ball.matrix]), np.concatenate([[ball.epsilon], -ball.centre])
