"""What reading a deep network costs: a whole one-shot run in forward passes, by depth.

``python -m bench cost`` prunes an encoder of blocks (384 wide, 64 sequences of 128 tokens) by
one-shot L-OBS and prints, beside one forward pass: the capture, the nodes run for reading and
measuring, the Hessians and row errors, the solves. What is neither Hessians nor solver is the price
of reading.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import retrain
from retrain.adapters.network.stream import TorchStream


class Block(nn.Module):
    """A block of BERT's kind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        n, s, width = x.shape
        q, k, v = (
            part(x).view(n, s, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = self.first(x + self.out(mixed.transpose(1, 2).reshape(n, s, width)))
        return self.second(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids, blocks, one vector for each position."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(Block(width, 6) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Clock:
    """Seconds spent in functions, those within others counted once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inside: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                total = time.perf_counter() - started
                own = total - self._inside.pop()
                self.spent[name] = self.spent.get(name, 0.0) + own
                if self._inside:
                    self._inside[-1] += total

        return call


def measure(blocks: int, width: int, sequences: int, length: int) -> dict[str, float]:
    """Time one forward pass, and a whole run by its parts."""
    torch.manual_seed(0)
    model = Encoder(blocks, width).eval()
    ids = np.random.default_rng(0).integers(0, 1000, (sequences, length))
    with torch.no_grad():
        model(torch.tensor(ids))
        started = time.perf_counter()
        model(torch.tensor(ids))
        one = time.perf_counter() - started
    clock = Clock()
    places = {
        "Hessians": "retrain.methods.lobs.moments.add_rows",
        "row errors": "retrain.methods.lobs.outcome.row_errors",
        "solver": "retrain.methods.lobs.method.solve_layer",
        "summaries": "retrain.methods.lobs.problem._sensitivities",
        "capture": "retrain.adapters.network.stream.capture",
        "nodes": "retrain.adapters.network.frontier.Frontier.evaluate",
    }
    with contextlib.ExitStack() as stack:
        for name, place in places.items():
            owner_name, _, attribute = place.rpartition(".")
            try:
                owner: Any = importlib.import_module(owner_name)
            except ModuleNotFoundError:
                module, _, kind = owner_name.rpartition(".")
                owner = getattr(importlib.import_module(module), kind)
            function = clock.timed(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))
        started = time.perf_counter()
        run = retrain.lobs(model, ids, sparsity=0.5, method="one-shot")
        total = time.perf_counter() - started
    assert run.certified and len(run.layers) == 6 * blocks
    return {"pass": one, "total": total, **clock.spent}


def sweep(blocks: int, width: int, sequences: int, length: int) -> float:
    """Forward passes that reading every layer's rows once takes, after the capture."""
    torch.manual_seed(0)
    model = Encoder(blocks, width).eval()
    ids = np.random.default_rng(0).integers(0, 1000, (sequences, length))
    stream = TorchStream(model, ids)
    started = time.perf_counter()
    for spec in stream.layers:
        if spec.reason is None:
            for batch in stream.batches(spec.name):
                assert len(batch.inputs)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        started = time.perf_counter()
        model(torch.tensor(ids))
        return seconds / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench cost", description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args(arguments)
    size = (options.width, options.sequences, options.length)
    for blocks in options.blocks:
        found = measure(blocks, *size)
        one = found["pass"]
        own = sum(found.get(k, 0.0) for k in ("Hessians", "row errors", "solver", "summaries"))
        parts = ", ".join(
            f"{name} {seconds / one:.2f}"
            for name, seconds in found.items()
            if name not in ("pass", "total")
        )
        print(
            f"{blocks:3} blocks: one pass {one:.2f} s; the run {found['total'] / one:.2f} passes, "
            f"{(found['total'] - own) / one:.2f} without Hessians, errors, solver ({parts}); "
            f"reading all rows {sweep(blocks, *size):.2f} passes",
            flush=True,
        )
    return 0
