"""Scikit-learn's multilayer perceptrons as chains of dense layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrain.stream.chain import Chain
from retrain.stream.stream import Follows

_ACTIVATIONS: dict[str, Follows] = {"relu": "relu", "identity": "linear"}
"""Activations between layers that a chain has, by scikit-learn's name."""


def chain_of(estimator: Any) -> Chain | None:
    """Read a fitted MLPClassifier or MLPRegressor.

    Parameters
    ----------
    estimator : object
        Any object; known by its fields, so that scikit-learn is not imported.

    Returns
    -------
    Chain or None
        Its layers, the last one linear: a classifier's outputs are those before the softmax (or
        the logistic function), whose largest is the same. None for any other object.

    Raises
    ------
    ValueError
        If it is not fitted, or has another activation than ``relu`` or ``identity``.
    """
    if type(estimator).__name__ not in ("MLPClassifier", "MLPRegressor"):
        return None
    if not type(estimator).__module__.startswith("sklearn."):
        return None
    if not hasattr(estimator, "coefs_"):
        raise ValueError("model: the estimator is not fitted")
    if estimator.activation not in _ACTIVATIONS:
        raise ValueError(
            f"model: got the activation {estimator.activation!r}, want relu or identity"
        )
    weights = tuple(
        np.vstack([weight, bias[None]])
        for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True)
    )
    between = _ACTIVATIONS[estimator.activation]
    follows: tuple[Follows, ...] = (*[between] * (len(weights) - 1), "linear")
    return Chain(weights, (True,) * len(weights), follows)
