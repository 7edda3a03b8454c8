"""The network that is retrained, a chain of arrays or a torch module, behind one interface.

The only place outside `adapters` and `trainers` that knows that there are two kinds of network. It
imports torch only for a torch module.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from retrain.data.arrays import Data
from retrain.files import READ_ERRORS, first_line, write_whole
from retrain.runs.accuracy import labels_for
from retrain.runs.directory import MODEL_FILE
from retrain.runs.record import ChainModel, Dense, ModuleModel
from retrain.stream.chain import Chain, ChainStream
from retrain.stream.estimator import chain_of
from retrain.stream.stream import LayerStream
from solvers.arrays import to_numpy


@contextmanager
def apart_from_caller() -> Iterator[None]:
    """Compute independently of the modes that the caller has set in torch, if torch is imported.

    Yields
    ------
    None
        Nothing; the caller's modes are restored afterwards.
    """
    if "torch" not in sys.modules:
        yield
        return
    from retrain.adapters.network.modes import apart

    with apart():
        yield


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A network trained after pruning, and its accuracies.

    Attributes
    ----------
    model : torch.nn.Module
        Trained network.
    accuracies : dict from str to float
        Accuracy in [0, 1] by data set: ``"calibration"``, ``"held_out"``.
    """

    model: Any
    accuracies: dict[str, float]


class Subject(Protocol):
    """A network that a run retrains."""

    def stream(self, data: Data, like: Any = None) -> Any:
        """Open the network on a data set.

        Parameters
        ----------
        data : Data
            Samples in memory.
        like : LayerStream, optional
            The network on other data, to be read in the same way.

        Returns
        -------
        LayerStream
            Network on these samples.
        """
        ...

    def model(self, stream: Any) -> Any:
        """Return the stream's current network, of the kind that was given.

        Parameters
        ----------
        stream : LayerStream
            Stream that `stream` returned.

        Returns
        -------
        torch.nn.Module or Chain
            Network with the current weights.
        """
        ...

    def identity(self, *, training: bool) -> dict[str, Any]:
        """Return the entries of a run's identity that a stream does not know.

        Parameters
        ----------
        training : bool
            Whether the run trains the network too (fine-tuning).

        Returns
        -------
        dict
            JSON values.
        """
        ...

    def check_fine_tune(self, stream: Any, data: Data) -> None:
        """Raise ValueError if `fine_tune` could not train on this data.

        Parameters
        ----------
        stream : LayerStream
            Stream that `stream` returned.
        data : Data
            Samples and labels to train on.

        Raises
        ------
        ValueError
            If the network, the data or the labels do not allow training.
        """
        ...

    def check_save(self, stream: Any) -> None:
        """Raise ValueError if `save` could not write the network.

        Parameters
        ----------
        stream : LayerStream
            Stream that `stream` returned.

        Raises
        ------
        ValueError
            If a tensor cannot be written.
        """
        ...

    def fine_tune(
        self, stream: Any, data: Data, epochs: int, held_out: Data | None, seed: int
    ) -> FineTuned:
        """Train the current network, with zeros kept at zero.

        Parameters
        ----------
        stream : LayerStream
            Stream that `stream` returned.
        data : Data
            Samples and labels to train on.
        epochs : int
            Number of epochs.
        held_out : Data or None
            Samples and labels for a second accuracy.
        seed : int
            Seed of the order of samples.

        Returns
        -------
        FineTuned
            Trained network and its accuracies.
        """
        ...

    def save(self, model: Any, directory: Path) -> None:
        """Write model.safetensors into a run directory.

        Parameters
        ----------
        model : torch.nn.Module or Chain
            Network to save.
        directory : Path
            Run directory.
        """
        ...

    def describe(self, stream: Any) -> dict[str, Any]:
        """Describe the network for `reopen`.

        Parameters
        ----------
        stream : LayerStream
            Stream that `stream` returned.

        Returns
        -------
        dict
            JSON values.
        """
        ...


