"""Recipes: what to train, on what, how, in a TOML file of seven tables at most.

    title = "MNIST, ten dense layers (table 2)"
    base = "mnist-dense-10"             # optional: another recipe, whose entries these replace

    [data]                              # sources as --data of retrain trim, or images:DIR
    train = "mnist:data/mnist"
    test = "mnist-test:data/mnist"
    [model]                             # a name of ARCHITECTURES, or factory = "package.module:f";
    architecture = "dense"              # the other keys are the function's arguments
    widths = [784, 100, 10]
    [training]
    epochs = 60
    [optimizer]                         # a name of OPTIMIZERS and its arguments
    name = "adam"
    [schedule]                          # optional: a name of SCHEDULES and its arguments
    name = "cosine"
    [method]                            # optional: a name of METHODS and its options
    name = "gates"

Built-in recipes are the files in `recipes/`, and go by their names. Listing them imports no torch.
"""

from __future__ import annotations

import codecs
import importlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from retrain.data.factories import import_factory
from retrain.trainers.named import Named
from retrain.trainers.recipes.options import check_arguments, check_names, make_options
from solvers import checks

RECIPES = Path(__file__).parent

# A name, and where what it stands for lives; imported when a recipe asks for it.
ARCHITECTURES: dict[str, str] = {
    "dense": "retrain.trainers.recipes.architectures:dense",
    "lenet-5": "retrain.trainers.itp.architectures:lenet_5",
    "vgg-like": "retrain.trainers.itp.architectures:vgg_like",
    "gated-dense": "retrain.trainers.gates.architectures:dense_network",
    "gated-lenet": "retrain.trainers.gates.architectures:deep_lenet",
    "gated-vgg16": "retrain.trainers.gates.architectures:vgg16",
    "gated-resnet-cifar": "retrain.trainers.gates.architectures:resnet_cifar",
    "gated-resnet50": "retrain.trainers.gates.architectures:resnet50",
}
"""Architectures, ``"module:function"``; the [model] table's other keys are its arguments."""

METHODS: dict[str, str] = {
    "plain": "retrain.trainers.plain:Plain",
    "gates": "retrain.trainers.gates.method:Gates",
    "itp": "retrain.trainers.itp.method:Itp",
    "shrinknets": "retrain.trainers.shrinknets.method:ShrinkNets",
    "group-sparsity": "retrain.trainers.shrinknets.method:GroupSparsity",
}
"""Methods, ``"module:Class"``; the [method] table's other keys are its fields."""

OPTIMIZERS: dict[str, str] = {
    "sgd": "torch.optim:SGD",
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "rmsprop": "torch.optim:RMSprop",
}
"""Optimisers, called with the parameters and the [optimizer] table's other keys."""

SCHEDULES: dict[str, str] = {
    "cosine": "retrain.trainers.recipes.schedules:cosine",
    "step": "retrain.trainers.recipes.schedules:step",
    "multistep": "retrain.trainers.recipes.schedules:multistep",
    "exponential": "retrain.trainers.recipes.schedules:exponential",
    "inverse": "retrain.trainers.recipes.schedules:inverse",
    "drop": "retrain.trainers.itp.schedules:sigmoid_drop",
}
"""Schedules, called with the optimiser, the `Setting` and the [schedule] table's other keys."""

LOSSES: dict[str, str] = {
    "cross-entropy": "torch.nn.functional:cross_entropy",
    "mse": "torch.nn.functional:mse_loss",
}
"""Losses of outputs and targets, means over the samples."""

_MOST_EPOCHS = 10**6  # more would end in no one's lifetime
_TABLES = ("data", "model", "training", "optimizer", "schedule", "method")


@dataclass(frozen=True)
class DataTable:
    """What to train on and test on; `limit` cuts the training data, `test_limit` the test data.

    A source is one of `retrain.data.sources.load_data`, or ``images:DIR``, a folder of images by
    class that are read as they are wanted, `size` pixels each way. `augment`: ``"flip-crop"``
    shifts images by up to 4 pixels and mirrors half of them, anew every epoch.
    """

    train: str | None = None
    test: str | None = None
    normalise: str | None = None
    limit: int | None = None
    test_limit: int | None = None
    size: int = 224
    augment: Literal["flip-crop"] | None = None

    def __post_init__(self) -> None:
        _at_least(1, limit=self.limit, test_limit=self.test_limit, size=self.size)


