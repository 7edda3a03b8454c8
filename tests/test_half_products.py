"""Steps with products in bfloat16 against the same steps in float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from instances import of_a_layer

from solvers import prepare
from solvers.admm import bfloat16 as half_products
from solvers.admm.bfloat16 import half_walk
from solvers.admm.splitting import Progress, Splitting, advance, start, step
from solvers.scaling import Scaling


@pytest.fixture
def always(monkeypatch):
    """Small layers too, and any processor: torch multiplies bfloat16 everywhere, if slowly."""
    monkeypatch.setattr(half_products, "LEAST_FLOPS", 0.0)
    monkeypatch.setattr(half_products, "has_products", lambda: True)


def in_float32(seed, form, **options):
    program = of_a_layer(seed, form, dtype=np.float32, **options)
    factor = prepare(program.inputs)
    return factor, Splitting.build(Scaling.of(program, factor.sizes), factor, np.float32)


def states(form, steps, **options):
    """The same iteration in float32 and with products in bfloat16."""
    factor, splitting = in_float32(2, form, **options)
    walks = None, half_walk(splitting)
    assert walks[1] is not None
    return splitting, [
        advance(splitting, Progress(start(splitting, factor, None)), steps, walk).state
        for walk in walks
    ]


@pytest.mark.parametrize("form", ["constrained", "regularised"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_iterates_are_those_of_float32(always, form, bias):
    _, (full, half) = states(form, 149, bias=bias)
    for name in ("u", "z", "w"):
        ours, theirs = getattr(half, name), getattr(full, name)
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - theirs) <= 2e-3 * np.linalg.norm(theirs)


def test_what_rounding_leaves_is_made_good(always):
    """Rounding the iterates themselves would leave 2^-9 of the response for good."""
    factor, splitting = in_float32(3, "regularised")
    walk = half_walk(splitting)
    state = walk(splitting, start(splitting, factor, None), 60)
    response = splitting.inputs @ state.u
    assert np.linalg.norm(state.z - response) <= 2e-3 * np.linalg.norm(response)
    # A full step goes before a walk; from a state at rest nothing changes, and nothing is rounded.
    for _ in range(30):
        state, _ = step(splitting, state)
        state = walk(splitting, state, 20)
    response = splitting.inputs @ state.u
    assert np.linalg.norm(state.z - response) <= 1e-5 * np.linalg.norm(response)


def test_two_walks_give_the_same_bytes(always):
    _, (_, first) = states("regularised", 60)
    _, (_, again) = states("regularised", 60)
    for name in ("u", "z", "p", "q", "w"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()


def test_where_it_is_no_gain_there_is_none(monkeypatch):
    monkeypatch.setattr(half_products, "has_products", lambda: True)
    _, small = in_float32(0, "regularised")
    assert half_walk(small) is None
    monkeypatch.setattr(half_products, "LEAST_FLOPS", 0.0)
    assert half_walk(small) is not None
    _, wide = in_float32(0, "regularised", kind="wide")
    assert half_walk(wide) is None
    assert half_walk(replace(small, inputs=small.inputs.astype(np.float64))) is None
    assert half_walk(replace(small, inputs=torch.asarray(small.inputs))) is None
    monkeypatch.setattr(half_products, "has_products", lambda: False)
    assert half_walk(small) is None


def test_it_asks_torch_for_the_processor(monkeypatch):
    for capabilities, want in (({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert half_products.has_products() is (want and torch.backends.mkldnn.is_available())
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not half_products.has_products()
