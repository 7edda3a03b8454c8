"""Run by torchrun in test_distributed: a training that fails while a thread of the group lags."""

import sys
from pathlib import Path

from joint_runs import let_go_late, recipes
from torch import nn

import retrain

RECIPE = {**recipes()["plain"], "model": {"factory": "ends_badly:network"}}


class Failing(nn.Linear):
    """A layer that fails in the second epoch."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 10:
            let_go_late(sys.stdout.write)
            raise FloatingPointError("no number came out")
        return super().forward(x)


def network():
    return Failing(12, 4)


if __name__ == "__main__":
    retrain.train(RECIPE, out=Path(sys.argv[1]))
