"""`retrain.lobs` and `retrain lobs`: runs, stages, resuming, bounds, what a stranger types."""

import json
import math

import numpy as np
import pytest
import torch
from command import command, start
from networks import random_chain
from safetensors.torch import load_file, save_file
from small_case import WIDTHS, network, samples, save_case
from torch import nn

import retrain
from retrain.adapters.files.load import load_model
from retrain.bounds.l_obs import second_order_bounds
from retrain.bounds.outputs import l_obs_bound
from retrain.runs.directory import read_record
from retrain.stream.chain import Chain, ChainStream

NAMES = ("0", "2", "4")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lobs")
    save_case(folder)
    np.savez(folder / "unlabelled.npz", x=samples()[0])
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    save_file(conv.state_dict(), folder / "conv.safetensors")
    (folder / "convnet.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))\n"
    )
    np.savez(folder / "images.npz", x=np.random.default_rng(0).normal(size=(20, 2, 6, 6)))
    return folder


def lobs(case, *arguments, data="data.npz", out="out", model="net.safetensors", **options):
    return command(case, "lobs", model, "--data", data, "--out", out, *arguments, **options)


def zeros(folder, name):
    return int((load_file(folder / "model.safetensors")[f"{name}.weight"] == 0).sum())


def size(name):
    index = NAMES.index(name)
    return WIDTHS[index] * WIDTHS[index + 1]


# --- the command ------------------------------------------------------------------------------


def test_a_run(case):
    answer = lobs(case, "--sparsity", 0.7, "--evaluate", "test.npz", out="plain")
    assert answer.code == 0
    assert answer.err.count("certified") == 3
    for word in ("swaps", "rms error", "kept", "theorem 3.2 on held-out data", "69.79 %"):
        assert word in answer.out
    record = read_record(case / "plain")
    for entry in record["layers"]:
        wanted = math.floor(0.7 * size(entry["name"]) + 0.5)
        assert entry["zeros"] == wanted == zeros(case / "plain", entry["name"])
        assert entry["certified"]
    for name in ("calibration", "held_out"):
        theorem, bound = record["theorems"][name], record["bounds"][name]
        assert theorem["frobenius"] >= theorem["spectral"] >= theorem["measured"] > 0
        assert theorem["measured"] == pytest.approx(bound["measured"])
        # before the activation, the paper's errors can only be larger
        assert theorem["spectral"] >= bound["best"] * (1 - 1e-6)


def test_by_layer_and_json(case):
    answer = lobs(case, "--sparsity", "0=0.5,[4]=0.25", "--json", out="layers")
    record = json.loads(answer.out)
    assert answer.err == ""
    assert {entry["name"]: entry["sparsity"] for entry in record["layers"]} == {"0": 0.5, "4": 0.25}
    assert [entry["name"] for entry in record["left"]] == ["2"]
    before, after = (
        load_file(case / "net.safetensors"),
        load_file(case / "layers/model.safetensors"),
    )
    assert torch.equal(before["2.weight"], after["2.weight"])
    assert list(before) == list(after)


def test_sparsity_zero_gives_the_bytes_back(case):
    answer = lobs(case, "--sparsity", 0, "--quiet", out="zero")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    before, after = load_file(case / "net.safetensors"), load_file(case / "zero/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pattern", "2:4"), ["swaps, 2:4", "50.00 %"]),
        (("--pattern", "inputs", "--sparsity", 0.5), ["inputs, inputs", "50.00 %"]),
        (("--pattern", "unit", "--sparsity", 0.5, "--method", "one-shot"), ["one-shot, unit"]),
        (("--layer-error", 0.3), ["greedy"]),
        (("--sparsity", 0.5, "--calibration", "corrected", "--damping", 1e-3), ["swaps"]),
        (("--sparsity", 0.5, "--keep-bias", "--jobs", 2), ["swaps"]),
    ],
    ids=str,
)
def test_options_reach_the_method(case, arguments, words, tmp_path):
    answer = lobs(case, *arguments, out=tmp_path / "run")
    assert answer.code == 0, answer
    assert all(word in answer.out for word in words)


