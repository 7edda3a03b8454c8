"""`retrain.load`: a finished run of any kind, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrain.runs.directory import read_record
from retrain.runs.outcome import Run, read_run
from retrain.runs.subject import apart_from_caller
from retrain.runs.trained import KIND, TrainedRun, load_trained


@apart_from_caller()
def load(path: str | Path, model: Any = None) -> Run | TrainedRun:
    """Read a finished run back.

    Parameters
    ----------
    path : path
        The run directory.
    model : torch.nn.Module, optional
        The architecture, where the run could not write it down; a copy of it is filled.

    Returns
    -------
    Run or TrainedRun
        What `retrain.net_trim` or `retrain.lobs` returned; what `retrain.train` returned.

    Raises
    ------
    ValueError
        If there is no finished run, a file of it is damaged, or the network's architecture must be
        given and is not.
    """
    directory = Path(path)
    record = read_record(directory)
    if record.get("state") != "finished":
        raise ValueError(f"run: {str(path)!r} is not finished; repeat its command to resume it")
    if record.get("kind") == KIND:
        return load_trained(directory, record, model)
    return read_run(directory, record, model)
