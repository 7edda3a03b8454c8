"""What is retrained: a chain of arrays or a torch module, behind one face.

The only place outside `adapters` and `trainers` that knows there are two kinds of network; it
imports torch only when it is given a torch module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from solvers.program import to_numpy


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

    def fine_tune(self, stream: Any, data: Data, epochs: int, held_out: Data | None) -> FineTuned:
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
        If it is neither a Chain nor a torch module nor a loaded model.
    """
    if isinstance(model, Chain):
        if device not in (None, "cpu"):
            raise ValueError("device: a chain of arrays is computed where its arrays are")
        return _ChainSubject(model)
    from torch import nn

    from retrain.adapters.load import LoadedModel

    if isinstance(model, LoadedModel):
        return _ModuleSubject(model.module, model.names, str(model.path), model.note, device)
    if isinstance(model, nn.Module):
        names = {name: name for name in model.state_dict()}
        return _ModuleSubject(model, names, None, "", device)
    raise ValueError(f"model: want a torch module or a retrain.Chain, got {type(model).__name__}")


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
    from retrain.adapters.load import fill, load_model

    if model is not None:
        return fill(model, path, description["names"])
    if description["plain"]:
        return load_model(path).module
    raise ValueError(
        "model: the run was of a torch module that is no plain chain of dense layers; pass the "
        "architecture, retrain.load(DIR, model)"
    )


@dataclass(frozen=True, eq=False)
class _ChainSubject:
    chain: Chain

    def stream(self, data: Data) -> ChainStream:
        inputs: Any = data.flat
        like = self.chain.weights[0]
        if not isinstance(like, np.ndarray):
            from solvers.program import like as as_like

            inputs = as_like(inputs, like)
        return ChainStream(self.chain, inputs)

    def model(self, stream: ChainStream) -> Chain:
        return stream.chain

    def fine_tune(
        self, stream: LayerStream, data: Data, epochs: int, held_out: Data | None
    ) -> FineTuned:
        raise ValueError("fine_tune: trains torch modules, and this is a chain of arrays")

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
        return stream.model

    def fine_tune(self, stream: Any, data: Data, epochs: int, held_out: Data | None) -> FineTuned:
        from retrain.adapters.stream import fit_samples
        from retrain.trainers.accuracy import evaluate
        from retrain.trainers.masked import fine_tune

        def pair(source: Data) -> tuple[Any, Any]:
            return fit_samples(stream.model, source.x), source.y

        trained = fine_tune(stream.model, pair(data), epochs=epochs, device=self.device)
        accuracies = {"calibration": evaluate(trained.model, pair(data))}
        if held_out is not None and held_out.y is not None:
            accuracies["held_out"] = evaluate(trained.model, pair(held_out))
        return FineTuned(trained.model, accuracies)

    def save(self, model: Any, directory: Path) -> None:
        from retrain.adapters.save import save_model

        save_model(model, directory / MODEL_FILE, names=self.names)

    def describe(self, stream: Any) -> dict[str, Any]:
        return {
            "kind": "module",
            "path": self.path,
            "note": self.note,
            "names": dict(self.names),
            "plain": stream.plain,
        }
