"""Recipes and comparisons that several tests of training runs share."""

import json
from pathlib import Path

import numpy as np

import retrain

DROP = ("seconds",)


def tables(**changes):
    """Tables of a small recipe with everything that has a state: momentum, dropout, a schedule."""
    recipe = {
        "data": {"train": "train.npz", "test": "test.npz"},
        "model": {"architecture": "dense", "widths": [12, 16, 8, 4], "dropout": 0.25},
        "training": {"epochs": 6, "batch_size": 16, "seed": 5},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "schedule": {"name": "cosine"},
    }
    for table, entries in changes.items():
        recipe[table] = {**recipe.get(table, {}), **entries}
    return recipe


def samples(count, seed, shape=(12,), classes=4):
    """Classes told by a linear map with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, *shape)).astype(np.float32)
    map_ = np.random.default_rng(0).standard_normal((int(np.prod(shape)), classes))
    scores = x.reshape(count, -1) @ map_ + 0.5 * rng.standard_normal((count, classes))
    return x, scores.argmax(1)


def save_data(folder: Path, shape=(12,)):
    """Write train.npz and test.npz."""
    for name, count, seed in (("train", 120, 1), ("test", 60, 2)):
        x, y = samples(count, seed, shape)
        np.savez(folder / f"{name}.npz", x=x, y=y)


def toml(recipe):
    """Write tables as TOML."""
    lines = []
    for name, table in recipe.items():
        lines += [f"[{name}]"] + [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


class Stopped(Exception):
    """Raised in a callback, in the stead of a power cut."""


def stop_after(epochs):
    """Make an on_epoch that ends a training after so many epochs of its own."""

    def stop(line, total):
        if line["epoch"] == epochs:
            raise Stopped

    return stop


def same_runs(one: Path, two: Path):
    """Whether two finished runs are the same, but for the seconds they took."""
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert timeless(retrain.load(one).history) == timeless(retrain.load(two).history)
    records = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert timeless(records[0]) == timeless(records[1])


def timeless(value):
    """Leave seconds out."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key not in DROP}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def assert_resumes(recipe, folder: Path, after=(1, 3), **options):
    """Train at once; and again, stopped after some epochs each time: the same run."""
    whole = retrain.train(recipe, out=folder / "whole", **options)
    for epochs in after:
        try:
            retrain.train(recipe, out=folder / "parts", on_epoch=stop_after(epochs), **options)
        except Stopped:
            continue
        raise AssertionError(f"the training ended before epoch {epochs}")
    retrain.train(recipe, out=folder / "parts", **options)
    same_runs(folder / "whole", folder / "parts")
    return whole
