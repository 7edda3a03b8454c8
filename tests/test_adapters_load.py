"""Loading: what is read, in which order, and that hostile files neither run nor fill the memory."""

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shared_data import LENET, SHARED
from torch import nn

from retrain.adapters.files.load import fill, load_model

RESNET = "data/models/resnet20-12fca82f.th"


def chain_tensors(widths=(6, 5, 4, 3), names=("fc1", "fc2", "fc3"), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, n_in, n_out in zip(names, widths, widths[1:], strict=False):
        tensors[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator).to(dtype)
        tensors[f"{name}.bias"] = torch.randn(n_out, generator=generator).to(dtype)
    return tensors


def by_hand(tensors, names, x, activation=torch.relu):
    for name in names[:-1]:
        x = activation(x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])
    return x @ tensors[f"{names[-1]}.weight"].T + tensors[f"{names[-1]}.bias"]


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    "names",
    [
        ("fc1", "fc2", "fc3"),
        ("net.0", "net.2", "net.10"),
        ("layers.0.fc", "layers.1.fc", "layers.2.fc"),
    ],
)
def test_a_chain_is_read_off_the_shapes(tmp_path, suffix, names):
    tensors = chain_tensors(names=names)
    loaded = load_model(write(tmp_path / f"m{suffix}", tensors))
    assert loaded.note == "read as dense layers 6-5-4-3, assuming relu between them"
    assert {ours: ours for ours in tensors} == dict(loaded.names)
    assert all(torch.equal(tensors[k], v) for k, v in loaded.module.state_dict().items())
    x = torch.randn(7, 2, 3)
    torch.testing.assert_close(loaded.module(x), by_hand(tensors, names, x.flatten(1)))
    assert not loaded.module.training


def test_the_activation_is_the_users(tmp_path):
    names = ("fc1", "fc2", "fc3")
    path = write(tmp_path / "m.pt", chain_tensors())
    x = torch.randn(7, 6)
    for activation, function in (("tanh", torch.tanh), ("none", lambda z: z)):
        loaded = load_model(path, activation=activation)
        assert f"assuming {activation} between them" in loaded.note
        torch.testing.assert_close(loaded.module(x), by_hand(chain_tensors(), names, x, function))
    with pytest.raises(ValueError, match="activation: got 'step', want one of none, relu, tanh"):
        load_model(path, activation="step")


def reorder(tensors, names):
    return {f"{n}.{leaf}": tensors[f"{n}.{leaf}"] for n in names for leaf in ("weight", "bias")}


def test_orders(tmp_path):
    """Numbers in the names, then the file's order, then the only order that fits the shapes."""

    def order(file, widths, names, saved):
        tensors = reorder(chain_tensors(widths, names), saved)
        module = load_model(write(tmp_path / file, tensors)).module
        return [layer.name for layer in module.dense_layers]

    numbered = ("n.0", "n.2", "n.10")
    # Sorted as text, n.10 comes before n.2, and all fit: the numbers decide.
    assert order("a.safetensors", (3, 3, 3, 3), numbered, numbered) == list(numbered)
    words = ("input", "hidden", "exit")
    assert order("b.pt", (3, 3, 3, 3), words, words) == list(words)  # the file's own order
    # Neither the file's order nor the alphabet fits; the shapes leave one.
    assert order("c.pt", (4, 3, 3, 2), words, ("exit", "hidden", "input")) == list(words)
    assert order("c.safetensors", (4, 3, 3, 2), words, words) == list(words)
    # A name's number that contradicts the shapes is not believed.
    assert order("d.pt", (5, 4, 3, 2), ("n.2", "n.0", "n.1"), ("n.2", "n.0", "n.1")) == [
        "n.2", "n.0", "n.1",
    ]  # fmt: skip


