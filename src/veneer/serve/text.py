"""Text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 8
"""Tokens before a text that it is decoded with."""
UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character (yet)."""


class TextStream:
    """Text of a growing list of tokens.

    Tokens are decoded together with a few before them, which settles spaces and characters over several tokens, and
    text that ends in an unfinished character is held back until it is whole. With a text `before` that it goes on from,
    the first token keeps the space that SentencePiece's tokenizers take from the start of a text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer, self.tokens = tokenizer, list(before[-BEFORE:])
        self.start, self.known = 0, self._decode(self.tokens)
        """Of tokens[start:read] the text is known."""
        if self.known.endswith(UNFINISHED):
            self.tokens, self.known = [], ""
        self.read = len(self.tokens)

    def add(self, token: int) -> str:
        """The text that one more token completes."""
        self.tokens.append(token)
        text = self._decode(self.tokens[self.start :])
        if text.endswith(UNFINISHED) or len(text) <= len(self.known):
            return ""
        new = text[len(self.known) :]
        self.start, self.read = self.read, len(self.tokens)
        self.known = self._decode(self.tokens[self.start : self.read])
        return new

    def rest(self) -> str:
        """What is still held back, at the end."""
        return self._decode(self.tokens[self.start :])[len(self.known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopFilter:
    """Passes text on up to the first stop string, and holds back an end that may yet become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop, self.held, self.hit = tuple(s for s in stop if s), "", False

    def add(self, text: str) -> str:
        """The text that is certain by now; after `hit` nothing."""
        if self.hit:
            return ""
        self.held += text
        found = [at for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            self.hit, out, self.held = True, self.held[: min(found)], ""
            return out
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def rest(self) -> str:
        """What was held back, where the answer ends without a stop string."""
        out, self.held = self.held, ""
        return out
