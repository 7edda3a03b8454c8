"""Networks of many kinds, read, pruned and reloaded: what share of each can be retrained.

``python -m bench zoo --out FILE`` goes through plain networks, and through the architectures of
`transformers` where it is installed (random weights, small configurations). For each: the share of
matrix weights outside embeddings that can be retrained; whether sparsity 0 writes the same bytes;
whether half of the weights go by one-shot removal, and the run opens again with equal weights; the
seconds; whether the bound is finite. Rows that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import retrain
from retrain.adapters.network.open import open_network
from retrain.data.sources import as_data

Made = tuple[nn.Module, Any]
"""A network and its samples."""


def numbers(*shape: int) -> np.ndarray:
    """Normal samples."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def tokens(*shape: int, count: int = 64) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng(0).integers(2, count, shape)


class Residual(nn.Module):
    """A residual block of convolutions with batch norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class UNet(nn.Module):
    """Down, up by a transposed convolution, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        a = torch.relu(self.down1(x))
        b = torch.relu(self.up(torch.relu(self.down2(a))))
        return self.join(torch.cat([a, b], 1))


class Recurrent(nn.Module):
    """Token ids, an embedding, a recurrent layer, a head."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(24, 8)
        self.recur = kind(16, 24, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        return self.head(self.recur(self.embed(ids))[0])


class Heads(nn.Module):
    """Two inputs by name, two heads in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.extra = nn.Conv2d(3, 6, 3), nn.Linear(5, 6)
        self.classes, self.size = nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
        """Run it."""
        x = torch.relu(self.image(image)).mean((2, 3)) + self.extra(extra)
        return {"size": self.size(x), "logits": self.classes(x)}


class Dynamic(nn.Module):
    """A loop and a branch on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(4)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        for number, layer in enumerate(self.layers):
            if x.shape[-1] == 12 and number % 2 == 0:
                x = x + torch.nn.functional.silu(layer(x))
            else:
                x = layer(x)
        return self.out(x)


class Tied(nn.Module):
    """A head that shares the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Run it."""
        return self.head(torch.relu(self.middle(self.embed(ids))))


def vgg() -> nn.Module:
    """A small VGG with batch norm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
                   nn.MaxPool2d(2)]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


PLAIN: dict[str, Callable[[], Made]] = {
    "MLP": lambda: (
        nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)),
        numbers(64, 20),
    ),
    "VGG-BN": lambda: (vgg(), numbers(16, 3, 32, 32)),
    "ResNet blocks": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.Flatten(), nn.Linear(800, 5)
        ),
        numbers(12, 3, 12, 12),
    ),
    "U-Net": lambda: (UNet(), numbers(8, 3, 16, 16)),
    "Conv1d": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 8, 5, 2),
            nn.GELU(),
            nn.Conv1d(8, 8, 3, dilation=2),
            nn.Flatten(),
            nn.Linear(80, 4),
        ),
        numbers(16, 2, 31),
    ),
    "Conv3d": lambda: (
        nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(4, 4, 3, 2),
            nn.Flatten(),
            nn.Linear(108, 4),
        ),
        numbers(8, 1, 7, 7, 7),
    ),
    "LSTM tagger": lambda: (Recurrent(nn.LSTM), tokens(16, 12)),
    "GRU tagger": lambda: (Recurrent(nn.GRU), tokens(16, 12)),
    "TransformerEncoder": lambda: (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
        numbers(8, 10, 16),
    ),
    "two inputs, two heads": lambda: (
        Heads(),
        {"image": numbers(12, 3, 8, 8), "extra": numbers(12, 5)},
    ),
    "control flow": lambda: (Dynamic(), numbers(32, 12)),
    "weight-tied": lambda: (Tied(), tokens(16, 9)),
}

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**TEXT, "intermediate_size": 64}
WORDS: dict[str, Any] = {**WIDE, "vocab_size": 64}
GROUPED: dict[str, Any] = {**WORDS, "num_key_value_heads": 2}
PATCHES: dict[str, Any] = {**WIDE, "image_size": 32, "patch_size": 8}

