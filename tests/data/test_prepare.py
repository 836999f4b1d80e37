"""Preparation: counted, cached by content, continued after an interruption."""

import numpy as np
import pytest

from veneer.data import prepare as module
from veneer.data.example import Example, Message
from veneer.data.prepare import prepare
from veneer.errors import ConfigError, DataError


def chats(count, words=3):
    return [
        Example(f"f:{i}", (Message("user", f"question {i}"), Message("assistant", f"answer {i} " * words)))
        for i in range(count)
    ]


def run(examples, tokenizer, cache=None, **options):
    return prepare(examples, tokenizer, content_hash="content", cache_dir=cache, **options)


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x.input_ids, y.input_ids) and np.array_equal(x.supervised, y.supervised) for x, y in zip(a, b)
    )


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    made = []
    real = module.tokenize_batch
    monkeypatch.setattr(module, "tokenize_batch", lambda r, t: made.append(len(r)) or real(r, t))
    return made


def test_a_second_preparation_tokenises_nothing(tokenizer, tmp_path, calls):
    first = run(chats(10), tokenizer, tmp_path)
    assert calls == [4, 4, 2] and first.counts.examples == len(first) == 10
    calls.clear()
    second = run(chats(10), tokenizer, tmp_path)
    assert calls == [] and same(first, second) and second.counts == first.counts and second.key == first.key


def test_an_interrupted_preparation_goes_on_at_its_next_shard(tokenizer, tmp_path, calls):
    def interrupted():
        yield from chats(10)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), tokenizer, tmp_path)
    assert calls == [4, 4]
    calls.clear()
    assert same(run(chats(10), tokenizer, tmp_path), run(chats(10), tokenizer)) and calls[:1] == [2]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_damaged_shard_is_made_again(shard, tokenizer, tmp_path, calls):
    first = run(chats(10), tokenizer, tmp_path)
    file = sorted(tmp_path.rglob("*.safetensors"))[shard]
    file.write_bytes(file.read_bytes()[:40])
    assert same(run(chats(10), tokenizer, tmp_path), first)
    calls.clear()
    assert same(run(chats(10), tokenizer, tmp_path), first) and calls == []


def test_an_exact_multiple_of_the_shard(tokenizer, tmp_path, calls):
    first = run(chats(8), tokenizer, tmp_path)
    assert len(first) == 8 and same(run(chats(8), tokenizer, tmp_path), first)


def test_the_key_covers_template_and_options(tokenizer, make_tokenizer):
    other = make_tokenizer(tokenizer.chat_template.replace("\n", " \n"))
    keys = {run(chats(2), t, max_length=n).key for t in (tokenizer, other) for n in (100, 200)}
    assert len(keys) == 4


@pytest.mark.parametrize("on_long", ["truncate", "drop", "split"])
def test_long_examples_are_counted(on_long, tokenizer):
    data = run([*chats(2), *chats(1, words=60)], tokenizer, max_length=64, on_long=on_long)
    c = data.counts
    assert c.read == 3 and all(len(e.input_ids) <= 64 for e in data) and c.longest <= 64
    if on_long == "truncate":
        assert len(data) == 3 and c.truncated == 1
    elif on_long == "drop":
        assert len(data) == 2 and c.dropped == {"longer than max_length": 1}
    else:
        whole = run(chats(1, words=60), tokenizer)[0]
        assert c.split == 1 and np.array_equal(np.concatenate([e.input_ids for e in list(data)[2:]]), whole.input_ids)


def test_an_example_whose_answer_is_cut_off_entirely_is_dropped_and_counted(tokenizer):
    long_prompt = Example("f:9", (Message("user", "why " * 100), Message("assistant", "because")))
    data = run([*chats(1), long_prompt], tokenizer, max_length=40)
    assert len(data) == 1 and data.counts.dropped == {"no supervised token within max_length": 1}


def test_nothing_to_learn_from_is_refused(tokenizer):
    with pytest.raises(DataError, match="no supervised token in 1 examples"):
        run(
            [Example("f:9", (Message("user", "why " * 100), Message("assistant", "because")))], tokenizer, max_length=40
        )


def test_indexing(tokenizer, calls):
    data = run(chats(10), tokenizer)
    assert np.array_equal(data[-1].input_ids, data[9].input_ids)
    with pytest.raises(IndexError):
        data[10]


def test_without_a_cache_no_hash_is_needed_and_a_cache_needs_one(tokenizer, tmp_path):
    assert same(prepare(chats(3), tokenizer), run(chats(3), tokenizer))
    assert prepare(chats(3), tokenizer).key != prepare(chats(3, words=4), tokenizer).key
    with pytest.raises(ConfigError, match="cache_dir needs content_hash"):
        prepare(chats(3), tokenizer, cache_dir=tmp_path)
