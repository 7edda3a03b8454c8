"""`retrain.load`: a finished run of any kind, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrain.runs.directory import read_record
from retrain.runs.outcome import Run, read_run
from retrain.runs.subject import apart_from_caller
from retrain.runs.trained import KIND, TrainedRun, load_trained


@apart_from_caller()
def load(path: str | Path, model: Any = None, *, trust: bool = False) -> Run | TrainedRun:
    """Read a finished run back.

    Parameters
    ----------
    path : str or Path
        Run directory, the `out` of the call that wrote it.
    model : torch.nn.Module, optional
        Architecture of the network, whose weights are replaced in a copy. Needed only where the run
        could not describe its architecture; the error message says so.
    trust : bool, optional
        Whether the ``package.module:factory`` that the record names may be imported and called to
        build the architecture, which runs its code.

    Returns
    -------
    Run or TrainedRun
        `Run` for a run of `retrain.net_trim` or `retrain.lobs`; `TrainedRun` for one of
        `retrain.train`. Its model is on the CPU.

    Raises
    ------
    ValueError
        If the directory holds no finished run, one of its files is damaged, or the architecture is
        needed and `model` is not given.

    Notes
    -----
    Reads ``run.json`` and ``model.safetensors`` (a training run also reads ``history.jsonl``) and
    computes nothing. Memory: the weights of one network.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import retrain
    >>> rng = np.random.default_rng(0)
    >>> chain = retrain.Chain((rng.standard_normal((8, 6)), rng.standard_normal((6, 3))))
    >>> inputs = rng.standard_normal((40, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = retrain.lobs(chain, inputs, sparsity=0.5, out=f"{folder}/run")
    ...     again = retrain.load(f"{folder}/run")
    >>> bool((again.model.weights[0] == run.model.weights[0]).all())
    True
    """
    directory = Path(path)
    record = read_record(directory)
    if record.get("state") != "finished":
        raise ValueError(f"run: {str(path)!r} is not finished; repeat its command to resume it")
    if record.get("kind") == KIND:
        return load_trained(directory, record, model)
    return read_run(directory, record, model, trust=trust)