# Class, configuration, and what goes in; sizes are small, the structure is the architecture's own.
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig",
              GROUPED, "ids"),
    "Mistral": ("MistralForCausalLM", "MistralConfig",
                GROUPED, "ids"),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config",
              GROUPED, "ids"),
    "OPT": ("OPTForCausalLM", "OPTConfig",
            {**TEXT, "ffn_dim": 64, "vocab_size": 64, "word_embed_proj_dim": 32,
             "max_position_embeddings": 64}, "mask"),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config",
              {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "ids"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig",
                 WORDS, "ids"),
    "BERT": ("BertModel", "BertConfig", WORDS, "mask"),
    "RoBERTa": ("RobertaModel", "RobertaConfig",
                WORDS, "mask"),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig",
                   {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
                    "vocab_size": 64}, "mask"),
    "ALBERT": ("AlbertModel", "AlbertConfig",
               {**WORDS, "embedding_size": 16}, "mask"),
    "ELECTRA": ("ElectraModel", "ElectraConfig",
                {**WORDS, "embedding_size": 16}, "mask"),
    "DeBERTa-v2": ("DebertaV2Model", "DebertaV2Config",
                   WORDS, "mask"),
    "T5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "vocab_size": 64}, "seq2seq"),
    "BART": ("BartForConditionalGeneration", "BartConfig",
             {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
              "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
              "vocab_size": 64}, "seq2seq"),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
                 "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
                 "decoder_attention_heads": 4, "vocab_size": 64, "num_mel_bins": 8,
                 "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 1, "decoder_start_token_id": 1}, "speech"),
    "Mamba": ("MambaForCausalLM", "MambaConfig",
              {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
               "vocab_size": 64}, "ids"),
    "ViT": ("ViTForImageClassification", "ViTConfig",
            PATCHES, "image"),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig",
             PATCHES, "image"),
    "BEiT": ("BeitForImageClassification", "BeitConfig",
             {**TEXT, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
              "out_indices": [1]}, "image"),
    "CLIP vision": ("CLIPVisionModel", "CLIPVisionConfig",
                    PATCHES, "image"),
    "Swin": ("SwinForImageClassification", "SwinConfig",
             {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
              "num_heads": [2, 4], "window_size": 4}, "image"),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}, "image64"),
    "ResNet-50 (small)": ("ResNetForImageClassification", "ResNetConfig",
                          {"embedding_size": 8, "hidden_sizes": [16, 32],
                           "depths": [1, 2]}, "image"),
    "MobileNet-V1": ("MobileNetV1ForImageClassification", "MobileNetV1Config",
                     {"depth_multiplier": 0.125, "min_depth": 4}, "image64"),
    "MobileNet-V2": ("MobileNetV2ForImageClassification", "MobileNetV2Config",
                     {"depth_multiplier": 0.1, "min_depth": 4}, "image64"),
    "EfficientNet-B0": ("EfficientNetForImageClassification", "EfficientNetConfig",
                        {"width_coefficient": 0.25, "depth_coefficient": 0.3,
                         "hidden_dim": 320}, "image64"),
    "RegNet": ("RegNetForImageClassification", "RegNetConfig",
               {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                "groups_width": 4}, "image"),
    "SegFormer": ("SegformerForImageClassification", "SegformerConfig",
                  {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
                   "num_attention_heads": [1, 2, 2, 4]}, "image64"),
    "PoolFormer": ("PoolFormerForImageClassification", "PoolFormerConfig",
                   {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}, "image64"),
}  # fmt: skip


