"""The computation of a module as JSON values: equal in every process, different where it differs.

A state dict holds tensors and no function: a maximum pool has the same as an average pool. So this
records three things, each of which covers what the others miss:

* ``steps``: the captured forward pass (`torch.export`), where it can be captured: operations, their
  order, the numbers in them;
* ``modules``: every module's class, its plain attributes and its hooks (a stride, a norm's eps, a
  tensor that is not a buffer);
* ``code``: for every class that is not of an installed package, its methods' byte code and the
  functions and global values that these name (a branch that the capture did not take, a context
  that it does not see).

Names of packages stand for their code; their versions are in a run's identity. What code reads
while it runs (a file, the environment, a name assembled from text) is not covered.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import math
import pickle
import sys
import sysconfig
import types
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from retrain.adapters.network.capture import Captured, arguments_of, name_of
from retrain.adapters.network.tensors import tensor_bytes

_LONGEST = 1000
"""Number of characters of a recorded text; a hash replaces the rest. Larger values make records
longer and differences more readable. Chosen by hand; changing it changes every identity."""

_RECORDED = ("retrain", "solvers", "torch", "numpy", "scipy", "builtins")
"""Packages that a run's identity records anyway, by version or by code."""

# Attributes in which torch keeps a module's hooks; each hook's code is recorded.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_NO_ATTRIBUTES = (
    *_HOOKS,
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Attributes of torch's modules that are recorded otherwise, or only concern saving and loading."""

# Modules with settings that evaluation ignores: they are recorded for training only.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Attributes of a class that Python sets and that do not change what it computes.
_NOT_IN_CLASSES = (
    "__dict__",
    "__weakref__",
    "__doc__",
    "__module__",
    "__qualname__",
    "__annotations__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__firstlineno__",
    "__static_attributes__",
    "__abstractmethods__",
    "_abc_impl",
    "__parameters__",
    "__orig_bases__",
)


def structure(
    module: nn.Module, captured: Captured | None, *, training: bool = False
) -> dict[str, Any]:
    """Record what a module computes.

    Parameters
    ----------
    module : nn.Module
        Network; it is not changed.
    captured : Captured or None
        Its captured forward pass; None where it cannot be captured, or is not.
    training : bool
        Whether the network is to be trained; then settings that evaluation ignores, such as a
        dropout's share, are recorded too.

    Returns
    -------
    dict
        ``steps``, a list of text; ``modules`` and ``code``, text by name. Parameters and buffers
        in the state dict are not included; `weights_hash` covers them.
    """
    writer = _Writer(module, training)
    modules = {name or "(root)": writer.module(part) for name, part in module.named_modules()}
    steps = [] if captured is None else list(_steps(captured, writer))
    return {"steps": steps, "modules": modules, "code": dict(sorted(writer.code.items()))}


def training_structure(module: nn.Module) -> dict[str, Any]:
    """Record what a module computes while it is trained, and which parameters are trained.

    Parameters
    ----------
    module : nn.Module
        Network, in any mode.

    Returns
    -------
    dict
        Entries of `structure`, and ``frozen``: names of parameters without a gradient. There are
        no steps: a forward pass in training mode is not captured, its modules and code are.
    """
    frozen = [name for name, tensor in module.named_parameters() if not tensor.requires_grad]
    return {**structure(module, None, training=True), "frozen": frozen}