def subject_of(model: Any, device: str | None = None) -> Subject:
    """Wrap a model; DataParallel, torch.compile and similar wrappers around a module are removed.

    Parameters
    ----------
    model : torch.nn.Module, Chain, LoadedModel, or a fitted MLPClassifier or MLPRegressor
        Network.
    device : str, optional
        Device on which torch computes; by default the device of the module.

    Returns
    -------
    Subject
        Network behind the common interface.

    Raises
    ------
    ValueError
        If the model is neither a Chain nor a torch module nor a loaded model, or the device is not
        available.
    """
    model = chain_of(model) or model
    if isinstance(model, Chain):
        if device not in (None, "cpu"):
            raise ValueError("device: a chain of arrays is computed where its arrays are")
        return _ChainSubject(model)
    from torch import nn

    from retrain.adapters.files.load import LoadedModel
    from retrain.adapters.network.wrappers import unwrapped

    if device is not None:
        check_device(device)
    if isinstance(model, LoadedModel):
        return _ModuleSubject(
            model.module, model.names, str(model.path), model.note, device, model.factory or None
        )
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        names = {name: name for name in model.state_dict()}
        return _ModuleSubject(model, names, None, "", device)
    raise ValueError(f"model: got {type(model).__name__}, want a torch module or a retrain.Chain")


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or cannot compute on here.

    Parameters
    ----------
    device : str
        Torch's name of a device.

    Raises
    ------
    ValueError
        If the device is unknown or not available on this machine.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: cannot compute on {device!r} here ({reason})") from error


def reopen(
    described: ChainModel | ModuleModel, directory: Path, model: Any = None, *, trust: bool = False
) -> Any:
    """Rebuild a finished run's network from its directory.

    Parameters
    ----------
    described : ChainModel or ModuleModel
        Description of the network in the run's record.
    directory : Path
        Run directory.
    model : torch.nn.Module, optional
        Architecture; a copy is filled with the run's weights.
    trust : bool, optional
        Whether the factory that the record names may be imported and called.

    Returns
    -------
    torch.nn.Module or Chain
        Network with the run's weights.

    Raises
    ------
    ValueError
        If the architecture is not in the run and `model` is not given, or the file is damaged or
        does not fit.
    """
    path = directory / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"run: {str(directory)!r} has no {MODEL_FILE}")
    if isinstance(described, ChainModel):
        try:
            with safe_open(path, framework="numpy") as file:
                weights = [file.get_tensor(str(index)) for index in range(len(described.biases))]
            return Chain(tuple(weights), tuple(described.biases), tuple(described.follows))
        except (SafetensorError, *READ_ERRORS) as error:
            raise ValueError(f"run: {path} is damaged ({first_line(error)})") from error
    from retrain.adapters.files.description import build_module
    from retrain.adapters.files.load import fill, load_model, made_module

    if model is None and described.hugging_face:
        from retrain.adapters.files.hugging_face import load_directory

        return load_directory(directory).module
    if model is None and described.dense_layers:
        model = _dense_chain(described.dense_layers)
    elif model is None and described.description:  # older runs have no entry
        model = build_module(described.description)
    if model is None and described.factory and trust:
        model = made_module(described.factory)
    if model is not None:
        return fill(model, path, described.names)
    if described.plain:
        return load_model(path).module
    if described.factory:
        raise ValueError(
            f"model: the architecture is made by {described.factory!r}; retrain.load(DIR, "
            "trust=True) imports it, which runs its code, or pass the architecture"
        )
    raise ValueError(
        "model: the run was of a torch module that is no plain chain of dense layers; pass the "
        "architecture, retrain.load(DIR, model)"
    )


def _dense_chain(layers: list[Dense]) -> Any:
    """Build the chain that ``--arch auto`` had read, for which the user has no code."""
    import torch

    from retrain.adapters.files.dense import DenseChain, DenseLayer

    dtypes = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    dtypes[str(torch.float64)] = torch.float64
    return DenseChain(
        [
            DenseLayer(layer.name, layer.shape, layer.bias, dtypes[layer.dtype], layer.activation)
            for layer in layers
        ]
    )


_NO_TRAINING = "fine_tune: trains torch modules, and this is a chain of arrays"


@dataclass(frozen=True, eq=False)
class _ChainSubject:
    chain: Chain

    def stream(self, data: Data, like: Any = None) -> ChainStream:
        inputs: Any = data.flat
        like = self.chain.weights[0]
        if not isinstance(like, np.ndarray):
            from solvers.arrays import like as as_like

            inputs = as_like(inputs, like)
        return ChainStream(self.chain, inputs)

    def model(self, stream: ChainStream) -> Chain:
        return stream.chain

    def identity(self, *, training: bool) -> dict[str, Any]:
        return {"tensor names": None, "training": None}

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
"""Number of samples per step of fine-tuning, the default of
`retrain.trainers.loop.masked.fine_tune`. Larger batches take fewer, smoother steps and more memory.
A convention, not tuned."""


