"""One number of zeros for a whole network, shared over its layers by what each weight costs.

The cost of a weight is its one-shot loss w_q^2 / (2 [H^-1]_qq) (L-OBS, equation for L_q), relative
to its layer's energy tr(W^T H W), so that layers of any scale can be compared. The weights with the
smallest costs go, as many as asked; how many of them lie in a layer is that layer's share. The
losses are those of single removals: they tell which layers can spare more, not what a layer loses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retrain.methods.lobs.method import oversized
from retrain.methods.lobs.options import LobsOptions
from retrain.methods.lobs.problem import state_layer
from retrain.stream.stream import LayerStream, layer
from solvers.arrays import to_numpy
from solvers.obs import sensitivities
from solvers.obs.one_shot import ONE_SHOT_DAMPING

_log = logging.getLogger(__name__)


def shared_sparsities(
    stream: LayerStream, names: Sequence[str], sparsity: float, options: LobsOptions
) -> dict[str, float]:
    """Share a network's zeros over its layers.

    Parameters
    ----------
    stream : LayerStream
        Network and calibration data.
    names : sequence of str
        Names of the layers to prune; those that do not fit the memory are left out.
    sparsity : float
        Share of all these layers' weights to remove, in [0, 1].
    options : LobsOptions
        Options of the method; the pattern is ``"layer"``.

    Returns
    -------
    dict from str to float
        Sparsity of each layer; their counts add up to the share asked for, rounded.

    Raises
    ------
    ValueError
        If a Hessian is singular to working precision.

    Notes
    -----
    Cost: one pass of the data through each layer, and the inverse of its Hessian. Memory: one
    float64 number for each weight of the network.
    """
    costs = {}
    for name in names:
        spec = layer(stream, name)
        if oversized(spec, options) is not None:
            continue
        _log.info("sharing the zeros: layer %s", name)
        task = state_layer(stream, spec, replace(options, sparsity=0.0))
        parts, energy = [], 0.0
        for group in task.groups:
            damping = ONE_SHOT_DAMPING if options.damping is None else options.damping
            cost = sensitivities(group.problem, damping=damping).saliency
            cost = np.where(to_numpy(group.problem.allowed), cost, 0.0)  # these zeros stay
            parts.append(cost[group.problem.prunable].ravel())
            weight = to_numpy(group.problem.weight).astype(np.float64)
            energy += float(np.sum(weight * (to_numpy(group.problem.hessian) @ weight)))
        costs[name] = np.concatenate(parts) / (energy if energy > 0 else 1.0)
    every = np.concatenate(list(costs.values()))
    owner = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs.values()])
    gone = int(np.floor(sparsity * len(every) + 0.5))
    chosen = owner[np.argsort(every, kind="stable")[:gone]]
    counts = np.bincount(chosen, minlength=len(costs))
    return {
        name: int(count) / len(cost)
        for (name, cost), count in zip(costs.items(), counts, strict=True)
    }
