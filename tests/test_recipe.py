"""Recipes: what is read, what is filled in, and what every mistake is told."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from retrain.trainers.recipes import recipe as recipes
from retrain.trainers.recipes.options import check_arguments, make_options
from retrain.trainers.recipes.recipe import built_in, parse_recipe, read_recipe

TABLES = {
    "data": {"train": "digits"},
    "model": {"architecture": "dense", "widths": [64, 8, 10]},
    "training": {"epochs": 2},
    "optimizer": {"name": "adam", "lr": 0.01},
}
TOML = """
title = "digits"
[data]
train = "digits"
[model]
architecture = "dense"
widths = [64, 8, 10]
[training]
epochs = 2
[optimizer]
name = "adam"
lr = 0.01
"""


def with_(table, **entries):
    new = {name: dict(value) for name, value in TABLES.items()}
    new.setdefault(table, {}).update(entries)
    for key in [key for key, value in entries.items() if value is None]:
        del new[table][key]
    return new


def without(table):
    return {name: value for name, value in TABLES.items() if name != table}


def test_a_recipe_with_its_defaults():
    recipe = parse_recipe(TABLES)
    assert (recipe.training.batch_size, recipe.training.precision) == (64, "float32")
    assert (recipe.method.name, recipe.schedule, recipe.title) == ("plain", None, "")
    assert recipe.identity()["training"]["seed"] == 0
    assert recipe.identity() == parse_recipe(with_("training", seed=0, batch_size=64)).identity()
    assert recipe.identity() != parse_recipe(with_("training", seed=1)).identity()


MISTAKES = [
    (without("data"), r"the table \[data\] is missing"),
    (without("optimizer"), r"the table \[optimizer\] is missing"),
    ({**TABLES, "modell": {}}, r"the file has no option 'modell'; did you mean model\?"),
    ({**TABLES, "training": 3}, r"got 3, want a table \[training\]"),
    ({**TABLES, "title": 3}, r"title: got 3, want text"),
    (with_("data", limit=0), r"\[data\] limit: got 0, want a whole number >= 1"),
    (with_("data", trian="x"), r"\[data\] has no option 'trian'; did you mean train\?"),
    (with_("data", augment="rotate"), r"\[data\] augment: got 'rotate', want 'flip-crop'"),
    (with_("training", epochs=None), r"\[training\] lacks epochs"),
    (with_("training", epochs="2"), r"\[training\] epochs: got '2', want a whole number"),
    (with_("training", epochs=True), r"\[training\] epochs: got True, want a whole number"),
    (with_("training", epochs=-1), r"\[training\] epochs: got -1, want a whole number >= 0"),
    (
        with_("training", batch_size=0),
        r"recipe: \[training\] batch_size: got 0, want a whole number >= 1",
    ),
    (
        with_("training", precision="half"),
        r"recipe: \[training\] precision: got 'half', want 'float32' or 'bfloat16'",
    ),
    (with_("training", precision="float16"), r"float16 is for CUDA"),
    (
        with_("training", loss="mae"),
        r"recipe: \[training\] loss: got 'mae', want 'cross-entropy' or 'mse'",
    ),
    (
        with_("model", architecture="densse"),
        r"\[model\] architecture: got .densse., want one of dense",
    ),
    (with_("model", factory="a:b"), r"\[model\] wants either architecture or factory"),
    (with_("model", architecture=None), r"\[model\] wants either architecture or factory"),
    (with_("model", depth=3), r"\[model\] has no option 'depth'; there are widths"),
    (with_("model", widths=None), r"\[model\] lacks widths"),
    (
        {**TABLES, "model": {"factory": "nowhere"}},
        r"recipe: \[model\] factory: got 'nowhere', want package\.module:factory",
    ),
    ({**TABLES, "model": {"factory": "no_such_module:f"}}, r"no_such_module"),
    (
        with_("optimizer", name="adamm"),
        r"recipe: \[optimizer\] name: got 'adamm', want one of sgd",
    ),
    (
        with_("optimizer", name=None),
        r"recipe: \[optimizer\] name: got None, want one of sgd",
    ),
    (
        with_("schedule", name="cosinus"),
        r"recipe: \[schedule\] name: got 'cosinus', want one of cosine",
    ),
    (
        with_("method", name="gate"),
        r"recipe: \[method\] name: got 'gate', want one of plain",
    ),
    (with_("method", name="plain", x=1), r"\[method\] has no option 'x'; there are no options"),
]


@pytest.mark.parametrize(("tables", "message"), MISTAKES)
def test_a_mistake_is_named(tables, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_recipe(tables)
    assert str(caught.value).startswith("recipe: ")


def test_a_file_is_read_and_its_mistakes_name_it(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TOML)
    assert read_recipe(path).title == "digits"
    assert read_recipe(path, {"training.epochs": 5}).training.epochs == 5
    path.write_text(TOML.replace("epochs = 2", "epoch = 2"))
    with pytest.raises(ValueError, match=r"^recipe r.toml: \[training\] has no option 'epoch'"):
        read_recipe(path)
    path.write_text("[data")
    with pytest.raises(ValueError, match=r"r.toml is not a TOML file"):
        read_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"r.toml is not a TOML file"):
        read_recipe(path)
    with pytest.raises(FileNotFoundError, match=r"no file 'absent'; built in are: "):
        read_recipe("absent")


def test_a_base_is_replaced_entry_by_entry_but_a_choice_as_a_whole(tmp_path):
    (tmp_path / "base.toml").write_text(TOML)
    path = tmp_path / "r.toml"
    path.write_text('base = "base.toml"\n[training]\nseed = 3\n[optimizer]\nname = "sgd"\nlr = 1.0')
    recipe = read_recipe(path)
    assert (recipe.training.epochs, recipe.training.seed, recipe.title) == (2, 3, "digits")
    assert (recipe.optimizer.name, recipe.optimizer.options) == ("sgd", {"lr": 1.0})
    assert "base" not in recipe.tables
    path.write_text('base = "r.toml"')
    with pytest.raises(
        ValueError, match=r"recipe r\.toml: base: got 'r\.toml', want the name of a recipe"
    ):
        read_recipe(path)


def test_changes():
    recipe = parse_recipe(with_("training", seed=3))
    assert recipe.changed({"training.seed": None, "method.name": "plain"}).training.seed == 0
    assert recipe.training.seed == 3
    for name in ("epochs", "traning.epochs", "training."):
        with pytest.raises(ValueError, match=rf"'{name}': want TABLE.KEY, a table of data"):
            recipe.changed({name: 1})


def test_a_factory_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_factory.py").write_text("def build(width, *, depth=2):\n    return width")
    monkeypatch.chdir(tmp_path)
    made = parse_recipe({**TABLES, "model": {"factory": "own_factory:build", "width": 5}})
    assert made.architecture()(**made.model.options) == 5
    with pytest.raises(ValueError, match=r"\[model\] lacks width"):
        parse_recipe({**TABLES, "model": {"factory": "own_factory:build"}})


def test_every_built_in_recipe_is_read_and_has_a_title():
    assert built_in()
    for name, title in built_in().items():
        assert title, name
        assert read_recipe(name).title == title


def test_listing_does_not_import_torch():
    code = "import sys; from retrain.trainers.recipes.recipe import built_in; built_in(); "
    code += "assert not {'torch', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("registry", ["OPTIMIZERS", "SCHEDULES", "LOSSES"])
def test_what_a_registry_names_is_there(registry):
    for home in getattr(recipes, registry).values():
        assert callable(recipes.imported(home))


@dataclass(frozen=True)
class Options:
    rate: float
    layers: tuple[str, ...] = ()
    range: tuple[int, float] | None = None
    mode: Literal["a", "b"] | None = None
    more: dict[str, float] | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate: got {self.rate}, want a number >= 0")


def test_options_take_their_types():
    made = make_options(Options, {"rate": 1, "layers": ["x"], "range": [1, 2]}, "[t]")
    assert made == Options(1.0, ("x",), (1, 2.0))
    assert isinstance(made.rate, float)
    assert make_options(Options, {"rate": 0.0, "mode": "b", "more": {"x": 1.0}}, "[t]").mode == "b"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"recipe: \[t\] lacks rate"),
        ({"rate": -1}, r"recipe: \[t\] rate: got -1.0, want a number >= 0"),
        ({"rate": float("nan")}, r"\[t\] rate: got nan, want a number"),
        ({"rate": 1, "layers": [1]}, r"layers: got \[1\], want a list, each entry text"),
        ({"rate": 1, "layers": "x"}, r"layers: got 'x', want a list, each entry text"),
        (
            {"rate": 1, "range": [1]},
            r"recipe: \[t\] range: got \[1\], want a list of 2: a whole number, a number",
        ),
        ({"rate": 1, "mode": "c"}, r"mode: got 'c', want 'a' or 'b'"),
        ({"rate": 1, "more": 3}, r"more: got 3, want a table"),
        ({"rate": 1, "rtae": 3}, r"no option 'rtae'; did you mean rate\?"),
    ],
)
def test_options_refuse(table, message):
    with pytest.raises(ValueError, match=message):
        make_options(Options, table, "[t]")


def test_arguments_of_a_function_with_any_names():
    check_arguments(lambda first, **rest: None, {"anything": 1}, "[t]", given=1)
