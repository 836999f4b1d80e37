"""The guide's blocks run, in the short setting: a tiny model, two steps. What fails on purpose says what the page shows."""

from __future__ import annotations

from pathlib import Path

import guide
import pytest

from conftest import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))

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