def test_ambiguous_orders_are_refused(tmp_path):
    both = chain_tensors((5, 3, 5), ("encoder", "decoder"))  # either first would do
    with pytest.raises(ValueError, match=r"order of the layers is ambiguous .* --arch"):
        load_model(write(tmp_path / "a.safetensors", both))
    load_model(write(tmp_path / "a.pt", both))  # in this file the order says it
    contrary = reorder(chain_tensors((3, 3, 3), ("n.0", "n.1")), ("n.1", "n.0"))
    with pytest.raises(ValueError, match=r"ambiguous \(n.0, n.1 or n.1, n.0\)"):
        load_model(write(tmp_path / "b.pt", contrary))
    ends = {f"{a}.weight": torch.ones(3, 3) for a in "abcdefghijklmnopqrst"}
    with pytest.raises(ValueError, match="ambiguous"):
        load_model(write(tmp_path / "c.safetensors", ends))


def test_a_search_without_end_is_given_up(tmp_path):
    """Twenty square layers and two that fit nowhere: the orders are too many to try."""
    square = {f"{a}.weight": torch.ones(3, 3) for a in "abcdefghijklmnopqrst"}
    square |= {"u.weight": torch.ones(7, 9), "v.weight": torch.ones(8, 6)}
    with pytest.raises(ValueError, match="no order of the layers can be told"):
        load_model(write(tmp_path / "a.safetensors", square))


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (chain_tensors((6, 5, 5, 3)) | {"fc2.weight": torch.ones(5, 4)}, "make no chain .fc1 6→5"),
        ({"c.weight": torch.ones(2, 2, 3, 3)}, r"'c.weight' of shape \(2, 2, 3, 3\) is neither"),
        ({"c.scale": torch.ones(2, 2)}, "'c.scale' of shape .* is neither .* --arch"),
        ({"c.weight": torch.ones(2)}, "is neither"),
        ({"c.weight": torch.ones(2, 0)}, "'c.weight' is empty"),
        ({"c.weight": torch.ones(2, 2), "c.bias": torch.ones(3)}, "has 3 entries, want 2 ent"),
        ({"c.bias": torch.ones(3)}, "has 3 entries, want a weight beside it"),
        ({"c.weight": torch.ones(2, 2, dtype=torch.int32)}, "'c.weight' is of type torch.int32"),
        ({"c.weight": torch.full((2, 2), torch.nan)}, "'c.weight' has NaN or infinite"),
        ({"c.weight": torch.full((2, 2), torch.inf)}, "'c.weight' has NaN or infinite"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_chain(tmp_path, tensors, text, suffix):
    with pytest.raises(ValueError, match=f"model: .*{text}") as caught:
        load_model(write(tmp_path / f"m{suffix}", tensors))
    assert "\n" not in str(caught.value)


def test_names_that_cannot_be_modules(tmp_path):
    for name in ("a..b", "forward"):
        tensors = {f"{name}.weight": torch.ones(2, 2)}
        with pytest.raises(ValueError, match="cannot name a layer"):
            load_model(write(tmp_path / "m.pt", tensors))


def test_bare_and_wrapped_names(tmp_path):
    bare = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    loaded = load_model(write(tmp_path / "a.pt", bare))
    assert loaded.names == {"layer.weight": "weight", "layer.bias": "bias"}
    assert loaded.note == "read as dense layers 3-2"
    for prefix in ("module.", "_orig_mod."):
        wrapped = {prefix + name: tensor for name, tensor in chain_tensors().items()}
        loaded = load_model(write(tmp_path / "b.pt", wrapped))
        assert [layer.name for layer in loaded.module.dense_layers] == ["fc1", "fc2", "fc3"]
        assert set(loaded.names.values()) == set(wrapped)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints(tmp_path, key):
    torch.save({"epoch": 3, key: chain_tensors(), "optimizer": {}}, tmp_path / "a.pt")
    assert load_model(tmp_path / "a.pt").note.startswith("read as dense layers 6-5-4-3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay(tmp_path, dtype):
    for suffix in (".pt", ".safetensors"):
        loaded = load_model(write(tmp_path / f"m{suffix}", chain_tensors(dtype=dtype)))
        assert all(tensor.dtype == dtype for tensor in loaded.module.state_dict().values())


def test_saved_on_a_gpu(tmp_path):
    """A state dict whose storages say cuda:0, as torch writes them, without there being a GPU."""
    path = write(tmp_path / "m.pt", chain_tensors())
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                assert b"cuda:0" in content
            archive.writestr(name, content)
    loaded = load_model(path)
    assert all(tensor.device.type == "cpu" for tensor in loaded.module.state_dict().values())


@pytest.mark.shared_data(LENET, RESNET)
def test_saved_networks_of_others(tmp_path, monkeypatch):
    lenet = load_model(SHARED / LENET)
    assert lenet.note == "read as dense layers 784-300-100-10, assuming relu between them"
    with pytest.raises(ValueError, match=r"not a chain of dense layers: 'conv1.weight'"):
        load_model(SHARED / RESNET)


FACTORIES = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))

