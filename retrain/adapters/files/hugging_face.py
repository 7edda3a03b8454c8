"""Networks and text in the form of a Hugging Face directory (extra ``hf``).

A directory holds ``config.json``, the weights as safetensors (one file or shards), and a
tokenizer's files. The network is built by the class of `transformers` that the configuration names,
never by code of the directory, and nothing is fetched. What is written back opens with
``from_pretrained``.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from retrain.adapters.files.load import LoadedModel
from retrain.adapters.network.modes import apart
from retrain.adapters.network.tensors import check_finite
from retrain.data.arrays import Data, first, several
from retrain.files import first_line

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Names of the weights' file, or of the list of its shards."""

_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the classes of language models that predict the next token end."""

LENGTH = 128
"""Tokens of a sequence cut from a text file. Longer ones cost more memory in attention, and show
what a network does with a longer context."""

_LARGEST_TEXT = 2**30
"""Bytes of a text file that is read; a larger one is refused."""


def is_directory(path: Path) -> bool:
    """Tell whether a directory is one of Hugging Face's.

    Parameters
    ----------
    path : Path
        Directory.

    Returns
    -------
    bool
        Whether it has a configuration and weights.
    """
    has_weights = any((path / name).is_file() for name in _WEIGHTS)
    return (path / "config.json").is_file() and has_weights


def _library() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            "model: a Hugging Face directory wants transformers; pip install 'retrain[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _architecture(path: Path) -> str:
    """Name of the class in a directory's configuration."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") if isinstance(config, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model: {path / 'config.json'}: {first_line(error)}") from error
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"model: {path / 'config.json'}: names no architecture")
    return names[0]


def _is_model(kind: Any, library: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)


@apart()
def load_directory(path: str | Path) -> LoadedModel:
    """Load a network from a Hugging Face directory.

    Parameters
    ----------
    path : str or Path
        Directory with ``config.json`` and safetensors.

    Returns
    -------
    LoadedModel
        Network in the dtype of its file, and the class that read it.

    Raises
    ------
    ValueError
        If transformers is not installed or has no such class, a file is damaged, or tensors are
        missing. Code in the directory is not run.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise ValueError(f"model: {str(path)!r} has no safetensors ({' or '.join(_WEIGHTS)})")
    library, name = _library(), _architecture(path)
    kind: Any = getattr(library, name, None)
    if not _is_model(kind, library):
        raise ValueError(
            f"model: {str(path)!r} is a {name}, which transformers {library.__version__} does not "
            "have; code of the directory is not run (build it yourself and pass the module)"
        )
    try:
        module, found = kind.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
    except Exception as error:  # the library raises errors of many kinds for damaged files
        raise ValueError(
            f"model: {str(path)!r}: {type(error).__name__}: {first_line(error):.200}"
        ) from error
    lacking = sorted(found.get("missing_keys", ()))
    if lacking:
        raise ValueError(f"model: {str(path)!r} lacks {lacking[0]!r} ({len(lacking)} tensors)")
    module.eval()
    check_finite(module)
    names = {entry: entry for entry in module.state_dict()}
    return LoadedModel(module, names, path, f"read by transformers' {name}")


def copy_beside(source: Path, target: Path) -> None:
    """Copy what belongs to a directory beside its weights: configuration, tokenizer.

    Parameters
    ----------
    source : Path
        Hugging Face directory that the network came from.
    target : Path
        Run directory.
    """
    for file in sorted(source.iterdir()):
        plain = file.is_file() and not file.is_symlink()
        known = file.suffix in (".json", ".txt", ".model", ".jinja")
        if plain and known and file.name not in ("run.json", *_WEIGHTS):
            shutil.copyfile(file, target / file.name)


def text_data(
    file: str | Path, directory: str | Path, *, length: int = LENGTH, limit: int | None = None
) -> Data:
    """Cut a text file into sequences of tokens by a network's own tokenizer.

    Parameters
    ----------
    file : str or Path
        Text in UTF-8.
    directory : str or Path
        Hugging Face directory with the tokenizer.
    length : int, optional
        Tokens of a sequence.
    limit : int, optional
        Sequences to return; all whole ones by default.

    Returns
    -------
    Data
        ``input_ids``, and for networks that predict the next token the following token of each as
        its label (-100 for the last, which has none).

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If it is too large, is not text, or is shorter than one sequence.
    """
    file, directory = Path(file), Path(directory)
    if not file.is_file():
        raise FileNotFoundError(f"data: there is no file {str(file)!r}")
    if file.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"data: {str(file)!r} is larger than {_LARGEST_TEXT >> 20} MiB")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {str(file)!r} is not UTF-8 text ({error.reason})") from error
    library = _library()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # as above
        raise ValueError(
            f"data: the tokenizer of {str(directory)!r}: {type(error).__name__}: "
            f"{first_line(error):.200}"
        ) from error
    return sequences(ids, str(file), causal=is_causal(directory), length=length, limit=limit)


def is_causal(directory: Path) -> bool:
    """Tell whether a directory's network predicts the next token.

    Parameters
    ----------
    directory : Path
        Hugging Face directory.

    Returns
    -------
    bool
        By the name of its class.
    """
    return _architecture(directory).endswith(_CAUSAL)


def sequences(
    ids: Any, name: str, *, causal: bool, length: int = LENGTH, limit: int | None = None
) -> Data:
    """Cut token ids into sequences.

    Parameters
    ----------
    ids : sequence of int
        Tokens of a text.
    name : str
        Name in messages and records.
    causal : bool
        Whether each token's label is the one that follows.
    length : int, optional
        Tokens of a sequence.
    limit : int, optional
        Sequences to return.

    Returns
    -------
    Data
        ``input_ids`` of shape (sequences, length), with labels where `causal`.

    Raises
    ------
    ValueError
        If there are fewer tokens than one sequence has.
    """
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"data: {name!r} has {len(ids)} tokens, want at least {length}")
    tokens = np.asarray(ids[: count * length], dtype=np.int64).reshape(count, length)
    labels = None
    if causal:
        labels = np.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
    return first(several((("input_ids", tokens),), labels, name), limit)
