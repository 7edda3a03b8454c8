"""The code blocks of CONTRIBUTING.md are complete programs that run and hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

WANTED = (
    "A solver",
    "A penalty",
    "A method over layers",
    "A layer kind",
    "A trainer",
    "A statement to verify",
)


def sections():
    """Python blocks by the heading that they stand under."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


BLOCKS = {heading: blocks for heading, blocks in sections().items() if blocks}


def test_what_is_explained_has_one_example_each():
    assert set(WANTED) <= set(BLOCKS)
    assert all(len(blocks) == 1 for blocks in BLOCKS.values())


@pytest.mark.parametrize("heading", BLOCKS)
def test_block(heading, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[heading][0], encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip(), "a block prints what it shows"
    assert [path.name for path in tmp_path.iterdir()] == ["block.py"]


@pytest.mark.parametrize("heading", BLOCKS)
def test_block_is_formatted_and_clean(heading):
    for command in (["format", "--check", "--diff"], ["check", "--ignore", "D,T20,S"]):
        answer = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", "block.py", "-"],
            cwd=ROOT,
            input=BLOCKS[heading][0],
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