def weights_hash(module: nn.Module) -> str:
    """Hash a state dict: names, dtypes, shapes, the order in memory, bytes.

    The order in memory (channels last, a transposed matrix) decides which kernels compute.

    Parameters
    ----------
    module : nn.Module
        Network.

    Returns
    -------
    str
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key}:".encode())
        digest.update(_tensor(value).encode() if isinstance(value, Tensor) else _other(value))
    return digest.hexdigest()


def _other(value: Any) -> bytes:
    """Write an entry of a state dict that is not a tensor (a module's extra state)."""
    return _Writer(nn.Module(), False).text(value).encode()


# --- the graph ------------------------------------------------------------------------------------


_EVALUATED = ("batch_norm", "dropout", "feature_dropout", "alpha_dropout")


def _steps(captured: Captured, writer: _Writer) -> Iterator[str]:
    """Yield the graph's nodes in words; a value is named by the number of its step."""
    numbers = {node: number for number, node in enumerate(captured.graph.nodes)}

    def named(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: _Reference(numbers[node]))

    for node in captured.graph.nodes:
        if name_of(node) in _EVALUATED:  # some of whose arguments evaluation ignores
            given = named(arguments_of(node))
            parts = [writer.text(v) for key, v in given.items() if key not in ("p", "momentum")]
        else:
            parts = [writer.text(part) for part in named(node.args)]
            parts += [f"{key}={writer.text(part)}" for key, part in named(node.kwargs).items()]
        if node in captured.tensors:
            target = f"value of {captured.tensors[node]}"
        elif node in captured.constants:
            target = f"value {writer.text(captured.constants[node])}"
        elif node.op == "placeholder":
            target = "input"
        elif node.op == "get_attr":
            target = f"value {writer.text(_attribute(captured.module, str(node.target)))}"
        elif node.op == "call_function":
            target = writer.text(node.target)
        else:
            target = str(node.target)
        yield _short(f"{target}({', '.join(parts)})")


class _Reference(str):
    """A step's number, in the place of its value."""

    __slots__ = ()

    def __new__(cls, number: int) -> _Reference:
        return super().__new__(cls, f"#{number}")


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


# --- values ---------------------------------------------------------------------------------------


class _Writer:
    """Writes values as text that is the same in every process.

    `code` collects, by name, a hash of each class that is not of an installed package.
    """

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.code: dict[str, str] = {}
        self._training = training
        self._paths = {id(part): name for name, part in root.named_modules()}
        self._state = {id(tensor) for tensor in root.state_dict(keep_vars=True).values()}
        self._open: list[int] = []  # objects being written, the outermost first
        self._done: dict[int, str] = {}
        self._kept: list[Any] = []  # keeps objects alive, so that no id is used twice

    def module(self, module: nn.Module) -> str:
        """Write a module's class, attributes, own tensors beside the state dict, and hooks."""
        kind = type(module)
        entries = [self._kind(kind, made=True)]
        if isinstance(module, torch.jit.ScriptModule):
            return f"{entries[0]} {_script(module)}"
        for name, value in sorted(vars(module).items()):  # a copy may have them in another order
            if name not in _NO_ATTRIBUTES and not self._ignored(module, name):
                entries.append(f"{name}={self.text(value)}")
        for name, tensor in (*module._buffers.items(), *module._parameters.items()):
            if tensor is None:
                entries.append(f"{name}=None")
            elif id(tensor) not in self._state:
                entries.append(f"{name}={self.text(tensor)}")
        for name in _HOOKS:
            hooks = getattr(module, name, None)
            if hooks:  # by numbers that a process counts up
                entries.append(f"{name}={self.text(list(hooks.values()))}")
        if isinstance(module, fx.GraphModule):
            entries.append(f"code={module.code}")
        return _short("; ".join(entries))

    def _ignored(self, module: nn.Module, name: str) -> bool:
        """Tell whether an attribute is covered by ``code``, or ignored by evaluation."""
        if isinstance(module, fx.GraphModule) and (name.startswith("_") or name == "meta"):
            return True
        if self._training:
            return False
        if name == "momentum":
            return type(module) in _NORMS and module.running_mean is not None
        return name in ("p", "inplace") and type(module) in _DROPOUTS

    def text(self, value: Any) -> str:
        """Write any value."""
        if value is None or value is ... or isinstance(value, bool | int | float | complex):
            return repr(value) if type(value) in _PLAIN else f"{type(value).__name__} {value!r}"
        if isinstance(value, _Reference):
            return str(value)
        if isinstance(value, str | bytes):
            return repr(value)
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
            return str(value)
        if isinstance(value, np.ndarray | np.generic):
            return _array(np.asarray(value))
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return f"<module {self._paths[id(value)] or '(root)'}>"
        if isinstance(value, slice):
            return f"slice({self.text([value.start, value.stop, value.step])})"
        return self._object(value)

    def _object(self, value: Any) -> str:
        """Write a value that may contain itself, or be contained in several places."""
        if id(value) in self._open:
            return f"<{len(self._open) - self._open.index(id(value))} up>"
        if id(value) not in self._done:
            self._open.append(id(value))
            try:
                text = self._contents(value)
            finally:
                self._open.pop()
            self._done[id(value)] = _short(text)
            self._kept.append(value)
        return self._done[id(value)]

    def _contents(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, nn.Module):
            inner = [f"{name}: {self.text(part)}" for name, part in value._modules.items()]
            return "; ".join([self.module(value), *inner])
        if type(value) in (list, fx.immutable_collections.immutable_list):
            return f"[{', '.join(map(self.text, value))}]"
        if type(value) in (tuple, torch.Size):
            return f"({', '.join(map(self.text, value))})"
        if type(value) in (dict, types.MappingProxyType, fx.immutable_collections.immutable_dict):
            return self._mapping(value)
        if type(value) in (set, frozenset):  # whose order differs between processes
            return f"{{{', '.join(sorted(map(self.text, value)))}}}"
        if isinstance(value, types.ModuleType):
            return self._python_module(value)
        if isinstance(value, type):
            return self._kind(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"{self.text(value.__func__)} of {self.text(value.__self__)}"
        if isinstance(value, staticmethod | classmethod):
            return f"{type(value).__name__} {self.text(value.__func__)}"
        if isinstance(value, property):
            return f"property {self.text([value.fget, value.fset])}"
        if isinstance(value, partial):
            return f"partial {self.text([value.func, value.args, value.keywords])}"
        # Asked without calling code of the value's own, which may answer to any name.
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        if wrapped is not None:
            return f"wrapped {self.text(wrapped)}"
        if isinstance(value, torch.jit.ScriptFunction):
            return f"script {_script(value)}"
        if callable(value) and hasattr(value, "__name__"):  # written in C
            home = sys.modules.get(getattr(value, "__module__", None) or "")
            if home is not None and _package(home.__name__) is None:
                self._python_module(home)
            return _callable_name(value)
        return self._any(value)

    def _mapping(self, value: Mapping[Any, Any]) -> str:
        return f"{{{', '.join(f'{self.text(k)}: {self.text(v)}' for k, v in value.items())}}}"

    def _any(self, value: Any) -> str:
        """Write an object by what pickle would save of it; locks and files by their class alone."""
        kind = self._kind(type(value), made=True)
        try:
            reduced = value.__reduce_ex__(2)
        except (TypeError, AttributeError, ValueError, RuntimeError, pickle.PickleError):
            return kind
        if isinstance(reduced, str):
            return f"{kind} {reduced}"
        maker, arguments, *rest = reduced
        parts = [] if maker.__module__ == "copyreg" else [maker]
        parts.append(tuple(part for part in arguments if part is not type(value)))
        parts += [sorted(part.items()) if _attributes(part) else part for part in rest[:1]]
        parts += [list(part) if isinstance(part, Iterator) else part for part in rest[1:]]
        return f"{kind}{''.join(self.text(part) for part in parts if part is not None)}"

    def _kind(self, kind: type, *, made: bool = False) -> str:
        """Name a class; the hash of a class that is not of an installed package goes into `code`.

        With `made`, the methods that construct the object are left out: their result is recorded.
        """
        name = _class_name(kind)
        for base in kind.__mro__:
            label = f"{base.__module__}.{base.__qualname__}{' as made' if made else ''}"
            if _package(base.__module__) is None and label not in self.code:
                self.code[label] = ""  # it may name itself
                entries = [
                    f"{key}={self.text(entry)}"
                    for key, entry in vars(base).items()
                    if key not in _NOT_IN_CLASSES and (key not in _MAKING or not made)
                ]
                self.code[label] = _digest("; ".join([*map(_class_name, base.__mro__), *entries]))
        return name

    def _python_module(self, module: types.ModuleType) -> str:
        """Name a module; for one outside installed packages, its whole file is hashed."""
        package = _package(module.__name__)
        if package is not None:
            return f"module {package}"
        file = getattr(module, "__file__", None)
        content = Path(file).read_bytes() if file and Path(file).is_file() else b""
        self.code[module.__name__] = hashlib.sha256(content).hexdigest()
        return f"module {module.__name__}"

    def _function(self, function: types.FunctionType) -> str:
        """Name a function; one that is not of an installed package has a hash of its code added."""
        # Several of torch's go by the name of what made them, and by their own only here.
        name = f"{function.__module__}.{function.__qualname__}"
        if function.__name__ not in function.__qualname__.split("."):
            name = f"{name} {function.__name__}"
        package = _package(function.__module__)
        if package is not None:
            cells = "" if package in _RECORDED else f" of {package}"
            return f"{name}{cells}{self._closure(function)}"
        used = sorted(_names(function.__code__))
        held = function.__globals__
        entries = [
            *_code(function.__code__, function.__doc__),
            self.text(function.__defaults__),
            self.text(function.__kwdefaults__),
            self._closure(function),
            *(f"{key}={self.text(held[key])}" for key in used if key in held),
        ]
        return f"{name} {_digest('; '.join(entries))[:16]}"

    def _closure(self, function: types.FunctionType) -> str:
        values = []
        for cell in function.__closure__ or ():
            try:
                values.append(self.text(cell.cell_contents))
            except ValueError:  # not filled yet
                values.append("empty")
        return f" on ({', '.join(values)})" if values else ""


# Methods of a class that matter only while an object is constructed or shown.
_MAKING = ("__init__", "__repr__", "extra_repr")
# Types whose values are written as Python writes them.
_PLAIN = (type(None), type(...), bool, int, float, complex)


def _attributes(state: Any) -> bool:
    """Tell whether pickle saves an object as its attributes, whose order has no meaning."""
    return type(state) is dict and all(type(key) is str for key in state)


def _code(code: types.CodeType, doc: str | None = None) -> Iterator[str]:
    """Yield what byte code does: no line numbers, no file, no names of its own variables."""
    yield code.co_code.hex()
    yield code.co_exceptiontable.hex()
    yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags))
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant)))
        elif doc is None or constant != doc:
            yield repr(constant)


