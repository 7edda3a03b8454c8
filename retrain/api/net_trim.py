"""`retrain.net_trim` and `retrain.load`: a network in, a run out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retrain.bounds.outputs import cascade_bound
from retrain.data.sources import as_data
from retrain.methods.amounts import layers_named
from retrain.methods.net_trim import method as net_trim_method
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.runs.directory import check_out
from retrain.runs.drive import drive
from retrain.runs.outcome import OnLayer, Run
from retrain.runs.prepare import prepare
from retrain.runs.subject import apart_from_caller, subject_of
from retrain.stream.stream import LayerStream, layer
from solvers.arrays import to_numpy

if TYPE_CHECKING:
    from retrain.runs.epsilon_search import OnTrial

_log = logging.getLogger(__name__)


@apart_from_caller()
def net_trim(
    model: Any,
    data: Any,
    *,
    out: str | Path | None = None,
    evaluate: Any = None,
    layers: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    fine_tune: int = 0,
    device: str | None = None,
    sparsity_of: Literal["layer", "network"] = "layer",
    max_drop: float | None = None,
    max_trials: int = 12,
    on_layer: OnLayer | None = None,
    on_trial: OnTrial | None = None,
    options: NetTrimOptions | None = None,
    **settings: Any,
) -> Run:
    """Retrain a network layer by layer with Net-Trim.

    Parameters
    ----------
    model : torch.nn.Module, Chain or LoadedModel
        The trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are taken off: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs; (inputs, labels) pairs give accuracies too, and allow fine-tuning.
        Labels are class numbers from 0, or what can be read as such (`retrain.data.labels`).
    out : path, optional
        Run directory: written as the run goes, resumed by the same call. Without one nothing is
        written.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to retrain, and to leave out.
    fine_tune : int, optional
        Epochs of training after pruning, zeros kept at zero. Wants labels and a torch module.
    device : str, optional
        Where torch computes; by default where the module is.
    sparsity_of : {"layer", "network"}
        What has the ``sparsity`` asked for: each layer, with an epsilon of its own, or all
        retrained layers together, with one relative epsilon that is searched for.
    max_drop : float, optional
        Instead of an epsilon or a sparsity: points of held-out accuracy that may be lost. The one
        relative epsilon is searched for that prunes most within it. Wants `evaluate` with labels.
    max_trials : int
        Networks that a search for one epsilon retrains at most.
    on_layer : callable, optional
        Called with each LayerReport as its layer is done, and the number of layers.
    on_trial : callable, optional
        Called with each `retrain.runs.epsilon_search.Trial` of such a search, and its Goal.
    options : NetTrimOptions, optional
        What to do; `settings` are its fields, given one by one or to replace some: ``scheme``,
        ``relative_epsilon``, ``sparsity``, ... ``tolerance`` may be a pair (gap, violation).

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is unfit; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the call resumes.
    """
    from retrain.runs.epsilon_search import goal_of, search_epsilon

    check_out(out)
    options = _options(options, settings)
    goal = goal_of(options, sparsity_of, max_drop, max_trials)
    subject, calibration = subject_of(model, device), as_data(data)
    held_out = None if evaluate is None else as_data(evaluate)

    def run(given: NetTrimOptions, place: str | Path | None, notify: OnLayer | None) -> Run:
        return drive(
            "net-trim",
            lambda stream, names, finished: net_trim_method.net_trim(
                stream, given, layers=names, finished=finished
            ),
            subject,
            calibration,
            held_out=held_out,
            settings=_settings(given),
            layers=layers_named(given.sparsity) if layers is None else layers,
            skip=skip,
            oversized=lambda stream, spec: net_trim_method.oversized(stream, spec, given),
            fine_tune=fine_tune,
            out=place,
            on_layer=notify,
            direct=cascade_bound,
        )

    def check(stream: LayerStream) -> None:
        prepared = prepare(
            subject,
            calibration,
            held_out,
            layers=layers,
            skip=skip,
            oversized=lambda stream, spec: net_trim_method.oversized(stream, spec, options),
            fine_tune=fine_tune,
            out=out,
        )
        if goal is not None and goal.sparsity is not None and options.zeros == "stay":
            _check_sparsity(stream, prepared.names, goal.sparsity)
        if goal is not None and goal.max_drop is not None and held_out is not None:
            outputs = next(prepared.held_out.outputs(dense=True))
            if outputs.ndim != 2 or outputs.shape[1] < 2:
                raise ValueError(
                    "max_drop: wants a network with an output for each class, to have an accuracy; "
                    f"this one's outputs are of shape {tuple(outputs.shape[1:])}"
                )

    if goal is None:
        return run(options, out, on_layer)
    return search_epsilon(
        goal,
        lambda epsilon, place, notify: run(
            replace(options, sparsity=None, relative_epsilon=epsilon), place, notify
        ),
        subject,
        calibration,
        held_out=held_out,
        settings={
            "options": _settings(options),
            "select": [layers, skip],
            "fine_tune": fine_tune,
        },
        check=check,
        out=out,
        on_layer=on_layer,
        on_trial=on_trial,
    )


def _check_sparsity(stream: LayerStream, names: Sequence[str], sparsity: float) -> None:
    """Refuse a network's sparsity below the one that its layers have, whose zeros stay."""
    specs = [layer(stream, name) for name in names]
    zeros = sum(
        int((to_numpy(stream.weight(spec.name, group))[: spec.shape[0]] == 0).sum())
        for spec in specs
        for group in range(spec.groups)
    )
    share = zeros / sum(spec.size for spec in specs)
    if sparsity < share:
        raise ValueError(
            f"sparsity: got {sparsity:g}, but {share:.4g} of the weights are zero in the dense "
            "network and stay; want more, or let them go (zeros='free', --free-zeros)"
        )


def _options(options: NetTrimOptions | None, settings: dict[str, Any]) -> NetTrimOptions:
    """Options from an object, from single settings, or both."""
    unknown = sorted(set(settings) - set(NetTrimOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(NetTrimOptions.__dataclass_fields__)
        raise ValueError(f"{unknown[0]}: no such option of Net-Trim; there are {known}")
    pair = settings.get("tolerance")
    if isinstance(pair, tuple | list):
        if len(pair) != 2 or "violation_tolerance" in settings:
            raise ValueError(
                "tolerance: want a number, or the pair (gap, violation) without "
                f"violation_tolerance, got {pair!r}"
            )
        settings = {**settings, "tolerance": pair[0], "violation_tolerance": pair[1]}
    if "epsilon" in settings and settings["epsilon"] is not None:
        settings.setdefault("relative_epsilon", None)
    return replace(options or NetTrimOptions(), **settings)


def _settings(options: NetTrimOptions) -> dict[str, Any]:
    """Options as a run's record and identity have them."""
    return {**_plain(options), "threads": options.threads_per_job}


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON values; a penalty by its name and parameters."""
    values = {name: getattr(options, name) for name in options.__dataclass_fields__}
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            values[name] = {"name": getattr(value, "name", type(value).__name__), **asdict(value)}
        elif isinstance(value, Mapping):
            values[name] = dict(value)
    return values
