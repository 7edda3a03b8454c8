"""`retrain.lobs`: second-order pruning of a network, in one stage or in several.

The paper's iterative version prunes, retrains lightly, prunes again, retrains again. Each stage is
a run of its own on the network that the stage before it left. It is written to
``DIR/layers/stage-1``, ``DIR/layers/stage-2``, ..., and resumed like any other run; DIR holds the
outcome of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from retrain.methods.amounts import Amount
from retrain.methods.lobs.budget import shared_sparsities
from retrain.methods.lobs.options import LobsOptions
from retrain.runs.drive import drive
from retrain.runs.outcome import OnLayer, Run
from retrain.runs.prepare import select
from retrain.runs.request import Request, request_of
from retrain.runs.stages import (
    lobs_method,
    plan_stages,
    run_stages,
)
from retrain.runs.subject import apart_from_caller
from solvers import checks


@apart_from_caller()
def lobs(
    model: Any,
    data: Any,
    *,
    sparsity: Amount | Sequence[Amount] | None = None,
    tolerance: Amount | Sequence[Amount] | None = None,
    stages: int | None = None,
    sparsity_of: Literal["layer", "network"] = "layer",
    out: str | Path | None = None,
    evaluate: Any = None,
    layers: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    fine_tune: int = 0,
    device: str | None = None,
    on_layer: OnLayer | None = None,
    options: LobsOptions | None = None,
    **settings: Any,
) -> Run:
    """Prune a network layer by layer by second-order information (L-OBS and its relatives).

    Parameters
    ----------
    model : torch.nn.Module, Chain, LoadedModel, MLPClassifier or MLPRegressor
        Trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are removed: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs, first axis the sample; all of them are used. Pairs (inputs, labels) give
        accuracies too, and allow fine-tuning.
    sparsity : float, mapping from str to float, or a sequence of those, optional
        Fraction in [0, 1] of each layer's weights to remove: one number for all layers, or numbers
        by layer name or shell pattern, in which case only those layers are pruned unless `layers`
        names others. A sequence has one entry per stage. None for an N:M pattern, and with a
        tolerance.
    tolerance : float, mapping from str to float, or a sequence of those, optional
        Instead of a sparsity: largest root mean squared error of each layer's response, in the
        response's own unit. A single number serves every stage.
    sparsity_of : {"layer", "network"}, optional
        Scope of a single ``sparsity``: each layer, or all pruned layers together, which share the
        zeros by their measured losses (`retrain.methods.lobs.budget`).
    stages : int, optional
        Number of prunings; by default one, or as many as there are sparsities. With a single
        sparsity for several stages, that sparsity is reached in the last one (`stage_amounts`).
    out : str or Path, optional
        Run directory: written as the run proceeds, resumed by the same call. Without it nothing is
        written.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to prune, and to leave out.
    fine_tune : int, optional
        Number of epochs of training after every stage, with zeros kept at zero. Needs labels and a
        torch module. 0 (the default) trains nothing.
    device : str, optional
        Device on which torch computes; by default the device of the module.
    on_layer : callable, optional
        Function called with the LayerReport of each layer as soon as the layer is done, and with
        the total number of layers of all stages.
    options : LobsOptions, optional
        Options of the method; the defaults of `LobsOptions` without it.
    **settings : object
        Fields of `LobsOptions`, given one by one or to replace some of `options`: ``method``,
        ``pattern``, ``calibration``, ``damping``, ``bias``, ``zeros``, ``memory``, ...

    Returns
    -------
    Run
        Network, report per layer, bounds and record. With several stages the layers are compared
        with the dense network, and the bounds are those of the last stage: from the network that it
        received to the one that it made, before fine-tuning. ``record["stages"]`` has every
        stage's. A layer whose check fails has ``certified=False`` in its report; its new weights
        are used.

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is invalid; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the same call resumes.

    Notes
    -----
    Cost per layer: two passes of the data up to the layer, n_in^2 operations per row for the
    Hessian, n_in^3 for its inverse, and for the exact greedy path (``method="greedy"`` and
    ``"swaps"``) n_in^3 per output unit; ``"auto"`` changes to ``"large"`` for layers of more than
    2048 inputs. Memory: one batch of activations, and some n_in x n_in matrices in float64,
    whatever the number of rows.

    References
    ----------
    Dong, Chen, Pan, Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon
    (NIPS 2017).

    Examples
    --------
    >>> import numpy as np
    >>> import retrain
    >>> rng = np.random.default_rng(0)
    >>> chain = retrain.Chain((rng.standard_normal((8, 6)), rng.standard_normal((6, 3))))
    >>> inputs = rng.standard_normal((40, 8))
    >>> run = retrain.lobs(chain, inputs, sparsity=0.5)
    >>> [(report.name, report.zeros, report.weights) for report in run.layers]
    [('0', 24, 48), ('1', 9, 18)]
    >>> run.measured <= run.bound
    True
    """
    checks.one_of(("layer", "network"), sparsity_of=sparsity_of)
    plan = plan_stages(options, sparsity, tolerance, stages, settings)
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
    if sparsity_of == "network":
        plan = [_shared(request, plan)]
    if len(plan) == 1:
        return drive(lobs_method(plan[0]), request)
    return run_stages(plan, model, request)


def _shared(request: Request, plan: list[LobsOptions]) -> LobsOptions:
    """Options with a sparsity for each layer in place of the network's one."""
    options = plan[0]
    amount = options.sparsity
    single = len(plan) == 1 and options.pattern == "layer"
    if not single or not isinstance(amount, int | float):
        raise ValueError(
            "sparsity_of: the network's wants one sparsity, a number, the pattern 'layer' and no "
            "stages"
        )
    stream = request.subject.stream(request.data)
    names = select(stream.layers, request.layers, request.skip)
    found = shared_sparsities(stream, names, amount, options)
    if not found:
        raise ValueError("memory: no layer fits into it; raise it (--memory)")
    return replace(options, sparsity=found)
