"""When a neuron is dead for good: the sign-variance rule.

The draft announces neuron removal and does not define it; this is the authors' method, as they
describe it. After each step, of every switch,

    m <- gamma m + (1 - gamma) sign(beta)                 the moving average of the sign
    v <- gamma (v + (1 - gamma) (sign(beta) - m)^2)       its variance, m as it was before

with m the first sign and v = 0 to begin with. A switch that the loss has no use for is pulled to
zero and overshoots it step after step: its sign keeps flipping, v grows towards 1, and above a
threshold (0.5) the neuron is removed.

The square of a sign is 1, so v = 1 - m^2 at all times (by induction: with s the new sign,
1 - (gamma m + (1 - gamma) s)^2 = gamma (1 - m^2 + (1 - gamma) (s - m)^2) as s^2 = 1), and m is all
there is to keep. A switch at exactly 0 has the sign 0 here: as if it were positive and negative
half the time each.

A switch that crosses zero once, for good, is taken for a flipping one while m passes through zero:
at gamma = 0.99 that is from 16 steps after the crossing. That is the rule; a larger gamma and a
smaller learning rate of the switches make it rarer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retrain.trainers.loop.callbacks import Step
from retrain.trainers.shrinknets.cutting import cut_neurons
from retrain.trainers.shrinknets.network import neurons_of
from retrain.trainers.shrinknets.switches import Switch, switches_of
from solvers import checks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SignVariance:
    """The rule's two numbers.

    Attributes
    ----------
    inertia : float
        gamma, in [0, 1): the moving average looks back over about 1 / (1 - gamma) steps. Larger is
        more patient. Of a sign that flips at every step the mean tends to +-(1 - gamma) / (1 +
        gamma): below gamma = 0.17 the variance never gets to 0.5.
    threshold : float
        In (0, 1): the variance above which a neuron is dead.
    """

    inertia: float = 0.99
    threshold: float = 0.5

    def __post_init__(self) -> None:
        checks.below_one(inertia=self.inertia)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold: got {self.threshold}, want a number in (0, 1)")


def follow_signs(switch: Switch, inertia: float) -> None:
    """Take the switches' present signs into their moving average, `Switch.mean_sign`."""
    with torch.no_grad():
        switch.mean_sign.lerp_(switch.beta.sign(), 1 - inertia)


def sign_variance(switch: Switch) -> Tensor:
    """Return the moving variance of each switch's sign, in [0, 1]."""
    return 1 - switch.mean_sign.square()


def remover(rule: SignVariance, survived: Callable[[str], None]) -> Callable[[Step], None]:
    """Make the callback for after each step: follow the signs, cut out what is dead.

    Parameters
    ----------
    rule : SignVariance
        When a neuron is dead.
    survived : callable
        Told the name of a switch layer all of whose neurons are dead. The one with the largest
        switch stays, so that the network stays one; it counts as alive until its variance passes
        the threshold again.

    Notes
    -----
    The callback raises FloatingPointError when a switch is not finite. A step costs one small
    kernel a switch layer, and a look at its result; a step that cuts costs copies of the
    parameters on both sides.
    """

    def remove(step: Step) -> None:
        dead = {}
        for name, switch in switches_of(step.model).items():
            # torch's sign of NaN is 0: such a switch would be taken for a dead one.
            if not bool(switch.beta.isfinite().all()):
                raise FloatingPointError(
                    f"{name!r} has a switch that is not finite at step {step.number} (epoch "
                    f"{step.epoch}): lower the learning rate"
                )
            follow_signs(switch, rule.inertia)
            over = sign_variance(switch) > rule.threshold
            if bool(over.any()):
                dead[name] = over
        if dead:
            for name in remove_dead(step.model, dead, step.optimizer):
                survived(name)

    return remove


def remove_dead(
    model: nn.Module, dead: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> list[str]:
    """Cut the neurons that are dead by some switch out of the model, in place.

    Parameters
    ----------
    dead : dict of str to bool Tensor
        For switch layers by name, which neurons.
    optimizer : Optimizer, optional
        As for `cut_neurons`.

    Returns
    -------
    list of str
        The switch layers all of whose neurons are dead. There one stays, the one whose switch is
        the largest.
    """
    saved = []
    for neurons in neurons_of(model):
        for name, switch in neurons.switches.items():
            if name not in dead:
                continue
            gone = dead[name]
            if bool(gone.all()):
                best = int(switch.beta.detach().abs().argmax())
                gone = gone.clone()
                gone[best] = False
                # It begins anew, or it would be taken for dead at every step from here on.
                switch.mean_sign[best] = switch.beta.detach()[best].sign()
                if switch.size > 1:
                    logger.warning(
                        "all %d neurons of %s are dead: the one with the largest switch stays",
                        switch.size,
                        name,
                    )
                saved.append(name)
            kept = (~gone).nonzero().flatten()
            if len(kept) < switch.size:
                cut_neurons(neurons, kept, optimizer)
                logger.debug("%s: %d neurons left", name, len(kept))
    return saved
