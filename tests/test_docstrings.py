"""Public functions and methods name every parameter and result; examples in docstrings run."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import warnings
from pathlib import Path

import pytest
from numpydoc.docscrape import FunctionDoc

import solvers

ROOMS = (
    "solvers",
    "retrain.api",
    "retrain.methods",
    "retrain.bounds",
    "retrain.stream",
    "retrain.adapters",
    "retrain.data",
    "retrain.runs",
    "retrain.compact",
)
FRONT = (
    "retrain.api.net_trim.net_trim",
    "retrain.api.lobs.lobs",
    "retrain.api.load.load",
    "retrain.runs.training.train",
    "retrain.data.sources.load_data",
    "solvers.program.trim_program",
    "solvers.admm.solve.solve_admm",
    "solvers.newton.layer.solve_newton",
    "solvers.path.path.solve_path",
    "solvers.path.count.solve_count",
    "solvers.qp.solve_osqp",
    "solvers.reference.solve_cvxpy",
    "solvers.admm.splitting.prepare",
)
"""The functions that people call first: with notes on what they cost, and an example."""


def modules(room):
    package = importlib.import_module(room)
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{room}."):
        yield importlib.import_module(found.name)


def functions(room):
    """Public functions, and public methods of public classes, with where they stand."""
    for module in modules(room):
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            elif inspect.isclass(thing):
                for inner, method in vars(thing).items():
                    plain = getattr(method, "__func__", method)
                    own = (
                        inspect.isfunction(plain)
                        and plain.__name__ != "<lambda>"
                        and plain.__module__ == module.__name__
                    )
                    if own and not inner.startswith("_"):
                        if stated_by_a_protocol(module, thing, inner):
                            continue
                        yield f"{module.__name__}.{name}.{inner}", plain


def stated_by_a_protocol(module, owner, name):
    """A method of a protocol is described there, once for all that implement it."""
    protocols = [kind for kind in vars(module).values() if getattr(kind, "_is_protocol", False)]
    return any(name in vars(protocol) for protocol in protocols if protocol is not owner)


def gaps(function):
    """What a docstring lacks of what the signature has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        documented = FunctionDoc(inspect.unwrap(function))
    named = {
        part.strip(" *") for entry in documented["Parameters"] for part in entry.name.split(",")
    }
    signature = inspect.signature(function)
    own = [name for name in signature.parameters if name not in ("self", "cls")]
    lacking = [name for name in own if name not in named]
    untyped = [entry.name for entry in documented["Parameters"] if not entry.type]
    result = signature.return_annotation
    if result not in (None, "None", "NoReturn") and not (
        documented["Returns"] or documented["Yields"]
    ):
        lacking.append("Returns")
    if not "".join(documented["Summary"]):
        lacking.append("summary")
    return lacking + [f"type of {name}" for name in untyped]


@pytest.mark.parametrize("room", ROOMS)
def test_every_parameter_and_result_is_described(room):
    found = {name: gaps(function) for name, function in functions(room)}
    assert len(found) >= 4
    assert {name: lacks for name, lacks in found.items() if lacks} == {}


@pytest.mark.parametrize("name", FRONT)
def test_the_front_door_tells_its_cost_and_has_an_example_that_runs(name, tmp_path, monkeypatch):
    module, _, function = name.rpartition(".")
    documented = FunctionDoc(getattr(importlib.import_module(module), function))
    for section in ("Parameters", "Returns", "Notes", "Examples"):
        assert documented[section], section
    monkeypatch.chdir(tmp_path)
    text = "\n".join(documented["Examples"])
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert result.failed == 0


def constants(path):
    """Module-level names in capitals, each with whether a text follows that explains it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [entry.id for target in targets if target for entry in ast.walk(target)
                 if isinstance(entry, ast.Name)]  # fmt: skip
        if names and isinstance(node, ast.Assign | ast.AnnAssign) and names[0].strip("_").isupper():
            told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            yield names[0], told and len(following.value.value) > 40


def test_every_constant_of_the_solvers_is_explained():
    folder = Path(solvers.__file__).parent
    found = {
        f"{path.relative_to(folder)}: {name}": told
        for path in folder.rglob("*.py")
        for name, told in constants(path)
        if len(name.strip("_")) > 1  # not a type variable
    }
    assert len(found) > 90
    assert [name for name, told in found.items() if not told] == []
