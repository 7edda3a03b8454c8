"""Layers of a captured network: operations whose weight is a parameter.

The weight is found through views of the parameter (transposes, slices, casts that change nothing),
so that a fused projection, a Hugging Face ``Conv1D`` and a plain dense layer are the same: an
operation that multiplies rows by a matrix. What each operation's rows, matrix and response are is
the table `OPERATIONS`; a kind of layer is one entry of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod, sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from retrain.adapters.network.capture import Captured, arguments_of, name_of, operation, readers
from retrain.adapters.network.fold import Fold, find_fold
from retrain.adapters.network.norms import cover, frequency_norm, frobenius_norm, spectral_norm
from retrain.adapters.network.recurrent import STEPS
from retrain.adapters.network.tensors import named_tensors
from retrain.stream.stream import Follows, LayerSpec, Norm

Arguments = Mapping[str, Any]
"""An operation's arguments by name; tensors are nodes."""


@dataclass(frozen=True)
class Operation:
    """How an operation multiplies rows by its weight.

    Attributes
    ----------
    kind : str
        Name of the kind of layer in reports.
    input, weight, bias : str
        Names of its arguments in the operation's schema; an empty bias where it has none.
    groups : callable
        (arguments, weight) -> number of weight matrices.
    matrix : callable
        (weight, arguments, group) -> the matrix, shape (n_in, n_out), a view where it can be.
    unmatrix : callable
        (matrix, weight, arguments, group) -> the same as a part of the weight, to be copied into
        ``part(weight, arguments, group)``.
    part : callable
        (weight, arguments, group) -> the view of the weight that belongs to a group.
    rows : callable
        (input, weight, arguments, group) -> rows, shape (rows, n_in).
    responses : callable
        (output, arguments, group) -> rows of the response, shape (rows, n_out).
    unfit : callable
        (arguments, weight) -> why this call cannot be retrained, or None.
    channel_axis : int
        Axis of the response that holds its output channels.
    kernel : callable or None
        For a convolution, (weight, arguments, group) -> its kernel (channels, channels, *sizes).
    unit_axis : int
        Axis of the kernel that holds the output channels.
    covers : callable
        (arguments, weight) -> how many windows cover an entry of the input at most.
    """

    kind: str
    input: str
    weight: str
    bias: str
    groups: Callable[[Arguments, Tensor], int]
    matrix: Callable[[Tensor, Arguments, int], Tensor]
    unmatrix: Callable[[Tensor, Tensor, Arguments, int], Tensor]
    part: Callable[[Tensor, Arguments, int], Tensor]
    rows: Callable[[Tensor, Tensor, Arguments, int], Tensor]
    responses: Callable[[Tensor, Arguments, int], Tensor]
    unfit: Callable[[Arguments, Tensor], str | None] = lambda arguments, weight: None
    channel_axis: int = -1
    kernel: Callable[[Tensor, Arguments, int], Tensor] | None = None
    unit_axis: int = 0
    covers: Callable[[Arguments, Tensor], int] = lambda arguments, weight: 1


def _dense(
    kind: str, inputs: str, weight: str, bias: str, *, transposed: bool, **more: Any
) -> Operation:
    """Describe an operation on rows: the last axis is multiplied by a matrix."""

    def turn(value: Tensor) -> Tensor:
        return value.T if transposed else value

    return Operation(
        kind=kind,
        input=inputs,
        weight=weight,
        bias=bias,
        groups=lambda arguments, w: 1,
        matrix=lambda w, arguments, group: turn(w),
        unmatrix=lambda m, w, arguments, group: turn(m),
        part=lambda w, arguments, group: w,
        rows=lambda x, w, arguments, group: x.reshape(-1, turn(w).shape[0]),
        responses=lambda y, arguments, group: y.reshape(-1, y.shape[-1]),
        **more,
    )


def _scaled(arguments: Arguments, weight: Tensor) -> str | None:
    plain = arguments.get("alpha", 1) == 1 and arguments.get("beta", 1) == 1
    return None if plain else "its product is scaled"


