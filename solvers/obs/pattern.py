"""Which weights may be kept where: a small value all methods share, with exact counts.

A sparsity is a count, never a threshold: ``round_half_up(sparsity * size)`` weights go, neither one
more nor one less, ties broken by position (row-major, the later entry goes first).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

Array = Any
Kind = Literal["layer", "unit", "n:m", "inputs"]


@dataclass(frozen=True)
class Pattern:
    """How many weights may be kept where. Make one with the functions of this module.

    Attributes
    ----------
    kind : {"layer", "unit", "n:m", "inputs"}
        ``"layer"``: one count for the whole matrix. ``"unit"``: the same count in every unit
        (column). ``"n:m"``: at most `keep` of every `group` consecutive inputs of a unit.
        ``"inputs"``: whole rows.
    sparsity : float or None
        Fraction removed, in [0, 1], of the layer's, a unit's, or the inputs' prunable ones.
    count : int or None
        The number removed, instead of a fraction.
    keep, group : int or None
        N and M of an N:M pattern.
    """

    kind: Kind
    sparsity: float | None = None
    count: int | None = None
    keep: int | None = None
    group: int | None = None

    def __str__(self) -> str:
        """Return what a user would type."""
        if self.kind == "n:m":
            return f"{self.keep}:{self.group}"
        amount = f"{self.sparsity:g}" if self.count is None else f"{self.count} removed"
        return f"{self.kind} {amount}"

    def removed(self, size: int) -> int:
        """Return how many of `size` weights (inputs, for whole inputs) are removed, at least.

        ``floor(sparsity * size + 1/2)``, or the count asked for.

        Parameters
        ----------
        size : int
            Number of weights, or of inputs.

        Returns
        -------
        int
            From 0 to `size`.

        Raises
        ------
        ValueError
            If the pattern is N:M, which has no one count, or the count exceeds `size`.
        """
        if self.count is not None:
            if self.count > size:
                raise ValueError(f"count: {self.count} of {size} weights cannot be removed")
            return self.count
        if self.sparsity is None:
            raise ValueError(f"pattern: {self} has a count for each group, not for the whole")
        # the product may land an ulp beside a half-integer that was meant: 0.145 * 100
        return min(size, math.floor(round(self.sparsity * size, 9) + 0.5))


def per_layer(sparsity: float) -> Pattern:
    """Remove a fraction of the whole matrix, wherever it costs least.

    Parameters
    ----------
    sparsity : float
        Fraction to remove, from 0 to 1.

    Returns
    -------
    Pattern
        For the methods of this room.

    Raises
    ------
    ValueError
        If the fraction is not in [0, 1].
    """
    return Pattern("layer", sparsity=_fraction(sparsity))


def per_layer_count(count: int) -> Pattern:
    """Remove exactly `count` weights of the matrix, wherever it costs least.

    Parameters
    ----------
    count : int
        Weights to remove, at least 0.

    Returns
    -------
    Pattern
        For the methods of this room.

    Raises
    ------
    ValueError
        If it is not a whole number of at least 0.
    """
    if isinstance(count, bool) or int(count) != count or count < 0:
        raise ValueError(f"count: got {count!r}, want a whole number of weights >= 0")
    return Pattern("layer", count=int(count))


def per_unit(sparsity: float) -> Pattern:
    """Remove the same fraction in every unit.

    Parameters
    ----------
    sparsity : float
        Fraction to remove, from 0 to 1.

    Returns
    -------
    Pattern
        For the methods of this room.

    Raises
    ------
    ValueError
        If the fraction is not in [0, 1].
    """
    return Pattern("unit", sparsity=_fraction(sparsity))


def n_of_m(keep: int, group: int) -> Pattern:
    """Keep at most `keep` of every `group` consecutive inputs, counted from the first input.

    Free rows are not counted. A last, shorter group of g inputs keeps min(keep, g).

    Parameters
    ----------
    keep : int
        N, weights kept of each group at most.
    group : int
        M, consecutive inputs in a group.

    Returns
    -------
    Pattern
        For the methods of this room.

    Raises
    ------
    ValueError
        If not 0 <= N <= M with M at least 1.
    """
    whole = all(int(v) == v and not isinstance(v, bool) for v in (keep, group))
    if not whole or not 0 <= keep <= group or group < 1:
        raise ValueError(f"n_of_m: got {keep!r}:{group!r}, want whole 0 <= N <= M, M >= 1")
    return Pattern("n:m", keep=int(keep), group=int(group))


def whole_inputs(sparsity: float) -> Pattern:
    """Remove a fraction of the inputs, each from all units.

    Parameters
    ----------
    sparsity : float
        Fraction to remove, from 0 to 1.

    Returns
    -------
    Pattern
        For the methods of this room.

    Raises
    ------
    ValueError
        If the fraction is not in [0, 1].
    """
    return Pattern("inputs", sparsity=_fraction(sparsity))


def parse_pattern(text: str, sparsity: float | None = None) -> Pattern:
    """Make a pattern from a word: ``layer``, ``unit``, ``inputs``, or ``N:M`` such as ``2:4``.

    Parameters
    ----------
    text : str
        The word.
    sparsity : float, optional
        Fraction to remove; none for N:M.

    Returns
    -------
    Pattern
        What the word means.

    Raises
    ------
    ValueError
        If the word is none of these, or the sparsity is missing, or given to an N:M pattern.
    """
    makers = {"layer": per_layer, "unit": per_unit, "inputs": whole_inputs}
    if text in makers:
        if sparsity is None:
            raise ValueError(f"sparsity: the pattern {text!r} needs one")
        return makers[text](sparsity)
    left, colon, right = text.partition(":")
    if colon and left.isdigit() and right.isdigit():
        if sparsity is not None:
            raise ValueError(f"sparsity: {text} fixes it; got {sparsity} as well")
        return n_of_m(int(left), int(right))
    raise ValueError(f"pattern: got {text!r}, want layer, unit, inputs or N:M")


def require(pattern: Pattern, supported: Iterable[Kind], method: str) -> None:
    """Refuse, by name, a pattern that a method does not implement.

    Parameters
    ----------
    pattern : Pattern
        Where zeros are counted, and how many.
    supported : iterable of str
        Kinds that the method implements.
    method : str
        Name of the method, for the message.

    Raises
    ------
    ValueError
        If the pattern's kind is not among those supported.
    """
    supported = tuple(supported)
    if pattern.kind not in supported:
        raise ValueError(
            f"pattern: {method} does not support {pattern.kind!r}, only {', '.join(supported)}"
        )


def row_groups(pattern: Pattern, prunable: np.ndarray) -> np.ndarray:
    """Number the groups of an N:M pattern, (n_in,) int64; -1 for free rows, 0 without groups.

    Parameters
    ----------
    pattern : Pattern
        Where zeros are counted, and how many.
    prunable : bool array, shape (n_in,)
        False for free rows (the bias).

    Returns
    -------
    int64 ndarray, shape (n_in,)
        Number of each row's group.
    """
    groups = np.where(prunable, 0, -1)
    if pattern.group is not None:
        groups[prunable] = np.arange(int(prunable.sum())) // pattern.group
    return groups.astype(np.int64)


def layer_count(pattern: Pattern, allowed: np.ndarray, prunable: np.ndarray) -> int:
    """Count the weights the pattern removes in all, for a mask of allowed weights.

    Where the mask forbids more than the pattern removes (in the layer, a unit, a group), what the
    mask forbids is removed.

    Parameters
    ----------
    pattern : Pattern
        Where zeros are counted, and how many.
    allowed : bool array, shape (n_in, n_out)
        Mask: False where a weight must be zero.
    prunable : bool array, shape (n_in,)
        False for free rows (the bias).

    Returns
    -------
    int
        Weights removed, those that the mask forbids among them.
    """
    return int((~kept_by(np.zeros(allowed.shape), pattern, allowed, prunable)).sum())


def kept_by(score: Array, pattern: Pattern, allowed: Array, prunable: np.ndarray) -> Array:
    """Keep the weights of largest score that the pattern lets one keep.

    Parameters
    ----------
    score : array, shape (n_in, n_out)
        Non-negative, finite: what keeping a weight is worth. numpy or torch.
    pattern : Pattern
        How many may be kept where. For whole inputs a row's score is its sum.
    allowed : bool array, shape (n_in, n_out)
        False where a weight must be zero. Those count as removed.
    prunable : bool ndarray, shape (n_in,)
        False on free rows, which are always kept and never counted.

    Returns
    -------
    bool array, shape (n_in, n_out)
        Exactly the pattern's count is removed, or what `allowed` forbids where that is more.
    """
    xp = array_namespace(score)
    kept = xp.asarray(allowed, copy=True)
    rows = xp.asarray(np.flatnonzero(prunable), device=device_of(score))
    n_out = score.shape[1]
    size = int(rows.shape[0])
    if size == 0:
        return kept
    may = xp.take(allowed, rows, axis=0)
    # forbidden weights go first: below every score
    worth = xp.where(may, xp.take(score, rows, axis=0), -1.0)
    if pattern.kind == "layer":
        keep = size * n_out - pattern.removed(size * n_out)
        chosen = xp.reshape(_largest(xp.reshape(worth, (1, -1)), keep), (size, n_out))
    elif pattern.kind == "unit":
        keep = size - pattern.removed(size)
        chosen = _largest(worth.T, keep).T
    elif pattern.kind == "inputs":
        keep = size - pattern.removed(size)
        total = xp.sum(xp.where(may, worth, 0.0), axis=1)
        # a row without any allowed weight is removed already
        total = xp.where(xp.any(may, axis=1), total, -1.0)
        chosen = xp.broadcast_to(_largest(total[None, :], keep).T, (size, n_out))
    else:
        chosen = _grouped(worth, pattern)
    kept[rows, :] = chosen & may
    return kept


def _grouped(worth: Array, pattern: Pattern) -> Array:
    """Keep the best N of every M consecutive rows, in every column."""
    xp = array_namespace(worth)
    size, n_out = worth.shape
    group, keep = int(pattern.group or 1), int(pattern.keep or 0)
    short = -size % group
    # padding of the last group goes before everything else, so min(N, g) are kept there
    padding = xp.full((short, n_out), -2.0, dtype=worth.dtype, device=device_of(worth))
    padded = xp.concat([worth, padding], axis=0)
    lines = xp.permute_dims(xp.reshape(padded, (-1, group, n_out)), (0, 2, 1))
    chosen = _largest(xp.reshape(lines, (-1, group)), keep)
    chosen = xp.permute_dims(xp.reshape(chosen, (-1, n_out, group)), (0, 2, 1))
    return xp.reshape(chosen, (-1, n_out))[:size, :]


def _largest(lines: Array, keep: int) -> Array:
    """Mark the `keep` largest entries of every line, the earlier one where two are equal."""
    xp = array_namespace(lines)
    length = lines.shape[1]
    if keep <= 0 or keep >= length:
        return xp.full(lines.shape, keep > 0, dtype=xp.bool, device=device_of(lines))
    threshold = _order_statistic(lines, length - keep)
    above = lines > threshold
    tied = lines == threshold
    missing = keep - xp.sum(xp.astype(above, xp.int64), axis=1)[:, None]
    return above | (tied & (xp.cumulative_sum(xp.astype(tied, xp.int64), axis=1) <= missing))


def _order_statistic(lines: Array, position: int) -> Array:
    """Return the entry at `position` of every line when sorted, as a column."""
    if isinstance(lines, np.ndarray):
        # linear time; the array API knows whole sorts only
        return np.partition(lines, position, axis=1)[:, position : position + 1]
    return array_namespace(lines).sort(lines, axis=1)[:, position : position + 1]


def _fraction(sparsity: float) -> float:
    """Check a sparsity."""
    if not 0.0 <= sparsity <= 1.0:  # a NaN fails, too
        raise ValueError(f"sparsity: got {sparsity!r}, want a fraction in [0, 1]")
    return float(sparsity)
