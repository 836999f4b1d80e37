"""veneer generate"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.common import (
    Device,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    Quant,
    Seed,
    Temperature,
    TopP,
    err,
    open_adapter,
)
from veneer.errors import ConfigError, DataError


def command(
    path: Annotated[
        Path | None, typer.Argument(help="A run or an adapter directory; leave out to use --model alone.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt; the answer goes to stdout.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help='A file: JSONL with "prompt" or "messages", or one prompt a line.')
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the JSONL goes (default: stdout).")] = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as text, without the chat template.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts generated together.")] = 16,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = None,
    force: Force = False,
) -> None:
    """Answer one prompt, or a file of prompts as JSON lines."""
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either --prompt TEXT or --prompts FILE")
    if path is None and model is None:
        raise ConfigError("give a run or adapter directory, or --model")
    asked = [prompt] if prompt is not None else read_prompts(prompts)
    from veneer.base.generate import generate
    from veneer.base.load import load_base
    from veneer.files import write_text

    if path is None:
        loaded, tokenizer = load_base(model, device=device, dtype=dtype, quant=quant)
    else:
        opened = open_adapter(path, model, device=device, dtype=dtype, quant=quant, force=force)
        loaded, tokenizer = opened.model, opened.tokenizer
    chats = [_chat(p, system, raw or not tokenizer.chat_template) for p in asked]
    answers = generate(
        loaded,
        tokenizer,
        chats,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=(lambda done: err.print(f"{done}/{len(chats)}")) if len(chats) > batch_size else None,
    )
    cut = sum(a.finish_reason == "length" for a in answers)
    if cut:
        err.print(
            f"warning: {cut} of {len(answers)} answers were cut off at --max-new-tokens {max_new_tokens}",
            style="yellow",
        )
    if prompt is not None and out is None:
        print(answers[0].text)
        return
    lines = "".join(
        json.dumps(
            {"prompt": p, "text": a.text, "tokens": a.tokens, "finish_reason": a.finish_reason}, ensure_ascii=False
        )
        + "\n"
        for p, a in zip(asked, answers, strict=True)
    )
    sys.stdout.write(lines) if out is None else write_text(out, lines)


def read_prompts(path: Path) -> list:
    """Prompts of a file: JSON lines holding a string, {"prompt": …} or {"messages": […]}; else one prompt a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".ndjson", ".json"):
            found.append(line)
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: broken JSON: {error}") from None
        value = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
        if is_chat := isinstance(value, list) and all(_is_message(m) for m in value):
            while value and value[-1]["role"] == "assistant":
                value = value[:-1]
        if not (isinstance(value, str) or is_chat and value):
            raise DataError(f'{path}:{number}: expected a string, "prompt" or "messages" with a role and text in each')
        found.append(value)
    if not found:
        raise DataError(f"{path}: no prompt in it")
    return found


def _is_message(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _chat(prompt, system: str | None, raw: bool):
    if isinstance(prompt, list):
        return prompt
    if raw:
        return prompt
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]