def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net

def meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

def number():
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_factories", None)
    import my_factories

    return my_factories


def randomised(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_factory_builds_the_module(tmp_path, factories, suffix, dtype):
    state = randomised(factories.plain()).to(dtype).state_dict()
    loaded = load_model(write(tmp_path / f"m{suffix}", state), arch="my_factories:plain")
    assert loaded.note == "" and isinstance(loaded.module, nn.Sequential)
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
    meta = {name: t for name, t in state.items() if not name.startswith("1.")}
    meta = {name.replace("3.", "2."): tensor for name, tensor in meta.items()}
    loaded = load_model(write(tmp_path / f"n{suffix}", meta), arch="my_factories:meta")
    assert all(torch.equal(loaded.module.state_dict()[name], meta[name]) for name in meta)


def test_old_batch_norms_lack_a_counter(tmp_path, factories):
    state = factories.plain().state_dict()
    del state["1.num_batches_tracked"]
    loaded = load_model(write(tmp_path / "m.pt", state), arch="my_factories:plain")
    assert "1.num_batches_tracked" not in loaded.names


def test_tied_weights_stay_tied(tmp_path, factories):
    module = randomised(factories.tied())
    module[2].weight = module[0].weight
    path = write(tmp_path / "m.pt", module.state_dict())
    loaded = load_model(path, arch="my_factories:tied")
    assert loaded.module[0].weight is loaded.module[2].weight
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["2.weight"] += 1
    with pytest.raises(ValueError, match="shares its memory with another tensor"):
        load_model(write(tmp_path / "m.pt", state), arch="my_factories:tied")


@pytest.mark.parametrize(
    ("change", "arch", "text"),
    [
        ({}, "my_factories:number", "arch: .* returned a int, want a module"),
        ({}, "my_factories:absent", "arch: .* has no 'absent'"),
        ({}, "no_such_package:f", "arch: .*No module named"),
        ({}, "plain", "arch: got 'plain', want package.module:factory"),
        ({"0.weight": None}, "my_factories:plain", "does not fit .* it lacks '0.weight'"),
        ({"9.weight": torch.ones(1)}, "my_factories:plain", "has besides '9.weight'"),
        (
            {"9.weight": torch.ones(1), "0.weight": None, "0.bias": None},
            "my_factories:plain",
            "lacks '0.weight', '0.bias' and has besides '9.weight'",
        ),
        ({"0.weight": torch.ones(5, 7)}, "my_factories:plain", r"shape \(5, 7\) in the file and"),
        (
            {"0.weight": torch.ones(5, 6, dtype=torch.int64)},
            "my_factories:plain",
            r"model: '0\.weight': got type torch\.int64, want torch\.float32 as in",
        ),
        ({"0.bias": torch.full((5,), torch.nan)}, "my_factories:plain", "'0.bias' has NaN or"),
        ({"1.running_var": torch.full((5,), torch.nan)}, "my_factories:plain", "var' has NaN"),
    ],
)
def test_factory_errors(tmp_path, factories, change, arch, text):
    state = dict(factories.plain().state_dict()) | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=text) as caught:
        load_model(write(tmp_path / "m.pt", state), arch=arch)
    assert "\n" not in str(caught.value)