@dataclass(frozen=True)
class TrainingTable:
    """How long, in what batches, where, in what precision."""

    epochs: int
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"

    def __post_init__(self) -> None:
        _at_least(0, epochs=self.epochs, seed=self.seed)
        if self.epochs > _MOST_EPOCHS:
            raise ValueError(f"epochs: got {self.epochs}, want at most {_MOST_EPOCHS}")
        if self.seed >= 2**63:  # torch takes none beyond
            raise ValueError(f"seed: got {self.seed}, want less than 2^63")
        _at_least(1, batch_size=self.batch_size)
        if self.precision == "float16" and not self.device.startswith("cuda"):
            raise ValueError("precision: float16 is for CUDA; use bfloat16 on a CPU")


@dataclass(frozen=True)
class Recipe:
    """A recipe whose every entry has been looked at.

    Attributes
    ----------
    title : str
        For people.
    data, training
        Their tables.
    model : Named
        The architecture's name, or a factory's ``package.module:factory``.
    optimizer, schedule, method : Named
    tables : dict
        What was read, bases merged: what `run.json` holds.
    """

    title: str
    data: DataTable
    model: Named
    training: TrainingTable
    optimizer: Named
    schedule: Named | None
    method: Named
    tables: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """Return all that could change a weight, defaults included; JSON values."""
        return {
            "model": asdict(self.model),
            "augment": self.data.augment,
            "training": asdict(self.training),
            "optimizer": asdict(self.optimizer),
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "method": {"name": self.method.name, **asdict(self.make_method())},
        }

    def changed(self, entries: Mapping[str, Any]) -> Recipe:
        """Return a recipe with entries replaced, ``{"training.epochs": 3}``; None removes one.

        Raises
        ------
        ValueError
            As `parse_recipe`.
        """
        return parse_recipe(_replaced(self.tables, entries))

    def architecture(self) -> Callable[..., Any]:
        """Return the function that builds the model from ``model.options``."""
        if self.model.name in ARCHITECTURES:
            return imported(ARCHITECTURES[self.model.name])
        return import_factory(self.model.name, "recipe: [model] factory")

    def make_method(self) -> Any:
        """Make the method of its options.

        Raises
        ------
        ValueError
            If an option is unknown, missing or refused.
        """
        kind = imported(METHODS[self.method.name])
        return make_options(kind, self.method.options, "[method]")


def read_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a built-in recipe by name.

    Parameters
    ----------
    source : str or Path
        A ``.toml`` file, or a name that `built_in` lists.
    changes : mapping, optional
        Entries to replace, as `Recipe.changed` takes them.

    Raises
    ------
    FileNotFoundError
        If there is no such file, and no such name.
    ValueError
        If it is not TOML, or `parse_recipe` refuses it; the message names the file.
    """
    path = _find(source)
    try:
        return parse_recipe(_replaced(_tables(path), changes or {}))
    except ValueError as error:
        text = str(error).removeprefix("recipe: ")
        raise ValueError(f"recipe {path.name}: {text}") from error


def parse_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Make a recipe of its tables.

    Raises
    ------
    ValueError
        If a table or a key is missing or unknown, or a value of another type or out of range.
    """
    check_names(tables, ["title", "base", *_TABLES], "the file")
    for name in ("data", "model", "training", "optimizer"):
        if name not in tables:
            raise ValueError(f"recipe: the table [{name}] is missing")
    for name in _TABLES:
        if not isinstance(tables.get(name, {}), Mapping):
            raise ValueError(f"recipe: got {tables[name]!r:.80}, want a table [{name}]")
    title = tables.get("title", "")
    if not isinstance(title, str):
        raise ValueError(f"recipe: title: got {title!r:.80}, want text")
    recipe = Recipe(
        title,
        make_options(DataTable, tables["data"], "[data]"),
        _model(tables["model"]),
        make_options(TrainingTable, tables["training"], "[training]"),
        _named(tables["optimizer"], OPTIMIZERS, "[optimizer]"),
        _named(tables["schedule"], SCHEDULES, "[schedule]") if "schedule" in tables else None,
        _named(tables.get("method", {"name": "plain"}), METHODS, "[method]"),
        {key: value for key, value in tables.items() if key != "base"},
    )
    check_arguments(recipe.architecture(), recipe.model.options, "[model]")
    recipe.make_method()
    return recipe