def _is_matrix(arguments: Arguments, weight: Tensor) -> str | None:
    return None if weight.ndim == 2 else "its weight is not a matrix"


def _tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * dimensions if len(values) == 1 else values))


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Cut an image (of any number of dimensions) into the windows that a convolution multiplies.

    Parameters
    ----------
    x : Tensor, shape (samples, channels, *sizes)
        Padded input.
    kernel, stride, dilation : sequence of int
        One number for each dimension.

    Returns
    -------
    Tensor, shape (samples * positions, channels * prod(kernel))
        Windows in the order of the output's positions.
    """
    for size, step, space in zip(kernel, stride, dilation, strict=True):
        x = x.movedim(2, -1)
        out = (x.shape[-1] - space * (size - 1) - 1) // step + 1
        at = torch.arange(out, device=x.device)[:, None] * step
        x = x[..., at + torch.arange(size, device=x.device) * space]
    dimensions = len(kernel)
    outs = [2 + 2 * d for d in range(dimensions)]
    sizes = [3 + 2 * d for d in range(dimensions)]
    return x.permute(0, *outs, 1, *sizes).reshape(-1, x.shape[1] * prod(kernel))


def _padding(arguments: Arguments, weight: Tensor) -> list[int]:
    """Padding for `torch.nn.functional.pad`: last dimension first, before and after."""
    dimensions = weight.ndim - 2
    given = arguments["padding"]
    if given == "valid":
        return [0] * (2 * dimensions)
    if given == "same":
        spaces = _tuple(arguments["dilation"], dimensions)
        total = [d * (k - 1) for d, k in zip(spaces, weight.shape[2:], strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in _tuple(given, dimensions)]
    return [side for pair in reversed(pairs) for side in pair]


def _convolution(kind: str) -> Operation:
    def part(w: Tensor, arguments: Arguments, group: int) -> Tensor:
        units = w.shape[0] // arguments["groups"]
        return w[group * units : (group + 1) * units]

    def rows(x: Tensor, w: Tensor, arguments: Arguments, group: int) -> Tensor:
        dimensions, channels = w.ndim - 2, w.shape[1]
        x = x[None] if x.ndim == dimensions + 1 else x
        x = functional.pad(x[:, group * channels : (group + 1) * channels], _padding(arguments, w))
        return windows(
            x,
            w.shape[2:],
            _tuple(arguments["stride"], dimensions),
            _tuple(arguments["dilation"], dimensions),
        )

    return Operation(
        kind=kind,
        input="input",
        weight="weight",
        bias="bias",
        groups=lambda arguments, w: int(arguments["groups"]),
        part=part,
        matrix=lambda w, arguments, group: part(w, arguments, group).flatten(1).T,
        unmatrix=lambda m, w, arguments, group: m.T.reshape(part(w, arguments, group).shape),
        rows=rows,
        responses=lambda y, arguments, group: _channels_last(y, arguments, group),
        channel_axis=1,
        kernel=part,
        covers=_covers,
    )


def _covers(arguments: Arguments, weight: Tensor) -> int:
    """Count the windows of a convolution that cover the same entry."""
    dims = weight.ndim - 2
    steps, spaces = (_tuple(arguments[name], dims) for name in ("stride", "dilation"))
    return prod(map(cover, weight.shape[2:], steps, spaces))


def _channels_last(y: Tensor, arguments: Arguments, group: int) -> Tensor:
    units = y.shape[1] // int(arguments["groups"])
    y = y[:, group * units : (group + 1) * units]
    return y.movedim(1, -1).reshape(-1, units)


def _transposed(kind: str) -> Operation:
    """Describe a transposed convolution.

    It is a convolution of the input with zeros between its entries by the weight turned around.
    """

    def part(w: Tensor, arguments: Arguments, group: int) -> Tensor:
        channels = w.shape[0] // int(arguments["groups"])
        return w[group * channels : (group + 1) * channels]

    def around(w: Tensor) -> list[int]:
        return list(range(2, w.ndim))

    def rows(x: Tensor, w: Tensor, arguments: Arguments, group: int) -> Tensor:
        dimensions = w.ndim - 2
        channels = w.shape[0] // int(arguments["groups"])
        x = x[:, group * channels : (group + 1) * channels]
        stride = _tuple(arguments["stride"], dimensions)
        space = _tuple(arguments["dilation"], dimensions)
        pads, extra = (
            _tuple(arguments[name], dimensions) for name in ("padding", "output_padding")
        )
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
        wide = x.new_zeros(*x.shape[:2], *sizes)
        wide[(slice(None), slice(None), *[slice(None, None, s) for s in stride])] = x
        sides: list[int] = []
        for k, d, p, e in zip(w.shape[2:], space, pads, extra, strict=True):
            sides = [d * (k - 1) - p, d * (k - 1) - p + e, *sides]
        return windows(functional.pad(wide, sides), w.shape[2:], [1] * dimensions, space)

    return Operation(
        kind=kind,
        input="input",
        weight="weight",
        bias="bias",
        groups=lambda arguments, w: int(arguments["groups"]),
        part=part,
        matrix=lambda w, arguments, group: (
            part(w, arguments, group).flip(around(w)).transpose(0, 1).flatten(1).T
        ),
        unmatrix=lambda m, w, arguments, group: (
            m.T.reshape(w.shape[1], part(w, arguments, group).shape[0], *w.shape[2:])
            .transpose(0, 1)
            .flip(around(w))
        ),
        rows=rows,
        responses=lambda y, arguments, group: _channels_last(y, arguments, group),
        channel_axis=1,
        kernel=part,  # of the convolution that it is the adjoint of
        unit_axis=1,
        covers=_covers,
    )


def operator_norm(
    how: Operation, weight: Tensor, arguments: Arguments, norm: Norm, scale: Tensor | None = None
) -> float:
    """Bound the norm of a layer as a map, bias aside.

    A dense layer's is its matrix's. For a convolution let δ be the change of the input and δ_p that
    of the patch at position p. In one group, with its weight matrix W,

        sum_p ||Wᵀ δ_p||² <= ||W||² sum_p ||δ_p||² <= ||W||² · c · ||δ||²,

    since every entry is in at most c patches. Groups read and write disjoint channels, so the
    largest of them counts. Where it is smaller, `frequency_norm` is taken instead. A transposed
    convolution has the norm of the convolution that it is the adjoint of.

    Parameters
    ----------
    how : Operation
        Kind of layer.
    weight : Tensor
        Its weight.
    arguments : mapping
        Arguments of the call.
    norm : {"spectral", "frobenius"}
        Norm of the weights; ``"frobenius"``, as in L-OBS's theorems, never takes `frequency_norm`.
    scale : Tensor, shape (n_out,), optional
        Factor of each output channel.

    Returns
    -------
    float
        Upper bound on the norm.
    """
    measure = spectral_norm if norm == "spectral" else frobenius_norm
    found = []
    for group in range(how.groups(arguments, weight)):
        if how.kernel is None:
            matrix = how.matrix(weight, arguments, group).detach().double()
            found.append(measure(matrix if scale is None else matrix * scale))
            continue
        kernel = how.kernel(weight, arguments, group).detach().double()
        if scale is not None:
            units = kernel.shape[how.unit_axis]
            shape = [1] * kernel.ndim
            shape[how.unit_axis] = units
            kernel = kernel * scale[group * units : (group + 1) * units].reshape(shape)
        flat = measure(kernel.flatten(1)) * sqrt(how.covers(arguments, weight))
        whole = norm == "frobenius" or not isfinite(flat)
        found.append(flat if whole else min(flat, frequency_norm(kernel)))
    return max(found, default=0.0)


OPERATIONS: dict[str, Operation] = {
    "linear": _dense("linear", "input", "weight", "bias", transposed=True),
    "addmm": _dense("linear", "mat1", "mat2", "self", transposed=False, unfit=_scaled),
    "mm": _dense("linear", "self", "mat2", "", transposed=False),
    "matmul": _dense("linear", "self", "other", "", transposed=False, unfit=_is_matrix),
    **{name: _convolution(name) for name in ("conv1d", "conv2d", "conv3d")},
    **{f"conv_transpose{d}d": _transposed(f"conv_transpose{d}d") for d in (1, 2, 3)},
}
"""Operations whose weights can be retrained, by name. A kind of layer is one entry."""

WEIGHTED = {
    "embedding": "an embedding: its rows are looked up, not multiplied",
    "lstm": f"recurrent: its matrices are retrained on sequences of at most {STEPS} steps",
    "gru": f"recurrent: its matrices are retrained on sequences of at most {STEPS} steps",
    "rnn_tanh": f"recurrent: its matrices are retrained on sequences of at most {STEPS} steps",
    "rnn_relu": f"recurrent: its matrices are retrained on sequences of at most {STEPS} steps",
    "bilinear": "bilinear: it multiplies two inputs",
}
"""Operations with weight matrices that are left, with the reason."""

_VIEWS = {
    "t",
    "transpose",
    "permute",
    "view",
    "reshape",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "alias",
    "detach",
    "contiguous",
    "to",
    "_to_copy",
    "flatten",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "expand",
    "numpy_T",
    "clone",
}
"""Operations through which a parameter is followed to the layer that uses it."""

_PASSED = {
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "contiguous",
    "clone",
    "unsqueeze",
    "squeeze",
    "dropout",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "alias",
    "detach",
    "feature_dropout",
    "alpha_dropout",
    "unflatten",
}
"""Operations that commute with a ReLU, so that the layer meets the ReLU behind them."""


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of a captured network.

    Attributes
    ----------
    spec : LayerSpec
        What methods see of it.
    calls : tuple of fx.Node
        Operations that use the weight, in the order of execution.
    operation : Operation or None
        How they use it; None where it cannot be retrained.
    parameter : str
        Qualified name of the parameter.
    parameters : int
        Number of its entries.
    fold : Fold or None
        Batch norm that is folded into it.
    """

    spec: LayerSpec
    calls: tuple[fx.Node, ...]
    operation: Operation | None
    parameter: str
    parameters: int
    fold: Fold | None = None

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """For each call, the node with the layer's response."""
        return self.calls if self.fold is None else (self.fold.end,)

    @property
    def chains(self) -> tuple[tuple[fx.Node, ...], ...]:
        """For each call, the nodes from the call to the response."""
        if self.fold is None:
            return tuple((call,) for call in self.calls)
        return ((*self.calls, *self.fold.nodes),)


