"""Saving: whole or not at all, the same bytes every time, names and types as they came."""

import errno
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from retrain.adapters.files.load import load_model
from retrain.adapters.files.save import save_model, save_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "module.b.weight": torch.randn(3, 4, generator=generator).to(torch.bfloat16),
        "module.a.weight": torch.randn(4, 5, generator=generator).double(),
        "module.a.bias": torch.randn(4, generator=generator).half(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "turned": torch.randn(4, 5, generator=generator).T,
    }


def test_every_type_and_name_comes_back(tmp_path):
    held = tensors()
    save_tensors(held, tmp_path / "m.safetensors")
    back = load_file(tmp_path / "m.safetensors")
    assert set(back) == set(held)
    for name, tensor in held.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert len(file.metadata()) == 1  # more keys would come in no fixed order


def test_bytes_repeat(tmp_path):
    save_tensors(tensors(), tmp_path / "a.safetensors")
    save_tensors(dict(reversed(tensors().items())), tmp_path / "b.safetensors")
    first = (tmp_path / "a.safetensors").read_bytes()
    assert first == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trip_of_a_network(tmp_path, prefix):
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    save_model(loaded.module, tmp_path / "a.safetensors", names=loaded.names)
    again = load_model(tmp_path / "a.safetensors")
    save_model(again.module, tmp_path / "b.safetensors", names=again.names)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    back = load_file(tmp_path / "b.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_tied_weights_are_written_under_each_name(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    save_model(net, tmp_path / "m.safetensors")
    back = load_file(tmp_path / "m.safetensors")
    assert torch.equal(back["0.weight"], back["1.weight"])


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")  # noqa: PTH110
def test_a_full_disk_is_an_os_error(tmp_path):
    path = tmp_path / "m.safetensors"
    beside = tmp_path / f".m.safetensors.{os.getpid()}.tmp"
    beside.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        save_tensors({"a": torch.zeros(2)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.ones(1)}, tmp_path / "no" / "m.safetensors")


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    save_tensors({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "m.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({"a": 3}, "tensors: 'a' is a int, not a tensor"),
        ({"a": torch.eye(2).to_sparse()}, "tensors: 'a' is sparse"),
        ({"a": torch.ones(2, device="meta")}, "tensors: 'a' is sparse, quantised or without"),
    ],
)
def test_errors(tmp_path, held, text):
    with pytest.raises(ValueError, match=text):
        save_tensors(held, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_that_the_module_lacks(tmp_path):
    with pytest.raises(ValueError, match="names: the module has no tensor 'b'"):
        save_model(nn.Linear(2, 2), tmp_path / "m.safetensors", names={"b": "c"})
