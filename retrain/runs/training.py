"""Train by a recipe: start or resume, one epoch at a time, and save a plain network.

    DIR/
      lock, run.json        as of every run (`retrain.runs.directory`): identity first, results last
      history.jsonl         one line per epoch
      checkpoint.pt         the complete state of the training after the last epoch
      model.safetensors     the finished network's tensors; run.json has its architecture
      model.pt2             the same as an exported program, when asked for

A killed run loses at most the current epoch, and the same command continues to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from retrain.adapters.files.description import described
from retrain.adapters.files.export import write_export
from retrain.adapters.files.save import save_model
from retrain.adapters.network.modes import apart
from retrain.files import READ_ERRORS, plain, write_whole
from retrain.runs.directory import (
    CHECKPOINT_FILE,
    EXPORT_FILE,
    HISTORY_FILE,
    MODEL_FILE,
    RunDirectory,
    check_out,
    open_run,
    read_record,
)
from retrain.runs.identity import surroundings
from retrain.runs.subject import check_device
from retrain.runs.trained import KIND, TrainedRun, history_bytes, load_trained, read_history
from retrain.trainers.loop.account import Account, cost
from retrain.trainers.loop.accuracy import assess
from retrain.trainers.loop.augment import flip_crop
from retrain.trainers.loop.batches import Part
from retrain.trainers.loop.callbacks import Epoch
from retrain.trainers.loop.checkpoints import (
    Checkpoint,
    entries_of,
    read_checkpoint,
    restore,
    states_of,
    write_checkpoint,
)
from retrain.trainers.loop.computation import Computation, computation
from retrain.trainers.loop.distributed import (
    Replicas,
    join_batch_norms,
    part_batch_norms,
    processes,
    shared,
)
from retrain.trainers.loop.masked import weights_of
from retrain.trainers.loop.states import seeded
from retrain.trainers.loop.supervised import fit
from retrain.trainers.loop.training import GeneratorState, Stateful, Training
from retrain.trainers.recipes.recipe import Recipe, parse_recipe, read_recipe
from retrain.trainers.recipes.start import Pair, Start, start

OnEpoch = Callable[[dict[str, Any], int], None]
"""Receives the record of each epoch, and the largest number of epochs that the run can have."""


@apart()
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    data: Any = None,
    test: Any = None,
    changes: Mapping[str, Any] | None = None,
    export: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainedRun:
    """Train a network by a recipe, pruning as its method does.

    Parameters
    ----------
    recipe : Recipe, mapping, str or Path
        Recipe, its tables as a mapping, the path of a TOML file, or the name of a built-in recipe.
    out : str or Path, optional
        Run directory: written after every epoch, resumed by the same call. Without it nothing is
        written.
    data, test : array, tensor, pair (x, y), DataLoader or Data, optional
        Data to train and to test on, in the forms that `retrain.net_trim` takes, in place of those
        that the recipe names; used as they are, without the recipe's limit and normalisation.
    changes : mapping from str to object, optional
        Entries of the recipe to replace, ``{"training.epochs": 3}``; None removes an entry.
    export : bool, optional
        Whether to write ``model.pt2``, an exported program, too. Needs `out`.
    on_epoch : callable, optional
        Function called with the record of each epoch, those done before a resume included, and with
        the largest number of epochs that the run can have.

    Returns
    -------
    TrainedRun
        Finished network, history and record. In a parallel run only the first process writes; the
        others return the same network.

    Raises
    ------
    ValueError
        If the recipe, the data, or the run directory is invalid; the message names it. Nothing of
        an earlier run is touched.
    FloatingPointError
        If the loss or a parameter is not finite; the checkpoint of the epoch before stays.
    OSError
        If the run directory cannot be written. Finished epochs are kept, and the same call resumes.

    Notes
    -----
    Cost: ``training.epochs`` epochs of ordinary training, the method's own work, one evaluation on
    the test data and one checkpoint per epoch. Memory: the data, the network, the optimiser's state
    and the activations of one batch.

    Examples
    --------
    >>> import numpy as np
    >>> import retrain
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 8))
    >>> y = (x[:, 0] > 0).astype(int)
    >>> recipe = {
    ...     "title": "a small dense network",
    ...     "data": {},
    ...     "model": {"architecture": "dense", "widths": [8, 6, 2]},
    ...     "training": {"epochs": 2},
    ...     "optimizer": {"name": "adam"},
    ... }
    >>> run = retrain.train(recipe, data=(x, y))
    >>> [record["epoch"] for record in run.history]
    [1, 2]
    """
    check_out(out)
    if isinstance(recipe, Recipe):
        chosen = recipe.changed(changes) if changes else recipe
    elif isinstance(recipe, Mapping):
        chosen = parse_recipe(recipe)
        chosen = chosen.changed(changes) if changes else chosen
    else:
        chosen = read_recipe(recipe, changes)
    if export and out is None:
        raise ValueError("export: wants a run directory, out")
    return run_training(chosen, out, data=data, test=test, export=export, on_epoch=on_epoch)


@apart()
def run_training(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data: Any = None,
    test: Any = None,
    export: bool = False,
    on_epoch: OnEpoch | None = None,
) -> TrainedRun:
    """Train by a recipe that has been read; `train` describes the arguments in full.

    Parameters
    ----------
    recipe : Recipe
        Recipe to train by.
    out : str or Path, optional
        Run directory; without it nothing is written.
    data, test : array, tensor, pair (x, y), DataLoader or Data, optional
        Data to train and to test on, in place of those that the recipe names.
    export : bool, optional
        Whether to write ``model.pt2``, an exported program, too.
    on_epoch : callable, optional
        Function called with the record of each epoch, and the largest number of epochs.

    Returns
    -------
    TrainedRun
        Finished network, history and record.

    Raises
    ------
    ValueError
        If the recipe, the data, or the run directory is invalid.
    FloatingPointError
        If the loss or a parameter is not finite.
    OSError
        If the run directory cannot be written.
    """
    check_device(recipe.training.device)
    with ExitStack() as stack:
        part, device = stack.enter_context(processes(torch.device(recipe.training.device)))
        stack.enter_context(seeded(recipe.training.seed, device))
        replicas = stack.enter_context(closing(Replicas())) if part.processes > 1 else None
        how = computation(recipe.training.precision, device, replicas=replicas, part=part)
        begun = start(recipe, device, data, test)
        identity = _identity(recipe, begun, device, part)
        directory = None
        if out is not None and part.rank == 0:
            directory = stack.enter_context(open_run(out, identity, ()))
        finished = directory is not None and _is_finished(directory.path)
        if out is not None and shared(finished):
            note = on_epoch if part.rank == 0 else None
            return _again(Path(out), begun, export, note)
        run = TrainingRun(recipe, begun, directory, how, on_epoch)
        run.resume()
        run.fit()
        return run.conclude(identity, export)


class TrainingRun:
    """A training run in progress.

    Parameters
    ----------
    recipe : Recipe
        What is trained, and how.
    begun : Start
        The training before its first step.
    directory : RunDirectory or None
        Where checkpoints go; None in processes that write nothing.
    how : Computation
        Precision, and this process's part of the samples.
    on_epoch : callable or None
        Called after each epoch with its line of the history.
    """

    def __init__(
        self,
        recipe: Recipe,
        begun: Start,
        directory: RunDirectory | None,
        how: Computation,
        on_epoch: OnEpoch | None,
    ) -> None:
        self.recipe, self.begun, self.directory, self.how = recipe, begun, directory, how
        self.on_epoch = on_epoch if how.part.rank == 0 else None
        self.sampler = torch.Generator().manual_seed(recipe.training.seed)
        self.account = Account(begun.dense, begun.sample)
        self._join()
        self.history: list[dict[str, Any]] = []
        self.epochs = self.steps = 0
        self.ended = False

    def _join(self) -> None:
        count, left = (
            self.how.part.processes,
            self.begun.setting.samples % self.begun.setting.batch_size,
        )
        if count > 1 and join_batch_norms(self.begun.training.model) and 0 < left < count:
            raise ValueError(
                f"recipe: [training] batch_size: leaves a last batch of {left}, which {count} "
                "processes cannot share under batch norm; choose another"
            )

    def others(self) -> dict[str, Stateful]:
        """Return the states beside the training's own: the order of samples, torch's generators.

        Returns
        -------
        dict
            Objects with a state, by name.
        """
        states: dict[str, Stateful] = {
            "sampler": GeneratorState(self.sampler),
            "generator": GeneratorState(torch.default_generator),
            "account": self.account,
        }
        if self.begun.setting.device.type == "cuda":
            index = self.begun.setting.device.index or 0
            states["cuda generator"] = GeneratorState(torch.cuda.default_generators[index])
        if self.how.scaler is not None:
            states["scaler"] = self.how.scaler
        return states

    def resume(self) -> None:
        """Continue from the run's checkpoint, if it has one."""
        path = None if self.directory is None else self.directory.path
        found = None if path is None else read_checkpoint(path / CHECKPOINT_FILE)
        entries = shared(None if found is None else entries_of(found))
        if entries is None:
            return
        checkpoint = Checkpoint(**entries)
        if path is not None:
            self.history = read_history(path, checkpoint.epochs)
        try:
            self.begun.method.reshape(self.begun.training, checkpoint.description)
        except READ_ERRORS as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"checkpoint: its description does not fit ({what})") from error
        self._join()
        restore(self.begun.training, self.others(), checkpoint.states)
        self.epochs, self.steps = checkpoint.epochs, checkpoint.steps
        self.ended = checkpoint.ended
        for line in self.history:
            if self.on_epoch is not None:
                self.on_epoch(line, self.begun.setting.epochs)

    def fit(self) -> None:
        """Train the remaining epochs, each followed by its line and its checkpoint."""
        if self.ended:
            return
        training, calls = self.begun.training, self.begun.training.callbacks

        def after_epoch(epoch: Epoch, model: nn.Module, optimizer: Optimizer) -> bool:
            answers = [call(epoch, model, optimizer) for call in calls.after_epoch]
            self.epochs, self.steps, self.ended = epoch.number + 1, epoch.steps, any(answers)
            if self.how.part.rank == 0:
                self._note(epoch)
            return self.ended

        try:
            fit(
                training.model,
                self.begun.data,
                epochs=self.begun.setting.epochs,
                optimizer=training.optimizer,
                generator=self.sampler,
                schedule=training.schedule,
                loss=training.loss,
                penalty=training.penalty,
                batch_size=self.begun.setting.batch_size,
                callbacks=replace(
                    calls,
                    before_forward=(self.account.step, *calls.before_forward),
                    after_epoch=(after_epoch,),
                ),
                first_epoch=self.epochs,
                first_step=self.steps,
                augmentation=None if self.recipe.data.augment is None else flip_crop(),
                computation=self.how,
            )
        except FloatingPointError as error:
            if self.directory is None or self.epochs == 0:
                raise
            kept = f"the checkpoint after epoch {self.epochs} stays in {self.directory.path}"
            raise FloatingPointError(f"{error}; {kept}") from error

    def _note(self, epoch: Epoch) -> None:
        """Write an epoch's line, then its checkpoint; on resuming, a surplus line is dropped."""
        training, test = self.begun.training, self.begun.test
        tested = (None, None) if test is None else assess(training.model, test, training.loss)
        said = training.describe()
        line = {
            "epoch": epoch.number + 1,
            "loss": epoch.loss,
            "penalty": epoch.penalty,
            "accuracy": epoch.accuracy,
            "test_loss": tested[0],
            "test_accuracy": tested[1],
            "learning_rate": training.optimizer.param_groups[0]["lr"],
            **self.account.figures(training.model),
            "seconds": epoch.seconds,
            "method": said,
        }
        self.history.append(plain(line))
        if self.directory is not None:
            path = self.directory.path
            write_whole(path / HISTORY_FILE, history_bytes(self.history))
            states = states_of(training, self.others())
            checkpoint = Checkpoint(self.epochs, self.steps, self.ended, said, states)
            write_checkpoint(path / CHECKPOINT_FILE, checkpoint)
        if self.on_epoch is not None:
            self.on_epoch(self.history[-1], self.begun.setting.epochs)

    def conclude(self, identity: dict[str, Any], export: bool) -> TrainedRun:
        """Make the network plain, evaluate and save it.

        Parameters
        ----------
        identity : dict
            Identity of the run, for its record.
        export : bool
            Whether an exported program is written too.

        Returns
        -------
        TrainedRun
            The finished run.
        """
        begun, dense = self.begun, self.begun.dense
        part_batch_norms(self.begun.training.model)
        network = self.begun.method.finish(self.begun.training).eval()
        said = self.begun.training.describe()  # after the last pruning
        final = cost(network, begun.sample)
        sets = {"train": begun.data, "test": begun.test}
        figures = {
            name: _figures(network, pair, self.begun.training, begun.labels[name])
            for name, pair in sets.items()
        }
        network = network.cpu()
        description, reason = described(network)
        record: dict[str, Any] = {
            "state": "finished",
            "kind": KIND,
            "identity": identity,
            "title": self.recipe.title,
            "recipe": self.recipe.tables,
            "method": {"name": self.recipe.method.name, **said},
            "model": {"description": description, "reason": reason},
            "epochs": self.epochs,
            "ended": self.ended,
            **figures,
            "weights": _zeros(network),
            "cost": {"dense": asdict(dense), "final": asdict(final)},
            "parameters_pruned": 1 - final.parameters / dense.parameters,
            "operations_pruned": 1 - final.forward / dense.forward,
            "load": self.account.load,
            "dense_load": self.account.dense_load,
            "seconds": sum(line["seconds"] for line in self.history),
        }
        where = None
        if self.directory is not None:
            where = self.directory.path
            save_model(network, where / MODEL_FILE)
            if export:
                write_export(network, begun.sample, where / EXPORT_FILE)
            self.directory.write_record(record)
        return TrainedRun(network, self.history, plain(record), where)