def built_in() -> dict[str, str]:
    """Return the built-in recipes' names and titles."""
    return {path.stem: _tables(path).get("title", "") for path in sorted(RECIPES.glob("*.toml"))}


def imported(home: str) -> Any:
    """Import what ``module:attribute`` of a registry stands for."""
    module, _, attribute = home.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _find(source: str | Path) -> Path:
    named = RECIPES / f"{source}.toml"
    # Only a bare name is looked for among ours: "../x" is not one.
    if Path(source).name == str(source) and named.is_file():
        return named
    path = Path(source)
    if not path.is_file():
        known = ", ".join(sorted(entry.stem for entry in RECIPES.glob("*.toml")))
        raise FileNotFoundError(f"recipe: there is no file {str(source)!r}; built in are: {known}")
    return path


def _tables(path: Path, depth: int = 0) -> dict[str, Any]:
    """Read a file, on top of the recipe that it is based on."""
    tables = _read_toml(path)
    if "base" not in tables:
        return tables
    if not isinstance(tables["base"], str) or depth == 8:
        raise ValueError(f"recipe: base: got {tables['base']!r:.80}, want the name of a recipe")
    beside = path.parent / tables["base"]
    base = _tables(beside if beside.is_file() else _find(tables["base"]), depth + 1)
    for key, value in tables.items():
        merge = isinstance(value, dict) and isinstance(base.get(key), dict)
        # Another choice does not take over the options of the one before.
        other = merge and any(k in value and value[k] != base[key].get(k) for k in _CHOOSING)
        base[key] = {**base[key], **value} if merge and not other else value
    return base


def _read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; editors on Windows put a byte order mark before it."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"recipe: {path.name} is too large for a recipe")
    content = path.read_bytes()
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"recipe: {path.name} is not a TOML file (UTF-16; save it as UTF-8)")
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"))
        repr(tables)  # which fails where messages and records would: nested too deeply
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"recipe: {path.name} is not a TOML file ({what})") from error
    return tables


_LARGEST = 2**20  # bytes of a recipe that a person would write
_CHOOSING = ("name", "architecture", "factory")


def _replaced(tables: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with ``table.key`` entries replaced, or removed where the value is None."""
    new = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()
    }
    for name, value in entries.items():
        table, _, key = name.partition(".")
        if table not in _TABLES or not key:
            raise ValueError(f"recipe: {name!r}: want TABLE.KEY, a table of {', '.join(_TABLES)}")
        entry = new.setdefault(table, {})
        if value is None:
            entry.pop(key, None)
        else:
            entry[key] = value
    return new


def _model(table: Mapping[str, Any]) -> Named:
    options = {k: v for k, v in table.items() if k not in ("architecture", "factory")}
    if ("architecture" in table) == ("factory" in table):
        raise ValueError("recipe: [model] wants either architecture or factory")
    if "architecture" in table:
        named = _named({**options, "name": table["architecture"]}, ARCHITECTURES, "[model]")
        return replace(named, options=options)
    factory = table["factory"]
    if not isinstance(factory, str) or ":" not in factory:
        raise ValueError(
            f"recipe: [model] factory: got {factory!r:.80}, want package.module:factory"
        )
    return Named(factory, options)


def _named(table: Mapping[str, Any], known: Mapping[str, str], where: str) -> Named:
    name = table.get("name")
    if not isinstance(name, str) or name not in known:
        what = "architecture" if where == "[model]" else "name"
        raise ValueError(
            f"recipe: {where} {what}: got {name!r:.80}, want one of {', '.join(known)}"
        )
    return Named(name, {key: value for key, value in table.items() if key != "name"})


def _at_least(least: int, **values: int | None) -> None:
    checks.count(least, **{name: value for name, value in values.items() if value is not None})
