"""From the rows that people have to `Example`.

| format     | keys of a row |
|------------|---|
| messages   | messages, conversations or conversation: list of {"role", "content"} (OpenAI) |
| sharegpt   | the same keys: list of {"from", "value"} |
| alpaca     | instruction, output (or response), optional input (or context), system, history |
| completion | prompt + completion, prompt + response or question + answer: text, or lists of messages (TRL) |
| text       | text |

Keys beside these are ignored. The order of turns is the chat template's business.
"""

from __future__ import annotations

from typing import Any

from veneer.data.example import Example, Message
from veneer.data.rows import Row, RowError, kind
from veneer.errors import DataError

FORMATS = ("messages", "sharegpt", "alpaca", "completion", "text")

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
TURN_LISTS = ("messages", "conversations", "conversation")
TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
ALPACA_OUTPUTS = ("output", "response")
ALPACA_INPUTS = ("input", "context")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))

NOTHING = "nothing to learn from"


def detect_format(values: dict[str, Any]) -> str | None:
    """The format of a row by its keys, the most structured first; None if it is none of `FORMATS`."""
    for key in TURN_LISTS:
        turns = values.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            for name, (role, _) in TURN_KEYS.items():
                if turns[0].get(role) is not None:
                    return name
    if "instruction" in values and _first(values, ALPACA_OUTPUTS):
        return "alpaca"
    if any(prompt in values and completion in values for prompt, completion in PAIRS):
        return "completion"
    if "text" in values:
        return "text"
    turns = next((values[key] for key in TURN_LISTS if key in values), {})
    holds_objects = isinstance(turns, dict) or (isinstance(turns, list) and turns and isinstance(turns[0], dict))
    return None if holds_objects else "messages"


def to_example(row: Row, format: str) -> Example:
    """Read a row as `format`. Raises `RowError` if it does not fit or leaves nothing to learn from."""
    if format not in CONVERTERS:
        raise DataError(f"unknown data format {format!r}; choose one of {', '.join(FORMATS)}")
    return CONVERTERS[format](row)


def unknown_format(row: Row) -> RowError:
    """The error for a row that `detect_format` does not know."""
    keys = ", ".join(map(repr, row.values)) or "none"
    if "chosen" in row.values and "rejected" in row.values:
        return RowError(row.where, "preference pairs are not supported", "; keep the chosen answer as 'messages'")
    expected = "'messages', 'conversations', 'instruction' + 'output', 'prompt' + 'completion', or 'text'"
    return RowError(row.where, "unknown format", f": found the keys {keys}; expected {expected}")


def _from_turns(row: Row, format: str) -> Example:
    key = _first(row.values, TURN_LISTS) or "messages"
    messages = _messages(row, key, row.values.get(key), format)
    return _conversation(row, [*_system(row, messages), *messages])


def _from_alpaca(row: Row) -> Example:
    output = _first(row.values, ALPACA_OUTPUTS) or "output"
    extra = _first(row.values, ALPACA_INPUTS)
    user = _text(row, "instruction", row.values.get("instruction"))
    if extra and row.values[extra] is not None and (text := _text(row, extra, row.values[extra])):
        user += f"\n\n{text}"
    messages = [Message("user", user), Message("assistant", _text(row, output, row.values.get(output)))]
    return _conversation(row, [*_system(row, []), *_history(row), *messages])


def _from_completion(row: Row) -> Example:
    values = row.values
    prompt, completion = next((pair for pair in PAIRS if pair[0] in values and pair[1] in values), PAIRS[0])
    if isinstance(values.get(prompt), list):
        turns = [turn for key in (prompt, completion) for turn in _messages(row, key, values.get(key), "messages")]
        return _conversation(row, turns)
    example = Example(
        row.where,
        prompt=_text(row, prompt, values.get(prompt)),
        completion=_text(row, completion, values.get(completion)),
    )
    if not example.completion.strip():
        raise RowError(row.where, NOTHING, f": {completion!r} is empty")
    return example


