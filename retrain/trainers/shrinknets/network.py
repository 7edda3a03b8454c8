"""Where the switches of a sequential network go, and what lies around a layer's neurons.

A network is a row of dense and convolutional layers. Between two of them lie modules that treat
every neuron (a dense unit, a channel) by itself: activations, pooling, normalisation, a flatten.
All that belongs to a neuron is then found between the layer that gives it and the one that takes
it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.utils import parametrize

from retrain.compact.cut import NORMS
from retrain.trainers.loop.states import device_of
from retrain.trainers.shrinknets.switches import InputSwitch, Switch
from solvers import checks

Side = Literal["inputs", "outputs"]
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
# Modules that treat each neuron by itself and give 0 for a neuron that is 0: a(0) = 0.
_KEEPS_ZERO = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink),
    *(nn.Hardshrink, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, *_POOLS),
)
# These treat each neuron by itself too, but a neuron that is 0 may leave a constant behind.
_MOVES_ZERO = (*NORMS, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Hardsigmoid, nn.Hardtanh)


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons between two layers, and every module that knows their number.

    Attributes
    ----------
    source : str or None
        Name of the layer that gives them; None for the network's inputs.
    target : str or None
        Name of the layer that takes them; None for the network's outputs.
    giver, taker : module or None
        Those layers.
    between : mapping of str to module
        The modules in between, in order, switches among them.
    count : int
        How many neurons there are.
    span : int
        Features a neuron has at `taker`: the positions of a channel after a flatten, else 1.
    """

    source: str | None
    target: str | None
    giver: Layer | None
    taker: Layer | None
    between: Mapping[str, nn.Module]
    count: int
    span: int

    @property
    def switches(self) -> dict[str, Switch]:
        """The switch layers on these neurons."""
        return {name: m for name, m in self.between.items() if isinstance(m, Switch)}

    @property
    def name(self) -> str:
        """What to call them in a message."""
        if self.source is None:
            return f"the inputs of {self.target!r}"
        return f"the neurons of layer {self.source!r}"


def neurons_of(model: nn.Module) -> list[Neurons]:
    """Return the neurons of a sequential network: its inputs, between its layers, its outputs.

    Parameters
    ----------
    model : nn.Sequential
        Sequentials inside it are read through.

    Raises
    ------
    ValueError
        If the model is no Sequential or has no dense or convolutional layer, a layer is used
        twice, grouped or parametrised, or two neighbouring layers do not fit.
    """
    leaves = list(_leaves(model))
    if not isinstance(model, nn.Sequential) or not any(isinstance(m, LAYERS) for _, m in leaves):
        raise ValueError(
            f"model: got {type(model).__name__}, want a Sequential with a dense or convolutional "
            f"layer"
        )
    if len({id(module) for _, module in leaves}) < len(leaves):
        raise ValueError("model: a module is used twice; its neurons cannot be told apart")
    found = []
    source: tuple[str, Layer] | None = None
    between: dict[str, nn.Module] = {}
    for name, module in leaves:
        if isinstance(module, LAYERS):
            _check_layer(name, module)
            found.append(_neurons(source, between, (name, module)))
            source, between = (name, module), {}
        else:
            between[name] = module
    found.append(_neurons(source, between, None))
    return found


def given(layer: Layer) -> int:
    """Return how many neurons a layer gives."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def taken(layer: Layer) -> int:
    """Return how many features a layer takes."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _neurons(
    source: tuple[str, Layer] | None,
    between: dict[str, nn.Module],
    target: tuple[str, Layer] | None,
) -> Neurons:
    giver = None if source is None else source[1]
    taker = None if target is None else target[1]
    span = 1
    if giver is not None:
        count = given(giver)
        if taker is not None:
            span = _span(source, between, target)
    else:
        # An InputSwitch hands on only the inputs that are left.
        count = taken(taker) if taker is not None else 0
    return Neurons(
        None if source is None else source[0],
        None if target is None else target[0],
        giver,
        taker,
        between,
        count,
        span,
    )


def _span(
    source: tuple[str, Layer] | None,
    between: Mapping[str, nn.Module],
    target: tuple[str, Layer] | None,
) -> int:
    assert source is not None and target is not None
    count, features = given(source[1]), taken(target[1])
    # A flatten behind a dense layer would interleave its neurons; only channels stay together.
    flat = not isinstance(source[1], nn.Linear) and any(
        isinstance(module, nn.Flatten) for module in between.values()
    )
    if features % count or (features != count and not flat):
        raise ValueError(
            f"model: layer {source[0]!r} gives {count} neurons, but layer {target[0]!r} takes "
            f"{features} features{'' if flat else ', without a flatten of channels in between'}"
        )
    return features // count


