"""The Python interface: what a run returns, records and gives back."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_case import WIDTHS, network, samples, save_case
from torch import nn

import retrain
from retrain.adapters.files.blocks import Sum
from retrain.adapters.files.load import load_model
from retrain.runs.directory import read_record
from retrain.stream.chain import Chain


def same(first, second):
    state, other = first.state_dict(), second.state_dict()
    return list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in state)


def outputs(model, x):
    with torch.no_grad():
        return model(torch.as_tensor(x))


class Skip(nn.Module):
    """Two layers with a connection around the second: no plain chain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return x + self.second(x)


# --- load gives the run back -------------------------------------------------------------------


def check_loaded(run, loaded):
    assert loaded.layers == run.layers
    assert loaded.bounds == run.bounds
    assert (loaded.bound, loaded.measured) == (run.bound, run.measured)
    assert loaded.certified == run.certified
    assert loaded.directory == run.directory
    assert {key: value for key, value in loaded.record.items() if key != "format"} == json.loads(
        json.dumps(run.record)
    )


def test_load_a_chain(tmp_path):
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(9, 6)), rng.normal(size=(6, 4)))
    chain = Chain(weights, (True, False), ("relu", "linear"))
    run = retrain.net_trim(chain, rng.normal(size=(30, 8)), out=tmp_path / "run")
    loaded = retrain.load(tmp_path / "run")
    check_loaded(run, loaded)
    assert (loaded.model.biases, loaded.model.follows) == (chain.biases, chain.follows)
    for index in range(2):
        assert np.array_equal(loaded.model.weights[index], run.model.weights[index])
        assert np.array_equal(chain.weights[index], weights[index])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("file", ["net.safetensors", "net.pth"])
def test_load_a_state_dict(tmp_path, file, activation):
    save_case(tmp_path)
    x, y = samples()
    model = load_model(tmp_path / file, activation=activation)
    run = retrain.net_trim(model, (x, y), out=tmp_path / "run")
    loaded = retrain.load(tmp_path / "run")
    check_loaded(run, loaded)
    assert same(loaded.model, run.model)
    assert torch.equal(outputs(loaded.model, x), outputs(run.model, x))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert sorted(saved) == sorted(network().state_dict())


def test_load_a_state_dict_whose_order_only_the_file_tells(tmp_path):
    """Square layers called b, then a: what safetensors writes is sorted, so the run must know."""
    torch.manual_seed(1)
    state = {f"{name}.weight": torch.randn(5, 5) for name in ("b", "a")}
    torch.save(state, tmp_path / "net.pth")
    x = samples(width=5)[0]
    run = retrain.net_trim(load_model(tmp_path / "net.pth"), x, out=tmp_path / "run")
    assert [layer.name for layer in run.layers] == ["b", "a"]
    loaded = retrain.load(tmp_path / "run")
    assert torch.equal(outputs(loaded.model, x), outputs(run.model, x))


