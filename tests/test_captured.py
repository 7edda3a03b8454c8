"""Networks captured by torch.export: layers, rows, frontiers and whole runs."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import retrain
from retrain.adapters.network.open import open_network
from retrain.adapters.network.recurrent import STEPS, unrolled
from retrain.adapters.network.sites import windows
from retrain.adapters.network.stream import TorchStream
from retrain.cli import main
from retrain.data.arrays import Data
from retrain.data.sources import as_data


class Branching(nn.Module):
    """A branch on the input's shape, and a mapping as output."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        if x.dim() > 2:
            x = x.flatten(1)
        return {"aux": None, "out": self.b(torch.relu(self.a(x)))}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.recur = nn.Embedding(20, 8), nn.LSTM(8, 10, batch_first=True)
        self.head = nn.Linear(10, 5)

    def forward(self, tokens):
        return self.head(self.recur(self.embed(tokens))[0])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, left, *, right):
        return self.out(torch.relu(self.left(left) + self.right(right))), left


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(12, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.mid(self.embed(tokens))))


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.same(x))
        return self.out(x) if x.shape[1] == 6 else x


class Fused(nn.Module):
    """One parameter in three parts, each a layer, and a product written by hand."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(12, 4) / 2)
        self.w = nn.Parameter(torch.randn(4, 5) / 2)

    def forward(self, x):
        q, k, v = (functional.linear(x, part) for part in self.qkv.chunk(3))
        mixed = torch.softmax(q * k, -1) * v
        made = mixed.flatten(0, 1) @ self.w
        return made.unflatten(0, x.shape[:2]) if x.dim() > 2 else mixed


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "one": nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2),
                "groups": nn.Conv1d(4, 6, 3, groups=2, padding="same"),
                "reflect": nn.Conv1d(6, 4, 3, padding=1, padding_mode="reflect"),
                "up": nn.ConvTranspose1d(4, 4, 4, stride=3, padding=1, output_padding=1, groups=2),
                "up_dilated": nn.ConvTranspose1d(4, 3, 2, dilation=3, bias=False),
            }
        )
        self.two = nn.ConvTranspose2d(1, 2, (3, 2), stride=(2, 1), padding=(1, 0))
        self.three = nn.Conv3d(1, 2, (2, 1, 2), padding=(1, 0, 0))

    def forward(self, x):
        if x.shape[-1] > 3:
            for part in self.parts.values():
                x = torch.relu(part(x))
        x = self.two(x[:, None])
        return self.three(x[:, None].flatten(2, 3)[:, :, None]).flatten(1)


def seeded(factory):
    torch.manual_seed(0)
    return factory()


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(rows, length, count, seed=0):
    return np.random.default_rng(seed).integers(0, count, (rows, length))


CASES = {
    "branch and mapping": (Branching, partial(numbers, 30, 6), {"a", "b"}),
    "tokens": (
        Tagger,
        partial(tokens, 14, 9, 20),
        {"recur.weight_ih_l0", "recur.weight_hh_l0", "head"},
    ),
    "two inputs": (
        TwoInputs,
        lambda: Data(
            numbers(30, 4), None, "two", ((None, numbers(30, 4)), ("right", numbers(30, 3, seed=1)))
        ),
        {"left", "right", "out"},
    ),
    "tied": (Tied, partial(tokens, 14, 5, 12), {"mid"}),
    "called thrice": (Repeated, partial(numbers, 30, 6), {"same", "out"}),
    "fused": (Fused, partial(numbers, 8, 7, 4), {"qkv.0", "qkv.1", "qkv.2", "w"}),
    "convolutions": (
        Convolutions,
        partial(numbers, 6, 2, 13),
        {*(f"parts.{n}" for n in ("one", "groups", "reflect", "up", "up_dilated")), "two", "three"},
    ),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        partial(numbers, 10, 6, 8),
        {
            f"layers.{i}.{n}"
            for i in (0, 1)
            for n in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
        },
    ),
}


@pytest.fixture(params=list(CASES))
def case(request):
    factory, data, names = CASES[request.param]
    return seeded(factory).eval(), as_data(data()), names


def open_layers(stream):
    return [spec for spec in stream.layers if spec.reason is None]


def test_rows_times_the_matrix_are_the_responses(case):
    model, data, names = case
    stream = TorchStream(model, data, batch_size=4)
    assert {spec.name for spec in open_layers(stream)} == names
    for spec in open_layers(stream):
        total = 0
        for group in range(spec.groups):
            rows = []
            for batch in stream.batches(spec.name, group):
                response = batch.inputs @ stream.weight(spec.name, group)
                torch.testing.assert_close(response, batch.responses, rtol=1e-4, atol=1e-5)
                assert batch.inputs is batch.dense_inputs
                rows.append(batch.rows)
            total = len(np.concatenate(rows))
            np.testing.assert_array_equal(np.concatenate(rows), np.arange(total))
        assert total == stream.count(spec.name)


def test_outputs_are_the_network_s_own(case):
    """To rounding: torch has faster paths of its own for some modules in evaluation mode."""
    model, data, _ = case
    stream = TorchStream(model, data, batch_size=4)
    with torch.no_grad():
        for start, got in zip(range(0, len(data), 4), stream.outputs(dense=True), strict=True):
            part = [
                (name, torch.tensor(values[start : start + 4]))
                for name, values in data.arguments(integers=True)
            ]
            args = [value for name, value in part if name is None]
            answer = model(*args, **{name: value for name, value in part if name})
            while not isinstance(answer, torch.Tensor):
                entries = answer.values() if isinstance(answer, dict) else answer
                answer = next(entry for entry in entries if entry is not None)
            torch.testing.assert_close(got, answer, rtol=1e-5, atol=1e-6)


def test_a_committed_weight_is_written_and_seen_behind_it(case):
    """Against the module itself with the same weight: every layer, the last bit of every output."""
    model, data, _ = case
    stream = TorchStream(model, data, batch_size=4)
    for spec in open_layers(stream):
        for group in range(spec.groups):
            old = stream.weight(spec.name, group)
            new = old * (torch.rand(old.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
            stream.commit(spec.name, new, group)
            torch.testing.assert_close(stream.weight(spec.name, group), new, rtol=0, atol=0)
            torch.testing.assert_close(stream.weight(spec.name, group, dense=True), old)
    fresh = TorchStream(stream.model, data, batch_size=4)
    for one, other in zip(stream.outputs(dense=False), fresh.outputs(dense=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for spec in open_layers(stream):  # inputs of the current network, read again from the start
        for one, other in zip(stream.batches(spec.name), fresh.batches(spec.name), strict=True):
            torch.testing.assert_close(one.inputs, other.inputs, rtol=0, atol=0)
            torch.testing.assert_close(one.dense_inputs.shape, other.inputs.shape)


@pytest.mark.parametrize("verb", ["lobs", "net_trim"])
def test_runs(case, verb, tmp_path):
    model, data, names = case
    before = copy.deepcopy(model.state_dict())
    options = {"sparsity": 0.5, "method": "one-shot"} if verb == "lobs" else {"epsilon": 0.3}
    if verb == "net_trim":
        options["relative_epsilon"] = None
    run = getattr(retrain, verb)(model, data, out=tmp_path / "run", evaluate=data, **options)
    assert {report.name for report in run.layers} == names
    bound = run.bounds["calibration"]
    if bound.bound is None:
        assert "factor" in bound.reason or "product of two activations" in bound.reason
    else:
        assert bound.bound >= run.measured
    assert run.bounds["held_out"].measured == pytest.approx(run.measured, rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = retrain.load(tmp_path / "run", model)
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert again.layers == run.layers
    if verb == "lobs":
        assert all(report.zeros >= report.weights // 2 for report in run.layers)


def test_sparsity_zero_writes_the_same_bytes(case):
    model, data, _ = case
    run = retrain.lobs(model, data, sparsity=0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)


def chain(blocks, width=16):
    layers = [m for _ in range(blocks) for m in (nn.Linear(width, width), nn.GELU())]
    return seeded(lambda: nn.Sequential(*layers)).eval()


@pytest.mark.parametrize("blocks", [4, 8, 16])
def test_a_sweep_costs_two_passes_whatever_the_depth(blocks):
    """Nodes run, over all batches: a survey, and then one pass of each network."""
    model, data = chain(blocks), numbers(40, 16)
    stream = TorchStream(model, data, batch_size=8)
    nodes = 2 * blocks  # linear and gelu
    for spec in stream.layers:
        for _ in range(2):  # methods read a layer twice
            for batch in stream.batches(spec.name):
                assert len(batch.inputs) == 8
        stream.commit(spec.name, stream.weight(spec.name) * 0.9)
    list(stream.outputs(dense=False))
    assert stream.nodes_run <= 5 * (2 * nodes) + 5 * 2 + 2 * nodes


def test_values_beyond_memory_go_to_disk_and_change_nothing(monkeypatch):
    model, data = chain(3), numbers(40, 16)
    kept = retrain.lobs(Branched(model), data, sparsity=0.5)
    monkeypatch.setattr("retrain.adapters.network.stream.LIVE", 600.0)
    spilled = retrain.lobs(Branched(model), data, sparsity=0.5)
    for name, value in kept.model.state_dict().items():
        assert torch.equal(value, spilled.model.state_dict()[name])


class Branched(nn.Module):
    """What symbolic tracing does not follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.dim() == 2 else x


