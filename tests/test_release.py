"""What a release stands on: one version everywhere; hooks and CI run what a person runs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]


def field(name):
    """A top-level field of CITATION.cff."""
    (value,) = re.findall(rf"^{name}: (.+)$", read("CITATION.cff"), re.MULTILINE)
    return value


def test_the_citation_is_of_this_version():
    assert field("version") == PROJECT["version"]
    assert field("license") == PROJECT["license"]
    assert field("title") == PROJECT["name"]
    assert field("cff-version") == "1.2.0"


def test_the_changelog_has_this_version():
    assert re.search(rf"^## {re.escape(PROJECT['version'])}\b", read("CHANGELOG.md"), re.MULTILINE)


def test_hooks_are_local_and_run_what_make_lint_runs():
    text = read(".pre-commit-config.yaml")
    assert set(re.findall(r"repo: (\S+)", text)) == {"local"}
    hooks = re.findall(r"entry: \.venv/bin/(.+)$", text, re.MULTILINE)
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", read("Makefile"), re.MULTILINE).group(1)
    lint = re.findall(r"\$\(BIN\)/(.+)$", recipe, re.MULTILINE)
    assert hooks == [re.sub(r" (\.|\$\$\(.*\))$", "", command) for command in lint]


def test_the_workflow_runs_what_a_person_runs():
    text = read(".github/workflows/ci.yml")
    assert "run: .ci/run" in text
    assert 'python-version: "3.11"' in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