def _zeros(network: nn.Module) -> dict[str, int]:
    """Count the weights (no biases, no normalisation), and those that are exactly zero."""
    weights = weights_of(network).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {"count": sum(weight.numel() for weight in weights), "zeros": zeros}


def _figures(
    network: nn.Module, pair: Pair | None, training: Training, labels: str
) -> dict[str, Any] | None:
    """Evaluate a network on a data set; say how labels were read, or why there is no accuracy."""
    if pair is None:
        return None
    loss, accuracy = assess(network, pair, training.loss)
    reason = "" if accuracy is not None else "the loss has targets, not classes"
    said = {name: text for name, text in (("labels", labels), ("reason", reason)) if text}
    return {"loss": loss, "accuracy": accuracy, "samples": len(pair[0]), **said}


def _is_finished(path: Path) -> bool:
    return bool(read_record(path).get("state") == "finished")


def _again(path: Path, begun: Start, export: bool, on_epoch: OnEpoch | None) -> TrainedRun:
    """Return a run that is already finished."""
    record = read_record(path)
    model = record.get("model")
    described = isinstance(model, Mapping) and model.get("description") is not None
    run = load_trained(path, record, None if described else begun.training.model)
    if export and not (path / EXPORT_FILE).exists():
        write_export(run.model, begun.sample, path / EXPORT_FILE)
    for line in run.history:
        if on_epoch is not None:
            on_epoch(line, begun.setting.epochs)
    return run


def _identity(recipe: Recipe, begun: Start, device: torch.device, part: Part) -> dict[str, Any]:
    return {
        "command": "train",
        **recipe.identity(),
        "data": begun.fingerprints,
        **begun.network,
        "processes": part.processes,
        "threads": torch.get_num_threads(),
        **surroundings(device.type, with_torch=True),
    }
