"""Random networks as plain data, which torch runs in its types and `exactly` in long double.

A network is a list of operations; branches hold lists of their own. `Net` builds torch modules from
it, `exactly` evaluates the same list in numpy's long double (64 bits of mantissa on x86), written
apart from the package and from torch: convolutions by their definition, one kernel entry at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Operation = tuple[Any, ...]
LONG = np.longdouble


@dataclass
class Plan:
    """A network: its operations, the modules they name, and the shape of a sample.

    Operations are ``("layer", name)`` (a module of `modules`), ``("relu",)``, ``("tanh",)``,
    ``("flatten",)``, ``("max", size, stride, padding)``, ``("mean", size, stride, padding)``,
    ``("add", branch, branch)`` and ``("cat", branch, branch)``, each branch a list of operations,
    and ``("unused", name)``: a layer that is called and whose response goes nowhere.
    """

    shape: tuple[int, ...]
    operations: list[Operation] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def add(self, module: nn.Module) -> Operation:
        """Register a module; return the operation that calls it."""
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        return ("layer", name)


class Net(nn.Module):
    """A plan as a torch module."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        for name, module in plan.modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Run the operations."""
        return self._run(self.plan.operations, x)

    def _run(self, operations: list[Operation], x: Tensor) -> Tensor:
        for kind, *settings in operations:
            if kind == "layer":
                x = getattr(self, settings[0])(x)
            elif kind == "unused":
                getattr(self, settings[0])(x)
            elif kind == "relu":
                x = torch.relu(x)
            elif kind == "tanh":
                x = torch.tanh(x)
            elif kind == "flatten":
                x = torch.flatten(x, 1)
            elif kind == "max":
                x = functional.max_pool2d(x, *settings)
            elif kind == "mean":
                x = functional.avg_pool2d(x, *settings)
            elif kind == "add":
                x = self._run(settings[0], x) + self._run(settings[1], x)
            else:
                x = torch.cat([self._run(settings[0], x), self._run(settings[1], x)], 1)
        return x


def exactly(net: Net, x: np.ndarray) -> np.ndarray:
    """Evaluate a network in long double on the samples as its type holds them."""
    dtype = next(net.parameters()).dtype
    held = torch.as_tensor(x).to(dtype).double().numpy()
    return _run(net, net.plan.operations, held.astype(LONG))


def _run(net: Net, operations: list[Operation], x: np.ndarray) -> np.ndarray:
    for kind, *settings in operations:
        if kind == "layer":
            x = _module(net.get_submodule(settings[0]), x)
        elif kind == "relu":
            x = np.maximum(x, 0)
        elif kind == "tanh":
            x = np.tanh(x)
        elif kind == "flatten":
            x = x.reshape(len(x), -1)
        elif kind == "max":
            x = _pool(x, settings, np.max, -np.inf)
        elif kind == "mean":
            x = _pool(x, settings, np.mean, 0.0)
        elif kind in ("add", "cat"):
            first, second = (_run(net, branch, x) for branch in settings)
            x = first + second if kind == "add" else np.concatenate([first, second], axis=1)
    return x


def _module(module: nn.Module, x: np.ndarray) -> np.ndarray:
    values = {
        name: tensor.detach().double().numpy().astype(LONG)
        for name, tensor in module.state_dict().items()
    }
    if isinstance(module, nn.Linear):
        return x @ values["weight"].T + values.get("bias", 0)
    if isinstance(module, nn.Conv2d):
        return _convolution(module, values, x)
    broad = (1, -1, *[1] * (x.ndim - 2))
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        scale = values["weight"] / np.sqrt(values["running_var"] + LONG(module.eps))
        centred = x - values["running_mean"].reshape(broad)
        return centred * scale.reshape(broad) + values["bias"].reshape(broad)
    if isinstance(module, nn.PReLU):
        return np.where(x >= 0, x, values["weight"].reshape(broad) * x)
    raise ValueError(f"module: got {type(module).__name__}, which has no long double form here")


