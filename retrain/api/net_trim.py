"""`retrain.net_trim`: a network and data in, a run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from retrain.bounds.outputs import cascade_bound
from retrain.methods.amounts import layers_named
from retrain.methods.net_trim import method
from retrain.methods.net_trim.options import NetTrimOptions
from retrain.methods.net_trim.task import oversized
from retrain.runs.drive import LayerMethod, drive
from retrain.runs.epsilon_search import Goal, OnTrial, check_classes, goal_of, search_epsilon
from retrain.runs.outcome import OnLayer, Run
from retrain.runs.prepare import Prepared, prepare
from retrain.runs.request import Request, request_of
from retrain.runs.subject import apart_from_caller
from retrain.stream.stream import LayerStream, layer
from solvers.arrays import to_numpy


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
    model : torch.nn.Module, Chain, LoadedModel, MLPClassifier or MLPRegressor
        Trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are removed: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs, first axis the sample. Pairs (inputs, labels) give accuracies too, and
        allow fine-tuning. Labels are class numbers from 0, or values that can be read as such
        (`retrain.data.labels`).
    out : str or Path, optional
        Run directory: written as the run proceeds, resumed by the same call. Without it nothing is
        written.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to retrain, and to leave out.
    fine_tune : int, optional
        Number of epochs of training after pruning, with zeros kept at zero. Needs labels and a
        torch module. 0 (the default) trains nothing.
    device : str, optional
        Device on which torch computes; by default the device of the module.
    sparsity_of : {"layer", "network"}, optional
        Scope of the ``sparsity`` asked for: each layer, with an epsilon of its own, or all
        retrained layers together, with one relative epsilon that is searched for.
    max_drop : float, optional
        Instead of an epsilon or a sparsity: held-out accuracy that may be lost, in percentage
        points. The search returns the sparsest network it finds within that drop. Needs `evaluate`
        with labels.
    max_trials : int, optional
        Largest number of networks that a search for one epsilon retrains.
    on_layer : callable, optional
        Function called with the LayerReport of each layer as soon as the layer is done, and with
        the number of layers.
    on_trial : callable, optional
        Function called with each `retrain.runs.epsilon_search.Trial` of such a search, and its
        Goal.
    options : NetTrimOptions, optional
        Options of the method; the defaults of `NetTrimOptions` without it.
    **settings : object
        Fields of `NetTrimOptions`, given one by one or to replace some of `options`: ``scheme``,
        ``relative_epsilon``, ``sparsity``, ``memory``, ... ``tolerance`` may be a pair (gap,
        violation).

    Returns
    -------
    Run
        Network, report per layer, bounds and record. A layer whose certificate falls short keeps
        its dense weights (unless ``accept_inexact=True``) and has ``certified=False`` in its
        report.

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is invalid; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the same call resumes.

    Notes
    -----
    Cost per layer: one pass of the data up to the layer, and one convex program with n_in x n_out
    unknowns over n_samples x n_out responses. A sparsity per layer solves several programs per
    layer; a search for one epsilon retrains up to `max_trials` networks. Memory: the cascade holds
    the activations of one layer, the parallel scheme those of ``jobs`` layers. Each is limited to
    ``memory`` bytes (4 GiB by default); a layer with more rows uses a seeded sample of them.

    References
    ----------
    Aghasi et al., Net-Trim (2017), Algorithms 1 (parallel) and 2 (cascade).

    Examples
    --------
    >>> import numpy as np
    >>> import retrain
    >>> rng = np.random.default_rng(0)
    >>> chain = retrain.Chain((rng.standard_normal((8, 6)), rng.standard_normal((6, 3))))
    >>> inputs = rng.standard_normal((40, 8))
    >>> run = retrain.net_trim(chain, inputs, scheme="cascade", relative_epsilon=0.1)
    >>> run.certified, run.measured <= run.bound
    (True, True)
    >>> [report.name for report in run.layers]
    ['0', '1']
    """
    options = _options(options, settings)
    goal = goal_of(options, sparsity_of, max_drop, max_trials)
    request = request_of(
        model,
        data,
        evaluate=evaluate,
        layers=layers,
        skip=skip,
        fine_tune=fine_tune,
        device=device,
        out=out,
        on_layer=on_layer,
    )
    if goal is None:
        return drive(net_trim_method(options), request)

    def run_at(epsilon: float, asked: Request) -> Run:
        given = replace(options, sparsity=None, relative_epsilon=epsilon)
        return drive(net_trim_method(given), asked)

    if goal.max_drop is not None:
        check_classes(request.subject, request.held_out)
    chosen = net_trim_method(options)
    prepared = prepare(request, chosen.oversized)
    _check_goal(goal, prepared, zeros_stay=options.zeros == "stay")
    return search_epsilon(goal, run_at, request, prepared.stream, chosen.settings, on_trial)


def net_trim_method(options: NetTrimOptions) -> LayerMethod:
    """Make the Net-Trim method with its options, in the form that `drive` takes.

    Parameters
    ----------
    options : NetTrimOptions
        Options of the method.

    Returns
    -------
    LayerMethod
        Method bound to the options.
    """
    return LayerMethod(
        name="net-trim",
        settings=_settings(options),
        layers=layers_named(options.sparsity),
        steps=lambda stream, names, finished: method.net_trim(
            stream, options, layers=names, finished=finished
        ),
        oversized=lambda stream, spec: oversized(stream, spec, options),
        direct=cascade_bound,
    )


def _check_goal(goal: Goal, prepared: Prepared, *, zeros_stay: bool) -> None:
    """Refuse, before the first trial, a goal that no trial can meet."""
    if goal.sparsity is not None and zeros_stay:
        _check_sparsity(prepared.stream, prepared.names, goal.sparsity)
    if goal.max_drop is not None and prepared.held_out is not None:
        outputs = next(prepared.held_out.outputs(dense=True))
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(
                "max_drop: wants a network with an output for each class, to have an accuracy; "
                f"this one's outputs are of shape {tuple(outputs.shape[1:])}"
            )


def _check_sparsity(stream: LayerStream, names: Sequence[str], sparsity: float) -> None:
    """Refuse a sparsity below that of the dense network, whose zeros stay."""
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
    """Build the options from an object, from single settings, or from both."""
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
    """Return the options in the form of a run's record and identity."""
    return {**_plain(options), "threads": options.threads_per_job}


def _plain(options: Any) -> dict[str, Any]:
    """Return the options as JSON values; a penalty by its name and parameters."""
    values = {name: getattr(options, name) for name in options.__dataclass_fields__}
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            values[name] = {"name": getattr(value, "name", type(value).__name__), **asdict(value)}
        elif isinstance(value, Mapping):
            values[name] = dict(value)
    return values
