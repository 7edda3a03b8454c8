"""Fine-tuning after pruning: training in which the weights that are zero stay zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from retrain.trainers.loop.batches import TrainingData
from retrain.trainers.loop.callbacks import Callbacks, Step
from retrain.trainers.loop.states import device_of
from retrain.trainers.loop.supervised import Loss, Model, Trained, adam, train


def weights_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the model's weights by name, in the model's order.

    Parameters
    ----------
    model : nn.Module
        Not changed; the parameters returned are its own.
    names : iterable of str, optional
        Qualified names of parameters. By default all parameters of two or more dimensions that are
        not called bias: no biases, no normalisation scales.

    Raises
    ------
    ValueError
        If a name is not a parameter's.
    """
    parameters = dict(model.named_parameters())
    if names is None:
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.ndim >= 2 and "bias" not in name.rpartition(".")[2]
        }
    chosen = set(names)
    _check_names("names", chosen, parameters)
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def masks_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return, for each of the weights `weights_of` finds, where it is not zero (bool)."""
    return {name: weight.detach() != 0 for name, weight in weights_of(model, names).items()}


def fine_tune(
    model: Model,
    data: TrainingData,
    *,
    epochs: int,
    masks: Mapping[str, Tensor] | None = None,
    optimizer: Callable[[nn.Module], Optimizer] = adam,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    loss: Loss = functional.cross_entropy,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    callbacks: Callbacks | None = None,
) -> Trained[Model]:
    """Train a copy of `model`, keeping pruned weights at exactly zero; `model` is not touched.

    A masked weight's gradient is zeroed before any callback or the optimiser sees it, so that what
    they do with all gradients at once (a norm, clipping) is as for the pruned network. The weight
    is zeroed again after the step, so that it is zero whatever the optimiser does.

    Parameters
    ----------
    masks : mapping of str to bool Tensor, optional
        For named parameters, False where the weight is zero and stays so; a weight that is not
        zero there is set to zero first. By default `masks_of(model)`: every zero of every weight
        stays. Parameters that are not named, biases among them, are free.
    model, data, epochs, optimizer, schedule, loss, penalty, batch_size, seed, device, callbacks
        As for `train`. The ``after_step`` callbacks come before the weights are zeroed again.

    Returns
    -------
    Trained
        The fine-tuned copy, and a record an epoch.

    Raises
    ------
    ValueError
        If a mask's name is not a parameter's, or it is not bool or of another shape; and as for
        `train`.
    FloatingPointError
        As for `train`.
    """
    chosen = masks_of(model) if masks is None else dict(masks)
    _check_masks(chosen, model)
    place = device_of(model) if device is None else torch.device(device)
    dead = {name: ~mask.to(place) for name, mask in chosen.items()}
    pruned = copy.deepcopy(model).to(place)
    _zero_weights(pruned, dead)

    def zero_gradients(step: Step) -> None:
        for name, mask in dead.items():
            gradient = step.model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)

    def zero_weights(step: Step) -> None:
        _zero_weights(step.model, dead)

    calls = callbacks or Callbacks()
    return train(
        pruned,
        data,
        epochs=epochs,
        optimizer=optimizer,
        schedule=schedule,
        loss=loss,
        penalty=penalty,
        batch_size=batch_size,
        seed=seed,
        device=device,
        callbacks=replace(
            calls,
            after_backward=(zero_gradients, *calls.after_backward),
            after_step=(*calls.after_step, zero_weights),
        ),
    )


def _zero_weights(model: nn.Module, dead: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in dead.items():
            # Filled, not multiplied: a product would keep -0.0 and NaN.
            model.get_parameter(name).masked_fill_(mask, 0)


def _check_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    _check_names("masks", masks, parameters)
    for name, mask in masks.items():
        shape = tuple(parameters[name].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(
                f"masks: {name!r}: got {mask.dtype} of shape {tuple(mask.shape)}, want torch.bool "
                f"of shape {shape}"
            )


def _check_names(argument: str, names: Iterable[str], parameters: Mapping[str, object]) -> None:
    unknown = sorted(set(names) - set(parameters))
    if unknown:
        raise ValueError(
            f"{argument}: the model has no parameter {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(parameters)}"
        )
