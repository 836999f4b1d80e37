"""Text as it streams, and how tokens are chosen."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CORPUS
from veneer.serve.answers import Logprobs
from veneer.serve.request import Sampling, TokenLogprob
from veneer.serve.sampling import choose, generator, logprobs
from veneer.serve.slots import common_start
from veneer.serve.text import StopFilter, TextStream


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("ab é你🙂ñ\n"), max_size=30))
def test_streamed_text_is_the_whole_text_in_whole_characters(text, tokenizer):
    tokens = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.rest() == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    tokens = tokenizer("ok 🙂")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.add(t) for t in tokens) == "ok "
    assert stream.rest() == "\ufffd" == tokenizer.decode(tokens)[3:]


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_cuts_exactly_where_it_first_begins(pieces, stop):
    text = "".join(pieces)
    found = [text.find(s) for s in stop if s in text]
    flow, out = StopFilter(tuple(stop)), ""
    for piece in pieces:
        out += flow.add(piece)
        cut = [out.find(s) for s in stop if s in out]
        assert not cut  # nothing of a stop string was ever shown
        if flow.hit:
            break
    assert flow.hit == bool(found)
    out += flow.rest()
    assert text.startswith(out)
    if not found:
        assert out == text
    else:
        assert any(text[len(out) :].startswith(s) for s in stop)


def test_draws_invert_the_cut_distribution():
    """Over an even grid of draws each token comes as often as its probability says, and no other comes."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    count = 4000
    draws = [(n + 0.5) / count for n in range(count)]
    rules = (
        (1.0, 0, 0.7),
        (0.8, 0, 1.0),
        (0.99, 0, 30.0),
        (1.0, 5, 2.0),
        (0.6, 9, 1.0),
        (0.5, 290, 30.0),
        (1.0, 290, 30.0),
    )
    for top_p, top_k, heat in rules:
        p = (logits[0].double() / heat).softmax(-1)
        best, index = p.sort(descending=True)
        kept = torch.arange(300) < (top_k or 300)
        best = best * kept / (best * kept).sum()
        kept &= best.cumsum(0) - best < top_p
        wanted = torch.zeros(300, dtype=torch.float64)
        wanted[index[kept]] = best[kept] / best[kept].sum()
        rule = Sampling(1, temperature=heat, top_p=top_p, top_k=top_k)
        got = torch.bincount(choose(logits.expand(count, -1), [rule] * count, draws), minlength=300) / count
        assert (got - wanted).abs().max() < 1.5 / count, (top_p, top_k, heat)


def test_rows_are_chosen_each_by_its_own_rules():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    rules = [Sampling(1, 0.0), Sampling(1, 2.0), Sampling(1, 0.5, 0.3), Sampling(1, 1.0, top_k=1)]
    together = choose(logits, rules, [0.3, 0.999999, 0.9, 0.5])
    for n, draw in enumerate([0.3, 0.999999, 0.9, 0.5]):
        assert together[n] == choose(logits[n : n + 1], [rules[n]], [draw])[0]
    assert together[0] == logits[0].argmax() and together[3] == logits[3].argmax()
    assert choose(logits[:1].masked_fill(torch.arange(50) != 7, float("-inf")), [rules[1]], [0.9999999])[0] == 7
    notes = logprobs(logits, together, [None, 0, 3, None])
    assert notes[0] is None and notes[1].top == () and len(notes[2].top) == 3


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_start(one, other):
    length = common_start(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_the_coldest_temperatures_are_greedy_and_negative_seeds_their_own():
    logits = torch.randn(3, 90, generator=torch.Generator().manual_seed(3)) * 20
    for temperature in (1e-7, 1e-40, 1e-300):
        rules = [Sampling(1, temperature, top_k=k, top_p=p) for k, p in ((0, 1.0), (5, 1.0), (0, 0.9))]
        assert choose(logits, rules, [0.1, 0.5, 0.99]).tolist() == logits.argmax(-1).tolist()
    assert len({generator(seed).random() for seed in (-2, -1, 0, 1, 2, -(2**70), 2**70)}) == 7


@cache
def sentencepiece():
    """A tokenizer as Llama 2's: spaces are part of tokens, and the first of a text loses its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@settings(max_examples=50, deadline=None)
@given(before=st.text(st.sampled_from("abet ,"), max_size=20), text=st.text(st.sampled_from("abet ,"), max_size=20))
def test_text_that_goes_on_has_all_that_its_tokens_say(before, text):
    """Its first space too, which is dropped at the start of a text."""
    tokenizer = sentencepiece()
    tokens = tokenizer(before + text)["input_ids"]
    for cut in range(len(tokens) + 1):
        stream = TextStream(tokenizer, tokens[:cut])
        said = "".join([*map(stream.add, tokens[cut:]), stream.rest()])
        assert tokenizer.decode(tokens[:cut]) + said == tokenizer.decode(tokens)


def test_tokens_of_logprobs_keep_their_spaces():
    tokenizer, text = sentencepiece(), "hello there, how are you"
    found = [TokenLogprob(token, -1.0) for token in tokenizer(text)["input_ids"]]
    shown = Logprobs(tokenizer).text(found)
    assert "".join(shown["tokens"]).strip() == text and len(shown["tokens"]) > 3
