"""Neurons cut out of a network: which entries of which tensors are theirs.

A neuron that goes takes with it its row of the layer that gives it and that layer's bias, its
entries of batch normalisations, PReLUs and switches on the way, and its columns of the layer that
takes it: one of a dense layer, a filter's slice of a convolution, all its positions behind a
flatten. `retrain.compact.cut` does the cutting.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from retrain.compact.cut import NORMS, Piece, cut, spread
from retrain.trainers.shrinknets.network import Neurons
from retrain.trainers.shrinknets.switches import InputSwitch, Switch


def cut_neurons(neurons: Neurons, kept: Tensor, optimizer: Optimizer | None = None) -> None:
    """Cut, in place, all neurons but `kept` out of their network.

    Parameters
    ----------
    neurons : Neurons
        Of the network as it is now; it is out of date afterwards.
    kept : Tensor of int64, shape (n,)
        The neurons that stay, ascending, at least one.
    optimizer : Optimizer, optional
        Any of torch's whose state is made of tensors of the parameter's shape (momenta, averages of
        squares), of that shape reduced along axes to 1 (factored averages), and of numbers. What it
        remembers of the neurons that stay is untouched.

    Raises
    ------
    ValueError
        If nothing would stay, the network's inputs have no switches that could select among them,
        or the optimiser's state cannot be cut. Nothing has been changed then.
    """
    if len(kept) == 0:
        raise ValueError(f"kept: want at least one of {neurons.name}")
    cut(_pieces(neurons, kept), optimizer)


def _pieces(neurons: Neurons, kept: Tensor) -> Iterator[Piece]:
    """Yield what there is of the neurons, in every module that knows them."""
    inputs = next((s for s in neurons.switches.values() if isinstance(s, InputSwitch)), None)
    if neurons.giver is not None:
        yield Piece(neurons.giver, "weight", 0, kept)
        yield Piece(neurons.giver, "bias", 0, kept)
    elif inputs is None:
        raise ValueError(f"neurons: {neurons.name} have no switches, so none of them can go")
    else:
        yield Piece(inputs, "kept", 0, kept)
    for module in neurons.between.values():
        if isinstance(module, Switch):
            yield Piece(module, "beta", 0, kept)
            yield Piece(module, "mean_sign", 0, kept)
        elif isinstance(module, NORMS) and neurons.giver is not None:
            entries = spread(kept, module.num_features // neurons.count)
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield Piece(module, name, 0, entries)
        elif isinstance(module, nn.PReLU) and neurons.giver is not None and len(module.weight) > 1:
            yield Piece(module, "weight", 0, spread(kept, len(module.weight) // neurons.count))
    assert neurons.taker is not None
    yield Piece(neurons.taker, "weight", 1, spread(kept, neurons.span))
