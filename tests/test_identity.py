"""The identity of a run: it sees what changes a weight, in every process alike, and says it."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_case import network, samples
from torch import nn
from torch.nn import functional

import retrain
from bench.campaigns import identity as campaign
from bench.campaigns.identity_cases import forgotten
from retrain.adapters.network.capture import capture
from retrain.adapters.network.structure import structure, training_structure, weights_hash
from retrain.runs.directory import read_record
from retrain.runs.identity import differences, surroundings, versions
from retrain.stream.chain import Chain, ChainStream

ROOT = Path(__file__).parents[1]


def recorded(module, training=False):
    copied = copy.deepcopy(module).train(training)
    captured = None if training else capture(copied, ((None, torch.ones(4, 8)),))
    return structure(copied, captured, training=training)


# --- the computation ----------------------------------------------------------------------------


class Net(nn.Module):
    """Everything that a state dict does not show."""

    def __init__(self, **changes):
        super().__init__()
        given = {
            "act": nn.ReLU(),
            "pool": nn.MaxPool1d(2),
            "norm": nn.LayerNorm(8),
            "drop": nn.Dropout(0.5),
            "batch": nn.BatchNorm1d(8),
            "skip": 2,
            "shift": torch.zeros(4),
            "mask": torch.ones(8),
            "bend": torch.tanh,
            "axis": 1,
            **changes,
        }
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(4, 4)
        self.register_buffer("mask", given.pop("mask"), persistent=False)
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x):
        h = self.drop(self.batch(self.norm(self.act(self.fc1(x * self.mask)))))
        h = self.pool(h[:, None])[:, 0]
        return functional.softmax(self.bend(self.fc2(h)) + self.skip * h + self.shift, self.axis)


CHANGES = {
    "activation": {"act": nn.Tanh()},
    "slope": {"act": nn.LeakyReLU(0.1)},
    "another slope": {"act": nn.LeakyReLU(0.2)},
    "pool": {"pool": nn.AvgPool1d(2)},
    "stride": {"pool": nn.MaxPool1d(3, 2, 1)},
    "eps": {"norm": nn.LayerNorm(8, eps=1e-3)},
    "skip weight": {"skip": 0},
    "a number's type": {"skip": 2.0},
    "constant tensor": {"shift": torch.ones(4)},
    "buffer": {"mask": torch.full((8,), 0.5)},
    "function": {"bend": torch.sigmoid},
    "lambda": {"bend": lambda x: x * 2},
    "another lambda": {"bend": lambda x: x * 3},
    "axis": {"axis": 0},
}


def powers(power):
    def bend(x):
        return x**power

    return bend


def test_what_a_state_dict_does_not_show_is_in_the_structure():
    seen = {"as it was": recorded(Net())}
    state = {key: value.shape for key, value in Net().state_dict().items()}
    for name, changes in CHANGES.items():
        changed = Net(**changes)
        assert {key: value.shape for key, value in changed.state_dict().items()} == state
        seen[name] = recorded(changed)
    seen["closure"], seen["another closure"] = (recorded(Net(bend=powers(p))) for p in (2, 3))
    texts = {name: json.dumps(value, sort_keys=True) for name, value in seen.items()}
    assert len(set(texts.values())) == len(texts)
    assert texts["as it was"] == json.dumps(recorded(Net()), sort_keys=True)


def test_what_evaluation_ignores_counts_in_training_only():
    dull = Net(drop=nn.Dropout(0.1), batch=nn.BatchNorm1d(8, momentum=0.3))
    assert recorded(dull) == recorded(Net())
    assert recorded(dull, training=True) != recorded(Net(), training=True)


def test_hooks_and_a_forward_of_its_own_are_seen():
    plain, hooked, again, own = (Net() for _ in range(4))
    hooked.fc1.register_forward_hook(lambda module, inputs, output: output * 2)
    again.fc1.register_forward_hook(lambda module, inputs, output: output * 3)
    own.act.forward = torch.tanh
    texts = {json.dumps(recorded(net)) for net in (plain, hooked, again, own)}
    assert len(texts) == 4


def test_a_network_that_cannot_be_captured_is_told_by_its_code():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else self.fc(x) + 1

    class Other(Branch):
        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else self.fc(x) + 2

    Other.__qualname__ = Branch.__qualname__
    first, second = structure(Branch(), None), structure(Other(), None)
    assert first["steps"] == []
    assert first["modules"] == second["modules"]
    assert first["code"] != second["code"]


def test_the_order_in_memory_is_part_of_the_weights():
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    assert weights_hash(second.to(memory_format=torch.channels_last)) != weights_hash(first)


def test_modules_of_many_kinds_are_described():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.LSTM(4, 4, 2), nn.Identity()), nn.TransformerEncoderLayer(8, 2, 8)]
    nets.append(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))
    nets.append(nn.Sequential(nn.Linear(4, 4), torch.fx.symbolic_trace(nn.Sequential(nn.Tanh()))))
    for net in nets:
        assert structure(net, None) == structure(copy.deepcopy(net), None)
        assert training_structure(net) == training_structure(copy.deepcopy(net))
    with warnings.catch_warnings(action="ignore"):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))  # which cannot be copied
    assert training_structure(old)["modules"]


def test_torch_script_is_seen():
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    texts = {json.dumps(recorded(nn.Sequential(torch.jit.script(Scale(f))))) for f in (2.0, 3.0)}
    assert len(texts) == 2


def test_chains_differ_by_what_stands_between_and_by_their_biases():
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(4, 4)), rng.normal(size=(4, 3)))
    x = rng.normal(size=(9, 4))
    streams = [
        ChainStream(Chain(weights), x),
        ChainStream(Chain(weights, follows=("linear", "linear")), x),
        ChainStream(Chain((weights[0], rng.normal(size=(5, 3))), biases=(False, True)), x),
        ChainStream(Chain((np.asfortranarray(weights[0]), weights[1])), x),
        ChainStream(Chain(weights), x, batch_size=5),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert ChainStream(Chain(weights), x).fingerprint == streams[0].fingerprint


# --- the same in every process ------------------------------------------------------------------

IN_A_PROCESS = """
import hashlib, json, sys, torch
sys.path.insert(0, "tests")
import test_identity as t
from retrain.adapters.network.stream import TorchStream
from retrain.runs.identity import run_identity
if len(sys.argv) > 1:
    import sklearn.cluster, cvxpy  # which bring libraries of their own
    torch.ones(300, 300) @ torch.ones(300, 300)
