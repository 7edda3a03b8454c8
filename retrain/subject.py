"""What is retrained: a chain of arrays or a torch module, behind one face.

The only place outside `adapters` and `trainers` that knows there are two kinds of network; it
imports torch only when it is given a torch module.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from retrain.chain import Chain, ChainStream
from retrain.data import Data
from retrain.files import write_whole
from retrain.run import MODEL_FILE
from retrain.stream import LayerStream
from solvers.arrays import to_numpy


@contextmanager
def apart_from_caller() -> Iterator[None]:
    """Compute apart from the modes that the caller has set in torch, if they have imported it."""
    if "torch" not in sys.modules:
        yield
        return
    from retrain.adapters.modes import apart

    with apart():
        yield


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A network trained after pruning, and its accuracies by data set."""

    model: Any
    accuracies: dict[str, float]


class Subject(Protocol):
    """A network that a run retrains."""

    def stream(self, data: Data) -> Any:
        """Open the network on a data set."""
        ...

    def model(self, stream: Any) -> Any:
        """Return the stream's current network, of the kind that was given."""
        ...

    def check_fine_tune(self, stream: Any, data: Data) -> None:
        """Raise ValueError if `fine_tune` could not train on this data."""
        ...

    def check_save(self, stream: Any) -> None:
        """Raise ValueError if `save` could not write the network."""
        ...

    def fine_tune(
        self, stream: Any, data: Data, epochs: int, held_out: Data | None, seed: int
    ) -> FineTuned:
        """Train the current network, zeros kept at zero."""
        ...

    def save(self, model: Any, directory: Path) -> None:
        """Write model.safetensors."""
        ...

    def describe(self, stream: Any) -> dict[str, Any]:
        """Return what `reopen` needs, as JSON values."""
        ...


def subject_of(model: Any, device: str | None = None) -> Subject:
    """Wrap a model.

    Raises
    ------
    ValueError
        If it is neither a Chain nor a torch module nor a loaded model, or the device is none.
    """
    if isinstance(model, Chain):
        if device not in (None, "cpu"):
            raise ValueError("device: a chain of arrays is computed where its arrays are")
        return _ChainSubject(model)
    from torch import nn

    from retrain.adapters.load import LoadedModel

    if device is not None:
        check_device(device)
    if isinstance(model, LoadedModel):
        return _ModuleSubject(model.module, model.names, str(model.path), model.note, device)
    if isinstance(model, nn.Module):
        names = {name: name for name in model.state_dict()}
        return _ModuleSubject(model, names, None, "", device)
    raise ValueError(f"model: want a torch module or a retrain.Chain, got {type(model).__name__}")


def has_classes(data: Data) -> bool:
    """Whether every sample is labelled with a class number."""
    return data.y is not None and data.y.ndim == 1 and np.issubdtype(data.y.dtype, np.integer)


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot compute on here."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: cannot compute on {device!r} here ({reason})") from error


def reopen(description: Mapping[str, Any], directory: Path, model: Any = None) -> Any:
    """Build a finished run's network from its directory.

    Raises
    ------
    ValueError
        If the architecture is not in the run and `model` is not given, or the file does not fit.
    """
    path = directory / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"run: {str(directory)!r} has no {MODEL_FILE}")
    if description["kind"] == "chain":
        with safe_open(path, framework="numpy") as file:
            weights = [file.get_tensor(str(index)) for index in range(len(description["biases"]))]
        return Chain(tuple(weights), tuple(description["biases"]), tuple(description["follows"]))
    from retrain.adapters.description import build_module
    from retrain.adapters.load import fill, load_model

    if model is None and description["dense_layers"]:
        model = _dense_chain(description["dense_layers"])
    elif model is None and description.get("description"):  # older runs have no entry
        model = build_module(description["description"])
    if model is not None:
        return fill(model, path, description["names"])
    if description["plain"]:
        return load_model(path).module
    raise ValueError(
        "model: the run was of a torch module that is no plain chain of dense layers; pass the "
        "architecture, retrain.load(DIR, model)"
    )


def _dense_chain(layers: list[dict[str, Any]]) -> Any:
    """Build the chain that --arch auto had read, whose code no user has."""
    import torch

    from retrain.adapters.dense import DenseChain, DenseLayer

    dtypes = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    dtypes[str(torch.float64)] = torch.float64
    return DenseChain(
        [
            DenseLayer(
                layer["name"],
                tuple(layer["shape"]),
                layer["bias"],
                dtypes[layer["dtype"]],
                layer["activation"],
            )
            for layer in layers
        ]
    )


_NO_TRAINING = "fine_tune: trains torch modules, and this is a chain of arrays"