def _convolution(layer: nn.Conv2d, values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    kernel = values["weight"]
    rows, columns = (int(p) for p in layer.padding)
    padded = np.pad(x, ((0, 0), (0, 0), (rows,) * 2, (columns,) * 2))
    ends = []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        ends.append((padded.shape[axis + 2] - reach) // layer.stride[axis] + 1)
    out = np.zeros((len(x), layer.out_channels, *ends), dtype=LONG)
    wide, narrow = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for group in range(layer.groups):
        into = slice(group * wide, (group + 1) * wide)
        part = padded[:, group * narrow : (group + 1) * narrow]
        for i, j in np.ndindex(*layer.kernel_size):
            window = part[
                :,
                :,
                i * layer.dilation[0] :: layer.stride[0],
                j * layer.dilation[1] :: layer.stride[1],
            ][:, :, : ends[0], : ends[1]]
            out[:, into] += np.einsum("oc,nchw->nohw", kernel[into, :, i, j], window)
    if layer.bias is not None:
        out += values["bias"].reshape(1, -1, 1, 1)
    return out


def _pool(x: np.ndarray, settings: Sequence[int], join: Any, outside: float) -> np.ndarray:
    size, stride, padding = settings
    edges = ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2)
    padded = np.pad(x, edges, constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return join(windows[:, :, ::stride, ::stride], axis=(4, 5))


def draw(rng: np.random.Generator) -> tuple[Net, np.ndarray, list[str]]:
    """Draw a network, samples for it, and the names of what is peculiar about it."""
    images = rng.random() < 0.4
    traits: list[str] = ["images" if images else "vectors"]
    shape = (int(rng.integers(1, 4)), 6, 5) if images else (int(rng.integers(2, 9)),)
    plan = Plan(shape)
    x = rng.standard_normal((int(rng.integers(3, 25)), *shape))
    if rng.random() < 0.3:
        x = np.abs(x)
    state = _State(rng, plan, traits)
    channels = shape[0]
    if images:
        channels = state.convolutions(channels)
    state.dense(channels)
    net = Net(plan).eval()
    net.requires_grad_(False)
    _fill(rng, net, traits)
    return net, x, traits


@dataclass
class _State:
    rng: np.random.Generator
    plan: Plan
    traits: list[str]

    def convolutions(self, channels: int) -> int:
        rng, operations = self.rng, self.plan.operations
        for _ in range(int(rng.integers(1, 3))):
            groups = int(rng.choice([g for g in (1, 2, 3) if channels % g == 0]))
            out = groups * int(rng.integers(1, 4))
            kernel = (int(rng.integers(1, 4)), int(rng.integers(1, 3)))
            dilation = int(rng.integers(1, 3))
            padding = (dilation * (kernel[0] - 1), dilation * (kernel[1] - 1))
            layer = nn.Conv2d(
                channels,
                out,
                kernel,
                stride=(int(rng.integers(1, 3)), int(rng.integers(1, 4))),
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=bool(rng.random() < 0.7),
            )
            self.traits.append(f"groups {groups}" if groups > 1 else "convolution")
            operations.append(self.plan.add(layer))
            channels = out
            if rng.random() < 0.3:
                operations.append(self.plan.add(nn.BatchNorm2d(channels)))
                self.traits.append("batch norm")
            self._activation(operations, channels)
        choice = rng.random() if min(self._shape()[2:]) > 1 else 1.0
        if choice < 0.25:
            operations.append(("max", 2, int(rng.integers(1, 3)), int(rng.integers(0, 2))))
        elif choice < 0.5:
            operations.append(("mean", 2, int(rng.integers(1, 3)), int(rng.integers(0, 2))))
        if rng.random() < 0.2:
            same = [self.plan.add(nn.Conv2d(channels, channels, 3, padding=1)), ("relu",)]
            operations.append(("add", same, []))
            self.traits.append("residual")
        operations.append(("flatten",))
        return self._shape()[1]

    def _shape(self) -> torch.Size:
        """Shape of what the operations so far give for one sample."""
        with torch.no_grad():
            return Net(self.plan).eval()(torch.zeros(1, *self.plan.shape)).shape

    def dense(self, width: int) -> None:
        rng, operations = self.rng, self.plan.operations
        for _ in range(int(rng.integers(0, 4))):
            out = int(rng.integers(1, 10))
            operations.append(self._linear(width, out))
            width = out
            if rng.random() < 0.15:
                operations.append(self.plan.add(nn.BatchNorm1d(width)))
                self.traits.append("batch norm")
            self._activation(operations, width)
            if rng.random() < 0.2:
                operations.append(("add", [self._linear(width, width), ("relu",)], []))
                self.traits.append("residual")
            if rng.random() < 0.1:
                operations.append(("unused", self._linear(width, 3)[1]))
                self.traits.append("unused layer")
        out = int(rng.integers(1, 6))
        ending = rng.random()
        if ending < 0.15:
            second = [self._linear(width, 2)]
            if rng.random() < 0.5:
                second = [self._linear(width, 4), ("relu",), self._linear(4, 2)]
            operations.append(("cat", [self._linear(width, out)], second))
            self.traits.append("two heads")
        elif ending < 0.3:
            deep = [self._linear(width, 4), ("relu",), self._linear(4, out)]
            operations.append(("add", [self._linear(width, out)], deep))
            self.traits.append("summed heads")
        else:
            operations.append(self._linear(width, out))
            if rng.random() < 0.3:
                operations.append(("relu",))
                self.traits.append("last ReLU")

    def _linear(self, width: int, out: int) -> Operation:
        return self.plan.add(nn.Linear(width, out, bias=bool(self.rng.random() < 0.7)))

    def _activation(self, operations: list[Operation], width: int) -> None:
        choice = self.rng.random()
        if choice < 0.75:
            operations.append(("relu",))
        elif choice < 0.85:
            operations.append(("tanh",))
            self.traits.append("tanh")
        elif choice < 0.95:
            slopes = nn.PReLU(width if self.rng.random() < 0.5 else 1)
            operations.append(self.plan.add(slopes))
            self.traits.append("PReLU")


def _fill(rng: np.random.Generator, net: Net, traits: list[str]) -> None:
    """Draw all tensors; then scale layers against each other, and let hidden units cancel."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = len(module.weight)
            _set(module.weight, rng.standard_normal(size))
            _set(module.bias, rng.standard_normal(size))
            _set(module.running_mean, 3 * rng.standard_normal(size))
            _set(module.running_var, 10 ** rng.uniform(-3, 1, size))
        elif isinstance(module, nn.PReLU):
            _set(module.weight, 2 * rng.standard_normal(module.weight.shape))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            _set(module.weight, rng.standard_normal(module.weight.shape) / np.sqrt(fan_in))
            if module.bias is not None:
                _set(module.bias, 0.3 * rng.standard_normal(len(module.bias)))
    layers = [m for m in _chain(net) if isinstance(m, nn.Linear | nn.Conv2d)]
    if len(layers) > 1 and rng.random() < 0.3:
        scale = 10.0 ** rng.uniform(-24, 24)
        _scale(layers[0], scale, bias=True)
        for between in layers[1:-1]:
            if between.bias is not None:
                between.bias *= scale
        _scale(layers[-1], 1 / scale, bias=False)
        traits.append(f"scale 1e{np.log10(scale):.0f}")
    if len(layers) > 1 and isinstance(layers[-1], nn.Linear) and rng.random() < 0.3:
        before, after = layers[-2], layers[-1]
        if len(before.weight) == after.in_features and after.in_features > 1:
            # Two hidden units nearly alike, read with opposite signs and a large factor.
            size = 10.0 ** rng.uniform(1, 4)
            before.weight[1] = before.weight[0] * (1 + 1e-3 * rng.standard_normal())
            after.weight[:, 1] = size * after.weight[:, 0]
            after.weight[:, 0] = -after.weight[:, 1]
            traits.append("cancellation")
    if rng.random() < 0.07:
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        _set(last.weight, np.zeros(last.weight.shape))
        if last.bias is not None:
            _set(last.bias, -np.abs(rng.standard_normal(len(last.bias))))
        traits.append("zero targets")


def _chain(net: Net) -> Iterator[nn.Module]:
    """The modules outside branches, in order."""
    for kind, *settings in net.plan.operations:
        if kind == "layer":
            yield net.get_submodule(settings[0])


def _scale(layer: Any, scale: float, *, bias: bool) -> None:
    layer.weight *= scale
    if bias and layer.bias is not None:
        layer.bias *= scale


def _set(tensor: Any, values: np.ndarray) -> None:
    tensor.copy_(torch.as_tensor(values))