x = t.samples(20, 8)[0]
net = t.Net(shift=torch.zeros(4), extra={"b", "a", "c"}, bend=t.powers(2))
torch.manual_seed(0)
for tensor in net.parameters():
    torch.nn.init.normal_(tensor)
print(json.dumps(run_identity(TorchStream(net, x)), sort_keys=True))
print(json.dumps(t.recorded(net, True), sort_keys=True))
"""


def test_the_same_in_processes_that_differ_in_what_does_not_matter():
    answers = []
    for number, more in enumerate(([], ["imports"])):
        variables = {"PYTHONHASHSEED": str(number), "LC_ALL": "C", "TZ": f"Etc/GMT-{number}"}
        if more:
            variables["OPENBLAS_NUM_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS, *more],
            capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, **variables},
        )  # fmt: skip
        answers.append([json.loads(line) for line in done.stdout.splitlines()])
    assert differences(answers[0][0], answers[1][0]) == ""
    assert answers[0] == answers[1]


# --- versions, kernels, environment -------------------------------------------------------------


def test_every_package_that_computes_has_its_version():
    wanted = {"python", "retrain", "numpy", "scipy", "numba", "llvmlite", "scikit-learn", "torch"}
    assert wanted <= set(versions())
    assert {"joblib", "threadpoolctl", "array-api-compat", "safetensors"} <= set(versions())
    assert not {"rich", "matplotlib", "pytest"} & set(versions())


def test_torch_counts_only_where_it_computes():
    alone = surroundings("cpu", with_torch=False)["kernels"]
    assert "torch" not in alone
    assert set(surroundings("cpu", with_torch=True)["kernels"]) > set(alone)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: torch.set_flush_denormal(True), "last bits"),
        (lambda: torch.set_float32_matmul_precision("high"), "float32 products"),
        (lambda: torch.set_default_dtype(torch.float64), "default type"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic"),
    ],
)
def test_settings_of_torch_are_seen(change, said):
    before = surroundings("cpu", with_torch=True)
    try:
        change()
        now = surroundings("cpu", with_torch=True)
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert said in differences(before, now)
    assert differences(before, surroundings("cpu", with_torch=True)) == ""


def test_variables_are_recorded_where_they_are_set(monkeypatch):
    before = surroundings("cpu", with_torch=False)
    monkeypatch.setenv("MKL_CBWR", "")
    assert surroundings("cpu", with_torch=False) == before
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    said = differences(before, surroundings("cpu", with_torch=False))
    assert said == 'environment.MKL_CBWR was not set, is "COMPATIBLE"'


# --- in words -----------------------------------------------------------------------------------


def test_a_long_value_is_shown_where_it_differs():
    before = {"computation": {"modules": {"conv": f"Conv2d; {'a' * 200}; stride=(1, 1); b=1"}}}
    now = json.loads(json.dumps(before).replace("(1, 1)", "(2, 2)"))
    said = differences(before, now)
    assert "computation.modules.conv was …stride=(1, 1); b=1" in said
    assert "is …stride=(2, 2); b=1" in said
    assert "aaa" not in said


def test_many_differences_are_counted():
    before = dict.fromkeys("abcdefg", 0) | {"network and data": "0" * 64}
    said = differences(before, dict.fromkeys("abcdefg", 1) | {"network and data": "1" * 64})
    assert said.startswith("a was 0, is 1; b was 0, is 1; c was 0, is 1; network and data was")
    assert said.endswith("and 4 more")


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_opens_and_is_not_resumed(tmp_path):
    model, (x, _) = network(), samples()
    run = retrain.net_trim(model, x, out=tmp_path)
    record = read_record(tmp_path)
    kept = ("method", "network and data", "layers", "options", "fine_tune", "device", "cores")
    record["identity"] = {
        **{key: record["identity"][key] for key in kept},
        "versions": {key: versions()[key] for key in ("retrain", "numpy", "scipy", "torch")},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert retrain.load(tmp_path).layers == run.layers
    with pytest.raises(ValueError, match=r"did not record its .*computation.*kernels"):
        retrain.net_trim(model, x, out=tmp_path)


def test_a_chain_of_arrays_depends_on_no_torch(tmp_path):
    chain = Chain((np.eye(4), np.ones((4, 2))))
    record = retrain.net_trim(chain, np.ones((5, 4)) + np.eye(5, 4), out=tmp_path).record
    assert "torch" not in record["identity"]["kernels"]
    assert record["identity"]["tensor names"] is None


def test_stages_and_a_frozen_parameter_resume(tmp_path):
    """What a stage read back begins with is what it would have begun with."""
    model = network()
    model[2].bias.requires_grad_(False)
    data = samples()
    run = retrain.lobs(model, data, sparsity=0.6, stages=2, fine_tune=1, out=tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "layers" / "stage-2")
    again = retrain.lobs(model, data, sparsity=0.6, stages=2, fine_tune=1, out=tmp_path / "a")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


# --- the campaign, in short ---------------------------------------------------------------------


def test_every_option_has_a_row():
    assert forgotten() == []


SHORT = "trim --activation|lobs --pattern|train --epochs|train --export|trim (skip weight|comment)"


def test_the_campaign_in_short(tmp_path):
    outcomes = list(campaign.campaign(tmp_path, f"^({SHORT})$", environment=False))
    assert len(outcomes) == 6
    assert {campaign.line(o) for o in outcomes if o.verdict == "VIOLATED"} == set()
    accepted = [o.row.option for o in outcomes if o.accepted]
    assert accepted == ["--export", "comment"]


def test_the_campaign_sees_a_violation(tmp_path, monkeypatch):
    """Where every identity is the same, another command's run is resumed, and that is told."""
    write = campaign.work

    monkeypatch.setattr(campaign, "work", unaware)
    outcomes = list(campaign.campaign(tmp_path, "^trim --inflation$", environment=False))
    assert campaign.work is not write
    assert [outcome.verdict for outcome in outcomes] == ["VIOLATED"]


def unaware(*arguments):
    """Run commands with identities that are not compared."""
    import retrain.runs.directory
    from bench.campaigns.identity import work

    retrain.runs.directory.differences = lambda before, now: ""
    work(*arguments)