def _leaves(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of nested Sequentials in the order they run in; repeats included."""
    for key, module in model._modules.items():
        assert module is not None
        if isinstance(module, nn.Sequential):
            yield from _leaves(module, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", module


def _check_layer(name: str, layer: Layer) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"model: layer {name!r} is parametrised; its weight cannot be cut")
    if not isinstance(layer, nn.Linear) and layer.groups != 1:
        raise ValueError(
            f"model: layer {name!r} has {layer.groups} groups, want 1, since a channel of a "
            f"group cannot go alone"
        )


# Putting switches in ---------------------------------------------------------------------------


def with_switches(
    model: nn.Module, at: Side = "inputs", layers: Iterable[str] | None = None
) -> nn.Sequential:
    """Return a copy of `model` with switches on the inputs or the outputs of layers.

    Parameters
    ----------
    model : nn.Sequential
        Dense and convolutional layers, and between them modules that treat each neuron by itself.
    at : {"inputs", "outputs"}
        "inputs": directly ahead of a layer, ``A diag(beta) x``; the switch NAME of layer NAME is
        called ``switch_NAME``. "outputs": directly behind a layer and the batch normalisation that
        follows it, if one does: ahead of that it would be normalised away.
    layers : iterable of str, optional
        Which layers. By default all that have neurons which may go: for inputs all but the first
        (the network's own inputs stay unless the first layer is named), for outputs all but the
        last.

    Returns
    -------
    nn.Sequential
        Gives the same outputs as `model`, since all switches are 1.

    Raises
    ------
    ValueError
        If a name is not a layer's, the outputs of the last layer are named, a module on the way
        mixes neurons or, behind a switch, makes something else than 0 of 0; and as `neurons_of`.
    """
    checks.one_of(get_args(Side), at=at)
    copied = copy.deepcopy(model)
    groups = neurons_of(copied)
    inner = groups[1:-1]
    named = {(g.target if at == "inputs" else g.source): g for g in groups}
    default = [g.target if at == "inputs" else g.source for g in inner]
    chosen = default if layers is None else list(dict.fromkeys(layers))
    if not chosen:
        raise ValueError("model: no layer has neurons that may go; name layers, or add one")
    ahead: dict[str, tuple[str, Switch]] = {}
    behind: dict[str, tuple[str, Switch]] = {}
    for name in chosen:
        group = named.get(name)
        if group is None or name is None:
            known = ", ".join(repr(g.target) for g in groups[:-1])
            raise ValueError(f"layers: the model has no layer {name!r}; it has {known}")
        if group.target is None:
            raise ValueError(f"layers: the outputs of the last layer, {name!r}, cannot go")
        if group.switches:
            raise ValueError(f"layers: {group.name} have switches already")
        switch = f"switch_{name.rpartition('.')[2]}"
        if at == "inputs":
            ahead[name] = (switch, _input_switch(group))
        else:
            place, made = _output_switch(group)
            behind[place] = (switch, made)
    place_on = device_of(copied)
    return _rebuilt(copied, ahead, behind, "").to(place_on)


def _input_switch(group: Neurons) -> Switch:
    assert group.taker is not None
    axis = -1 if isinstance(group.taker, nn.Linear) else 1
    dtype = group.taker.weight.dtype
    if group.giver is None:
        return InputSwitch(group.count, axis=axis).to(dtype)
    _check_apart(group)
    return Switch(group.count, span=group.span, axis=axis).to(dtype)


def _output_switch(group: Neurons) -> tuple[str, Switch]:
    """Return the name of the module to put it behind, and the switch."""
    assert group.giver is not None and group.source is not None
    _check_apart(group)
    place, rest = group.source, list(group.between.items())
    if rest and isinstance(rest[0][1], NORMS):
        place, rest = rest[0][0], rest[1:]
    for name, module in rest:
        if not _keeps_zero(module):
            raise ValueError(
                f"model: {group.name} cannot have switches at the layer's outputs: {name!r}, a "
                f"{type(module).__name__} behind them, makes something else than 0 of 0"
            )
    axis = -1 if isinstance(group.giver, nn.Linear) else 1
    return place, Switch(group.count, axis=axis).to(group.giver.weight.dtype)


def _keeps_zero(module: nn.Module) -> bool:
    if isinstance(module, nn.Hardtanh):
        return module.min_val <= 0 <= module.max_val
    return isinstance(module, _KEEPS_ZERO)


def _check_apart(group: Neurons) -> None:
    """Raise where a module between two layers mixes neurons, or is not known not to."""
    dense = isinstance(group.giver, nn.Linear)
    for name, module in group.between.items():
        known = isinstance(module, _KEEPS_ZERO + _MOVES_ZERO)
        if isinstance(module, _POOLS):
            known = not dense
        if isinstance(module, nn.Flatten):
            known = (module.start_dim, module.end_dim) == (1, -1)
            dense = True
        if not known:
            raise ValueError(
                f"model: {group.name} cannot have switches: {name!r}, a {type(module).__name__}, "
                f"is not known to treat each neuron by itself"
            )


def _rebuilt(
    model: nn.Module,
    ahead: Mapping[str, tuple[str, Switch]],
    behind: Mapping[str, tuple[str, Switch]],
    prefix: str,
) -> nn.Sequential:
    """Return nested Sequentials with switches put in; the other modules keep their names."""
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for key, module in model._modules.items():
        assert module is not None
        name = prefix + key
        for place in (ahead, behind):
            if name in place and place[name][0] in {*model._modules, *children}:
                raise ValueError(f"model: module {place[name][0]!r} has the name of a switch")
        if name in ahead:
            children[ahead[name][0]] = ahead[name][1]
        children[key] = (
            _rebuilt(module, ahead, behind, f"{name}.")
            if isinstance(module, nn.Sequential)
            else module
        )
        if name in behind:
            children[behind[name][0]] = behind[name][1]
    rebuilt = nn.Sequential(children)
    rebuilt.training = model.training
    return rebuilt