def test_fill_loads_into_a_copy(tmp_path, factories):
    module = factories.plain()
    kept = module[0].weight.detach().clone()
    state = randomised(factories.plain()).state_dict()
    path = tmp_path / "m.safetensors"
    save_file({"x." + name: tensor for name, tensor in state.items()}, path)
    names = {name: "x." + name for name in state}
    filled = fill(module, path, names)
    assert all(torch.equal(filled.state_dict()[name], state[name]) for name in state)
    assert torch.equal(module[0].weight, kept) and not filled.training
    with pytest.raises(ValueError, match="has no tensor 'y'"):
        fill(module, path, {"0.weight": "y"})
    with pytest.raises(ValueError, match=r"does not fit the given module: it lacks '0.bias'"):
        fill(module, path, {name: names[name] for name in names if name != "0.bias"})


# --- hostile files ------------------------------------------------------------------------------


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_pickles_do_not_run(tmp_path):
    marker = tmp_path / "it ran"
    torch.save({"fc.weight": torch.ones(2, 2), "x": Bomb(marker)}, tmp_path / "zip.pt")
    torch.save(
        {"fc.weight": torch.ones(2, 2), "x": Bomb(marker)},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "module.pt")
    for name in ("zip.pt", "old.pt", "bare.pt", "module.pt"):
        with pytest.raises(
            ValueError, match=r"holds pickled objects .* not loaded; .* --arch"
        ) as c:
            load_model(tmp_path / name)
        assert "\n" not in str(c.value)
    (tmp_path / "new.pt").write_bytes(pickle.dumps(Bomb(marker), protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"truncated or not a file that torch.save wrote"):
            load_model(tmp_path / "new.pt")
    assert not marker.exists()
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert marker.exists()  # so the bombs were live


def test_exported_programs_want_trust(tmp_path):
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4, bias=False),
        nn.Tanh(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    x = torch.randn(3, 2, 3)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "m.pt2")
    (tmp_path / "hidden.pt").write_bytes((tmp_path / "m.pt2").read_bytes())
    for name in ("m.pt2", "hidden.pt"):
        with pytest.raises(
            ValueError, match=r"can run code that is in it; pass --trust .* or save"
        ):
            load_model(tmp_path / name)
    loaded = load_model(tmp_path / "m.pt2", trust=True)
    torch.testing.assert_close(loaded.module(x), net(x))
    assert dict(loaded.names) == {name: name for name in net.state_dict()}
    assert [layer.activation for layer in loaded.module.dense_layers] == ["relu", "tanh", "none"]
    with pytest.raises(ValueError, match=r"arch: .* brings its own"):
        load_model(tmp_path / "m.pt2", trust=True, arch="a:b")


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.a(x))


class Branches(Twice):
    def forward(self, x):
        return self.a(x) + x


class TwoInputs(Twice):
    def forward(self, x, y):
        return self.a(x) + y


class Computed(Twice):
    def forward(self, x):
        return nn.functional.linear(x, self.a.weight * 2)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Twice(), "uses 'a' twice"),
        (Branches(), "branches at"),
        (TwoInputs(), "several inputs or outputs"),
        (Computed(), "multiplies by what is no layer's weight"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softplus()), "does aten.softplus.default, and only"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), "does aten.relu.default"),
        (nn.Sequential(nn.Flatten()), "has no dense layer"),
    ],
)
def test_exported_programs_that_are_no_chain(tmp_path, net, text):
    inputs = (torch.randn(3, 4),) * (2 if isinstance(net, TwoInputs) else 1)
    torch.export.save(torch.export.export(net.eval(), inputs), tmp_path / "m.pt2")
    with pytest.raises(ValueError, match=f"model: .*{text}"):
        load_model(tmp_path / "m.pt2", trust=True)


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(ValueError, match="is a TorchScript archive; save its state dict instead"):
        load_model(tmp_path / "m.pt")


