"""Render a conversation with the model's own chat template, and find what the assistant says in the rendered text.

The template is treated as a function from messages to text. It is called twice: with the messages, and with each
assistant content replaced by a sentinel. The text between the sentinels is what the template itself writes; laid over
the first rendering, it leaves exactly the assistant's text. So no template needs `{% generation %}` markers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.data.example import Example
from veneer.errors import TemplateError


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text: `content`, then `end_of_turn` ("" where there is none)."""

    start: int
    end: int
    content: str
    end_of_turn: str


@dataclass(frozen=True)
class Rendered:
    """One example as text. `chat` says that the template wrote it, with its own BOS if it has one."""

    where: str
    text: str
    spans: tuple[Span, ...]
    chat: bool


def render(example: Example, tokenizer: Any, *, train_on: str = "assistant") -> Rendered:
    """The text of an example and its supervised spans. Raises `TemplateError` naming the example."""
    if not example.messages:
        return _raw(example, tokenizer, train_on)
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    text = _apply(tokenizer, messages, example.where)
    if train_on == "all":
        bos = tokenizer.bos_token or ""
        start = len(bos) if bos and text.startswith(bos) else 0
        return Rendered(example.where, text, (Span(start, len(text), text[start:], ""),), True)
    turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    stem = "veneersentinel"
    while any(stem in m.content for m in example.messages):
        stem += "x"
    sentinels = [f"{stem}{n}z" for n in range(len(turns))]
    for i, sentinel in zip(turns, sentinels):
        messages[i] = messages[i] | {"content": sentinel}
    pieces = _split(_apply(tokenizer, messages, example.where), sentinels, example.where)
    spans = _overlay(example, text, pieces, turns, _special_tokens(tokenizer))
    return Rendered(example.where, text, tuple(spans[-1:] if train_on == "last-assistant" else spans), True)


def _raw(example: Example, tokenizer: Any, train_on: str) -> Rendered:
    end, text = tokenizer.eos_token or "", example.prompt + example.completion
    start = 0 if train_on == "all" else len(example.prompt)
    return Rendered(example.where, text + end, (Span(start, len(text + end), text[start:], end),), False)


def _apply(tokenizer: Any, messages: list[dict[str, str]], where: str) -> str:
    if not tokenizer.chat_template:
        raise TemplateError(f"{where}: the tokenizer has no chat template: pass --chat-template FILE")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever the template's own code raises
        roles = ", ".join(m["role"] for m in messages)
        raise TemplateError(f"{where}: the chat template refuses the roles {roles}: {error}") from None


def _split(text: str, sentinels: list[str], where: str) -> list[str]:
    pieces = []
    for sentinel in sentinels:
        before, found, text = text.partition(sentinel)
        if not found or sentinel in text:
            raise TemplateError(f"{where}: the chat template does not show each assistant message exactly once")
        pieces.append(before)
    return [*pieces, text]


def _overlay(example: Example, text: str, pieces: list[str], turns: list[int], special: list[str]) -> list[Span]:
    """Match the template's own pieces against the text; what is left between them is the assistant's."""
    if not text.startswith(pieces[0]):
        raise TemplateError(f"{example.where}: the chat template writes something else around this assistant message")
    at, spans = len(pieces[0]), []
    for n, turn in enumerate(turns):
        content, after = example.messages[turn].content, pieces[n + 1]
        shown = _shown(text, at, content, after, last=n == len(turns) - 1)
        if shown is None:
            raise TemplateError(
                f"{example.where}: the chat template changes assistant message {n + 1}, so that it cannot be found "
                f"exactly; pass a --chat-template that writes it as it is"
            )
        end = end_of_turn(after, special)
        spans.append(Span(at, at + len(shown) + len(end), shown, end))
        at += len(shown) + len(after)
    return spans


def _shown(text: str, at: int, content: str, after: str, *, last: bool) -> str | None:
    """How the text at `at` shows `content`: as it is, stripped, or (reasoning templates) its tail; None if it doesn't."""
    variants = [content, content.strip(), content.lstrip(), content.rstrip()]
    # A template may drop the reasoning of earlier turns, or lay it out anew: what counts is a tail of the content.
    if "</think>" in content:
        tail = content.rpartition("</think>")[2]
        variants += [tail, tail.strip(), tail.lstrip("\n"), tail.lstrip("\n").rstrip()]
    for shown in variants:
        end = at + len(shown)
        if (
            shown
            and text.startswith(shown, at)
            and text.startswith(after, end)
            and (not last or len(text) == end + len(after))
        ):
            return shown
    return None


def end_of_turn(after: str, special: list[str]) -> str:
    """What ends a turn: up to and with the first special token, if only white space stands before it."""
    bare = after.lstrip()
    token = next((s for s in special if bare.startswith(s)), None)
    return after[: len(after) - len(bare)] + token if token else ""


def _special_tokens(tokenizer: Any) -> list[str]:
    """Special tokens as text, longest first."""
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | {tokenizer.eos_token or ""}
    return sorted(
        added - {"", tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else ""},
        key=lambda s: (-len(s), s),
    )
