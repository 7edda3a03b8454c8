"""Stochastic multi-gradient descent as torch optimisers: SMGD, MAdam, MRMSProp.

Each step solves (15) for the weights lambda of the objectives' gradients, and moves along the mean
of the objectives' own directions with these weights::

    SMGD      direction_j = b_j,                           b_j <- momentum b_j + g_j
    MRMSProp  direction_j = g_j / (sqrt(mov_j) + eps)      (11), (12)
    MAdam     direction_j = m_j / (sqrt(v_j) + eps)        (13), (14), bias-corrected

    w <- w - lr sum_j lambda_j direction_j

so that every objective has moments of its own, and only steps are mixed. With one objective they
are torch's SGD, RMSprop and Adam, step for step: the operations are the same, in the same order.

They are used as any optimiser is. The first objective's gradient is in ``.grad``; the others' are
handed over before the step::

    optimizer = MAdam(model.parameters(), objectives=2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.set_gradients(1, torch.autograd.grad(complexity, list(model.parameters())))
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from retrain.trainers.itp.min_norm import min_norm_weights
from solvers import checks


class MultiGradient(Optimizer):
    """What the three have in common: gradients handed over, (15), and the record of its weights.

    Attributes
    ----------
    trade_offs : list of list of float
        The weights lambda of every step so far, one entry an objective. Part of the state.
    """

    def __init__(self, params: Any, objectives: int, defaults: dict[str, Any]) -> None:
        checks.count(1, objectives=objectives)
        checks.positive(lr=defaults["lr"])
        super().__init__(params, defaults)
        self.objectives = objectives
        self.trade_offs: list[list[float]] = []
        self._further: dict[int, list[Tensor | None]] = {}

    def parameters(self) -> list[Tensor]:
        """Return all parameters, in the order in which gradients are handed over."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def set_gradients(self, objective: int, gradients: Iterable[Tensor | None]) -> None:
        """Hand over one objective's gradient for the next step.

        Parameters
        ----------
        objective : int
            1 to q - 1: objective 0 has its gradient in ``.grad``.
        gradients : iterable of Tensor or None
            One entry a parameter, in the order of `parameters`; None is zero.

        Raises
        ------
        ValueError
            If there is no such objective, or number or shapes are not those of the parameters.
        """
        if not 1 <= objective < self.objectives:
            raise ValueError(
                f"objective: 1 to {self.objectives - 1} was want (0 is in .grad), not {objective}"
            )
        given, parameters = list(gradients), self.parameters()
        if len(given) != len(parameters):
            raise ValueError(
                f"gradients: got {len(given)}, want one for each of {len(parameters)} parameters"
            )
        for gradient, parameter in zip(given, parameters, strict=True):
            if gradient is not None and gradient.shape != parameter.shape:
                raise ValueError(
                    f"gradients: got shape {tuple(gradient.shape)}, want {tuple(parameter.shape)}"
                )
        self._further[objective] = given

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Compute the gradients of all objectives: the first's into ``.grad``, the others kept."""
        if len(losses) != self.objectives:
            raise ValueError(f"losses: got {len(losses)}, want {self.objectives}")
        parameters = self.parameters()
        for objective, loss in enumerate(losses[1:], 1):
            self.set_gradients(
                objective,
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
            )
        losses[0].backward()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step along the common direction, and record its trade-off.

        Raises
        ------
        RuntimeError
            If an objective's gradient was not handed over since the last step.
        FloatingPointError
            If a gradient is not finite.
        """
        answer = None
        if closure is not None:
            with torch.enable_grad():
                answer = closure()
        missing = [j for j in range(1, self.objectives) if j not in self._further]
        if missing:
            raise RuntimeError(f"objective {missing[0]}: its gradient was not handed over")
        parameters = self.parameters()
        rows = [[p.grad for p in parameters]]
        rows += [self._further[j] for j in range(1, self.objectives)]
        weights = [1.0] if self.objectives == 1 else _solve(rows)
        columns = iter(zip(*rows, strict=True))
        for group in self.param_groups:
            for parameter, gradients in zip(group["params"], columns, strict=False):
                if any(gradient is not None for gradient in gradients):
                    known = [torch.zeros_like(parameter) if g is None else g for g in gradients]
                    self._move(parameter, known, weights, group, self.state[parameter])
        self.trade_offs.append(weights)
        self._further.clear()
        return answer

    def _move(
        self,
        parameter: Tensor,
        gradients: list[Tensor],
        weights: list[float],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Update every objective's moments of one parameter, and the parameter."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and the record of the trade-offs."""
        record = torch.tensor(self.trade_offs, dtype=torch.float64)
        return {**super().state_dict(), "trade_offs": record.view(-1, self.objectives)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back.

        Raises
        ------
        ValueError
            If it is of another number of objectives.
        """
        record = state_dict["trade_offs"]
        if record.shape[1] != self.objectives:
            raise ValueError(
                f"state_dict: got {record.shape[1]}, want {self.objectives} objectives"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.trade_offs = record.tolist()


class SMGD(MultiGradient):
    """Stochastic multi-gradient descent, algorithm 2, with momentum.

    Parameters
    ----------
    params, lr, momentum
        As for ``torch.optim.SGD``.
    objectives : int
        How many there are.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, *, objectives: int = 2
    ) -> None:
        checks.below_one(momentum=momentum)
        super().__init__(params, objectives, {"lr": lr, "momentum": momentum})

    def _move(
        self,
        parameter: Tensor,
        gradients: list[Tensor],
        weights: list[float],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        momentum = group["momentum"]
        for j, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            direction = gradient
            if momentum != 0:
                key = f"momentum_buffer_{j}"
                if key in state:
                    state[key].mul_(momentum).add_(gradient)
                else:
                    state[key] = gradient.detach().clone()
                direction = state[key]
            if weight != 0:
                parameter.add_(direction, alpha=-group["lr"] * weight)


class MRMSProp(MultiGradient):
    """RMSProp on several objectives: a moving average (11) for each, the steps (12) mixed.

    Parameters
    ----------
    params, lr, alpha, eps
        As for ``torch.optim.RMSprop``; alpha is the paper's beta.
    objectives : int
        How many there are.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        alpha: float = 0.9,
        eps: float = 1e-7,
        *,
        objectives: int = 2,
    ) -> None:
        checks.below_one(alpha=alpha)
        checks.positive(eps=eps)
        super().__init__(params, objectives, {"lr": lr, "alpha": alpha, "eps": eps})

    def _move(
        self,
        parameter: Tensor,
        gradients: list[Tensor],
        weights: list[float],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        alpha = group["alpha"]
        for j, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            moving = _buffer(state, f"square_avg_{j}", parameter)
            moving.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
            if weight != 0:
                scale = moving.sqrt().add_(group["eps"])
                parameter.addcdiv_(gradient, scale, value=-group["lr"] * weight)


class MAdam(MultiGradient):
    """Adam on several objectives: both moments (13) for each, the steps (14) mixed.

    Parameters
    ----------
    params, lr, betas, eps
        As for ``torch.optim.Adam``.
    objectives : int
        How many there are.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        objectives: int = 2,
    ) -> None:
        for beta in betas:
            checks.below_one(betas=beta)
        checks.positive(eps=eps)
        super().__init__(params, objectives, {"lr": lr, "betas": tuple(betas), "eps": eps})

    def _move(
        self,
        parameter: Tensor,
        gradients: list[Tensor],
        weights: list[float],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        beta1, beta2 = group["betas"]
        step = state.setdefault("step", torch.tensor(0.0))
        step += 1
        size = group["lr"] / (1 - beta1 ** step.item())
        root = (1 - beta2 ** step.item()) ** 0.5
        for j, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            first = _buffer(state, f"exp_avg_{j}", parameter)
            second = _buffer(state, f"exp_avg_sq_{j}", parameter)
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            if weight != 0:
                scale = (second.sqrt() / root).add_(group["eps"])
                parameter.addcdiv_(first, scale, value=-size * weight)


def _solve(rows: Sequence[Sequence[Tensor | None]]) -> list[float]:
    """Solve (15) for gradients given parameter by parameter."""
    gram = np.zeros((len(rows), len(rows)))
    for column in zip(*rows, strict=True):
        known = [(j, g.flatten().double()) for j, g in enumerate(column) if g is not None]
        if known:
            index = [j for j, _ in known]
            part = torch.stack([g for _, g in known])
            gram[np.ix_(index, index)] += (part @ part.T).cpu().numpy()
    return [float(weight) for weight in min_norm_weights(gram)]


def _buffer(state: dict[str, Any], key: str, parameter: Tensor) -> Tensor:
    if key not in state:
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    buffer: Tensor = state[key]
    return buffer