def _names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that byte code uses, that of inner functions included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _package(module: str | None) -> str | None:
    """The installed package that a module belongs to, with its version; None for a user's own."""
    if module is None:
        return "builtins"
    if module == "__main__":
        return None
    top = module.partition(".")[0]
    if top in _RECORDED:
        return top
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        paths = list(getattr(sys.modules.get(top), "__path__", []))
        file = paths[0] if paths else None
    if file is None:
        return "builtins" if top in sys.builtin_module_names else None
    place = Path(file).resolve()
    if any(part in ("site-packages", "dist-packages") for part in place.parts):
        try:
            return f"{top} {version(top)}"
        except PackageNotFoundError:
            return f"{top} {getattr(sys.modules[top], '__version__', '')}".strip()
    return "builtins" if place.is_relative_to(_STANDARD) else None


_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()  # directory of Python's own modules


def _class_name(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    package = _package(kind.__module__)
    if package is None or package in _RECORDED:
        inside = kind.__module__.startswith("torch.nn.modules.")
        return f"nn.{kind.__qualname__}" if inside else name
    return f"{name} of {package}"


def _callable_name(value: Any) -> str:
    """Name a function written in C: torch.relu, operator.add, an operator of ATen."""
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(value)
    name = getattr(value, "__qualname__", value.__name__).removeprefix("_VariableFunctionsClass.")
    home = (getattr(value, "__module__", None) or "").removeprefix("_")  # _operator is operator
    return f"{home}.{name}" if home else name


def _tensor(tensor: Tensor) -> str:
    """Write a tensor's type, shape, order in memory and a hash of its bytes."""
    shape = tuple(tensor.shape)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"tensor {tensor.dtype} {shape} {tensor.layout} {tensor.device.type}"
    # Torch chooses kernels by the strides, also by those of axes with a single entry.
    plain = tuple(
        math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape))
    )
    strides = "" if tensor.stride() == plain else f" strides {tensor.stride()}"
    content = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return f"tensor {tensor.dtype} {shape}{strides} {content[:32]}"


def _array(array: np.ndarray) -> str:
    if array.dtype.hasobject:
        return f"array {array.dtype} {array.shape} {_digest(repr(array.tolist()))[:32]}"
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"array {array.dtype} {array.shape} {content[:32]}"


def _script(module: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> str:
    """Hash what TorchScript would save, but for its notes on source files."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer) as archive:
        for name in sorted(archive.namelist()):
            inner = name.partition("/")[2]
            if not inner.endswith(".debug_pkl") and not inner.startswith((".data/", "version")):
                digest.update(inner.encode() + archive.read(name))
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(text: str) -> str:
    """Shorten a text to a bounded length; a hash replaces what is cut."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… {_digest(text)[:32]}"
