"""What a Net-Trim run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import joblib

from retrain.methods.amounts import Amount, amount_for, check_amount, check_parallel
from retrain.stream.stream import LayerSpec
from solvers import L1, ElasticNet, Penalty, checks

# Values of the options of the same names; `Chosen` is the solver that ``"auto"`` becomes.
Scheme = Literal["parallel", "cascade"]
Form = Literal["constrained", "regularised"]
Solver = Literal["auto", "admm", "newton"]
Chosen = Literal["admm", "newton"]


@dataclass(frozen=True)
class NetTrimOptions:
    """What a Net-Trim run is asked to do.

    Attributes
    ----------
    scheme : {"cascade", "parallel"}
        Algorithm 2 or Algorithm 1.
    epsilon : float or None
        Absolute radius: of every layer (parallel), of the first (cascade), in the unit of |Y|_F.
    relative_epsilon : float or None
        The same, relative to the norm of the layer's targets. Exactly one of the two.
    sparsity : float, mapping from str to float, or None
        Fraction in [0, 1] of each layer's weights to make zero, one for all layers or by layer name
        or pattern: each layer then gets the epsilon (regularised form: the fit weight) at which its
        solution has so many zeros; the search begins at `relative_epsilon`.
    inflation : float
        gamma of (7), >= 1.
    form : {"constrained", "regularised"}
        Programs (4)/(6), or (11).
    fit_weight : float or None
        lambda of (11); by default |W_l|_1 / epsilon_l^2, see `retrain.methods.net_trim.method`.
    penalty : Penalty
        Penalty on the weights; l1 by default.
    penalise_bias : bool
        Whether the bias is penalised too; otherwise it is free.
    zeros : {"stay", "free"}
        Whether weights that are exactly zero in the dense network must stay so. Biases are not
        counted as weights.
    link_normalised : bool
        Whether `epsilon` is that of the link-normalised network: epsilon_l = epsilon times the
        product of |W_j|_1 over the layers up to l. For chains.
    solver : {"auto", "admm", "newton"}
        ADMM for all units at once, or `solvers.solve_newton`, which reaches tight tolerances and
        solves layers on which ADMM stops short. ``"auto"`` is Newton, except where the penalty
        couples the units (group) or the arrays are not in the processor's memory: `solver_on`.
    tolerance, violation_tolerance : float
        Largest relative duality gap and largest violation of a certified layer, see
        `solvers.Certificate`.
    max_iterations : int
        Largest number of solver iterations per layer: steps of ADMM, or Newton steps per unit.
    accept_inexact : bool
        Whether weights whose certificate falls short are used instead of the dense ones.
    memory : float
        Largest memory, in bytes, of one layer's solve; layers with more rows use a seeded sample.
    seed : int
        Seed of that sample.
    jobs : int
        Number of layers solved at the same time (parallel scheme).
    threads : int or None
        Number of linear algebra threads of each job; by default the machine's cores divided by
        `jobs`.

    Raises
    ------
    ValueError
        If an option is invalid, or two options exclude each other.

    References
    ----------
    Aghasi et al., Net-Trim (2017), programs (4), (6), (7), (11), Algorithms 1 and 2.
    """

    scheme: Scheme = "cascade"
    epsilon: float | None = None
    relative_epsilon: float | None = 0.05
    sparsity: Amount | None = None
    inflation: float = 1.1
    form: Form = "constrained"
    fit_weight: float | None = None
    penalty: Penalty = field(default_factory=L1)
    penalise_bias: bool = False
    zeros: Literal["stay", "free"] = "stay"
    link_normalised: bool = False
    solver: Solver = "auto"
    tolerance: float = 1e-2
    violation_tolerance: float = 1e-3
    max_iterations: int = 5000
    accept_inexact: bool = False
    memory: float = 4 * 2**30
    seed: int = 0
    jobs: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.scheme not in ("cascade", "parallel"):
            raise ValueError(f"scheme: got {self.scheme!r}, want 'cascade' or 'parallel'")
        if self.form not in ("constrained", "regularised"):
            raise ValueError(f"form: got {self.form!r}, want 'constrained' or 'regularised'")
        if (self.epsilon is None) == (self.relative_epsilon is None):
            raise ValueError("epsilon, relative_epsilon: want exactly one of the two")
        for name in ("epsilon", "relative_epsilon"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r}, want a finite number >= 0")
        check_amount("sparsity", self.sparsity, 1.0)
        if self.sparsity is not None and self.epsilon is not None:
            raise ValueError("epsilon: a sparsity finds its own; want one of the two")
        if not (self.inflation >= 1 and math.isfinite(self.inflation)):
            raise ValueError(f"inflation: got {self.inflation!r}, want a finite number >= 1")
        if self.fit_weight is not None:
            if self.form == "constrained":
                raise ValueError("fit_weight: belongs to the regularised form; set form too")
            checks.positive(fit_weight=self.fit_weight)
        if self.form == "regularised" and not self.penalty.separable:
            raise ValueError(
                f"penalty: the {self.penalty.name} penalty couples the units, which the "
                "regularised form solves one by one; use the constrained form"
            )
        if self.zeros not in ("stay", "free"):
            raise ValueError(f"zeros: got {self.zeros!r}, want 'stay' or 'free'")
        if self.solver not in ("auto", "admm", "newton"):
            raise ValueError(f"solver: got {self.solver!r}, want 'auto', 'admm' or 'newton'")
        if self.solver == "newton" and not self.penalty.separable:
            raise ValueError(
                f"solver: newton solves the units one by one, which the {self.penalty.name} "
                "penalty couples; want admm"
            )
        radius = self.epsilon or self.relative_epsilon or 0.0
        if self.form == "regularised" and self.fit_weight is None and radius == 0:
            raise ValueError("fit_weight: want one in the regularised form when epsilon is 0")
        if self.link_normalised and self.epsilon is None:
            raise ValueError("link_normalised: gives an absolute epsilon its meaning; set epsilon")
        for name in ("tolerance", "violation_tolerance", "memory"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r}, want a positive finite number")
        checks.count(1, max_iterations=self.max_iterations)
        if self.max_iterations >= 2**31:  # the kernels count in fixed widths
            raise ValueError(f"max_iterations: got {self.max_iterations!r}, want less than 2^31")
        check_parallel(self.jobs, self.threads, self.seed)

    @property
    def threads_per_job(self) -> int:
        """Linear algebra threads of each job."""
        return self.threads or max(1, joblib.cpu_count() // self.jobs)

    def solver_on(self, device: str) -> tuple[Chosen, str]:
        """Choose the solver for arrays on a device, and say why.

        Parameters
        ----------
        device : str
            Device of a layer's arrays: ``"cpu"``, ``"cuda:0"``, ...

        Returns
        -------
        solver : {"admm", "newton"}
            Solver to use.
        reason : str
            Why it was chosen.
        """
        if self.solver != "auto":
            return self.solver, "asked for"
        if not self.penalty.separable:
            return "admm", f"auto: the {self.penalty.name} penalty couples the units"
        if not isinstance(self.penalty, L1 | ElasticNet):
            return "admm", f"auto: Newton's method does not know the {self.penalty.name} penalty"
        if device != "cpu":
            return "admm", f"auto: the layer's arrays are on {device}"
        return "newton", "auto: the penalty is separable and the layer's arrays are on the CPU"

    def zeros_for(self, spec: LayerSpec) -> list[int]:
        """Return the number of zeros of each of a layer's groups; they add up to the layer's share.

        Parameters
        ----------
        spec : LayerSpec
            Layer.

        Returns
        -------
        list of int
            Number of zeros per group.

        Raises
        ------
        ValueError
            If no sparsity is set, or none for this layer.
        """
        if self.sparsity is None:
            raise ValueError("sparsity: none is asked for")
        share = amount_for(self.sparsity, spec.name, "sparsity")
        zeros = math.floor(round(share * spec.size, 9) + 0.5)
        return [
            zeros * (group + 1) // spec.groups - zeros * group // spec.groups
            for group in range(spec.groups)
        ]
