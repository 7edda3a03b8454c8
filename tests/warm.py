"""Imported once by the process that commands are forked off: what a first export imports."""

import torch
from torch import nn

from retrain.adapters.network.capture import capture

capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), ((None, torch.ones(2, 2)),))
