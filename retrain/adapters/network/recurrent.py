"""Recurrent layers written out step by step, so that their matrices are layers like others.

``aten.lstm`` and its kin return the outputs of the last layer only. Written out, each matrix is a
product of its own: the input matrix of all steps at once, the recurrent one of each step, with the
rows h_{t-1}. Parameters keep their names, so what is captured here runs on the tensors of the
network's own layers.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 512
"""Longest sequence that is written out; each step is some ten operations of the graph. Beyond it
the matrices are left, with the reason."""


class Unrolled(nn.Module):
    """An `nn.RNN`, `nn.LSTM` or `nn.GRU` step by step.

    Parameters
    ----------
    layer : nn.RNNBase
        Its parameters are shared.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.mode, self.hidden_size, self.bias = layer.mode, layer.hidden_size, layer.bias
        self.num_layers, self.batch_first = layer.num_layers, layer.batch_first
        self.bidirectional = layer.bidirectional

    def forward(
        self,
        input: Tensor,  # noqa: A002 - as torch calls it
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """Run it as the layer itself does.

        Parameters
        ----------
        input : Tensor, shape (steps, samples, n_in), or with the first two axes exchanged
            Sequences; without the axis of samples for one.
        hx : Tensor or pair of Tensor, optional
            State before the first step; zeros by default.

        Returns
        -------
        output : Tensor
            The last layer's outputs at every step.
        state : Tensor or pair of Tensor
            State after the last step.
        """
        batched = input.ndim == 3
        x = input if batched else input[:, None]
        x = x.transpose(0, 1) if self.batch_first and batched else x
        directions = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
        given = hx if isinstance(hx, tuple) else (zeros if hx is None else hx, zeros)
        hidden, cell = given if batched or hx is None else tuple(v[:, None] for v in given)
        last_h, last_c = [], []
        for number in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = number * directions + direction
                name = f"l{number}" + ("_reverse" if direction else "")
                out, h, c = self._sweep(x, name, hidden[index], cell[index], bool(direction))
                outputs.append(out)
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(outputs, dim=-1)
        state_h, state_c = torch.stack(last_h), torch.stack(last_c)
        if not batched:
            x, state_h, state_c = x[:, 0], state_h[:, 0], state_c[:, 0]
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, ((state_h, state_c) if self.mode == "LSTM" else state_h)

    def _sweep(
        self, x: Tensor, name: str, h: Tensor, c: Tensor, backwards: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer in one direction over all steps."""
        weight, recurrent = getattr(self, f"weight_ih_{name}"), getattr(self, f"weight_hh_{name}")
        first = getattr(self, f"bias_ih_{name}") if self.bias else None
        second = getattr(self, f"bias_hh_{name}") if self.bias else None
        given = functional.linear(x, weight, first)
        steps = range(x.shape[0])
        outputs: list[Tensor] = []
        for step in reversed(steps) if backwards else steps:
            added = functional.linear(h, recurrent, second)
            h, c = self._cell(given[step], added, h, c)
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs), h, c

    def _cell(self, given: Tensor, added: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step: the formulas of torch's documentation."""
        if self.mode == "LSTM":
            i, f, g, o = (given + added).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c
        if self.mode == "GRU":
            (i_r, i_z, i_n), (h_r, h_z, h_n) = given.chunk(3, dim=-1), added.chunk(3, dim=-1)
            r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
            return (1 - z) * torch.tanh(i_n + r * h_n) + z * h, c
        total = given + added
        return (torch.relu(total) if self.mode == "RNN_RELU" else torch.tanh(total)), c


def unrolled(model: nn.Module) -> nn.Module:
    """Return a network whose recurrent layers are written out; the same where there are none.

    Parameters
    ----------
    model : nn.Module
        Network; it is not changed, and the copy shares its parameters.

    Returns
    -------
    nn.Module
        Network with the same parameters under the same names.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.RNN | nn.LSTM | nn.GRU) and not getattr(module, "proj_size", 0)
    ]
    if not found or "" in found:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)  # tensors in the memo are not copied
    for name in found:
        parent = other.get_submodule(name.rpartition(".")[0])
        layer = cast("nn.RNNBase", other.get_submodule(name))
        setattr(parent, name.rpartition(".")[2], Unrolled(layer))
    return other