def lying_safetensors(shape, offsets, payload=bytes(16), dtype="F32"):
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    return struct.pack("<Q", len(header)) + header.encode() + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        lying_safetensors([1 << 20, 1 << 20], [0, 1 << 42]),
        lying_safetensors([1 << 40, 1 << 40], [0, 16]),
        lying_safetensors([2, 2], [0, 64]),
        lying_safetensors([2, 2], [0, 16], bytes(15)),
        lying_safetensors([2, 2], [0, 16], bytes(17)),
        lying_safetensors([2, 2], [4, 20], bytes(20)),
        lying_safetensors([2, 2], [0, 16], dtype="F31"),
    ],
)
def test_safetensors_that_lie(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole safetensors file") as caught:
        load_model(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(tmp_path, zipped):
    buffer = io.BytesIO()
    torch.save(chain_tensors(), buffer, _use_new_zipfile_serialization=zipped)
    whole = buffer.getvalue()
    path = tmp_path / "m.pt"
    for part in (0, 1, 5, 100, len(whole) // 3, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"truncated or not a file that torch.save") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    rng = torch.Generator().manual_seed(0)
    path.write_bytes(bytes(torch.randint(0, 256, (3000,), generator=rng, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="truncated or not a file"):
        load_model(path)


def test_truncated_exported_program_says_one_line(tmp_path, capfd):
    torch.export.save(
        torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.ones(3, 2),)), tmp_path / "m.pt2"
    )
    whole = (tmp_path / "m.pt2").read_bytes()
    (tmp_path / "m.pt2").write_bytes(whole[: len(whole) // 2])
    capfd.readouterr()
    with pytest.raises(ValueError, match="is no whole exported program"):
        load_model(tmp_path / "m.pt2", trust=True)
    assert capfd.readouterr() == ("", "")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = write(tmp_path / "m.pt", {"a.weight": torch.zeros(1000, 1000)})
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 50_000
    with pytest.raises(ValueError, match="its records claim more than the file holds"):
        load_model(path)


def test_tensors_that_claim_more_than_they_hold(tmp_path):
    torch.save({"a.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"'a.weight' claims shape .*, more than its memory holds"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ([torch.ones(2, 2)], "holds a list, want a state dict"),
        (torch.ones(2, 2), "holds a Tensor, want a state dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"a.weight": torch.ones(2, 2), "epoch": 3}, "entry 'epoch' is of type int, not a tensor"),
        ({3: torch.ones(2, 2)}, "entry 3 is of type Tensor"),
        ({"a.weight": torch.eye(3).to_sparse()}, "sparse, quantised or empty-handed"),
        ({"a.weight": torch.ones(2, 2, device="meta")}, "sparse, quantised or empty-handed"),
        ({"a.weight": torch.ones(2, 2, dtype=torch.complex64)}, "of type torch.complex64"),
        ({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "of type torch.float8_e4m3fn"),
    ],
)
def test_what_is_no_state_dict(tmp_path, held, text):
    torch.save(held, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"model: .*{text}"):
        load_model(tmp_path / "m.pt")


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: there is no file '.*m\.pt'"):
        load_model(tmp_path / "m.pt")
    (tmp_path / "d.pt").mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        load_model(tmp_path / "d.pt")
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"model: 'm\.onnx' is of no known kind, want .safetensors",
    ):
        load_model(tmp_path / "m.onnx")


def test_lies_take_no_memory(tmp_path):
    """All the lying files together stay within 300 MB of address space more than torch needs."""
    torch.save({"a.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(lying_safetensors([1 << 20, 1 << 20], [0, 1 << 42]))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from retrain.adapters.files.load import load_model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_model(path)\n"
        "    except ValueError: pass\n"
        "    else: raise SystemExit('it loaded')\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000\n"
    )
    files = [str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