def hugging_face(name: str) -> Made:
    """Build an architecture of transformers with random weights, and samples for it."""
    library: Any = importlib.import_module("transformers")
    library.logging.set_verbosity(50)
    kind, config, options, inputs = HUGGING_FACE[name]
    model = getattr(library, kind)(getattr(library, config)(**options))
    ids, ones = tokens(12, 10), np.ones((12, 10), dtype=np.int64)
    ones[:6, 7:] = 0
    samples = {
        "ids": {"input_ids": ids},
        "mask": {"input_ids": ids, "attention_mask": ones},
        "seq2seq": {"input_ids": ids, "decoder_input_ids": tokens(12, 6)},
        "speech": {"input_features": numbers(6, 8, 40), "decoder_input_ids": tokens(6, 5)},
        "image": {"pixel_values": numbers(8, 3, 32, 32)},
        "image64": {"pixel_values": numbers(6, 3, 64, 64)},
    }
    return model, samples[inputs]


def matrix_weights(model: nn.Module) -> int:
    """Entries of parameters with at least two axes of more than one entry, embeddings left out."""
    looked_up = {
        parameter.data_ptr()
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if sum(size > 1 for size in parameter.shape) > 1 and parameter.data_ptr() not in looked_up
    )


def measure(made: Callable[[], Made]) -> dict[str, Any]:
    """Read, prune, reload one network."""
    torch.manual_seed(0)
    model, samples = made()
    model.eval()
    data = as_data(samples)
    started = time.perf_counter()
    stream = open_network(model, data)
    open_weights = sum(spec.size for spec in stream.layers if spec.reason is None)
    row: dict[str, Any] = {
        "read by": "hooks" if stream.captured is None else "export",
        "weights": matrix_weights(model),
        "retrainable": open_weights,
        "left": {spec.name: spec.reason for spec in stream.layers if spec.reason is not None},
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = retrain.lobs(model, data, sparsity=0.0).model.state_dict()
    row["sparsity 0 the same"] = all(torch.equal(same[name], before[name]) for name in before)
    with tempfile.TemporaryDirectory() as folder:
        run = retrain.lobs(model, data, sparsity=0.5, method="one-shot", out=Path(folder) / "run")
        again = retrain.load(Path(folder) / "run", model).model.state_dict()
    now = run.model.state_dict()
    row["reload equals"] = all(torch.equal(again[name], now[name]) for name in now)
    row["zeros"] = run.record["totals"]["sparsity"]
    row["certified"] = run.certified
    row["bound"] = run.bound is not None
    row["moved"] = run.bounds["calibration"].relative
    row["seconds"] = time.perf_counter() - started
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that are not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench zoo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    makers = dict(PLAIN)
    if importlib.util.find_spec("transformers") is not None:
        makers |= {name: partial(hugging_face, name) for name in HUGGING_FACE}
    done: dict[str, Any] = {}
    if options.out.exists():
        for line in options.out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            done[row["network"]] = row
    print(f"{'network':22} {'read by':8} {'share':>7} {'same':>5} {'reload':>6} {'zeros':>6} "
          f"{'moved':>6} {'bound':>6} {'seconds':>8}")  # fmt: skip
    for name, made in makers.items():
        if options.only is not None and name not in options.only:
            continue
        if name not in done:
            try:
                row = {"network": name, **measure(made)}
            except Exception as error:  # noqa: BLE001 - a row says what went wrong, and the others follow
                text = f"{type(error).__name__}: {str(error).splitlines()[0]:.160}"
                where = traceback.extract_tb(error.__traceback__)[-1]
                row = {"network": name, "error": text, "at": f"{where.filename}:{where.lineno}"}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            done[name] = row
        print(line_of(done[name]), flush=True)
    shown = [row for row in done.values() if "error" not in row]
    full = sum(row["retrainable"] >= 0.95 * row["weights"] for row in shown)
    print(f"{len(done)} networks, {len(shown)} read, {full} with at least 95 % of their weights")
    return 0


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['network']:22} {row['error']} ({row['at']})"
    said = {True: "yes", False: "NO"}
    return (
        f"{row['network']:22} {row['read by']:8} {row['retrainable'] / row['weights']:7.1%} "
        f"{said[row['sparsity 0 the same']]:>5} {said[row['reload equals']]:>6} "
        f"{row['zeros']:6.1%} {row['moved']:6.2f} {'yes' if row['bound'] else 'no':>6} "
        f"{row['seconds']:8.1f}"
    )