def test_padding_is_no_row():
    """Positions that the attention mask excludes are left out, in all batches."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask):
            return self.fc(self.embed(input_ids)) * attention_mask[..., None]

    mask = np.random.default_rng(1).random((11, 6)) < 0.6
    data = as_data({"input_ids": tokens(11, 6, 9), "attention_mask": mask.astype(np.int64)})
    stream = TorchStream(seeded(Masked).eval(), data, batch_size=4)
    assert stream.count("fc") == mask.sum()
    got = torch.cat([batch.inputs for batch in stream.batches("fc")])
    table = stream.dense_model.embed.weight[torch.tensor(data.inputs[0][1])][torch.tensor(mask)]
    torch.testing.assert_close(got[:, :4], table, rtol=0, atol=0)
    some = np.array([0, 3, int(mask.sum()) - 1])
    picked = torch.cat([batch.inputs for batch in stream.batches("fc", rows=some)])
    torch.testing.assert_close(picked, got[torch.tensor(some)], rtol=0, atol=0)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_windows_are_unfold_s(dimensions):
    sizes, kernel, stride, space = (7, 6, 5), (3, 2, 2), (2, 1, 2), (1, 2, 1)
    x = torch.randn(2, 3, *sizes[:dimensions])
    weight = torch.randn(4, 3, *kernel[:dimensions])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dimensions - 1]
    options = {"stride": stride[:dimensions], "dilation": space[:dimensions]}
    rows = windows(x, kernel[:dimensions], options["stride"], options["dilation"])
    wanted = convolve(x, weight, **options).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(rows @ weight.flatten(1).T, wanted, rtol=1e-4, atol=1e-5)


def test_reasons_of_what_is_left():
    def reasons(factory, data):
        return {s.name: s.reason for s in TorchStream(seeded(factory).eval(), data).layers}

    tied = reasons(Tied, tokens(6, 5, 12))
    assert "embedding" in tied["embed"] and "(tied)" in tied["head"]
    long = reasons(Tagger, tokens(2, STEPS + 1, 20))
    assert "at most 512 steps" in long["recur.weight_ih_l0"]

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            first = functional.linear(x, self.v / self.v.norm(), self.b)
            return functional.linear(first, self.v[:, :3].contiguous(), self.b * 2)

    assert "computed" in str(reasons(Normed, numbers(6, 4)))


def test_a_traced_network_keeps_its_bounds():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert isinstance(open_network(model, numbers(10, 6)), TorchStream)
    assert isinstance(open_network(seeded(Branching), numbers(10, 6)), TorchStream)


def test_what_cannot_be_captured_says_why():
    class DataDependent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, ids, x):
            return self.fc(x) if x.sum() > 0 else x

    both = Data(numbers(5, 4), None, "two", ((None, tokens(5, 4, 3)), (None, numbers(5, 4))))
    with pytest.raises(ValueError, match="model: the forward pass could not be captured"):
        open_network(seeded(DataDependent), both)


def test_half_types_are_read_and_written():
    model = seeded(Branching).to(torch.bfloat16).eval()
    run = retrain.lobs(model, numbers(30, 6), sparsity=0.5)
    assert all(value.dtype is torch.bfloat16 for value in run.model.state_dict().values())
    assert int((run.model.a.weight == 0).sum()) == 24


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.RNN, nonlinearity="relu")])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True, "bidirectional": True}, {"num_layers": 2, "bias": False}],
)
def test_recurrent_layers_written_out_are_the_layers(kind, options):
    layer = seeded(lambda: kind(4, 5, **options))
    holder = unrolled(nn.ModuleDict({"recur": layer}))
    for x in (torch.randn(6, 3, 4), torch.randn(6, 4)):
        (out, state), (wanted, last) = holder["recur"](x), layer(x)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(state, last)
    state = last  # of one sequence, given as the state to begin with
    torch.testing.assert_close(holder["recur"](x, state)[0], layer(x, state)[0])
    assert dict(holder.named_parameters()).keys() == {
        f"recur.{name}" for name, _ in layer.named_parameters()
    }


def test_recurrent_matrices_are_retrained_and_the_layer_is_saved(tmp_path):
    model, data = seeded(Tagger).eval(), tokens(14, 9, 20)
    run = retrain.lobs(model, data, sparsity=0.5, out=tmp_path / "run")
    assert {r.name for r in run.layers} >= {"recur.weight_ih_l0", "recur.weight_hh_l0"}
    assert isinstance(run.model.recur, nn.LSTM)
    assert int((run.model.recur.weight_hh_l0 == 0).sum()) == 200
    with torch.no_grad():
        ours, theirs = run.model(torch.tensor(data)), model(torch.tensor(data))
    assert run.measured == pytest.approx(float((ours - theirs).norm()), rel=1e-4)
    steps = TorchStream(model, data)
    assert steps.count("recur.weight_hh_l0") == 14 * 9


def test_a_run_names_its_factory_and_imports_it_only_when_told(tmp_path, monkeypatch):
    source = "from torch import nn\nimport torch\n\n\nclass Net(nn.Module):\n"
    source += (
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(6, 4)\n"
    )
    source += "    def forward(self, x):\n        return {'y': torch.tanh(self.a(x))}\n"
    (tmp_path / "their_networks.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    torch.save(nn.ModuleDict({"a": nn.Linear(6, 4)}).state_dict(), "net.pt")
    np.save("x.npy", numbers(20, 6))
    arguments = ["net.pt", "--arch", "their_networks:Net", "--data", "x.npy"]
    assert main(["lobs", *arguments, "--sparsity", "0.5", "--out", "run", "--quiet"]) == 0
    with pytest.raises(ValueError, match=r"made by 'their_networks:Net'; .*trust=True"):
        retrain.load("run")
    run = retrain.load("run", trust=True)
    assert int((run.model.a.weight == 0).sum()) == 12
    again = ["lobs", "run", "--data", "x.npy", "--sparsity", "0.7", "--out", "more", "--quiet"]
    assert main(again) == 2
    assert main([*again, "--trust"]) == 0


@pytest.mark.parametrize("verb", ["lobs", "net_trim"])
def test_an_interrupted_run_ends_with_the_same_bytes(verb, tmp_path):
    factory, data, _ = CASES["transformer"]
    model, samples = seeded(factory).eval(), data()
    options = {"sparsity": 0.5, "calibration": "sequential"} if verb == "lobs" else {}
    call = partial(getattr(retrain, verb), model, samples, **options)
    call(out=tmp_path / "whole")

    class Stopped(Exception):
        pass

    seen = []

    def stop(report, total):
        seen.append(report.name)
        if len(seen) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        call(out=tmp_path / "cut", on_layer=stop)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    call(out=tmp_path / "cut")
    files = sorted((tmp_path / "whole" / "layers").glob("*.safetensors"))
    assert len(files) == 8
    for name in ("model.safetensors", *(f"layers/{file.name}" for file in files)):
        whole, cut = (load_file(tmp_path / which / name) for which in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_another_computation_is_refused(tmp_path):
    """The captured graph is part of a run's identity."""
    model, x = seeded(Branching).eval(), numbers(30, 6)
    retrain.lobs(model, x, sparsity=0.5, out=tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    retrain.lobs(model, x, sparsity=0.5, out=tmp_path / "other")

    class Otherwise(Branching):
        def forward(self, x):
            return {"out": self.b(torch.sigmoid(self.a(x)))}

    other = seeded(Otherwise).eval()
    with pytest.raises(ValueError, match="computation"):
        retrain.lobs(other, x, sparsity=0.5, out=tmp_path / "other")


def test_whole_numbers_as_features_keep_the_bounds():
    """Integers are token ids only for a network that looks them up."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    counts = tokens(20, 6, 9)
    assert isinstance(open_network(model, counts), TorchStream)
    run = retrain.lobs(model, counts, sparsity=0.5)
    assert run.bound is not None and run.measured <= run.bound
    assert isinstance(open_network(seeded(Tagger).eval(), tokens(8, 9, 20)), TorchStream)
    with pytest.raises(ValueError, match=r"cannot take samples of shape .*: index out"):
        open_network(seeded(Tagger).eval(), tokens(8, 9, 20) + 100)
