"""Run by torchrun in test_distributed: trainings that processes share, written to a folder."""

import sys
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import distributed, nn
from training_cases import Stopped, tables

import retrain
from retrain.adapters.files.blocks import Sum
from retrain.trainers.loop.callbacks import Callbacks
from retrain.trainers.loop.distributed import joint_mean, processes
from retrain.trainers.loop.training import GeneratorState
from retrain.trainers.plain import Plain
from retrain.trainers.recipes import recipe

recipe.METHODS["shrink"] = "joint_runs:Shrink"


class Block(nn.Module):
    """A residual block that may be skipped for a step."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.on = nn.Linear(width, width), True

    def forward(self, x):
        return x + torch.relu(self.layer(x)) if self.on else x


def blocks(count=3, width=8):
    """A network whose blocks are skipped at random, and whose second one leaves."""
    return nn.Sequential(nn.Linear(12, width), *(Block(width) for _ in range(count)),
                         nn.Linear(width, 4))  # fmt: skip


def normed():
    """A network with batch norm of rows, and of images with nothing to learn in it."""
    layers = []
    for n_in, n_out in pairwise((12, 16, 8)):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
    shaped = [nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2, affine=False), nn.Flatten()]
    return nn.Sequential(*layers, *shaped, nn.Linear(8, 4))


@dataclass(frozen=True)
class Shrink(Plain):
    """Skip blocks at random, drawn alike everywhere; take one out after three epochs."""

    stop: ClassVar[int] = -1

    def reshape(self, training, description):
        if description["blocks"] == 2:
            self._cut(training.model, training.optimizer)

    def start(self, model, setting):
        training = super().start(model, setting)
        generator = torch.Generator().manual_seed(setting.seed)
        means = []

        def draw(step):
            for block in step.model:
                if isinstance(block, Block):
                    block.on = bool(torch.rand((), generator=generator) < 0.7)

        def note(step):
            means.append(float(joint_mean(step.inputs.mean(), step)))

        def cut(epoch, model, optimizer):
            if epoch.number == Shrink.stop:
                raise Stopped
            if epoch.number == 2:
                self._cut(model, optimizer)

        return replace(
            training,
            callbacks=Callbacks(before_forward=(draw,), after_backward=(note,), after_epoch=(cut,)),
            parts={"gates": GeneratorState(generator)},
            describe=lambda: {"blocks": len(model) - 2, "inputs": means[-1]},
        )

    def _cut(self, model, optimizer):
        gone = list(model[2].parameters())
        model.pop(2)
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if all(p is not q for q in gone)]
        for parameter in gone:
            optimizer.state.pop(parameter, None)

    def finish(self, training):
        first, *inner, last = training.model
        body = [Sum(nn.Sequential(b.layer, nn.ReLU()), nn.Identity()) for b in inner]
        return nn.Sequential(first, *body, last)


def recipes():
    """Each case's tables; 120 samples in batches of 17 leave a last one of one sample."""
    plain = tables(model={"dropout": 0.0}, training={"batch_size": 17})
    dense = tables(model={"dropout": 0.0}, optimizer={"name": "adam", "lr": 0.01, "momentum": 0.0})
    del dense["optimizer"]["momentum"], dense["schedule"]
    itp = {"name": "itp", "descent": "multi-gradient", "threshold": 0.01}
    switches = {"name": "shrinknets", "strength": 0.3, "inertia": 0.8}
    return {
        "plain": plain,
        "shrinking": {**plain, "model": {"factory": "joint_runs:blocks"},
                      "method": {"name": "shrink"}},
        "batch norm": {**tables(training={"batch_size": 16}),
                       "model": {"factory": "joint_runs:normed"}},
        "itp": {**dense, "method": itp},
        "shrinknets": {**dense, "method": switches},
    }  # fmt: skip


def let_go_late(said):
    """Have a thread of the group let go of a tensor late, as under load, and say so then."""
    tensor = torch.ones(1)

    def late():
        time.sleep(1)
        said("let go")

    weakref.finalize(tensor, late).atexit = False
    time.sleep(0.2 * distributed.get_rank())  # so that here the first process's threads are last
    distributed.all_reduce(tensor, async_op=True)


def run_all(folder: Path):
    """Train every case."""
    for name, entry in recipes().items():
        retrain.train(entry, out=folder / name)


def main(folder):
    """Train every case, one in parts, and one that is refused."""
    run_all(folder)
    for Shrink.stop in (2, 4, -1):
        with suppress(Stopped):
            retrain.train(recipes()["shrinking"], out=folder / "resumed")
    try:
        bad = {**recipes()["batch norm"], "training": {"epochs": 1, "batch_size": 17}}
        retrain.train(bad, out=folder / "bad")
    except ValueError as error:
        if "leaves a last batch of 1, which 2 processes cannot share" not in str(error):
            raise
    else:
        raise SystemExit("a last batch of one sample was shared under batch norm")


if __name__ == "__main__":
    said = []
    with processes(torch.device("cpu")):
        main(Path(sys.argv[1]))
        let_go_late(said.append)
    if said != ["let go"]:
        raise SystemExit("a thread of the group outlived it")