def source_of(node: Any, captured: Captured) -> str | None:
    """Follow views back to the parameter that a value is made of.

    Parameters
    ----------
    node : fx.Node or object
        Argument of an operation.
    captured : Captured
        Network.

    Returns
    -------
    str or None
        Qualified name; None where the value is computed.
    """
    while isinstance(node, fx.Node):
        if node in captured.tensors:
            return captured.tensors[node]
        name = operation(node) or getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in {*_VIEWS, "getitem"}:
            return None
        node = node.args[0]
    return None


def view_of(node: fx.Node, captured: Captured, tensors: Mapping[str, Tensor]) -> Tensor:
    """Make the view of a parameter that an operation receives.

    Parameters
    ----------
    node : fx.Node
        Argument for which `source_of` found a parameter.
    captured : Captured
        Network.
    tensors : mapping from str to Tensor
        Parameters and buffers.

    Returns
    -------
    Tensor
        Shares its entries with the parameter, unless a cast or a copy is among the views.
    """
    if node in captured.tensors:
        return tensors[captured.tensors[node]]
    target: Any = node.target
    args = fx.node.map_arg(node.args, lambda entry: view_of(entry, captured, tensors))
    kwargs = fx.node.map_arg(node.kwargs, lambda entry: view_of(entry, captured, tensors))
    return target(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Found:
    """Calls that use the same view of the same parameter."""

    operation: str
    parameter: str
    calls: list[fx.Node]


def find_sites(captured: Captured, model: nn.Module) -> tuple[Site, ...]:
    """List the layers of a captured network in the order of execution.

    Parameters
    ----------
    captured : Captured
        Network.
    model : nn.Module
        The module that was captured.

    Returns
    -------
    tuple of Site
        All weights of at least two axes that an operation uses, those that cannot be retrained
        with the reason.
    """
    tensors = named_tensors(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    found: dict[tuple[Any, ...], _Found] = {}
    users: dict[int, set[tuple[Any, ...]]] = {}
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        name = operation(node)
        if name not in OPERATIONS and name not in WEIGHTED:
            continue
        for argument in _weights_of(node, name):
            parameter = source_of(argument, captured)
            if parameter is None or parameter not in every:
                continue
            weight = view_of(argument, captured, tensors)
            key = (every[parameter].data_ptr(), weight.storage_offset(), tuple(weight.shape),
                   tuple(weight.stride()), name in WEIGHTED)  # fmt: skip
            found.setdefault(key, _Found(name, parameter, [])).calls.append(node)
            users.setdefault(every[parameter].data_ptr(), set()).add(key)
    sites = []
    for key, one in found.items():
        shared = [other for other in users[key[0]] if other != key and _overlap(other, key)]
        same = [name for name, each in every.items() if each.data_ptr() == key[0]]
        one = replace(one, parameter=_own_name(one, same, model))
        sites.append(_site(one, captured, tensors, tied=bool(shared)))
    order = {node: index for index, node in enumerate(captured.graph.nodes)}
    placed = [(order[site.calls[0]], site) for site in _named_apart(sites)]
    held = {every[site.parameter].data_ptr() for site in sites}
    placed += _others(captured, model, held, order)
    return tuple(site for _, site in sorted(placed, key=lambda pair: pair[0]))


def _others(
    captured: Captured, model: nn.Module, held: set[int], order: Mapping[fx.Node, int]
) -> list[tuple[int, Site]]:
    """List the modules whose weights no operation of `OPERATIONS` or `WEIGHTED` uses."""
    first: dict[str, int] = {}
    for node, name in captured.tensors.items():
        for user in node.users:
            first[name] = min(first.get(name, len(order)), order[user])
    found: list[tuple[int, Site]] = []
    parametrised: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in parametrised):
            continue
        inside = hasattr(module, "parametrizations")
        if inside:
            parametrised.append(f"{name}.parametrizations")
        own = dict(module.named_parameters(recurse=inside))
        if not own or any(tensor.data_ptr() in held for tensor in own.values()):
            continue
        full = [f"{name}.{key}" if name else key for key in own]
        place = min((first.get(key, len(order)) for key in full), default=len(order))
        reason = _reason(name, module, reached=place < len(order))
        largest = max(own, key=lambda key: own[key].numel())
        tensor = own[largest]
        units = tensor.shape[0] if tensor.ndim > 1 else 1
        spec = LayerSpec(
            name or "(root)",
            type(module).__name__,
            (tensor.numel() // max(units, 1), units),
            getattr(module, "bias", None) is not None,
            "linear",
            1,
            reason,
        )
        count = sum(tensor.numel() for tensor in own.values())
        found.append((place, Site(spec, (), None, full[0], count)))
    return found


def _reason(name: str, module: nn.Module, *, reached: bool) -> str:
    """Say why a module's weights are left."""
    label = type(module).__name__
    if hasattr(module, "parametrizations"):
        entries: Any = module.parametrizations
        return (
            "its weight is parametrised; remove the parametrisation first: "
            "torch.nn.utils.parametrize.remove_parametrizations"
            f"(model.get_submodule({name!r}), {next(iter(entries))!r})"
        )
    if not reached:
        return "the forward pass does not reach it"
    if type(module).__module__.startswith("torch.nn."):
        return f"{label} layers are not retrained"
    return f"{label} uses its weights otherwise than as a matrix that multiplies rows"


def _own_name(one: _Found, names: list[str], model: nn.Module) -> str:
    """Choose among a tied parameter's names: an embedding's for a look-up, else another."""
    looks_up = one.operation == "embedding"
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding) == looks_up:
            return name
    return one.parameter


def _overlap(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tell whether two views of one storage share entries, as far as their extents tell."""

    def extent(key: tuple[Any, ...]) -> tuple[int, int]:
        _, start, shape, stride, _ = key
        return start, start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))

    (a, b), (c, d) = extent(one), extent(other)
    return a <= d and c <= b


def _weights_of(node: fx.Node, name: str) -> list[Any]:
    """Arguments of an operation that are its weights."""
    arguments = arguments_of(node)
    if name in OPERATIONS:
        return [arguments.get(OPERATIONS[name].weight)]
    if name == "embedding":
        return [arguments.get("weight")]
    listed = arguments.get("params") or []
    return [entry for entry in listed if isinstance(entry, fx.Node)]


def _site(one: _Found, captured: Captured, tensors: Mapping[str, Tensor], *, tied: bool) -> Site:
    """Describe a layer; a reason where it cannot be retrained."""
    parameter = one.parameter
    module, _, leaf = parameter.rpartition(".")
    name = module if leaf == "weight" else f"{module}.{leaf.removesuffix('_weight')}".strip(".")
    count = tensors[parameter].numel()
    if one.operation in WEIGHTED:
        kind = one.operation
        spec = LayerSpec(name, kind, (0, 0), False, "linear", 1, WEIGHTED[one.operation])
        return Site(spec, tuple(one.calls), None, parameter, count)
    how = OPERATIONS[one.operation]
    first = arguments_of(one.calls[0])
    weight = view_of(first[how.weight], captured, tensors)
    groups = how.groups(first, weight)
    shape = tuple(how.matrix(weight, first, 0).shape) if weight.ndim >= 2 else (0, 0)
    bias = first.get(how.bias) if how.bias else None
    reason = how.unfit(first, weight)
    if reason is None and weight.ndim < 2:
        reason = "its weight is not a matrix"
    own = tensors[parameter].untyped_storage().data_ptr()
    if reason is None and weight.untyped_storage().data_ptr() != own:
        reason = "its weight is computed from the parameter"
    if reason is None and bias is not None and source_of(bias, captured) is None:
        reason = "its bias is computed"
    biases = {arguments_of(node).get(how.bias) for node in one.calls} if how.bias else {None}
    if reason is None and len(biases) > 1:
        reason = "its weight is used with different biases"
    if reason is None and tied:
        reason = "its weight is used by another layer too (tied)"
    if reason is None and not weight.is_floating_point():
        reason = f"its weight is of type {weight.dtype}"
    fold = None
    if reason is None and len(one.calls) == 1:
        fold = find_fold(one.calls[0], how.channel_axis, captured)
    ends = one.calls if fold is None else [fold.end]
    follows: Follows = "relu" if all(_meets_relu(end) for end in ends) else "linear"
    biased = bias is not None or fold is not None
    size = (int(shape[0]), int(shape[1]))
    spec = LayerSpec(name, how.kind, size, biased, follows, groups, reason)
    return Site(spec, tuple(one.calls), None if reason else how, parameter, weight.numel(), fold)


def response_user(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Find what takes all of a response, behind nothing but what commutes with a ReLU.

    Parameters
    ----------
    node : fx.Node
        Call of a layer.

    Returns
    -------
    user : fx.Node or None
        Operation; None where there is no single one.
    several : bool
        Whether there are several.
    """
    while True:
        users = readers(node)
        if len(users) != 1:
            return None, len(users) > 1
        node = users[0]
        if name_of(node) not in _PASSED:
            return node, False


def _meets_relu(node: fx.Node) -> bool:
    """Tell whether a ReLU takes all of a response."""
    user, _ = response_user(node)
    return user is not None and name_of(user) == "relu"


def _named_apart(sites: Sequence[Site]) -> list[Site]:
    """Number layers that share a parameter's name, as the parts of a fused projection do."""
    names = [site.spec.name for site in sites]
    apart = []
    for index, site in enumerate(sites):
        name = site.spec.name
        if names.count(name) > 1:
            name = f"{name}.{names[:index].count(name)}"
        apart.append(replace(site, spec=replace(site.spec, name=name)))
    return apart
