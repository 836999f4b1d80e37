"""veneer merge, extract, resize and diff on the command line."""

from __future__ import annotations

import json

import pytest
import torch

import veneer
from conftest import tiny_llama


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A sharded bfloat16 base with its tokenizer, and two adapters of it."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "base")
    for number, name in enumerate("ab"):
        model, _ = veneer.load_base(tmp_path / "base", dtype="bfloat16", device="cpu")
        bank = veneer.attach(model, veneer.AdapterConfig(rank=4 + number), seed=number)
        for parameter in bank.parameters("default").values():
            parameter.data += 0.1 * torch.randn_like(parameter)
        veneer.save_adapter(model, tmp_path / name)
    return tmp_path


def test_merge_file_by_file_then_extract(cli, folder):
    done = cli("merge", folder / "base", folder / "a", "--out", folder / "merged", "--device", "cpu")
    assert done.code == 0 and "2 files" in done.out and "logit error" in done.out and "memory" not in done.err, done
    done = cli("merge", folder / "base", folder / "a", "-o", folder / "random", "--stochastic-rounding", "--no-verify")
    assert done.code == 0 and "stochastic" in done.out and "not verified" in done.out, done
    done = cli("extract", folder / "merged", folder / "base", "--out", folder / "back", "--rank", "4")
    assert done.code == 0 and "rank     4 in 14 layers" in done.out, done
    done = cli("diff", folder / "a", folder / "back")
    assert done.code == 0 and float(done.out.split("cosine ")[1].split(",")[0]) > 0.99, done
    assert cli("merge", folder / "base", folder / "a", "--out", folder / "merged").code == 2


def test_merge_falls_back_to_memory_and_says_so(cli, folder, tokenizer):
    model, own = veneer.load_base(folder / "base", device="cpu")
    config = veneer.AdapterConfig(target_modules=["q_proj"], new_tokens=["<a>"])
    veneer.attach(model, config, tokenizer=own, seed=0)
    veneer.save_adapter(model, folder / "tokens", tokenizer=own)
    done = cli("merge", folder / "base", folder / "tokens", "--out", folder / "merged", "--device", "cpu")
    assert done.code == 0 and "merging in memory: the adapter brings new tokens" in done.err, done
    done = cli("merge", folder / "base", folder / "tokens", "--out", folder / "other", "--stochastic-rounding")
    assert done.code == 2 and "new tokens" in done.err, done


def test_resize_and_diff(cli, folder):
    done = cli("resize", folder / "b", "--rank", "2", "--out", folder / "small")
    assert done.code == 0 and "5 → 2" in done.out, done
    done = cli("resize", folder / "b", "--energy", "0.9", "--per-layer", "--out", folder / "some")
    assert done.code == 0 and "error" in done.out, done
    done = cli("diff", folder / "a", folder / "b", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and len(found["layers"]) == 14 and abs(found["cosine"]) < 0.2
    done = cli("diff", folder / "b", folder / "small")
    assert done.code == 0 and "least alike" in done.out, done
    assert cli("resize", folder / "b", "--out", folder / "x").code == 2


def test_forgetting_is_combine_with_a_negative_weight(cli, folder):
    done = cli("combine", folder / "a", folder / "b", "--weights", "1,-1", "--out", folder / "less")
    assert done.code == 0, done
    found = json.loads(cli("diff", folder / "a", folder / "less", "--json").out)
    other = json.loads(cli("diff", folder / "a", folder / "b", "--json").out)
    norm = sum(layer["norm_b"] ** 2 for layer in other["layers"]) / sum(
        layer["norm_a"] ** 2 for layer in other["layers"]
    )
    assert found["distance"] == pytest.approx(norm**0.5, rel=1e-4)
