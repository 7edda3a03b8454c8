"""A small language model pruned by every method: perplexity on held-out stories.

``python -m bench stories --data DIR --out DIR`` builds a Hugging Face directory from the weights of
stories260K (5 blocks, 64 wide), prunes all its 35 matrices on calibration sequences, and writes one
JSON line for each method and sparsity, beside magnitude and |w| |x|. With --out, rows that are
there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import retrain
from retrain.adapters.files.hugging_face import load_directory, sequences
from retrain.adapters.network.stream import TorchStream
from retrain.data.arrays import Data
from retrain.runs.accuracy import accuracies

LENGTH = 192
"""Tokens taken of each story, from its beginning; shorter stories are left out."""

TRIM_MEMORY = 2.0**26
"""Bytes of one layer's solve by Net-Trim, which then samples rows: a few thousand of 24 768. More
rows take longer in proportion and fit better."""

METHODS = ("magnitude", "wanda", "sweep", "one-shot", "lobs", "net-trim", "net-trim refitted")


def vocabulary(path: Path) -> list[tuple[bytes, float]]:
    """Read a llama2.c vocabulary: text and score of each token."""
    content = path.read_bytes()
    place, found = 4, []
    while place < len(content):
        score, size = struct.unpack_from("<fi", content, place)
        place += 8
        found.append((content[place : place + size], score))
        place += size
    return found


def encode(text: str, tokens: list[tuple[bytes, float]]) -> list[int]:
    """Encode a text as llama2.c does: bytes, then the best pairs joined."""
    numbers = {piece: index for index, (piece, _) in reversed(list(enumerate(tokens)))}
    ids = [1]
    for character in " " + text:
        piece = character.encode()
        ids += [numbers[piece]] if piece in numbers else [byte + 3 for byte in piece]
    while True:
        best = None
        for place in range(1, len(ids) - 1):
            joined = numbers.get(tokens[ids[place]][0] + tokens[ids[place + 1]][0])
            if joined is not None and (best is None or tokens[joined][1] > best[0]):
                best = (tokens[joined][1], place, joined)
        if best is None:
            return ids
        _, place, joined = best
        ids[place : place + 2] = [joined]


def build(data: Path, out: Path) -> None:
    """Write the model as a Hugging Face directory."""
    from transformers import LlamaConfig

    held = np.load(data / "models" / "stories260K_named.npz")
    dim, hidden, blocks, heads, kv_heads, count, length = (int(v) for v in held["config"])
    size = dim // heads

    def turned(weight: np.ndarray) -> torch.Tensor:
        """Rotary pairs lie side by side there, in halves here."""
        pairs = weight.reshape(-1, size // 2, 2, dim)
        return torch.tensor(pairs.transpose(0, 2, 1, 3).reshape(weight.shape))

    state = {"model.embed_tokens.weight": torch.tensor(held["tok"])}
    state["model.norm.weight"] = torch.tensor(held["rms_final"])
    for block in range(blocks):
        name = f"model.layers.{block}."
        state[f"{name}input_layernorm.weight"] = torch.tensor(held["rms_att"][block])
        state[f"{name}post_attention_layernorm.weight"] = torch.tensor(held["rms_ffn"][block])
        state[f"{name}self_attn.q_proj.weight"] = turned(held["wq"][block])
        state[f"{name}self_attn.k_proj.weight"] = turned(held["wk"][block])
        for theirs, ours in (("wv", "self_attn.v_proj"), ("wo", "self_attn.o_proj"),
                             ("w1", "mlp.gate_proj"), ("w2", "mlp.down_proj"),
                             ("w3", "mlp.up_proj")):  # fmt: skip
            state[f"{name}{ours}.weight"] = torch.tensor(held[theirs][block])
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=count,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(out)
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )


def stories(data: Path, cache: Path) -> tuple[Data, Data]:
    """Calibration and held-out sequences: whole stories of the file, two thirds and the rest."""
    if not cache.exists():
        tokens = vocabulary(data / "models" / "tok512.bin")
        text = (data / "text" / "stories260K_model_samples.txt").read_text(encoding="utf-8")
        parts = [part.strip() for part in text.split("<|endoftext|>")]
        np.savez(cache, *[np.array(encode(part, tokens)) for part in parts])
    held = np.load(cache)
    every = [held[name][:LENGTH] for name in held.files if len(held[name]) >= LENGTH]
    cut = 2 * len(every) // 3
    sets = (np.concatenate(every[:cut]), np.concatenate(every[cut:]))
    names = ("stories", "held-out stories")
    found = [sequences(s, n, causal=True, length=LENGTH) for s, n in zip(sets, names, strict=True)]
    return found[0], found[1]


def prune(folder: Path, method: str, sparsity: float, data: Data) -> Any:
    """Prune all matrices of the blocks; return the network and figures of the run."""
    module = load_directory(folder).module
    if method in ("magnitude", "wanda"):
        stream = TorchStream(module, data)
        for spec in stream.layers:
            if spec.reason is None:
                weight = stream.weight(spec.name)
                score = weight.abs()
                if method == "wanda":
                    batches = stream.batches(spec.name)
                    squares = sum((batch.inputs.double() ** 2).sum(0) for batch in batches)
                    score = score * squares.sqrt()[:, None].float()
                    order = score.argsort(dim=0)[: round(sparsity * len(weight))]
                    weight.scatter_(0, order, 0.0)
                else:
                    gone = score.flatten().argsort()[: round(sparsity * weight.numel())]
                    weight = weight.contiguous()
                    weight.view(-1)[gone] = 0
                stream.commit(spec.name, weight)
        return stream.model
    if method.startswith("net-trim"):
        trimmed = retrain.net_trim(
            module, data, sparsity=sparsity, accept_inexact=True, memory=TRIM_MEMORY
        ).model
        return trimmed if method == "net-trim" else refitted(module, trimmed, data)
    name = "swaps" if method == "lobs" else method
    return retrain.lobs(
        module, data, sparsity=sparsity, method=name, calibration="sequential"
    ).model


def refitted(dense: Any, pruned: Any, data: Data) -> Any:
    """Least squares on the pruned network's supports, layer by layer.

    Each layer's inputs are those of the network refitted so far, its targets the dense network's
    responses.
    """
    source, stream = TorchStream(pruned, data), TorchStream(dense, data)
    for spec in stream.layers:
        if spec.reason is not None:
            continue
        kept = source.weight(spec.name, dense=True).double() != 0
        gram, cross = 0.0, 0.0
        for batch in stream.batches(spec.name):
            inputs = batch.inputs.double()
            gram = gram + inputs.T @ inputs
            cross = cross + inputs.T @ batch.responses.double()
        assert isinstance(gram, torch.Tensor) and isinstance(cross, torch.Tensor)
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.zeros_like(cross)
        for unit in range(cross.shape[1]):
            on = kept[:, unit].nonzero()[:, 0]
            weight[on, unit] = torch.linalg.solve(gram[on][:, on], cross[on, unit])
        stream.commit(spec.name, weight)
    return stream.model


def measure(network: Any, held_out: Data) -> dict[str, Any]:
    """Perplexity and share of next tokens predicted, on held-out sequences."""
    found = accuracies(TorchStream(network, held_out), held_out)
    return {"perplexity": found["perplexity"]["before"], "accuracy": found["before"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench stories", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    folder, rows = options.out / "stories260K", options.out / "rows.jsonl"
    if not (folder / "config.json").exists():
        build(options.data, folder)
    data, held_out = stories(options.data, options.out / "tokens.npz")
    done = {}
    if rows.exists():
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            done[row["method"], row["sparsity"]] = row
    plan = [(method, s) for s in options.sparsity for method in options.methods]
    for method, sparsity in [("dense", 0.0), *plan]:
        if (method, sparsity) not in done:
            started = time.perf_counter()
            network = (
                load_directory(folder).module
                if method == "dense"
                else prune(folder, method, sparsity, data)
            )
            seconds = time.perf_counter() - started
            row = {"method": method, "sparsity": sparsity, "seconds": seconds}
            row |= measure(network, held_out)
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            done[method, sparsity] = row
        row = done[method, sparsity]
        print(
            f"{method:17} {sparsity:4.0%}  perplexity {row['perplexity']:9.4f}  "
            f"next token {row['accuracy']:6.2%}  {row['seconds']:7.1f} s",
            flush=True,
        )
    return 0
