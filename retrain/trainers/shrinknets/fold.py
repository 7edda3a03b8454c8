"""Switches folded into the weights: what is left is a plain network of torch's own layers."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from retrain.compact.cut import NORMS
from retrain.trainers.shrinknets.network import Layer, Neurons, neurons_of
from retrain.trainers.shrinknets.switches import InputSwitch, Switch


def fold(model: nn.Module) -> nn.Sequential:
    """Return `model` without its switches, giving the same outputs; `model` is not touched.

    A switch directly ahead of a layer goes into its columns, ``A <- A diag(beta)``; one behind a
    layer into its rows and bias, ``A <- diag(beta) A, b <- beta b``; one behind a batch
    normalisation into its scale and shift. The first layer gets a column of zeros for each of the
    network's inputs that has been removed, so that the network takes the inputs it always took.

    Returns
    -------
    nn.Sequential
        In the modes that `model`'s modules are in, the modules named as before the switches.
    """
    folded = copy.deepcopy(model)
    for neurons in neurons_of(folded):
        names = list(neurons.between)
        for name, switch in neurons.switches.items():
            position = names.index(name)
            if position == len(names) - 1 and neurons.taker is not None:
                _into_columns(switch, neurons.taker)
            else:
                _into_rows(switch, neurons, names[:position])
    return _without_switches(folded)


def _into_columns(switch: Switch, layer: Layer) -> None:
    """A <- A diag(beta); a convolution's slices likewise."""
    with torch.no_grad():
        beta = switch.beta.repeat_interleave(switch.span)
        weight = layer.weight * beta.view(1, -1, *[1] * (layer.weight.ndim - 2))
        if isinstance(switch, InputSwitch):
            weight = _widen(weight, switch.kept, switch.total)
            _set_inputs(layer, switch.total)
        layer.weight.data = weight


def _widen(weight: Tensor, kept: Tensor, total: int) -> Tensor:
    wide = weight.new_zeros(len(weight), total, *weight.shape[2:])
    wide[:, kept] = weight
    return wide


def _set_inputs(layer: Layer, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = count
    else:
        layer.in_channels = count


def _into_rows(switch: Switch, neurons: Neurons, ahead: list[str]) -> None:
    """A <- diag(beta) A, b <- beta b; or the scale and shift of the normalisation in between."""
    assert neurons.giver is not None
    owner: nn.Module = neurons.between[ahead[-1]] if ahead else neurons.giver
    assert isinstance(owner, NORMS) or owner is neurons.giver
    with torch.no_grad():
        beta = switch.beta.detach()
        if isinstance(owner, NORMS) and owner.weight is None:
            owner.affine = True
            owner.weight = nn.Parameter(beta.clone())
            owner.bias = nn.Parameter(torch.zeros_like(beta))
            return
        for parameter in (owner.weight, owner.bias):
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter * beta.view(-1, *[1] * (parameter.ndim - 1))


def _without_switches(model: nn.Module) -> nn.Sequential:
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for key, module in model._modules.items():
        assert module is not None
        if isinstance(module, Switch):
            continue
        children[key] = _without_switches(module) if isinstance(module, nn.Sequential) else module
    plain = nn.Sequential(children)
    plain.training = model.training
    return plain
