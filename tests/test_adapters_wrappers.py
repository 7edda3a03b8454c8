"""Wrappers are taken off; weights that are computed at each call are refused with a remedy."""

import itertools
import re

import numpy as np
import pytest
import torch
from networks import dense, rows
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import retrain
from retrain.adapters.files.load import load_model
from retrain.adapters.network.open import layer_table
from retrain.adapters.network.wrappers import unwrapped, without_wrappers

X = rows(40, 6)


def network():
    return dense(6, 5, 3)


@pytest.fixture(scope="module")
def group():
    """A group of this process alone, which DistributedDataParallel wants."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "compiled": torch.compile,
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "parallel, compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "in part": lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_are_the_plain_ones(group, tmp_path, name):
    plain = network()
    wrapped = WRAPPERS[name](network())
    before = list(wrapped.state_dict())
    for verb, options in ((retrain.net_trim, {}), (retrain.lobs, {"sparsity": 0.5})):
        mine = verb(wrapped, X, **options)
        theirs = verb(plain, X, **options)
        assert type(mine.model) is nn.Sequential
        assert list(mine.model.state_dict()) == list(plain.state_dict())
        for key, tensor in theirs.model.state_dict().items():
            assert torch.equal(mine.model.state_dict()[key], tensor)
    assert [found.spec.name for found in layer_table(wrapped)] == ["0", "2"]
    run = retrain.lobs(wrapped, X, sparsity=0.5, out=tmp_path / "run")
    again = retrain.load(tmp_path / "run", wrapped).model
    assert type(again) is nn.Sequential
    assert torch.equal(again[2].weight, run.model[2].weight)
    assert list(wrapped.state_dict()) == before  # the given network is left alone


def test_a_part_that_is_used_twice_stays_one():
    part = nn.DataParallel(nn.Linear(4, 4))
    plain = unwrapped(nn.Sequential(part, nn.ReLU(), part))
    assert plain[0] is plain[2] and type(plain[0]) is nn.Linear
    model = network()
    assert unwrapped(model) is model


def test_a_factory_of_a_wrapped_network_trains(group, tmp_path, monkeypatch):
    tables = {
        "data": {},
        "model": {"factory": f"{__name__}:parallel"},
        "training": {"epochs": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    run = retrain.train(tables, data=(X, np.arange(40) % 3))
    assert list(run.model.state_dict()) == list(network().state_dict())


def parallel():
    return nn.DataParallel(network())


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prefixes_in_any_order_and_number(tmp_path, depth):
    for parts in itertools.product(("module.", "_orig_mod."), repeat=depth):
        prefix = "".join(parts)
        state = {prefix + name: tensor for name, tensor in network().state_dict().items()}
        torch.save(state, tmp_path / "m.pt")
        for arch in ("auto", f"{__name__}:network", f"{__name__}:parallel"):
            loaded = load_model(tmp_path / "m.pt", arch=arch)
            assert set(loaded.names) == set(network().state_dict())
            assert set(loaded.names.values()) == set(state)


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "a.b.c.", "_orig_mod.net.module."])
def test_a_common_prefix_goes_where_the_architecture_fits(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in network().state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", arch=f"{__name__}:network")
    assert loaded.names == {name: prefix + name for name in network().state_dict()}
    assert "prefix" in loaded.note
    holder = load_model(tmp_path / "m.pt", arch=f"{__name__}:in_model") if prefix == "model." else 0
    assert not holder or (holder.note == "" and all(a == b for a, b in holder.names.items()))
    with pytest.raises(ValueError, match=r"does not fit .* lacks '0.weight'"):
        torch.save({"x.0.weight": torch.ones(5, 6), "y.0.bias": torch.ones(5)}, tmp_path / "n.pt")
        load_model(tmp_path / "n.pt", arch=f"{__name__}:network")


def in_model():
    holder = nn.Module()
    holder.model = network()
    holder.forward = holder.model.forward
    return holder


def test_names_of_wrapped_parts():
    names = ["features._orig_mod.0.weight", "head._orig_mod.bias"]
    assert without_wrappers(names) == ["features.0.weight", "head.bias"]
    clash = ["a._orig_mod.w", "a.w"]
    assert without_wrappers(clash) == clash


# --- checkpoints --------------------------------------------------------------------------------


def test_the_only_mapping_of_tensors_is_taken(tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.from_numpy(X)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "net": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt")
    assert torch.equal(loaded.module.state_dict()["2.weight"], model[2].weight)
    assert loaded.note.endswith("assuming relu between them, from 'net'")
    torch.save({"best": {"weights": {"net": model.state_dict()}}}, tmp_path / "b.pt")
    assert load_model(tmp_path / "b.pt").note.endswith("from 'best.weights.net'")
    loaded = load_model(tmp_path / "b.pt", arch=f"{__name__}:network")
    assert loaded.note == "read from 'best.weights.net'"


def test_several_mappings_are_listed_and_one_is_chosen(tmp_path):
    one, two = (
        network().state_dict(),
        {k: v + 1 for k, v in network().state_dict().items()},
    )
    torch.save({"student": one, "teacher": {"net": two}, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"several mappings of tensors, student, teacher.net; .*"):
        load_model(tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", key="teacher.net")
    assert torch.equal(loaded.module.state_dict()["0.bias"], two["0.bias"])
    with pytest.raises(ValueError, match=r"key: .* 'ema'; there are student, teacher.net"):
        load_model(tmp_path / "a.pt", key="ema")
    torch.save({"state_dict": one, "ema": two}, tmp_path / "b.pt")
    assert torch.equal(load_model(tmp_path / "b.pt").module.state_dict()["0.bias"], one["0.bias"])
    loaded = load_model(tmp_path / "b.pt", key="ema")
    assert torch.equal(loaded.module.state_dict()["0.bias"], two["0.bias"])


# --- computed weights ---------------------------------------------------------------------------


def masked(model):
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2], "bias", 0.4)
    return model


def normed(model):
    weight_norm(model[0])
    return model


def spectral(model):
    spectral_norm(model[2])
    return model


def parametrised(model):
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[2])
    return model


COMPUTED = {
    "pruning mask": masked,
    "weight norm of the old kind": normed,
    "spectral norm of the old kind": spectral,
    "parametrised": parametrised,
}


def code_in(error):
    return re.search(r"\[.*\]$", str(error))[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_a_remedy_that_works(tmp_path, kind):
    model = COMPUTED[kind](network()).eval()
    wanted = model(torch.from_numpy(X))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for arch in ("auto", f"{__name__}:network"):
        with pytest.raises(ValueError, match=f"^model: the file has .*{kind}.*before saving") as e:
            load_model(tmp_path / "m.pt", arch=arch)
    code = code_in(e.value)
    if kind != "parametrised":  # such a layer can be copied: it alone is left, with its reason
        with pytest.raises(ValueError, match=f"^model: '[02]' has .*{kind}") as error:
            retrain.net_trim(model, X)
        assert code_in(error.value) == code
    else:
        for found in layer_table(model):
            assert "remove_parametrizations(model.get_submodule" in found.spec.reason
    exec(code, {"torch": torch, "model": model})
    torch.testing.assert_close(model(torch.from_numpy(X)), wanted)
    assert set(model.state_dict()) == set(network().state_dict())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").note
    assert retrain.lobs(model, X, sparsity=0.5).certified
