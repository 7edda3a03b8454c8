"""Verbs compute apart from the caller's modes in torch, and leave them as they were."""

import copy
import os
import random
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from small_case import network, samples
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from training_cases import samples as training_samples
from training_cases import tables

import retrain
from retrain.adapters.files.load import load_model
from retrain.adapters.files.save import save_model
from retrain.adapters.network.modes import apart


class Doubles(TorchFunctionMode):
    """A mode that spoils whatever it sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func in (torch.nn.functional.linear, torch.relu) else out


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError("an operation under the caller's mode")


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": default_dtype,
    "default device": default_device,
    "meta context": lambda: torch.device("meta"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "function mode": Doubles,
    "dispatch mode": Refuses,
    "low precision": low_precision,
    "deterministic": deterministic,
}


def state():
    """What a verb may not change."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "dispatch modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch generator": torch.random.default_generator.get_state().numpy().tobytes(),
        "numpy generator": np.random.get_state()[1].tobytes(),  # noqa: NPY002
        "python generator": random.getstate(),
        "torch threads": torch.get_num_threads(),
        "threads": [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()],
    }


def quiet(enter):
    """The state, read where the caller's own modes do not see the reading."""
    with torch.utils._python_dispatch._disable_current_modes():
        return enter()


NETWORK = network()


@pytest.fixture(scope="module")
def data():
    return samples(120)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("modes")
    save_model(network(), folder / "net.safetensors")
    retrain.net_trim(network(), data, out=folder / "run")
    return folder


def plain_train(folder, data):
    x, y = training_samples(96, 1)
    return retrain.train(tables(training={"epochs": 2}), data=(x, y), test=(x, y))


VERBS = {
    "net_trim": lambda folder, data: retrain.net_trim(
        NETWORK, data, evaluate=data, fine_tune=1, seed=3
    ),
    "net_trim jobs": lambda folder, data: retrain.net_trim(
        NETWORK, data, scheme="parallel", jobs=2
    ),
    "lobs": lambda folder, data: retrain.lobs(NETWORK, data, sparsity=0.5, fine_tune=1),
    "lobs stages": lambda folder, data: retrain.lobs(NETWORK, data, sparsity=0.5, stages=2),
    "max_drop": lambda folder, data: retrain.net_trim(
        NETWORK, data, evaluate=data, max_drop=5, max_trials=2
    ),
    "train": plain_train,
    "load": lambda folder, data: retrain.load(folder / "run"),
    "saved": lambda folder, data: retrain.net_trim(
        load_model(folder / "net.safetensors"), data, fine_tune=1
    ),
}


@pytest.fixture(scope="module")
def expected(saved, data):
    return {name: verb(saved, data).model.state_dict() for name, verb in VERBS.items()}


def assert_trainable(model):
    """Every parameter takes a step outside of any mode."""
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.is_inference()
    x = torch.zeros(4, next(model.parameters()).shape[1])
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_mode_changes_nothing_and_stays(verb, mode, saved, data, expected):
    with MODES[mode]():
        before = quiet(state)
        run = VERBS[verb](saved, data)
        after = quiet(state)
    assert after == before
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[verb][name]), name
        assert tensor.dtype == expected[verb][name].dtype
    assert_trainable(run.model)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_stays_when_a_verb_fails(mode, data):
    def interrupt(report, total):
        raise KeyboardInterrupt

    with MODES[mode]():
        before = quiet(state)
        for verb in (retrain.net_trim, retrain.lobs):
            options = {} if verb is retrain.net_trim else {"sparsity": 0.5}
            with pytest.raises(KeyboardInterrupt):
                verb(NETWORK, data, on_layer=interrupt, **options)
            with pytest.raises(ValueError, match="data"):
                verb(NETWORK, np.zeros((3, 5)), **options)
        with pytest.raises(ValueError, match="recipe"):
            retrain.train({})
        with pytest.raises(ValueError, match=r"run\.json"):
            retrain.load("/nowhere")
        assert quiet(state) == before


