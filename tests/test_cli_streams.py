"""Whatever a terminal's encoding, every command says what it has to say and ends as it should."""

import codecs
import io
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from command import command, start
from torch import nn

from retrain.cli import streams

ENCODINGS = ("ascii", "cp1252", "latin-1", "utf-8", "cp437", "utf-16")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A network whose listing has an arrow, with layers named beyond ASCII, and data for it."""
    folder = tmp_path_factory.mktemp("case")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    torch.save(model.state_dict(), folder / "conv.pt")
    (folder / "mine.py").write_text(
        "from torch import nn\n"
        "def conv():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))\n"
    )
    dense = {"été→.weight": torch.randn(5, 6), "中.weight": torch.randn(3, 5)}
    torch.save(dense, folder / "é→.pt")
    rng = np.random.default_rng(0)
    np.savez(folder / "é.npz", x=rng.normal(size=(40, 6)).astype(np.float32), y=np.arange(40) % 3)
    (folder / "r.toml").write_text(
        'title = "é → 中"\n[data]\ntrain = "é.npz"\n[model]\narchitecture = "dense"\n'
        "widths = [6, 5, 3]\n[training]\nepochs = 1\n[optimizer]\nname = 'sgd'\nlr = 0.1\n",
        encoding="utf-8",
    )
    return folder


def in_encoding(encoding):
    """Give this process standard streams of an encoding, as PYTHONIOENCODING would."""
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding=encoding)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, encoding=encoding)


COMMANDS = {
    "layers": ("layers", "conv.pt", "--arch", "mine:conv"),
    "trim": ("trim", "é→.pt", "--data", "é.npz", "--out", "OUT"),
    "lobs": ("lobs", "é→.pt", "--data", "é.npz", "--sparsity", "0.5", "--out", "OUT"),
    "train": ("train", "r.toml", "--out", "OUT"),
    "verify": ("verify", "net-trim/theorem-1"),
    "list": ("train", "--list"),
    "refusal": ("layers", "中→.pt"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("encoding", ENCODINGS[:4])
def test_every_command_in_every_encoding(case, tmp_path, encoding, name):
    out = tmp_path / "ö→"
    arguments = [out if part == "OUT" else part for part in COMMANDS[name]]
    code, shown, errors = _bytes_of(case, arguments, partial(in_encoding, encoding))
    assert code == (2 if name == "refusal" else 0), errors
    text = (shown + errors).decode(encoding)
    assert "Traceback" not in text and "codec" not in text
    if name == "layers":
        assert ("1→2 channels" if encoding == "utf-8" else "1->2 channels") in text
    if name == "refusal":
        assert ("中→.pt" if encoding == "utf-8" else "\\u4e2d->.pt") in text


def _bytes_of(folder, arguments, prepare):
    running = start(folder, *arguments, prepare=prepare)
    running.process.join(100)
    content = [file.read_bytes() for file in running.files]
    return running.process.exitcode, *content


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}])
def test_a_fresh_interpreter(case, variables):
    """As a terminal has it; in the C locale Python's own UTF-8 mode is off."""
    environment = {**os.environ, **variables, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-m", "retrain", "layers", "conv.pt", "--arch", "mine:conv"],
        capture_output=True,
        cwd=case,
        env=environment,
        timeout=100,
        check=False,
    )
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert b"1->2 channels" in answer.stdout


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_text_can_be_written(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    streams.make_streams_safe()
    text = "".join(map(chr, range(1, 0x3000))) + "\udcff\ud800 中 🙂"
    sys.stdout.write(text)
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert "\\udcff\\ud800" in shown
    if encoding in ("ascii", "latin-1"):
        assert "->" in shown and "\\u4e2d" in shown and "\\U0001f642" in shown
    assert codecs.lookup_error("retrain-ascii")


def test_an_output_that_is_empty_is_refused(case):
    for name in ("trim", "lobs", "train"):
        arguments = ["" if part == "OUT" else part for part in COMMANDS[name]]
        assert "out: got '', want a directory" in command(case, *arguments).error()
    for arguments in (("verify", "net-trim/theorem-1", "--out", ""), ("demo", "--out", "")):
        assert "out: got '', want a directory" in command(case, *arguments).error()
