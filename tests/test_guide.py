"""The guide's blocks run, in the short setting: a tiny model, two steps. What fails on purpose says what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import guide
from conftest import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs" / "guide").glob("*.md")), ROOT / "docs" / "hardware.md"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A base with room for the bundled examples, which are long in the tests' own tokens."""
    path = tmp_path_factory.mktemp("guide") / "tiny"
    sizes = {"hidden_size": 96, "intermediate_size": 100, "num_key_value_heads": 6}  # rank 64 must fit
    tiny_llama(max_position_embeddings=2048, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tiny, tmp_path, monkeypatch):
    for key, value in guide.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    work = tmp_path / "work"
    work.mkdir()
    assert guide.go(page, work, tiny=tiny) == []


def test_the_examples_of_contributing_fit_the_code():
    """The lines that each patch replaces are in the file that it names, once."""
    patches = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)
    files = [part for patch in patches for part in re.split(r"^--- a/", patch, flags=re.M)[1:]]
    assert len(patches) == 4 and len(files) >= 8
    for part in files:
        name, *hunks = re.split(r"^@@ .*\n", part, flags=re.M)
        text = (ROOT / name.split("\n")[0]).read_text(encoding="utf-8")
        for hunk in hunks:
            before = "".join(line[1:] + "\n" for line in hunk.splitlines() if not line.startswith("+"))
            assert text.count(before) == 1, f"{name.splitlines()[0]}:\n{before}"


def test_a_changed_output_is_found():
    assert guide.difference("loss 0.50\n", "loss 0.51\n", 0.05) is None
    assert guide.difference("loss 0.50\n", "loss 0.60\n", 0.05) and guide.difference("loss 0.50\n", "lost 0.50\n", None)
    assert guide.difference("loss 0.50\n", "loss 9\n", None) is None
    assert guide.difference("a\nb\n", "a\n", None) and guide.difference("a\n", "a\nb\n", None)
