"""Hugging Face directories: what does not need transformers, and round trips where it is there."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

import retrain
from retrain.adapters.files.hugging_face import (
    is_directory,
    load_directory,
    sequences,
    text_data,
)
from retrain.cli import main
from retrain.data.sources import load_data
from retrain.runs.accuracy import accuracies

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def test_sequences_carry_the_next_token():
    data = sequences(list(range(23)), "text", causal=True, length=5, limit=3)
    (name, ids), *others = data.inputs
    assert (name, others) == ("input_ids", [])
    np.testing.assert_array_equal(ids, np.arange(15).reshape(3, 5))
    np.testing.assert_array_equal(data.y[:, :-1], ids[:, 1:])
    assert (data.y[:, -1] == -100).all()
    assert sequences(list(range(9)), "t", causal=False, length=4).y is None
    with pytest.raises(ValueError, match="'text' has 4 tokens, want at least 5"):
        sequences(list(range(4)), "text", causal=True, length=5)


def test_perplexity_and_share_of_positions():
    class Outputs:
        """A stream whose dense network gives these logits, and whose other gives their half."""

        def __init__(self, logits):
            self.logits = logits

        def outputs(self, *, dense):
            yield from np.array_split(self.logits * (1 if dense else 0.5), 3)

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 4, 6))
    data = sequences(rng.integers(0, 6, 28).tolist(), "text", causal=True, length=4)
    found = accuracies(Outputs(logits), data)
    counted = data.y >= 0
    for when, scale in (("before", 1.0), ("after", 0.5)):
        loss = torch.nn.functional.cross_entropy(
            torch.tensor(scale * logits[counted]), torch.tensor(data.y[counted])
        )
        assert found["perplexity"][when] == pytest.approx(float(loss.exp()), rel=1e-12)
    hits = (logits.argmax(-1) == data.y)[counted].mean()
    assert found["before"] == found["after"] == pytest.approx(hits)


def test_a_file_of_token_ids_is_a_network_s_inputs(tmp_path):
    ids = np.arange(12).reshape(3, 4)
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=np.ones((3, 4), bool), labels=ids)
    data = load_data(tmp_path / "ids.npz", limit=2)
    assert dict(data.inputs).keys() == {"input_ids", "attention_mask"}
    assert data.integers and data.mask.all() and len(data) == 2
    np.testing.assert_array_equal(data.y, ids[:2])


def test_what_is_no_directory_of_theirs(tmp_path, capsys):
    assert not is_directory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no safetensors"):
        load_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert is_directory(tmp_path)
    with pytest.raises(ValueError, match=r"names no architecture|pip install 'retrain\[hf\]'"):
        load_directory(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        text_data(tmp_path / "none.txt", tmp_path)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        text_data(tmp_path / "text", tmp_path)
    options = ["--data", f"text:{tmp_path / 'text'}", "--sparsity", "0.5", "--out"]
    torch.save({}, tmp_path / "m.pt")
    assert main(["lobs", str(tmp_path / "m.pt"), *options, str(tmp_path / "out")]) == 2
    assert "retrain: error: " in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A small Llama with random weights, as its library writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 40, (10, 8)))
    return tmp_path


@needs_library
def test_a_directory_comes_back_as_one(folder, monkeypatch):
    import transformers

    monkeypatch.chdir(folder)
    arguments = ["lobs", "llama", "--data", "ids.npz", "--sparsity", "0.5", "--out", "run"]
    assert main([*arguments, "--quiet"]) == 0
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder / "run")
    weight = opened.model.layers[1].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    again = retrain.load("run")
    for name, value in opened.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert main(["layers", "run", "--data", "ids.npz", "--json"]) == 0
    assert main([*arguments, "--quiet"]) == 0  # finished: the same command answers again


@needs_library
def test_damaged_directories_end_in_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree("llama", "torn")
    path = folder / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model: "):
        load_directory("torn")
    shutil.copytree("llama", "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.2\."):
        load_directory("other")
    config["architectures"] = ["NoSuchModel"]
    (folder / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a NoSuchModel, which transformers .* does not have"):
        load_directory("other")
