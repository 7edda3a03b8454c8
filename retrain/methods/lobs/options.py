"""What a second-order run is asked to do: options, amounts by layer, the schedule of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import joblib

from retrain.methods.amounts import Amount, amount_for, check_amount, check_parallel
from retrain.methods.lobs.moments import Calibration
from retrain.stream.stream import LayerSpec
from solvers import checks
from solvers.obs import (
    METHODS,
    Pruned,
    parse_pattern,
    prune_greedy_to_tolerance,
    prune_to_tolerance,
)

WIDEST = 2048
"""Largest number of inputs for which ``method="auto"`` takes the exact path, whose cost per unit
grows with the cube of the inputs. Larger values give smaller errors on wide layers and take longer.
Chosen by hand."""

TO_TOLERANCE: dict[str, Callable[..., Pruned]] = {
    "greedy": prune_greedy_to_tolerance,
    "one-shot": prune_to_tolerance,
}
"""Methods that can prune to a tolerance instead of a sparsity, by name."""


@dataclass(frozen=True)
class LobsOptions:
    """What a second-order run is asked to do.

    Attributes
    ----------
    method : str
        Name in `solvers.obs.METHODS`, or ``"auto"``.
    pattern : str
        ``"layer"``, ``"unit"``, ``"inputs"`` or ``"N:M"``.
    sparsity : float, mapping from str to float, or None
        Fraction in [0, 1] of each layer's prunable weights (weights per unit, inputs) to remove,
        met as an exact count. None for N:M, which fixes it.
    tolerance : float, mapping from str to float, or None
        Instead of a sparsity: largest root of the layer's mean squared error, in the unit of the
        response; weights are removed as long as it is met.
    damping : float or None
        Fraction of the mean diagonal of H; each method's own default when None.
    calibration : {"dense", "sequential", "corrected"}
        Inputs and targets, see `retrain.methods.lobs.moments`.
    bias : {"update", "keep"}
        Whether biases change with the weights or stay as they are. They are never pruned.
    zeros : {"stay", "free"}
        Whether weights that are zero in the dense network must stay so.
    memory : float
        Largest memory, in bytes, for a layer's Hessian and everything derived from it.
    seed : int
        Seed of fine-tuning; the methods themselves are deterministic.
    jobs : int
        Number of layers at the same time (dense calibration).
    threads : int or None
        Number of threads of each job; by default the machine's cores divided by `jobs`.

    Raises
    ------
    ValueError
        If an option is invalid, or two options exclude each other.
    """

    method: str = "auto"
    pattern: str = "layer"
    sparsity: Amount | None = None
    tolerance: Amount | None = None
    damping: float | None = None
    calibration: Calibration = "dense"
    bias: Literal["update", "keep"] = "update"
    zeros: Literal["stay", "free"] = "stay"
    memory: float = 4 * 2**30
    seed: int = 0
    jobs: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        checks.one_of(("auto", *METHODS), method=self.method)
        checks.one_of(("dense", "sequential", "corrected"), calibration=self.calibration)
        checks.one_of(("update", "keep"), bias=self.bias)
        checks.one_of(("stay", "free"), zeros=self.zeros)
        kind = parse_pattern(self.pattern, None if ":" in self.pattern else 0.0).kind
        if kind == "n:m":
            if self.sparsity is not None or self.tolerance is not None:
                raise ValueError(
                    f"sparsity, tolerance: the pattern {self.pattern} fixes the sparsity; want none"
                )
        elif (self.sparsity is None) == (self.tolerance is None):
            raise ValueError("sparsity, tolerance: want exactly one of the two")
        check_amount("sparsity", self.sparsity, 1.0)
        check_amount("tolerance", self.tolerance, math.inf)
        if self.tolerance is not None:
            if kind != "layer":
                raise ValueError(f"pattern: got {self.pattern!r}, want 'layer' with a tolerance")
            checks.one_of(("auto", *TO_TOLERANCE), **{"method (with a tolerance)": self.method})
        elif self.method != "auto" and kind not in METHODS[self.method].patterns:
            kinds = ", ".join(METHODS[self.method].patterns)
            raise ValueError(
                f"pattern: got {self.pattern!r}, want one of {kinds} for {self.method}"
            )
        if self.damping is not None:
            if not (0 <= self.damping < math.inf):
                raise ValueError(f"damping: got {self.damping!r}, want a finite fraction >= 0")
            if self.method == "best":
                raise ValueError("damping: the method 'best' has its own; want none")
        checks.positive(memory=self.memory)
        check_parallel(self.jobs, self.threads, self.seed)
        if self.jobs > 1 and self.calibration != "dense":
            raise ValueError(f"jobs: {self.calibration} calibration takes layers one by one")

    @property
    def threads_per_job(self) -> int:
        """Threads of each job."""
        return self.threads or max(1, joblib.cpu_count() // self.jobs)

    def sparsity_for(self, name: str) -> float | None:
        """Return a layer's sparsity.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        float or None
            Fraction in [0, 1]; None with a tolerance, and for N:M.
        """
        return None if self.sparsity is None else amount_for(self.sparsity, name, "sparsity")

    def tolerance_for(self, name: str) -> float | None:
        """Return a layer's tolerance.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        float or None
            Root mean squared error; None with a sparsity, and for N:M.
        """
        return None if self.tolerance is None else amount_for(self.tolerance, name, "tolerance")

    def method_for(self, spec: LayerSpec) -> str:
        """Name the method used for a layer.

        Parameters
        ----------
        spec : LayerSpec
            Layer.

        Returns
        -------
        str
            Name in `solvers.obs.METHODS` or `TO_TOLERANCE`.
        """
        if self.method != "auto":
            return self.method
        if self.tolerance is not None:
            return "greedy"
        if self.pattern == "inputs":
            return "inputs"
        return "swaps" if spec.shape[0] <= WIDEST else "large"


def bytes_needed(spec: LayerSpec, options: LobsOptions) -> float:
    """Estimate the memory of a layer's solve: Hessian, inverse, and up to two matrices per thread.

    Parameters
    ----------
    spec : LayerSpec
        Layer.
    options : LobsOptions
        Options of the method.

    Returns
    -------
    float
        Memory in bytes, of one group.
    """
    n_in, n_out = spec.shape[0] + 1, spec.shape[1]
    a_thread = 0 if options.method_for(spec) in ("one-shot", "sweep", "inputs") else 2
    squares = 6 + a_thread * options.threads_per_job
    return 8.0 * (squares * n_in**2 + 8 * n_in * n_out)


_MOST_STAGES = 1000
"""Largest number of stages. Each is a run of its own, so a larger number is refused as a typing
error. Chosen by hand."""


def check_stages(stages: int) -> None:
    """Refuse a number of stages that is not from 1 to 1000.

    Parameters
    ----------
    stages : int
        Number of stages.

    Raises
    ------
    ValueError
        If it is not from 1 to 1000.
    """
    checks.count(1, stages=stages)
    if stages > _MOST_STAGES:
        raise ValueError(f"stages: got {stages!r}, want at most {_MOST_STAGES}")


def stage_amounts(amount: Amount | Sequence[Amount], stages: int | None) -> list[Amount]:
    """Spread a sparsity over stages.

    Parameters
    ----------
    amount : float, mapping from str to float, or a sequence of those
        One entry per stage; or the entry of the last stage, from which the earlier ones follow:
        stage k of K keeps kept^(k/K), each the same share of what the stage before it kept. (The
        paper's table 3 has 8.7 % and 1.5 %; this rule gives 12.2 % and 1.5 %.)
    stages : int or None
        K; by default as many as there are entries.

    Returns
    -------
    list of (float or mapping)
        One entry per stage.

    Raises
    ------
    ValueError
        If `stages` is not from 1 to 1000, or not the number of entries.

    References
    ----------
    Dong, Chen, Pan, L-OBS (2017), table 3 (iterative pruning).
    """
    entries: list[Amount] = list(amount) if isinstance(amount, Sequence) else [amount]
    stages = len(entries) if stages is None else stages
    check_stages(stages)
    if len(entries) == stages:
        return entries
    if len(entries) != 1:
        raise ValueError(f"stages: {stages} wanted, but there are sparsities for {len(entries)}")
    last = entries[0]

    def at(stage: int, sparsity: float) -> float:
        return 1 - (1 - sparsity) ** (stage / stages) if stage < stages else sparsity

    if isinstance(last, Mapping):
        return [
            {name: at(stage, value) for name, value in last.items()}
            for stage in range(1, stages + 1)
        ]
    return [at(stage, last) for stage in range(1, stages + 1)]