def test_names_of_the_file_are_kept_under_a_wrapper_s_prefix(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in network().state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    x = samples()[0]
    run = retrain.net_trim(load_model(tmp_path / "net.safetensors"), x, out=tmp_path / "run")
    assert sorted(load_file(tmp_path / "run" / "model.safetensors")) == sorted(state)
    assert same(retrain.load(tmp_path / "run").model, run.model)


def test_load_a_plain_module(tmp_path):
    x = samples()[0]
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = retrain.net_trim(module, x, out=tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    check_loaded(run, retrain.load(tmp_path / "run"))
    for loaded in (retrain.load(tmp_path / "run"), retrain.load(tmp_path / "run", network(seed=3))):
        assert torch.equal(outputs(loaded.model, x), outputs(run.model, x))


def test_load_a_network_that_can_be_described(tmp_path):
    """Convolutions, pooling and a residual sum: the run holds their description."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        Sum(body, nn.Identity()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 4),
    )
    x = torch.rand(40, 1, 8, 8).numpy()
    run = retrain.net_trim(module, x, out=tmp_path / "run")
    loaded = retrain.load(tmp_path / "run")
    check_loaded(run, loaded)
    assert type(loaded.model) is nn.Sequential
    given = torch.from_numpy(x)
    assert torch.equal(loaded.model(given), run.model(given))


def test_load_another_module_wants_its_architecture(tmp_path):
    x = samples()[0]
    run = retrain.net_trim(Skip(), x, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"pass the architecture, retrain\.load\(DIR, model\)"):
        retrain.load(tmp_path / "run")
    fresh = Skip()
    loaded = retrain.load(tmp_path / "run", fresh)
    check_loaded(run, loaded)
    assert torch.equal(outputs(loaded.model, x), outputs(run.model, x))
    with pytest.raises(ValueError, match=r"does not fit|has shape|no tensor|lacks"):
        retrain.load(tmp_path / "run", network())


def test_load_refuses_what_is_not_finished_or_damaged(tmp_path):
    x = samples()[0]
    retrain.net_trim(network(), x, out=tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    for change in (
        {"state": "running"},
        {"model": None},
        {"model": {}},
        {"model": {"kind": "module"}},
        {"layers": [{}]},
        {"layers": 3},
        {"bounds": {"calibration": {}}},
        {"bounds": []},
    ):
        file.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=r"repeat its command|layer report"):
            retrain.load(tmp_path / "run")
    file.write_text(json.dumps(record))
    model = tmp_path / "run" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        retrain.load(tmp_path / "run")
    model.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        retrain.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds no run\.json"):
        retrain.load(tmp_path / "nowhere")


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_certified_as_saved(tmp_path, dtype):
    """The certificate of a half type is of the rounded weights: it holds on what the file has."""
    x = samples()[0]
    given = network().to(dtype)
    options = {"violation_tolerance": 0.05, "tolerance": 0.05, "scheme": "parallel"}
    run = retrain.net_trim(given, x, out=tmp_path / "run", layers="0", **options)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert same(retrain.load(tmp_path / "run").model, run.model)
    report = run.layers[0]
    wide = x.astype(np.float64)
    old, new = (
        np.maximum(wide @ weight.double().numpy().T + bias.double().numpy(), 0)
        for weight, bias in (
            (given[0].weight.detach(), given[0].bias.detach()),
            (saved["0.weight"], saved["0.bias"]),
        )
    )
    assert np.linalg.norm(new - old) == pytest.approx(report.error, rel=1e-4)
    assert int((saved["0.weight"] == 0).sum()) == report.zeros
    if report.certified:
        assert report.error <= report.details.epsilon * 1.05
    again = retrain.net_trim(given, x, out=tmp_path / "run", layers="0", **options)
    assert again.layers == run.layers


# --- fine-tuning -------------------------------------------------------------------------------


def test_fine_tuning_trains_and_keeps_zeros_exactly_zero(tmp_path):
    x, y = samples()
    plain = retrain.net_trim(network(), (x, y), out=tmp_path / "plain")
    tuned = retrain.net_trim(
        network(), (x, y), out=tmp_path / "tuned", fine_tune=3, evaluate=samples(seed=1)
    )
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned")
    )
    for name in ("0.weight", "2.weight", "4.weight"):
        zero = before[name] == 0
        assert zero.any()
        assert not after[name][zero].any()
        assert not torch.equal(before[name], after[name])
    assert plain.record["accuracy"]["calibration"].keys() == {"before", "after"}
    for accuracy in tuned.record["accuracy"].values():
        assert accuracy.keys() == {"before", "after", "fine_tuned"}
    bytes_before = (tmp_path / "tuned" / "model.safetensors").read_bytes()
    retrain.net_trim(
        network(), (x, y), out=tmp_path / "tuned", fine_tune=3, evaluate=samples(seed=1)
    )
    assert (tmp_path / "tuned" / "model.safetensors").read_bytes() == bytes_before


def test_fine_tuning_takes_other_types_of_samples_and_labels():
    x, y = samples()
    for inputs, labels in ((x.astype(np.float64), y.astype(np.uint8)), (x, y.astype(np.int32))):
        run = retrain.net_trim(network(), (inputs, labels), fine_tune=1)
        assert run.record["accuracy"]["calibration"]["fine_tuned"] is not None


def test_the_seed_orders_the_samples_of_fine_tuning():
    x, y = samples()
    models = [
        retrain.net_trim(network(), (x, y), fine_tune=2, seed=seed).model for seed in (0, 0, 1)
    ]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_the_model_can_be_trained_on_where_the_given_one_could():
    given = network()
    given[0].weight.requires_grad_(False)
    run = retrain.net_trim(given, samples()[0])
    flags = {name: tensor.requires_grad for name, tensor in run.model.named_parameters()}
    assert flags == {name: tensor.requires_grad for name, tensor in given.named_parameters()}
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="fine_tune: no parameter"):
        retrain.net_trim(frozen, samples(), fine_tune=1)


def test_a_chain_cannot_be_fine_tuned_and_says_so_at_once(tmp_path):
    chain = Chain((np.eye(4),), (False,), ("linear",))
    with pytest.raises(ValueError, match="fine_tune: trains torch modules"):
        retrain.net_trim(chain, (np.eye(4), np.arange(4)), fine_tune=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- arguments ---------------------------------------------------------------------------------


def test_options_by_name():
    with pytest.raises(ValueError, match="epsilom: no such option of Net-Trim; there are scheme"):
        retrain.net_trim(network(), samples()[0], epsilom=3)
    run = retrain.net_trim(network(), samples()[0], epsilon=2.0)
    assert run.record["options"]["relative_epsilon"] is None
    assert run.layers[0].details.epsilon == 2.0
    with pytest.raises(ValueError, match="exactly one of the two"):
        retrain.net_trim(network(), samples()[0], epsilon=2.0, relative_epsilon=0.1)


def test_what_is_no_model_or_device():
    with pytest.raises(ValueError, match=r"got list, want a torch module or a retrain\.Chain"):
        retrain.net_trim([1, 2], samples()[0])
    chain = Chain((np.eye(4),), (False,), ("linear",))
    with pytest.raises(ValueError, match="device: a chain of arrays"):
        retrain.net_trim(chain, np.eye(4), device="cuda")
    with pytest.raises(ValueError, match="device: cannot compute on 'abacus'"):
        retrain.net_trim(network(), samples()[0], device="abacus")


def test_patterns():
    def names(**chosen):
        return [layer.name for layer in retrain.net_trim(network(), samples()[0], **chosen).layers]

    assert names(layers="0,4") == ["0", "4"]
    assert names(layers=["[24]"]) == ["2", "4"]
    assert names(skip="2") == ["0", "4"]
    assert names(layers="*", skip=["0", "2"]) == ["4"]


def test_progress_is_told_for_every_layer_resumed_ones_too(tmp_path):
    for _ in range(2):
        seen: list[tuple[str, int]] = []

        def note(report, total, seen=seen):
            seen.append((report.name, total))

        retrain.net_trim(network(), samples()[0], out=tmp_path, on_layer=note)
        assert seen == [("0", 3), ("2", 3), ("4", 3)]


# --- run.json ----------------------------------------------------------------------------------


def test_the_record_holds_all_that_a_report_needs(tmp_path):
    save_case(tmp_path)
    x, y = samples()
    run = retrain.net_trim(
        load_model(tmp_path / "net.pth"),
        (x, y),
        evaluate=samples(seed=1),
        out=tmp_path / "run",
        layers="0,4",
        seed=5,
    )
    text = (tmp_path / "run" / "run.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # no NaN, no infinity
    assert record == read_record(tmp_path / "run")
    assert record["format"] == 1
    assert record["state"] == "finished"
    assert record["method"] == "net-trim"
    assert record["model"]["path"].endswith("net.pth")
    assert "64" not in record["model"]["note"]
    assert "16-12-8-6" in record["model"]["note"]
    assert record["data"]["samples"] == record["held_out"]["samples"] == 60
    assert record["fine_tune"] == 0
    assert record["seconds"] > 0

    versions = record["identity"]["versions"]
    assert {"python", "retrain", "numpy", "torch"} <= set(versions)
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
    assert record["identity"]["options"] == record["options"]
    assert record["identity"]["layers"] == ["0", "4"]
    assert len(record["identity"]["network and data"]) == 64
    assert record["options"]["seed"] == 5
    assert record["options"]["threads"] >= 1
    assert record["options"]["penalty"]["name"] == "l1"

    saved = load_file(tmp_path / "run" / "model.safetensors")
    given = network().state_dict()
    assert [layer["name"] for layer in record["layers"]] == ["0", "4"]
    for layer in record["layers"]:
        weight = saved[f"{layer['name']}.weight"]
        assert layer["kind"] == "linear"
        assert layer["shape"] == list(weight.T.shape)
        assert layer["weights"] == weight.numel()
        assert layer["zeros"] == int((weight == 0).sum())
        assert layer["sparsity"] == layer["zeros"] / layer["weights"]
        assert layer["zeros_before"] == 0
        assert layer["rows"] == layer["total_rows"] == 60
        assert layer["status"] == "solved"
        assert layer["certified"] is True
        assert layer["dense_units"] == 0
        assert layer["seconds"] > 0
        details = layer["details"]
        assert layer["error"] <= details["epsilon"] * (1 + details["violation_tolerance"])
        assert layer["relative_error"] == pytest.approx(layer["error"] / details["target_norm"])
        for name in ("objective", "dual_bound", "gap", "ball_violation", "ceiling_violation"):
            assert math.isfinite(details[name])
        assert details["gap"] <= details["tolerance"]
        assert details["solver"] == "newton"
        assert details["solver_because"].startswith("auto: ")
        assert details["iterations"] >= 1
    assert [layer["follows"] for layer in record["layers"]] == ["relu", "linear"]
    assert record["left"] == [{"name": "2", "kind": "linear", "reason": "not selected"}]

    totals = record["totals"]
    assert totals["weights"] == sum(layer["weights"] for layer in record["layers"])
    assert totals["zeros"] == sum(layer["zeros"] for layer in record["layers"])
    assert totals["sparsity"] == totals["zeros"] / totals["weights"]
    assert totals["certified"] is True

    for name, (inputs, labels) in (
        ("calibration", (x, y)),
        ("held_out", samples(seed=1)),
    ):
        old, new = (outputs(model, inputs) for model in (network(), run.model))
        accuracy = record["accuracy"][name]
        assert accuracy["before"] == float((old.argmax(1).numpy() == labels).mean())
        assert accuracy["after"] == float((new.argmax(1).numpy() == labels).mean())
        bound = record["bounds"][name]
        assert bound["rows"] == 60
        assert bound["measured"] == pytest.approx(float((new - old).norm()), rel=1e-4)
        assert bound["best"] >= bound["measured"]
        assert bound["ratio"] == bound["best"] / bound["measured"]
    assert torch.equal(saved["2.weight"], given["2.weight"])


# --- imports -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules",
    [
        "stream.chain, stream.stream, stream.layer_report, methods.net_trim.method, bounds.outputs",
        "runs.directory, runs.drive, runs.outcome, runs.stages, runs.epsilon_search",
        "files, data.sources",
        "api.net_trim, api.lobs, api.load",
    ],
)
def test_the_core_imports_no_torch(modules):
    names = ", ".join(f"retrain.{name.strip()}" for name in modules.split(","))
    code = f"import sys, {names}\nprint('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


def test_a_chain_is_retrained_without_torch():
    code = (
        "import sys, numpy as np, retrain\n"
        "chain = retrain.Chain((np.eye(4),), (False,), ('linear',))\n"
        "retrain.net_trim(chain, np.random.default_rng(0).normal(size=(9, 4)))\n"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


assert WIDTHS == (16, 12, 8, 6)  # what the notes and patterns above were written for


def test_a_tolerance_may_be_a_pair():
    model, data = network(), samples(60)[0]
    pair = retrain.net_trim(model, data, tolerance=(0.05, 0.01))
    apart = retrain.net_trim(model, data, tolerance=0.05, violation_tolerance=0.01)
    assert pair.record["options"] == apart.record["options"]
    assert pair.record["options"]["tolerance"] == 0.05
    assert pair.record["options"]["violation_tolerance"] == 0.01
    for wrong in ((0.1,), (0.1, 0.1, 0.1), ("a", 0.1), "0.1", None, (0.1, -1.0)):
        with pytest.raises(ValueError, match=r"tolerance: .*want"):
            retrain.net_trim(model, data, tolerance=wrong)
    with pytest.raises(ValueError, match=r"tolerance: want .* without violation_tolerance"):
        retrain.net_trim(model, data, tolerance=(0.1, 0.1), violation_tolerance=0.1)
