"""What each method's report holds of a layer beside what all reports hold.

The fields stand in `run.json` under ``details``, null where there is none. A method of one's own
gives `PlainDetails`; one with a type of its own here is read back field by field, and its fields
are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from retrain.files import Count, Size, read_as

_Kind = TypeVar("_Kind", bound="Details")


class Details:
    """Figures of one method on one layer. Every kind is a dataclass of JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value for each field.

        Returns
        -------
        dict
            As it stands in the record.
        """
        return asdict(cast("Any", self))


@dataclass(frozen=True)
class PlainDetails(Details):
    """Figures of a method that has no type of its own here.

    Attributes
    ----------
    values : mapping
        JSON values by name.
    """

    values: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the values.

        Returns
        -------
        dict
            As they were given.
        """
        return dict(self.values)


@dataclass(frozen=True, kw_only=True)
class NetTrimDetails(Details):
    """Figures of a layer that Net-Trim retrained: the worst over its groups and units, or sums.

    Attributes
    ----------
    scheme : {"parallel", "cascade"}
        Inputs that the program was stated on: the dense network's, or those of the layers before
        as they are now.
    form : {"constrained", "regularised"}
        Program (4), (6), or (11) of the paper.
    penalty : str or None
        Name of the penalty.
    epsilon, relative_epsilon : float
        Radius of the ball around the targets, in the responses' unit and relative to
        `target_norm`; the latter None where that is 0.
    objective, dual_bound : float or None
        Penalty of the weights, and a proven lower bound of the optimum; sums.
    gap : float
        Relative gap between the two.
    ball_violation, ceiling_violation, largest_violation : float
        By how much the saved weights leave the ball and the ceilings, relative to the targets'
        norm; the largest single violation, in the responses' unit.
    residual, over, ceiling_norm : float or None
        Norms, in the responses' unit: of the residual where the program fits, of what lies above
        the ceilings, and of the ceilings. The run's direct bound is made of them.
    target_norm : float or None
        Norm of what is fitted.
    tolerance, violation_tolerance : float or None
        Gap and violation up to which a layer is certified.
    solver, solver_because : str or None
        Solver that was used, and why.
    iterations : int or None
        Largest over the groups.
    setup_seconds, solve_seconds : float or None
        Wall time of factorising and of solving.
    fit_weight : sequence of float or None
        Weight lambda of the fit in each group's program, for the regularised form.
    asked_zeros, asked_sparsity : int, float or None
        Zeros asked for, and their share, where a sparsity was asked for.
    trials : int or None
        Solves that the search for that number of zeros took.
    """

    scheme: str
    form: str
    epsilon: float
    gap: float
    ball_violation: float
    ceiling_violation: float
    relative_epsilon: float | None
    largest_violation: float | None
    penalty: str | None
    objective: float | None
    dual_bound: float | None
    residual: float | None
    over: float | None
    ceiling_norm: float | None
    target_norm: float | None
    tolerance: float | None
    violation_tolerance: float | None
    solver: str | None
    solver_because: str | None
    iterations: Count | None
    setup_seconds: float | None
    solve_seconds: float | None
    fit_weight: Sequence[float] | None = None
    asked_zeros: Count | None = None
    asked_sparsity: float | None = None
    trials: Count | None = None

    def __post_init__(self) -> None:
        if (self.asked_zeros is None) != (self.asked_sparsity is None):
            raise ValueError("want asked_zeros and asked_sparsity together")


@dataclass(frozen=True, kw_only=True)
class LobsDetails(Details):
    """Figures of a layer that the second-order method pruned; sums over its groups.

    Attributes
    ----------
    method : str
        Way of choosing the weights: ``"swaps"``, ``"greedy"``, ...
    pattern : str
        Pattern of the zeros: ``"layer"``, ``"unit"``, ``"2:4"``, ``"inputs"``.
    calibration : {"dense", "current"} or None
        Inputs that the Hessian was taken on.
    bias : {"updated", "kept", "none"} or None
        What became of the bias.
    damping : float or None
        Added to the Hessian's diagonal, as a fraction of its mean.
    sparsity : float or None
        Share of zeros asked for.
    tolerance : float or None
        Largest root mean square layer error allowed, where that was asked for.
    removed : int or None
        Weights removed.
    dead_inputs : sequence of int or None
        Inputs of each group that are zero on all rows.
    layer_error, layer_error_from_hessian : float or None
        Mean over the rows of the squared change of the responses, measured row by row, and as the
        Hessian tells it.
    rms_error : float or None
        Root of `layer_error`, in the responses' unit.
    energy : float or None
        Mean over the rows of the squared responses.
    relative_layer_error : float or None
        `layer_error` over `energy`; None where that is 0.
    method_status : str or None
        How the solves ended.
    sensitivities : sequence of (dict or None) or None
        For each group, quantiles of the saliencies.
    """

    method: str
    pattern: str
    rms_error: Size | None
    relative_layer_error: Size | None
    calibration: str | None
    bias: str | None
    damping: float | None
    sparsity: float | None
    tolerance: float | None
    removed: Count | None
    dead_inputs: Sequence[Count] | None
    layer_error: float | None
    layer_error_from_hessian: float | None
    energy: float | None
    method_status: str | None
    sensitivities: Sequence[dict[str, Any] | None] | None


KINDS: Mapping[str, type[NetTrimDetails] | type[LobsDetails]] = {
    "net-trim": NetTrimDetails,
    "lobs": LobsDetails,
}
"""Type of the details by the method's name in the record."""


def details_from_json(method: str, record: Any, what: str, at: str) -> Details:
    """Read what a report's `to_json` gave as its details.

    Parameters
    ----------
    method : str
        Name of the method in the record.
    record : object
        JSON values.
    what, at : str
        Beginning of messages and place in what was read, as for `retrain.files.read_as`.

    Returns
    -------
    Details
        `PlainDetails` for a method that has no type here.

    Raises
    ------
    ValueError
        If a field is missing or of another type.
    """
    kind = KINDS.get(method)
    if kind is None:
        return PlainDetails(read_as(dict[str, Any], record, what, at))
    return read_as(kind, record, what, at)


def details_of(details: Details, kind: type[_Kind]) -> _Kind:
    """Return the details of a report whose method is known.

    Parameters
    ----------
    details : Details
        Of a report.
    kind : type
        ``NetTrimDetails`` or ``LobsDetails``.

    Returns
    -------
    NetTrimDetails or LobsDetails
        The same object.

    Raises
    ------
    TypeError
        If they are of another method.
    """
    if not isinstance(details, kind):
        raise TypeError(f"details: got {type(details).__name__}, want {kind.__name__}")
    return details