@pytest.mark.parametrize("verb", [retrain.net_trim, retrain.lobs])
@pytest.mark.parametrize("failing", [False, True])
def test_threads_are_as_before(verb, failing, data):
    def fail(report, total):
        if failing:
            raise KeyboardInterrupt

    options = {} if verb is retrain.net_trim else {"sparsity": 0.5}
    with threadpool_limits(2):
        before = state()
        kept = None
        try:
            verb(NETWORK, data, on_layer=fail, threads=1, **options)
        except KeyboardInterrupt as error:
            kept = error  # and with it the frames of what was interrupted
        assert state() == before
    assert failing == (kept is not None)


@pytest.mark.parametrize("fine_tune", [0, 1])
def test_a_network_of_inference_tensors(data, fine_tune):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
        model.load_state_dict(
            {name: value.clone() for name, value in model.state_dict().items()}, assign=True
        )
    assert all(parameter.is_inference() for parameter in model.parameters())
    for verb, options in ((retrain.net_trim, {}), (retrain.lobs, {"sparsity": 0.5})):
        run = verb(model, data, fine_tune=fine_tune, **options)
        assert_trainable(run.model)
        assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_a_loader_that_shuffles_leaves_the_generators(data):
    loader = DataLoader(
        TensorDataset(torch.tensor(data[0]), torch.tensor(data[1])), batch_size=16, shuffle=True
    )
    torch.manual_seed(5)
    before = state()
    first = retrain.net_trim(NETWORK, loader)
    assert state() == before
    assert retrain.net_trim(NETWORK, loader).record["identity"] == first.record["identity"]


def test_the_module_given_is_as_it_was(data):
    model = network().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    for verb, options in ((retrain.net_trim, {}), (retrain.lobs, {"sparsity": 0.5})):
        verb(model, data, fine_tune=1, **options)
    assert [module.training for module in model.modules()] == [True, True, False, *[True] * 3]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_chain_of_tensors_is_apart_too():
    rng = np.random.default_rng(0)
    weights = [torch.tensor(rng.normal(size=shape), dtype=torch.float32)
               for shape in ((9, 12), (13, 4))]  # fmt: skip
    chain = retrain.Chain(tuple(weights), (True, True))
    x = rng.normal(size=(60, 8)).astype(np.float32)
    expected = retrain.lobs(chain, x, sparsity=0.5).model
    for mode in MODES.values():
        with mode():
            found = retrain.lobs(chain, x, sparsity=0.5).model
        for one, two in zip(expected.weights, found.weights, strict=True):
            assert torch.equal(one, two)
            assert not two.is_inference()


def test_inside_everything_is_as_in_a_fresh_interpreter():
    fresh = state()
    modes = [torch.inference_mode(), torch.autocast("cpu"), default_dtype(), default_device()]
    with ExitStack() as stack:
        for mode in (*modes, Doubles()):
            stack.enter_context(mode)
        stack.enter_context(apart())
        inside = state()
        made = torch.ones(2)
        assert made.device.type == "cpu"
        assert not made.is_inference()
    assert {name for name in fresh if fresh[name] != inside[name]} <= {"device", "precision"}


def precisions():
    """Both sets of settings; the older ones raise where they disagree."""
    found = []
    for setting in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            found.append(setting())
        except RuntimeError:
            found.append("disagree")
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):
        places = [backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        found += [place.fp32_precision for place in places]
    return found


CHANGES = {
    "none": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "older": "torch.backends.cuda.matmul.allow_tf32 = True",
    "convolutions": "torch.backends.cudnn.allow_tf32 = False",
    "newer": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "all of the newer": "torch.backends.fp32_precision = 'tf32'",
    "products of the CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("name", CHANGES)
def test_precision_is_whole_inside_and_as_it_was_outside(name):
    """In a process of its own: some of these settings cannot be taken back."""
    script = f"""
import torch
from test_modes import precisions
from retrain.adapters.network.modes import apart
{CHANGES[name]}
before = precisions()
with apart():
    inside = precisions()
assert "disagree" not in inside, inside
assert {{"tf32", "bf16", "high", "medium", True}}.isdisjoint(inside), inside
assert precisions() == before, (before, precisions())
"""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
