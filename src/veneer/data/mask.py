"""Rendered text to token ids, and which of them are supervised; checked on every example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.data.example import TokenizedExample
from veneer.data.template import Rendered, Span
from veneer.errors import TemplateError


def tokenize_batch(rendered: Sequence[Rendered], tokenizer: Any) -> list[TokenizedExample]:
    """Token ids and supervised masks of several texts, by one call of the fast tokenizer (it uses all cores).

    A token is supervised if its characters overlap a span. Raises `TemplateError` where the result does not decode to
    exactly the span's text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError("the tokenizer gives no character offsets: Veneer needs a fast tokenizer (tokenizer.json)")
    chat = rendered[0].chat
    out = tokenizer(
        [r.text for r in rendered],
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    examples = []
    for r, ids, offsets in zip(rendered, out["input_ids"], out["offset_mapping"]):
        if not chat:
            ids, offsets = _without_added_end(ids, offsets, tokenizer)
        ids, offsets = np.asarray(ids, dtype=np.int32), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        supervised = np.zeros(len(ids), dtype=bool)
        for span in r.spans:
            chosen = (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
            check_span(r, span, ids[chosen], tokenizer)
            supervised |= chosen
        examples.append(TokenizedExample(ids, supervised))
    return examples


def _without_added_end(ids: list[int], offsets: list, tokenizer: Any) -> tuple[list[int], list]:
    """Some tokenizers add an end token of their own after the text, which already holds one."""
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]
    return ids, offsets


def check_span(rendered: Rendered, span: Span, ids: np.ndarray, tokenizer: Any) -> None:
    """The tokens of a span must decode to the assistant's text and its end-of-turn (white space before it aside)."""
    wanted = rendered.text[span.start : span.end]
    found = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if found.lstrip() != wanted.lstrip() and not _lossy_only(found, wanted, tokenizer):
        raise TemplateError(
            f"{rendered.where}: the supervised tokens read {_short(found)!r} and not {_short(wanted)!r}: "
            f"the tokenizer joins the assistant's text with what stands around it"
        )


def _lossy_only(found: str, wanted: str, tokenizer: Any) -> bool:
    """Whether the two differ only as the tokenizer's own normalisation makes any text differ (e.g. unknown characters)."""
    again = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    plain = tokenizer.decode(again, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return plain != wanted and found.strip() == plain.strip()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"


def double_bos(example: TokenizedExample, tokenizer: Any) -> bool:
    """Whether an example begins with two BOS tokens."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or len(example.input_ids) < 2:
        return False
    return bool(example.input_ids[0] == bos and example.input_ids[1] == bos)


def fit_length(example: TokenizedExample, max_length: int, on_long: str) -> list[TokenizedExample]:
    """An example in pieces of at most `max_length` tokens: its start ("truncate"), nothing ("drop") or all ("split")."""
    if len(example.input_ids) <= max_length:
        return [example]
    if on_long == "drop":
        return []
    starts = range(0, len(example.input_ids), max_length) if on_long == "split" else [0]
    return [
        TokenizedExample(example.input_ids[s : s + max_length], example.supervised[s : s + max_length]) for s in starts
    ]
