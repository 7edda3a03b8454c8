"""What a caller asks of a run, whatever the method: network, data, layers, directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrain.data.arrays import Data
from retrain.data.sources import as_data
from retrain.runs.directory import check_out
from retrain.runs.outcome import OnLayer
from retrain.runs.subject import Subject, subject_of

_MOST_EPOCHS = 10**6
"""Largest number of epochs of fine-tuning. More are refused as a typing error, since such a run
would not end. Chosen by hand."""


@dataclass(frozen=True, eq=False)
class Request:
    """What a caller asks of a run, whatever the method. Built by `request_of`.

    Attributes
    ----------
    subject : Subject
        Network.
    data : Data
        Calibration samples.
    held_out : Data or None
        Held-out samples, for accuracies and bounds.
    layers, skip : str, sequence of str, or None
        Shell patterns of the layers to retrain, and to leave out.
    fine_tune : int
        Number of epochs of training after pruning.
    device : str or None
        Device on which torch computes.
    out : Path or None
        Run directory.
    on_layer : callable or None
        Function called with each LayerReport as soon as its layer is done, and the number of
        layers.
    """

    subject: Subject
    data: Data
    held_out: Data | None
    layers: str | Sequence[str] | None
    skip: str | Sequence[str] | None
    fine_tune: int
    device: str | None
    out: Path | None
    on_layer: OnLayer | None

    def of(self, network: Any, out: Path | None, on_layer: OnLayer | None) -> Request:
        """Ask the same for another network, in another directory.

        Parameters
        ----------
        network : torch.nn.Module, Chain or LoadedModel
            Network.
        out : Path or None
            Run directory.
        on_layer : callable or None
            Function called with each LayerReport, and the number of layers.

        Returns
        -------
        Request
            New request; this one is not changed.
        """
        subject = subject_of(network, self.device)
        return replace(self, subject=subject, out=out, on_layer=on_layer)

    def at(self, out: Path | None, on_layer: OnLayer | None) -> Request:
        """Ask the same in another directory.

        Parameters
        ----------
        out : Path or None
            Run directory.
        on_layer : callable or None
            Function called with each LayerReport, and the number of layers.

        Returns
        -------
        Request
            New request; this one is not changed.
        """
        return replace(self, out=out, on_layer=on_layer)

    def choosing(self, layers: str | Sequence[str] | None) -> Request:
        """Ask for the layers given, where the request itself names none.

        Parameters
        ----------
        layers : str, sequence of str or None
            Shell patterns of the layers to retrain.

        Returns
        -------
        Request
            New request; this one where it names layers itself.
        """
        return self if self.layers is not None else replace(self, layers=layers)


def request_of(
    model: Any,
    data: Any,
    *,
    evaluate: Any,
    layers: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    fine_tune: int,
    device: str | None,
    out: str | Path | None,
    on_layer: OnLayer | None,
) -> Request:
    """Read the arguments that all methods share; `retrain.net_trim` describes them in full.

    Parameters
    ----------
    model : torch.nn.Module, Chain or LoadedModel
        Network.
    data : array, tensor, DataLoader, Data, or anything that yields batches
        Calibration samples.
    evaluate : like `data`, or None
        Held-out samples.
    layers, skip : str, sequence of str or None
        Shell patterns of the layers to retrain, and to leave out.
    fine_tune : int
        Number of epochs of training after pruning, from 0 to 10^6.
    device : str or None
        Device on which torch computes.
    out : str, Path or None
        Run directory.
    on_layer : callable or None
        Function called with each LayerReport, and the number of layers.

    Returns
    -------
    Request
        Arguments as types, the data in memory.

    Raises
    ------
    ValueError
        If an argument is invalid; the message names it.
    """
    check_out(out)
    if fine_tune < 0:
        raise ValueError(f"fine_tune: got {fine_tune}, want a number of epochs >= 0")
    if fine_tune > _MOST_EPOCHS:
        raise ValueError(f"fine_tune: got {fine_tune}, want at most {_MOST_EPOCHS} epochs")
    return Request(
        subject=subject_of(model, device),
        data=as_data(data),
        held_out=None if evaluate is None else as_data(evaluate),
        layers=layers,
        skip=skip,
        fine_tune=fine_tune,
        device=device,
        out=None if out is None else Path(out),
        on_layer=on_layer,
    )