def test_a_convolution_with_groups(case):
    answer = lobs(
        case,
        "--arch",
        "convnet:make",
        "--sparsity",
        0.5,
        model="conv.safetensors",
        data="images.npz",
        out="conv",
    )
    assert answer.code == 0, answer
    assert "9 x 2 x 2" in answer.out
    weight = load_file(case / "conv/model.safetensors")["0.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2
    theorem = read_record(case / "conv")["theorems"]["calibration"]
    assert theorem["frobenius"] >= theorem["spectral"] >= theorem["measured"] > 0


def test_a_dry_run_writes_nothing(case):
    answer = lobs(
        case,
        "--sparsity",
        "0=0.5",
        "--sparsity",
        "0.9",
        "--dry-run",
        "--method",
        "greedy",
        out="dry",
    )
    assert answer.code == 0
    first, *rest = answer.out.splitlines()
    assert first.startswith("stage 1, 0: 16 x 12, 96 of 192 to go, by greedy on 60 rows")
    assert len(rest) == 3
    assert not (case / "dry").exists()


BAD = {
    "nothing": ((), "sparsity, tolerance: want exactly one of the two"),
    "both": (("--sparsity", 0.5, "--layer-error", 1), "not allowed with argument"),
    "a word": (("--sparsity", "much"), "--sparsity: got 'much', want a number, or NAME=NUMBER"),
    "half a pair": (("--sparsity", "0=0.5,0.3"), "--sparsity: a name is missing"),
    "twice": (("--layer-error", "0=0.5,0=0.3"), "--layer-error: a name is missing or given twice"),
    "too much": (("--sparsity", 1.5), "sparsity: got 1.5, want a number in [0, 1]"),
    "no such layer": (("--sparsity", "fc1=0.5"), "no layer matches 'fc1'; there are 0, 2, 4"),
    "one is missing": (
        ("--sparsity", "0=0.5", "--layers", "0,2"),
        "sparsity: none given for layer '2', only for 0",
    ),
    "method": (
        ("--sparsity", 0.5, "--method", "obs"),
        "method: got 'obs', want one of auto, one-shot",
    ),
    "pattern": (
        ("--sparsity", 0.5, "--pattern", "half"),
        "pattern: got 'half', want layer, unit, inputs",
    ),
    "fixed": (("--sparsity", 0.5, "--pattern", "2:4"), "the pattern 2:4 fixes the sparsity"),
    "method and pattern": (
        ("--sparsity", 0.5, "--pattern", "inputs", "--method", "sweep"),
        "want one of layer, unit, n:m for sweep",
    ),
    "calibration": (("--sparsity", 0.5, "--calibration", "none"), "invalid choice: 'none'"),
    "damping": (("--sparsity", 0.5, "--damping", -1), "damping: got -1.0, want a finite fraction"),
    "stages": (("--sparsity", 0.5, "--stages", 0), "stages: got 0, want a whole number >= 1"),
    "stages and sparsities": (
        ("--sparsity", 0.5, "--sparsity", 0.6, "--stages", 3),
        "stages: 3 wanted, but there are sparsities for 2",
    ),
    "stages of N:M": (("--pattern", "2:4", "--stages", 2), "stages: 2 want a sparsity"),
    "memory": (("--sparsity", 0.5, "--memory", 1e-9), "memory: layer '0' with 16 inputs"),
    "jobs": (
        ("--sparsity", 0.5, "--jobs", 2, "--calibration", "sequential"),
        "jobs: sequential calibration takes layers one by one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_2(case, name):
    arguments, message = BAD[name]
    assert message in lobs(case, *arguments, out="bad").error()
    assert not (case / "bad").exists()


def test_fine_tuning_wants_labels(case):
    answer = lobs(case, "--sparsity", 0.5, "--fine-tune", 1, data="unlabelled.npz", out="bad")
    assert "fine_tune: wants labels" in answer.error()


def test_another_command_does_not_get_the_directory(case):
    assert lobs(case, "--sparsity", 0.5, out="taken").code == 0
    assert "options.sparsity was 0.5, is 0.6" in lobs(case, "--sparsity", 0.6, out="taken").error()


# --- killed and resumed -----------------------------------------------------------------------


def slowly():
    """Halt for good before the second layer."""
    import time

    from retrain.methods.lobs import method

    solve = method.solve_layer

    def halting(task, options):
        if task.spec.name != "0":
            time.sleep(60)
        return solve(task, options)

    method.solve_layer = halting


@pytest.mark.parametrize("calibration", ["dense", "sequential"])
def test_killed_and_resumed_is_the_uninterrupted_run(case, calibration):
    arguments = ["lobs", "net.safetensors", "--data", "data.npz", "--sparsity", 0.7]
    arguments += ["--calibration", calibration]
    whole, cut = f"whole-{calibration}", f"cut-{calibration}"
    assert command(case, *arguments, "--out", whole).code == 0
    running = start(case, *arguments, "--out", cut, prepare=slowly)
    first = case / cut / "layers" / "000.safetensors"
    for _ in range(600):
        if first.exists():
            break
        running.process.join(0.1)
    running.kill()
    assert sorted(p.name for p in (case / cut / "layers").iterdir()) == ["000.safetensors"]
    made = first.stat().st_mtime_ns
    assert command(case, *arguments, "--out", cut).code == 0
    assert first.stat().st_mtime_ns == made
    one, two = (case / name / "model.safetensors" for name in (whole, cut))
    assert one.read_bytes() == two.read_bytes()


# --- retrain.lobs -----------------------------------------------------------------------------


def test_the_python_contract(tmp_path):
    model, (x, y) = network(), samples()
    run = retrain.lobs(model, (x, y), sparsity=0.7, out=tmp_path / "run")
    assert run.certified
    assert [report.zeros for report in run.layers] == [134, 67, 34]
    assert run.bound >= run.measured
    again = retrain.load(tmp_path / "run", model)
    for mine, theirs in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="sparcity: no such option of lobs; there are method"):
        retrain.lobs(model, (x, y), sparcity=0.7)


def test_a_chain_stays_a_chain():
    rng = np.random.default_rng(0)
    chain = Chain((rng.normal(size=(8, 6)), rng.normal(size=(6, 3))))
    x = rng.normal(size=(50, 8))
    run = retrain.lobs(chain, x, sparsity=[0.5, 0.75])
    assert isinstance(run.model, Chain)
    assert [report.zeros for report in run.layers] == [36, 14]
    with pytest.raises(ValueError, match="fine_tune: trains torch modules"):
        retrain.lobs(chain, x, sparsity=0.5, fine_tune=1)


def test_stages(tmp_path):
    model, data = network(), samples()
    seen = []
    out = tmp_path / "run"

    def note(report, total):
        seen.append((report.name, total))

    def prune():
        return retrain.lobs(
            model,
            data,
            sparsity=0.91,
            stages=2,
            fine_tune=2,
            evaluate=samples(seed=1),
            out=out,
            on_layer=note,
        )

    run = prune()
    assert seen == [(name, 6) for name in NAMES] * 2
    first, second = (
        retrain.load(out / "layers" / f"stage-{number}", model).model for number in (1, 2)
    )
    for name in NAMES:
        early, late = (m.get_submodule(name).weight for m in (first, second))
        assert int((early == 0).sum()) == math.floor(0.7 * early.numel() + 0.5)
        assert int((late == 0).sum()) == math.floor(0.91 * late.numel() + 0.5)
        assert torch.all(late[early == 0] == 0)
        assert not torch.equal(early, model.get_submodule(name).weight)
    record = run.record
    assert [report.zeros_before for report in run.layers] == [0, 0, 0]
    assert record["totals"]["zeros_before"] == 0
    assert len(record["stages"]) == 2
    for name in ("calibration", "held_out"):
        stages = [stage["accuracy"][name] for stage in record["stages"]]
        assert record["accuracy"][name]["before"] == stages[0]["before"]
        assert record["accuracy"][name]["fine_tuned"] == stages[1]["fine_tuned"]
        assert stages[1]["before"] == stages[0]["fine_tuned"]
    # once more: read back; and with the last stage gone, that stage alone is done again
    stamp = (out / "layers/stage-1/run.json").stat().st_mtime_ns
    again = prune()
    (out / "layers/stage-2/run.json").unlink()
    (out / "layers/stage-2/model.safetensors").unlink()
    for file in (out / "layers/stage-2/layers").iterdir():
        file.unlink()
    third = prune()
    assert (out / "layers/stage-1/run.json").stat().st_mtime_ns == stamp
    loaded = retrain.load(out, model)
    for other in (again, third, loaded):
        for mine, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="belongs to another run"):
        retrain.lobs(model, data, sparsity=0.9, stages=2, fine_tune=2, out=out)


def test_a_stage_that_fails_leaves_the_others(tmp_path, monkeypatch):
    model, data = network(), samples()
    out = tmp_path / "run"
    from retrain.methods.lobs import method

    lobs = method.lobs

    def failing(stream, options, **rest):
        if options.sparsity == 0.9:
            raise ValueError("failed on purpose")
        return lobs(stream, options, **rest)

    monkeypatch.setattr(method, "lobs", failing)
    with pytest.raises(ValueError, match="on purpose"):
        retrain.lobs(model, data, sparsity=[0.5, 0.9], fine_tune=1, out=out)
    stamp = (out / "layers/stage-1/run.json").stat().st_mtime_ns
    monkeypatch.undo()
    run = retrain.lobs(model, data, sparsity=[0.5, 0.9], fine_tune=1, out=out)
    assert (out / "layers/stage-1/run.json").stat().st_mtime_ns == stamp
    assert [report.zeros for report in run.layers] == [173, 86, 43]


def test_stages_of_a_saved_model_keep_its_names(case):
    answer = lobs(
        case, "--sparsity", 0.8, "--stages", 2, "--fine-tune", 1, model="net.pth", out="staged"
    )
    assert answer.code == 0, answer
    assert "stage 2: 19.94 % kept" in answer.out
    assert answer.err.count("certified") == 6
    saved = load_file(case / "staged/model.safetensors")
    assert set(saved) == set(torch.load(case / "net.pth", weights_only=True))
    assert zeros(case / "staged", "0") == math.floor(0.8 * size("0") + 0.5)
    same = load_model(case / "staged/model.safetensors").module(torch.ones(1, WIDTHS[0]))
    assert torch.isfinite(same).all()
    first = command(
        case,
        "lobs",
        "net.pth",
        "--data",
        "data.npz",
        "--sparsity",
        0.8,
        "--stages",
        2,
        "--fine-tune",
        1,
        "--out",
        "staged",
    )
    assert first.code == 0
    assert torch.equal(load_file(case / "staged/model.safetensors")["0.weight"], saved["0.weight"])


def test_zeros_stay_through_fine_tuning():
    model, data = network(), samples()
    run = retrain.lobs(model, data, sparsity=0.8, fine_tune=3, bias="keep", method="one-shot")
    for report in run.layers:
        weight = run.model.get_submodule(report.name).weight
        assert int((weight == 0).sum()) == report.zeros == math.floor(0.8 * weight.numel() + 0.5)
    assert run.record["accuracy"]["calibration"]["fine_tuned"] is not None


# --- theorems 3.2 and 5.1 ---------------------------------------------------------------------


def pruned_chain(seed, widths=(10, 12, 9, 5), rows=80):
    rng = np.random.default_rng(seed)
    dense, inputs = random_chain(*widths, seed=rng, samples=rows)
    stream = ChainStream(dense, inputs)
    new = retrain.lobs(dense, rng.normal(size=(60, widths[0])), sparsity=0.6).model
    for index, weight in enumerate(new.weights):
        stream.commit(str(index), weight)
    return stream


@pytest.mark.parametrize("seed", range(5))
def test_theorems_hold_on_held_out_rows(seed):
    stream = pruned_chain(seed)
    bounds = second_order_bounds(stream)
    assert bounds.frobenius >= bounds.spectral >= bounds.measured > 0
    assert bounds.layers[0].inputs == bounds.layers[0].measured == 0
    for entry in bounds.layers[1:]:
        assert entry.frobenius >= entry.spectral >= entry.measured > 0
    norms = [np.linalg.norm(w[:-1]) for w in stream.chain.weights]
    errors = [entry.layer_error for entry in bounds.layers]
    assert bounds.frobenius == pytest.approx(l_obs_bound(errors, norms), rel=1e-8)
    spectral = [np.linalg.norm(w[:-1], 2) for w in stream.chain.weights]
    assert bounds.spectral == pytest.approx(l_obs_bound(errors, spectral), rel=1e-8)


def test_theorems_against_the_network_computed_by_hand():
    stream = pruned_chain(7)
    first = stream.layers[0]
    dense = current = next(stream.batches(first.name)).inputs[:, : first.shape[0]]
    ones = np.ones((len(dense), 1))
    for index, entry in enumerate(second_order_bounds(stream).layers):
        old, new = stream.dense.weights[index], stream.chain.weights[index]
        dense, current = np.hstack([dense, ones]), np.hstack([current, ones])
        assert entry.inputs == pytest.approx(np.linalg.norm(current - dense), abs=1e-12)
        assert entry.layer_error == pytest.approx(np.linalg.norm(dense @ (new - old)))
        relu = (lambda z: np.maximum(z, 0)) if index < 2 else (lambda z: z)
        moved = relu(current @ new) - relu(dense @ new)
        assert entry.measured == pytest.approx(np.linalg.norm(moved), abs=1e-12)
        dense, current = relu(dense @ old), relu(current @ new)


def test_nothing_pruned_is_a_bound_of_zero():
    rng = np.random.default_rng(0)
    stream = ChainStream(Chain((rng.normal(size=(4, 3)),)), rng.normal(size=(9, 4)))
    bounds = second_order_bounds(stream)
    assert bounds.measured == bounds.spectral == bounds.frobenius == 0


def test_no_finite_gain_is_said():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.softmax(self.first(x) * x, dim=-1))

    torch.manual_seed(0)
    run = retrain.lobs(Root(), samples(width=4)[0], sparsity=0.5, layers="first")
    assert run.bound is None and run.bounds["calibration"].reason.startswith("first: ")
    assert "calibration" not in run.record["theorems"]  # nothing of it would be proven
