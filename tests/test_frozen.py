"""Results, problems and specifications do not change once they are made."""

import dataclasses
import importlib
import pkgutil

import pytest

import retrain
import solvers

WORKING = {
    "solvers.admm.bfloat16",
    "solvers.newton.block",
    "solvers.newton.layer",
    "solvers.newton.unit",
    "solvers.newton.work",
    "retrain.trainers",
}
"""Rooms with dataclasses that hold a computation's state, which moves on."""


def dataclasses_of(package):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for entry in vars(module).values():
            own = isinstance(entry, type) and entry.__module__ == found.name
            if own and dataclasses.is_dataclass(entry):
                yield entry


@pytest.mark.parametrize("package", [solvers, retrain], ids=["solvers", "retrain"])
def test_what_is_handed_out_is_frozen(package):
    found = [
        entry
        for entry in dataclasses_of(package)
        if not any(entry.__module__.startswith(room) for room in WORKING)
    ]
    assert len(found) > 10
    for entry in found:
        assert entry.__dataclass_params__.frozen, f"{entry.__module__}.{entry.__name__}"
