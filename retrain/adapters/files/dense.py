"""Read a chain of dense layers from the tensors of a state dict that comes without code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrain.adapters.network.tensors import FLOATS
from solvers import checks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "leaky_relu": nn.functional.leaky_relu,
}
"""Activations between the layers of a chain that is read without code, by name."""

WAY_OUT = "give the architecture with --arch package.module:factory"
"""Remedy that ends the messages about files which do not determine a network."""

_STEPS = 100_000
"""Number of steps after which the search for an order by shapes gives up. A larger value takes
longer on files with many equal layers. Chosen by hand."""


@dataclass(frozen=True)
class DenseLayer:
    """One layer of a `DenseChain`.

    Attributes
    ----------
    name : str
        Dotted name of the layer.
    shape : tuple of int
        (n_in, n_out).
    bias : bool
        Whether the layer has a bias.
    dtype : torch.dtype
        Type of its tensors.
    activation : str
        Activation after the layer, a key of `ACTIVATIONS`.
    """

    name: str
    shape: tuple[int, int]
    bias: bool
    dtype: torch.dtype
    activation: str


class DenseChain(nn.Module):
    """Dense layers one after the other, under any (dotted) names; samples are flattened first.

    Parameters
    ----------
    layers : sequence of DenseLayer
        Layers in execution order. Their tensors are on the meta device until a state dict is
        assigned.

    Raises
    ------
    ValueError
        If a name cannot be the name of a module.
    """

    def __init__(self, layers: Sequence[DenseLayer]) -> None:
        super().__init__()
        self.dense_layers = tuple(layers)  # `layers` is a name that modules have
        for layer in layers:
            n_in, n_out = layer.shape
            linear = nn.Linear(n_in, n_out, layer.bias, device="meta", dtype=layer.dtype)
            *path, last = layer.name.split(".")
            holder: nn.Module = self
            try:
                for part in path:
                    if part not in dict(holder.named_children()):
                        holder.add_module(part, nn.Module())
                    holder = holder.get_submodule(part)
                holder.add_module(last, linear)
            except KeyError as error:
                raise ValueError(f"model: {layer.name!r} cannot name a layer; {WAY_OUT}") from error

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layers to samples of any shape, (n_samples, ...).

        Parameters
        ----------
        inputs : Tensor, shape (n_samples, ...)
            Samples, flattened first.

        Returns
        -------
        Tensor, shape (n_samples, n_out)
            Outputs of the last layer.
        """
        values = torch.flatten(inputs, 1)
        for layer in self.dense_layers:
            values = ACTIVATIONS[layer.activation](self.get_submodule(layer.name)(values))
        return values


def read_chain(
    tensors: Mapping[str, Tensor], *, activation: str, ordered: bool
) -> tuple[DenseChain, dict[str, str]]:
    """Build the chain that a state dict of dense layers describes.

    The order is that of the numbers in the names if these differ in nothing else, or that of the
    file; where neither fits the shapes, the only order that does.

    Parameters
    ----------
    tensors : mapping from str to Tensor
        Tensors ``NAME.weight`` (n_out, n_in) and, where there is a bias, ``NAME.bias`` (n_out,).
    activation : str
        Activation between two layers, a key of `ACTIVATIONS`; the last layer has none.
    ordered : bool
        Whether the order of `tensors` is meaningful; safetensors sorts by name.

    Returns
    -------
    chain : DenseChain
        Chain with these tensors.
    names : dict from str to str
        Name in `tensors` by name in the chain.

    Raises
    ------
    ValueError
        If the tensors are not those of dense layers, make no chain, or make several.
    """
    checks.one_of(ACTIVATIONS, activation=activation)
    shapes = _layer_shapes(tensors)
    order = _order(shapes, ordered)
    layers, names = [], {}
    for i, prefix in enumerate(order):
        name, dot = (prefix, ".") if prefix else ("layer", "")
        bias = f"{prefix}{dot}bias" in tensors
        dtype = tensors[f"{prefix}{dot}weight"].dtype
        meets = activation if i < len(order) - 1 else "none"
        layers.append(DenseLayer(name, shapes[prefix], bias, dtype, meets))
        for leaf in ("weight", "bias") if bias else ("weight",):
            names[f"{name}.{leaf}"] = f"{prefix}{dot}{leaf}"
    chain = DenseChain(layers)
    chain.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()}, assign=True)
    return chain, names


def _layer_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return (n_in, n_out) by layer name; every tensor must be a dense layer's weight or bias."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or tensor.ndim != (2 if leaf == "weight" else 1):
            raise ValueError(
                f"model: not a chain of dense layers: {name!r} of shape {tuple(tensor.shape)} is "
                f"neither a dense layer's weight nor its bias; {WAY_OUT}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"model: {name!r} is of type {tensor.dtype}, want real weights")
        if leaf == "weight":
            n_out, n_in = tensor.shape
            if not n_out or not n_in:
                raise ValueError(f"model: {name!r} is empty: shape {tuple(tensor.shape)}")
            shapes[prefix] = (n_in, n_out)
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "bias" and (prefix not in shapes or len(tensor) != shapes[prefix][1]):
            wanted = f"{shapes[prefix][1]} entries" if prefix in shapes else "a weight beside it"
            raise ValueError(f"model: {name!r} has {len(tensor)} entries, want {wanted}")
    return shapes


def _order(shapes: Mapping[str, tuple[int, int]], ordered: bool) -> list[str]:
    """Put the layers in execution order, or refuse."""
    hints = []
    numbered = _by_number(list(shapes))
    if numbered:
        hints.append(numbered)
    if ordered:
        hints.append(list(shapes))
    fitting = [hint for hint in hints if _is_chain([shapes[name] for name in hint])]
    if not fitting:
        fitting = _by_shapes(shapes)
    if not fitting:
        listed = ", ".join(f"{name or 'weight'} {i}→{o}" for name, (i, o) in shapes.items())
        raise ValueError(f"model: the layers make no chain ({_short(listed)}); {WAY_OUT}")
    if any(order != fitting[0] for order in fitting):
        ours, theirs = (_short(", ".join(order)) for order in (fitting[0], fitting[-1]))
        raise ValueError(
            f"model: the order of the layers is ambiguous ({ours} or {theirs}); {WAY_OUT}"
        )
    return fitting[0]


def _by_number(names: list[str]) -> list[str] | None:
    """Sort names that differ only in their numbers by these; None if they differ otherwise."""
    split = {name: re.split(r"(\d+)", name) for name in names}
    if len({tuple(parts[::2]) for parts in split.values()}) != 1:
        return None
    return sorted(names, key=lambda name: [int(part) for part in split[name][1::2]])


def _is_chain(shapes: Sequence[tuple[int, int]]) -> bool:
    return all(a[1] == b[0] for a, b in itertools.pairwise(shapes))


def _by_shapes(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Find up to two orders in which every layer's inputs are the previous layer's outputs.

    Depth-first; raises ValueError where the search takes too many steps.
    """
    found: list[list[str]] = []
    stack: list[list[str]] = [[name] for name in shapes]
    steps = 0
    while stack and len(found) < 2 and steps < _STEPS:
        steps += 1
        path = stack.pop()
        if len(path) == len(shapes):
            found.append(path)
            continue
        width = shapes[path[-1]][1]
        stack += [[*path, n] for n, shape in shapes.items() if shape[0] == width and n not in path]
    if steps == _STEPS:
        raise ValueError(f"model: no order of the layers can be told by their shapes; {WAY_OUT}")
    return found


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
