"""The one form that every data format is read into, and the one form that training consumes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One training example as text, before any template or tokenizer.

    Either a conversation (`messages` non-empty: the chat template applies, assistant turns are supervised) or raw text
    (`messages` empty: no template; `completion` and the end-of-text token are supervised, `prompt` is not; plain text
    is a completion with an empty prompt). `where` names the source for messages to the user, as ``file:line``.
    """

    where: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids (length T, int32) and which of them are supervised (length T, bool).

    ``supervised[t]`` says that token t is a target: the loss is on predicting ``input_ids[t]`` from the tokens before.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
