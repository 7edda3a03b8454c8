"""From a recipe to a training that can begin: data, model, setting, each checked against the other.

Everything that can be found out before the first step is found out here, before a run directory
is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrain.adapters.network.structure import training_structure, weights_hash
from retrain.adapters.network.wrappers import unwrapped
from retrain.data.arrays import Data
from retrain.data.labels import class_numbers, unfit_range
from retrain.data.sources import as_data, load_data
from retrain.trainers.loop.account import Cost, cost
from retrain.trainers.loop.batches import Rows
from retrain.trainers.loop.states import mode, seeded
from retrain.trainers.loop.supervised import Loss
from retrain.trainers.loop.training import Choice, Method, Setting, Training
from retrain.trainers.named import Named
from retrain.trainers.recipes.recipe import LOSSES, OPTIMIZERS, SCHEDULES, Recipe, imported

Pair = tuple[Tensor | Rows, Tensor]


@dataclass(frozen=True, eq=False)
class Start:
    """A training that has not begun.

    Attributes
    ----------
    method : Method
    training : Training
    setting : Setting
    data : pair
        Samples (a tensor, or `Rows`) and targets to train on.
    test : pair or None
    fingerprints : dict
        Of the data sets.
    network : dict
        Of the network as it was made: its weights' hash, and what it computes.
    labels : dict
        How the data sets' labels were read; empty text where they were taken as they are.
    sample : Tensor, shape (1, ...)
        An input, on the training's device.
    dense : Cost
        Of the network before the method took it over.
    """

    method: Method
    training: Training
    setting: Setting
    data: Pair
    test: Pair | None
    fingerprints: dict[str, str | None]
    network: dict[str, Any]
    labels: dict[str, str]
    sample: Tensor
    dense: Cost


def start(recipe: Recipe, device: torch.device, data: Any = None, test: Any = None) -> Start:
    """Make a training; the model's initial weights come from torch's default generators.

    Parameters
    ----------
    recipe : Recipe
    device : torch.device
        Where to train.
    data, test : optional
        Instead of what the recipe names.

    Raises
    ------
    ValueError
        If the data cannot be used, the model does not fit it, or an option is refused.
    """
    training_data, test_data = (
        _source(given, recipe, which) for given, which in ((data, "train"), (test, "test"))
    )
    if training_data is None:
        raise ValueError("recipe: [data] lacks train")
    pair = training_data.pair
    setting = _setting(recipe, len(pair[0]), device)
    model = _model(recipe).to(device)
    network = {"weights": weights_hash(model), "computation": training_structure(model)}
    sample = pair[0][:1].to(device)
    _check_fit(model, sample, pair[1], recipe.training.loss)
    other = None if test_data is None else test_data.pair
    if other is not None:
        if other[0].shape[1:] != pair[0].shape[1:]:
            raise ValueError(
                f"data: the test samples have shape {tuple(other[0].shape[1:])}, those to train on "
                f"{tuple(pair[0].shape[1:])}"
            )
        _check_fit(model, sample, other[1], recipe.training.loss)
    dense = cost(model, sample)
    method: Method = recipe.make_method()
    return Start(
        method,
        method.start(model, setting),
        setting,
        pair,
        other,
        {
            "train": training_data.fingerprint,
            "test": None if test_data is None else test_data.fingerprint,
        },
        network,
        {"train": training_data.labels, "test": "" if test_data is None else test_data.labels},
        sample,
        dense,
    )


def _model(recipe: Recipe) -> nn.Module:
    try:
        model = recipe.architecture()(**recipe.model.options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe: [model] {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"recipe: [model] {recipe.model.name!r} made a {type(model).__name__}, want a module"
        )
    return unwrapped(model)


@dataclass(frozen=True, eq=False)
class _Source:
    pair: Pair
    fingerprint: str
    labels: str


def _source(given: Any, recipe: Recipe, which: str) -> _Source | None:
    table = recipe.data
    source = table.train if which == "train" else table.test
    limit = table.limit if which == "train" else table.test_limit
    if given is None and source is not None and source.startswith("images:"):
        from retrain.trainers.loop.images import ImageFolder  # wants Pillow

        folder = Path(source.removeprefix("images:"))
        images = ImageFolder(folder, table.size, normalise=table.normalise, limit=limit)
        return _Source((images, images.labels), images.fingerprint, "")
    if given is not None:
        data = as_data(given)
    elif source is not None:
        data = load_data(source, limit=limit, normalise=table.normalise)
    else:
        return None
    pair, note = _pair(data, recipe)
    return _Source(pair, data.fingerprint, note)


def _pair(data: Data, recipe: Recipe) -> tuple[Pair, str]:
    """Return samples in float32 and targets as the loss takes them, and how labels were read."""
    if data.y is None:
        raise ValueError(f"data: {data.name!r} has no labels to train on")
    inputs = torch.from_numpy(np.ascontiguousarray(data.x, dtype=np.float32))
    if recipe.training.loss != "cross-entropy":
        return (inputs, torch.from_numpy(np.ascontiguousarray(data.y, dtype=np.float32))), ""
    labels = class_numbers(data.y)
    if labels.classes is None:
        raise ValueError(
            f"data: cross-entropy wants a class number for each sample of {data.name!r}: "
            f"{labels.reason}"
        )
    return (inputs, torch.from_numpy(labels.classes)), labels.note


def _check_fit(model: nn.Module, sample: Tensor, targets: Tensor, loss: str) -> None:
    """Refuse a model that does not take the samples, or whose outputs are not for the targets."""
    try:
        with mode(model, training=False), torch.no_grad(), seeded(0, sample.device):
            outputs = model(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        text = str(error).strip().split("\n")[0]
        raise ValueError(
            f"recipe: [model] does not take samples of shape {tuple(sample.shape[1:])} ({text})"
        ) from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"recipe: [model] returns a {type(outputs).__name__}, want a tensor")
    if loss == "cross-entropy":
        if outputs.ndim != 2:
            raise ValueError(
                f"recipe: [model] has outputs of shape {tuple(outputs.shape[1:])}, and "
                "cross-entropy wants one for each class"
            )
        unfit = unfit_range(targets.numpy(), outputs.shape[1])
        if unfit:
            raise ValueError(
                f"recipe: [model] has outputs of shape {tuple(outputs.shape[1:])}, but {unfit}"
            )
    elif outputs.shape[1:] != targets.shape[1:]:
        raise ValueError(
            f"recipe: [model] has outputs of shape {tuple(outputs.shape[1:])}, but the targets are "
            f"of shape {tuple(targets.shape[1:])}"
        )


def _setting(recipe: Recipe, samples: int, device: torch.device) -> Setting:
    """Look up what the recipe names, and try it on a parameter of no account."""
    loss: Loss = imported(LOSSES[recipe.training.loss])
    setting = Setting(
        samples,
        recipe.training.batch_size,
        recipe.training.epochs,
        recipe.training.seed,
        device,
        _choice(recipe.optimizer, OPTIMIZERS),
        None if recipe.schedule is None else _choice(recipe.schedule, SCHEDULES),
        loss,
    )
    where = "[optimizer]"
    try:
        optimizer = setting.make_optimizer([nn.Parameter(torch.zeros(1))])
        where = "[schedule]"
        setting.make_schedule(optimizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe: {where} {error}") from error
    return setting


def _choice(named: Named, registry: Mapping[str, str]) -> Choice:
    return Choice(named.name, named.options, imported(registry[named.name]))
