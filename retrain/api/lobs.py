"""`retrain.lobs`: second-order pruning of a network, in one stage or in several.

The paper's iterative version prunes, retrains lightly, prunes again, retrains again. Each stage is
a run of its own on the network that the stage before it left, in ``DIR/layers/stage-1``,
``DIR/layers/stage-2``, ..., and is resumed as one; DIR holds the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrain.methods.amounts import Amount
from retrain.methods.lobs.options import LobsOptions
from retrain.runs.drive import drive
from retrain.runs.outcome import OnLayer, Run
from retrain.runs.request import request_of
from retrain.runs.stages import (
    lobs_method,
    plan_stages,
    run_stages,
)
from retrain.runs.subject import apart_from_caller


@apart_from_caller()
def lobs(
    model: Any,
    data: Any,
    *,
    sparsity: Amount | Sequence[Amount] | None = None,
    tolerance: Amount | Sequence[Amount] | None = None,
    stages: int | None = None,
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
    model : torch.nn.Module, Chain or LoadedModel
        The trained network. It is not changed. Wrappers (DataParallel, DistributedDataParallel,
        torch.compile) are taken off: the run's model and its names are those of the plain module.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration inputs, all of which are used; (inputs, labels) pairs give accuracies too, and
        allow fine-tuning.
    sparsity : number, mapping, or a sequence of those
        Fraction of each layer's weights to remove, one for all or by layer name (or shell pattern):
        then only those layers are pruned, unless `layers` says more. A sequence has one a stage.
        None for an N:M pattern, and with a tolerance.
    tolerance : number, mapping, or a sequence of those
        Instead: the root of the mean squared error of each layer's response, in its own units. One
        number serves every stage.
    stages : int, optional
        How often to prune; by default once, or as often as there are sparsities. A single sparsity
        is the last stage's, and earlier stages go a part of the way (`stage_amounts`).
    out : path, optional
        Run directory: written as the run goes, resumed by the same call.
    evaluate : like `data`, optional
        Held-out data for accuracies and bounds.
    layers, skip : str or sequence of str, optional
        Shell patterns of layer names to prune, and to leave out.
    fine_tune : int, optional
        Epochs of training after every stage, zeros kept at zero. Wants labels and a torch module.
    device : str, optional
        Where torch computes; by default where the module is.
    on_layer : callable, optional
        Called with each LayerReport as its layer is done, and the number of layers of all stages.
    options : LobsOptions, optional
        What to do; `settings` are its fields, given one by one or to replace some: ``method``,
        ``pattern``, ``calibration``, ``damping``, ``bias``, ``zeros``, ...

    Returns
    -------
    Run
        Of several stages, the layers count from the network given, and the bounds are the last
        stage's: from the network that it was given to what it made of it, before fine-tuning.
        ``record["stages"]`` has every stage's.

    Raises
    ------
    ValueError
        If the model, the data, an option or the run directory is unfit; the message names it.
    OSError
        If the run directory cannot be written. Finished layers are kept, and the call resumes.
    """
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
    if len(plan) == 1:
        return drive(lobs_method(plan[0]), request)
    return run_stages(plan, model, request)