@dataclass(frozen=True, eq=False)
class _ChainSubject:
    chain: Chain

    def stream(self, data: Data) -> ChainStream:
        inputs: Any = data.flat
        like = self.chain.weights[0]
        if not isinstance(like, np.ndarray):
            from solvers.arrays import like as as_like

            inputs = as_like(inputs, like)
        return ChainStream(self.chain, inputs)

    def model(self, stream: ChainStream) -> Chain:
        return stream.chain

    def check_fine_tune(self, stream: LayerStream, data: Data) -> None:
        raise ValueError(_NO_TRAINING)

    def check_save(self, stream: LayerStream) -> None:
        """Arrays can always be saved."""

    def fine_tune(
        self, stream: LayerStream, data: Data, epochs: int, held_out: Data | None, seed: int
    ) -> FineTuned:
        raise ValueError(_NO_TRAINING)

    def save(self, model: Chain, directory: Path) -> None:
        tensors = {
            str(index): np.ascontiguousarray(to_numpy(weight))
            for index, weight in enumerate(model.weights)
        }
        write_whole(directory / MODEL_FILE, save(tensors))

    def describe(self, stream: ChainStream) -> dict[str, Any]:
        return {
            "kind": "chain",
            "biases": list(self.chain.biases),
            "follows": list(self.chain.follows),
        }


BATCH = 64
"""Samples of a step of fine-tuning, as `retrain.trainers.masked.fine_tune` has it by default."""


def _pair(model: Any, source: Data) -> tuple[Any, Any]:
    """Samples and class numbers as the network is trained on them."""
    import torch

    from retrain.adapters.stream import fit_samples

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    labels: Any = source.y
    inputs = torch.as_tensor(fit_samples(model, source.x)).to(dtype)
    return inputs, torch.as_tensor(labels.astype(np.int64))


@dataclass(frozen=True, eq=False)
class _ModuleSubject:
    module: Any
    names: Mapping[str, str]
    path: str | None
    note: str
    device: str | None

    def stream(self, data: Data) -> Any:
        from retrain.adapters.stream import TorchStream

        return TorchStream(self.module, data, device=self.device)

    def model(self, stream: Any) -> Any:
        """Copy the stream's network; what could be trained in the given one can be again."""
        network = copy.deepcopy(stream.model)
        trainable = {name: tensor.requires_grad for name, tensor in self.module.named_parameters()}
        for name, tensor in network.named_parameters():
            tensor.requires_grad_(trainable[name])
        return network

    def check_fine_tune(self, stream: Any, data: Data) -> None:
        if not any(tensor.requires_grad for tensor in self.module.parameters()):
            raise ValueError("fine_tune: no parameter of the model requires a gradient")
        if data.y is None:
            raise ValueError(f"fine_tune: wants labels, and {data.name!r} has none")
        if not has_classes(data):
            raise ValueError(
                f"fine_tune: wants a class number for each sample, and the labels of "
                f"{data.name!r} are {data.y.dtype} of shape {data.y.shape}"
            )
        outputs = next(stream.outputs(dense=True))
        if outputs.ndim != 2 or data.y.min() < 0 or data.y.max() >= outputs.shape[1]:
            raise ValueError(
                f"fine_tune: wants labels from 0 to one less than the network's outputs, of shape "
                f"{tuple(outputs.shape[1:])}; those of {data.name!r} are {data.y.min()} to "
                f"{data.y.max()}"
            )
        self._try_step(stream, data)

    def _try_step(self, stream: Any, data: Data) -> None:
        """Train a copy for one batch of each size that there will be, which may fail."""
        from retrain.trainers.masked import fine_tune

        model = self.model(stream)
        inputs, labels = _pair(model, data)
        for size in sorted({min(len(data), BATCH), len(data) % BATCH or BATCH}):
            some = inputs[:size], labels[:size]
            try:
                fine_tune(model, some, epochs=1, batch_size=BATCH, device=self.device)
            except (RuntimeError, ValueError, TypeError, IndexError, FloatingPointError) as error:
                text = str(error).strip().split("\n")[0]
                raise ValueError(
                    f"fine_tune: the network cannot be trained on a batch of {len(some[0])} "
                    f"samples of {data.name!r}: {text}"
                ) from error

    def check_save(self, stream: Any) -> None:
        from retrain.adapters.save import check_tensors

        state = stream.model.state_dict()
        check_tensors({theirs: state.get(ours) for ours, theirs in self.names.items()})

    def fine_tune(
        self, stream: Any, data: Data, epochs: int, held_out: Data | None, seed: int
    ) -> FineTuned:
        from retrain.trainers.accuracy import evaluate
        from retrain.trainers.masked import fine_tune

        model = self.model(stream)
        trained = fine_tune(
            model,
            _pair(model, data),
            epochs=epochs,
            batch_size=BATCH,
            device=self.device,
            seed=seed,
        )
        accuracies = {"calibration": evaluate(trained.model, _pair(model, data))}
        if held_out is not None and has_classes(held_out):
            accuracies["held_out"] = evaluate(trained.model, _pair(model, held_out))
        return FineTuned(trained.model, accuracies)

    def save(self, model: Any, directory: Path) -> None:
        from retrain.adapters.save import save_model

        save_model(model, directory / MODEL_FILE, names=self.names)

    def describe(self, stream: Any) -> dict[str, Any]:
        from retrain.adapters.description import described

        return {
            "kind": "module",
            "path": self.path,
            "note": self.note,
            "names": dict(self.names),
            "plain": stream.plain,
            "description": described(self.module)[0],
            "dense_layers": [
                {**asdict(layer), "dtype": str(layer.dtype)}
                for layer in getattr(self.module, "dense_layers", ())
            ],
        }
