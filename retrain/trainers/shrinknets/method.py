"""ShrinkNets, and group sparsity, as methods of the trainers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from retrain.trainers.loop.callbacks import Callbacks, Step
from retrain.trainers.loop.training import Setting, Training
from retrain.trainers.shrinknets.cost import Costs, input_neurons
from retrain.trainers.shrinknets.cutting import cut_neurons
from retrain.trainers.shrinknets.fold import fold
from retrain.trainers.shrinknets.group import group_norms, group_penalty, groups_of, proximal_step
from retrain.trainers.shrinknets.network import Side, neurons_of, with_switches
from retrain.trainers.shrinknets.removal import SignVariance, remove_dead, remover
from retrain.trainers.shrinknets.switches import (
    POWERS,
    InputSwitch,
    regularised_penalty,
    switches_of,
)
from solvers import checks

logger = logging.getLogger(__name__)

Removal = Literal["sign-variance", "never"]


@dataclass
class Survivors:
    """Names of switch layers that would have lost all their neurons, in the order it happened."""

    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Remember a name, once."""
        if name not in self.names:
            self.names.append(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the names."""
        return {"names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put names back."""
        self.names[:] = state["names"]


@dataclass(frozen=True)
class ShrinkNets:
    """Train with switches and the penalty (8), and cut dead neurons out meanwhile.

    Attributes
    ----------
    strength : float
        lambda of (1), on the switches.
    weight_strength : float
        lambda_2 of (8), on the weights of dense and convolutional layers. 0 leaves (1), which alone
        has no minimum (proposition A.3): the switches shrink and the weights grow.
    power : {1, 2}
        p of (8).
    at : {"inputs", "outputs"}
        Where a layer's switches are, as for `with_switches`.
    layers : sequence of str, optional
        Which layers have them, as for `with_switches`.
    removal : {"sign-variance", "never"}
        Whether dead neurons are cut out while training.
    inertia, threshold : float
        gamma and the threshold of the sign-variance rule.

    Notes
    -----
    The optimiser gets the switches as a parameter group of their own without weight decay: (1) is
    all that pulls at them.

    Where a layer that takes switched neurons is followed by a batch normalisation, that undoes the
    scale of all its switches together: the penalty can drive them all down at no loss. Such layers
    shrink less by merit, and may come down to the one neuron that always stays.
    """

    strength: float = 1e-3
    weight_strength: float = 1e-4
    power: int = 2
    at: Side = "inputs"
    layers: tuple[str, ...] | None = None
    removal: Removal = "sign-variance"
    inertia: float = 0.99
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _check_common(self.strength, self.at)
        checks.not_negative(weight_strength=self.weight_strength)
        checks.one_of(POWERS, power=self.power)
        if self.removal not in get_args(Removal):
            choices = " or ".join(map(repr, get_args(Removal)))
            raise ValueError(f"removal: got {self.removal!r}, want {choices}")
        SignVariance(self.inertia, self.threshold)
        object.__setattr__(self, "layers", _names(self.layers))

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Put switches into a copy of the model, and make the training."""
        switched = with_switches(model, self.at, self.layers)
        switches = [switch.beta for switch in switches_of(switched).values()]
        own = {id(beta) for beta in switches}
        rest = [p for p in switched.parameters() if id(p) not in own]
        optimizer = setting.make_optimizer([{"params": rest}, {"params": switches}])
        if "weight_decay" in optimizer.param_groups[1]:
            optimizer.param_groups[1]["weight_decay"] = 0.0
        costs, survivors = Costs(input_neurons(switched)), Survivors()
        return Training(
            switched,
            optimizer,
            setting.make_schedule(optimizer),
            setting.loss,
            penalty=partial(
                regularised_penalty,
                strength=self.strength,
                weight_strength=self.weight_strength,
                power=self.power,
            ),
            callbacks=Callbacks(after_step=self._after_step(survivors), after_epoch=(costs,)),
            parts={"costs": costs, "survivors": survivors},
            describe=lambda: _description(switched, costs, survivors),
        )

    def _after_step(self, survivors: Survivors) -> tuple[Callable[[Step], None], ...]:
        if self.removal == "never":
            return ()
        return (remover(SignVariance(self.inertia, self.threshold), survivors.add),)

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Cut a fresh training to the sizes of a description."""
        sizes = dict(description.get("neurons", {}))
        found = {name: switch.size for name, switch in switches_of(training.model).items()}
        if set(sizes) != set(found) or any(not 1 <= sizes[n] <= found[n] for n in sizes):
            raise ValueError(
                f"description: it has {sizes} neurons, but the model has {found}: they are of "
                f"different models"
            )
        for neurons in neurons_of(training.model):
            for name, switch in neurons.switches.items():
                if sizes[name] < switch.size:
                    # Which ones does not matter: their values are loaded afterwards.
                    kept = torch.arange(sizes[name], device=switch.beta.device)
                    cut_neurons(neurons, kept, training.optimizer)

    def finish(self, training: Training) -> nn.Module:
        """Return the network with its switches folded in; neurons whose switch is 0 are cut."""
        switched = copy.deepcopy(training.model)
        off = {name: switch.beta == 0 for name, switch in switches_of(switched).items()}
        remove_dead(switched, {name: zero for name, zero in off.items() if bool(zero.any())})
        return fold(switched)


def _description(model: nn.Module, costs: Costs, survivors: Survivors) -> dict[str, Any]:
    switches = switches_of(model)
    inputs = {
        name: switch.kept.tolist()
        for name, switch in switches.items()
        if isinstance(switch, InputSwitch)
    }
    return {
        "neurons": {name: switch.size for name, switch in switches.items()},
        "input_neurons": input_neurons(model),
        "cost_neurons": costs.neurons,
        "survivors": list(survivors.names),
        **({"inputs_kept": inputs} if inputs else {}),
    }


@dataclass(frozen=True)
class GroupSparsity:
    """Train with group sparsity (3) by proximal steps: the draft's baseline.

    Attributes
    ----------
    strength : float
        lambda of (3).
    at : {"inputs", "outputs"}
        Whether groups are columns, or rows with their biases.
    layers : sequence of str, optional
        Whose, as for `with_switches`.

    Notes
    -----
    Nothing is cut while training: a column that is zero may come back. In the end the neurons of
    zero groups are cut; the network's own inputs stay, with columns of zeros.
    """

    strength: float = 1e-3
    at: Side = "inputs"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_common(self.strength, self.at)
        object.__setattr__(self, "layers", _names(self.layers))

    def start(self, model: nn.Module, setting: Setting) -> Training:
        """Make the training: the recipe's optimiser, and a proximal step after each of its own."""
        with_switches(model, self.at, self.layers)  # whether the neurons of these layers may go
        optimizer = setting.make_optimizer(model.parameters())
        costs = Costs(input_neurons(model))
        return Training(
            model,
            optimizer,
            setting.make_schedule(optimizer),
            setting.loss,
            callbacks=Callbacks(
                after_step=(proximal_step(self.at, self.layers, self.strength),),
                after_epoch=(costs,),
            ),
            parts={"costs": costs},
            describe=lambda: self._description(model, costs),
        )

    def _description(self, model: nn.Module, costs: Costs) -> dict[str, Any]:
        layers = groups_of(model, self.at, self.layers)
        return {
            "groups": {name: int((group_norms(g) > 0).sum()) for name, g in layers.items()},
            "penalty": float(group_penalty(layers, self.strength).detach()),
            "input_neurons": input_neurons(model),
            "cost_neurons": costs.neurons,
        }

    def reshape(self, training: Training, description: dict[str, Any]) -> None:
        """Leave the training as it is: nothing is removed on the way."""
        here, there = input_neurons(training.model), description.get("input_neurons")
        if here != there:
            raise ValueError(
                f"description: it has {there} input neurons, but the model has {here}: they are "
                f"of different models"
            )

    def finish(self, training: Training) -> nn.Module:
        """Return the network without the neurons of zero groups; a layer keeps at least one."""
        model = copy.deepcopy(training.model)
        for name, groups in groups_of(model, self.at, self.layers).items():
            for neurons in neurons_of(model):
                owner = neurons.target if self.at == "inputs" else neurons.source
                if owner == name and neurons.giver is not None:
                    kept = (group_norms(groups) > 0).nonzero().flatten()
                    if len(kept) == 0:
                        logger.warning("all groups of %r are zero: one neuron stays", name)
                        kept = kept.new_zeros(1)
                    if len(kept) < neurons.count:
                        cut_neurons(neurons, kept)
        return model


def _check_common(strength: float, at: str) -> None:
    checks.not_negative(strength=strength)
    checks.one_of(get_args(Side), at=at)


def _names(layers: Any) -> tuple[str, ...] | None:
    """Take names from a recipe's list."""
    if layers is None:
        return None
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers) or not layers:
        raise ValueError(f"layers: got {layers!r}, want a list of at least one name")
    return tuple(layers)