def _pair(model: Any, stream: Any, source: Data) -> tuple[Any, Any]:
    """Samples and class numbers as the network is trained on them; the labels name classes."""
    import torch

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = torch.as_tensor(stream.shaped(source.x)).to(dtype)
    return inputs, torch.as_tensor(labels_for(stream, source.y).classes)


@dataclass(frozen=True, eq=False)
class _ModuleSubject:
    module: Any
    names: Mapping[str, str]
    path: str | None
    note: str
    device: str | None
    factory: str | None = None

    def stream(self, data: Data, like: Any = None) -> Any:
        from retrain.adapters.network.open import open_network

        return open_network(self.module, data, device=self.device, like=like)

    def model(self, stream: Any) -> Any:
        """Copy the stream's network; what could be trained in the given one can be again."""
        network = copy.deepcopy(stream.model)
        trainable = {name: tensor.requires_grad for name, tensor in self.module.named_parameters()}
        for name, tensor in network.named_parameters():
            tensor.requires_grad_(trainable[name])
        return network

    def identity(self, *, training: bool) -> dict[str, Any]:
        """The names that tensors are saved under; for training, what evaluation does not show."""
        from retrain.adapters.network.structure import training_structure

        names = json.dumps(sorted(self.names.items()))
        return {
            "tensor names": hashlib.sha256(names.encode()).hexdigest(),
            "training": training_structure(self.module) if training else None,
        }

    def check_fine_tune(self, stream: Any, data: Data) -> None:
        if not any(tensor.requires_grad for tensor in self.module.parameters()):
            raise ValueError("fine_tune: no parameter of the model requires a gradient")
        if not stream.takes_numbers:
            raise ValueError(
                "fine_tune: trains networks with one input of numbers; fine-tune the saved network "
                "with your own loop, its zeros held"
            )
        if data.y is None:
            raise ValueError(f"fine_tune: wants labels, and {data.name!r} has none")
        labels = labels_for(stream, data.y)
        if labels.classes is None:
            raise ValueError(
                f"fine_tune: wants a class number for each sample of {data.name!r}: {labels.reason}"
            )
        self._try_step(stream, data)

    def _try_step(self, stream: Any, data: Data) -> None:
        """Train a copy for one batch of each size that will occur, to find errors early."""
        from retrain.trainers.loop.masked import fine_tune

        model = self.model(stream)
        inputs, labels = _pair(model, stream, data)
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
        from retrain.adapters.files.save import check_tensors

        state = stream.model.state_dict()
        check_tensors({theirs: state.get(ours) for ours, theirs in self.names.items()})

    def fine_tune(
        self, stream: Any, data: Data, epochs: int, held_out: Data | None, seed: int
    ) -> FineTuned:
        from retrain.trainers.loop.accuracy import evaluate
        from retrain.trainers.loop.masked import fine_tune

        model = self.model(stream)
        pair = partial(_pair, model, stream)
        training = pair(data)
        trained = fine_tune(
            model, training, epochs=epochs, batch_size=BATCH, device=self.device, seed=seed
        )
        accuracies = {"calibration": evaluate(trained.model, training)}
        if held_out is not None and labels_for(stream, held_out.y).classes is not None:
            accuracies["held_out"] = evaluate(trained.model, pair(held_out))
        return FineTuned(trained.model, accuracies)

    def save(self, model: Any, directory: Path) -> None:
        from retrain.adapters.files.save import save_model

        save_model(model, directory / MODEL_FILE, names=self.names)
        if self._is_hugging_face():
            from retrain.adapters.files.hugging_face import copy_beside

            copy_beside(Path(str(self.path)), directory)

    def _is_hugging_face(self) -> bool:
        from retrain.adapters.files.hugging_face import is_directory

        return self.path is not None and is_directory(Path(self.path))

    def describe(self, stream: Any) -> dict[str, Any]:
        from retrain.adapters.files.description import described
        from retrain.adapters.files.plain import is_plain

        return {
            "kind": "module",
            "path": self.path,
            "note": self.note,
            "names": dict(self.names),
            "plain": stream.captured is not None
            and is_plain(stream.captured, stream.layers, stream.dense_model),
            "description": described(self.module)[0],
            "hugging_face": self._is_hugging_face(),
            "factory": self.factory,
            "dense_layers": [
                {**asdict(layer), "dtype": str(layer.dtype)}
                for layer in getattr(self.module, "dense_layers", ())
            ],
        }