def _from_text(row: Row) -> Example:
    text = _text(row, "text", row.values.get("text"))
    if not text.strip():
        raise RowError(row.where, NOTHING, ": 'text' is empty")
    return Example(row.where, completion=text)


CONVERTERS = {
    "messages": lambda row: _from_turns(row, "messages"),
    "sharegpt": lambda row: _from_turns(row, "sharegpt"),
    "alpaca": _from_alpaca,
    "completion": _from_completion,
    "text": _from_text,
}


def _conversation(row: Row, messages: list[Message]) -> Example:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError(row.where, NOTHING, ": the conversation has no assistant turn")
    if not all(answer.content.strip() for answer in answers):
        raise RowError(row.where, NOTHING, ": an assistant turn is empty")
    return Example(row.where, messages=tuple(messages))


def _messages(row: Row, key: str, turns: Any, format: str) -> list[Message]:
    role_key, content_key = TURN_KEYS[format]
    if not isinstance(turns, list):
        raise RowError(row.where, f"is {kind(turns)}, not a list of messages", at=repr(key))
    messages = []
    for index, turn in enumerate(turns):
        at = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(row.where, f"is {kind(turn)}, not an object with {role_key!r} and {content_key!r}", at=at)
        role = _role(row, f"{at}.{role_key}", turn.get(role_key))
        _refuse_unsupported(row, at, turn)
        messages.append(Message(role, _content(row, f"{at}.{content_key}", turn.get(content_key))))
    return messages


def _role(row: Row, at: str, value: Any) -> str:
    name = _text(row, at, value).strip().lower()
    if name in ("function_call", "tool_call"):
        raise RowError(row.where, "tool calls are not supported yet", at=f"{at}:")
    if name not in ROLES:
        raise RowError(row.where, "unknown role", f" {value!r}; use system, user, assistant or tool", at=f"{at}:")
    return ROLES[name]


def _refuse_unsupported(row: Row, at: str, turn: dict[str, Any]) -> None:
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowError(row.where, "tool calls are not supported yet", at=f"{at}:")
    if turn.get("weight") not in (None, 1):
        raise RowError(row.where, "weights of single messages are not supported yet", at=f"{at}.weight:")


def _content(row: Row, at: str, value: Any) -> str:
    if not isinstance(value, list):
        return _text(row, at, value)
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise RowError(row.where, f"is {kind(part)}, not an object with 'type' and 'text'", at=f"{at}[{index}]")
        if part.get("type") != "text":
            reason = "only parts of type 'text' are supported"
            raise RowError(row.where, reason, f", not {part.get('type')!r}", at=f"{at}[{index}]:")
        parts.append(_text(row, f"{at}[{index}].text", part.get("text")))
    return "".join(parts)


def _system(row: Row, messages: list[Message]) -> list[Message]:
    """The row's own "system" text, unless the conversation starts with a system turn."""
    value = row.values.get("system")
    if not value or (messages and messages[0].role == "system"):
        return []
    return [Message("system", _text(row, "system", value))]


def _history(row: Row) -> list[Message]:
    """Earlier turns of an Alpaca row: a list of [instruction, response]."""
    messages = []
    history = row.values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(row.where, "is not a list of [instruction, response] pairs", at="'history'")
    for index, (user, assistant) in enumerate(history):
        messages.append(Message("user", _text(row, f"history[{index}][0]", user)))
        messages.append(Message("assistant", _text(row, f"history[{index}][1]", assistant)))
    return messages


def _text(row: Row, at: str, value: Any) -> str:
    if not isinstance(value, str):
        found = "is missing or null" if value is None else f"is {kind(value)}"
        raise RowError(row.where, f"{found}, not text", at=repr(at))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            reason = "holds half of a surrogate pair, which is no text"
            raise RowError(row.where, reason, "; write the whole character", at=repr(at)) from None
    return value


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in values), None)
