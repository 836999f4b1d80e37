"""Score base and adapter on held-out examples: generate, compare with the references, keep paired samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from veneer.adapter.attach import get_bank
from veneer.base.generate import generate
from veneer.data.example import Example
from veneer.data.score import is_json_task, score_json, score_text
from veneer.errors import DataError

SUBSET_SEED = 20240229
SAMPLES = 12

Prompt = list[dict[str, str]] | str


def prompt_and_reference(example: Example) -> tuple[Prompt, str]:
    """What the model is asked, and the answer it should give: the last assistant turn, or the completion."""
    if not example.messages:
        return example.prompt, example.completion
    last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{example.where}: nothing stands before the assistant's answer, so there is no prompt")
    return [{"role": m.role, "content": m.content} for m in example.messages[:last]], example.messages[last].content


def subset(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """A fixed choice of `limit` examples: the same for every run, in the data's order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(SUBSET_SEED).permutation(len(examples))[:limit]
    return [examples[i] for i in np.sort(chosen)]


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    systems: Sequence[str] = ("base", "adapter"),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Greedy answers of the base and the adapter on `examples`, scored; the content of eval.json.

    JSON scores where every reference is a JSON object, exact match of text otherwise. Without `max_new_tokens`, an
    answer may be half as long again as the longest reference. `progress(system, done, total)`.
    """
    if not examples:
        raise DataError("there is no example to score")
    prompts, references = zip(*(prompt_and_reference(e) for e in examples))
    if max_new_tokens is None:
        longest = max(len(ids) for ids in tokenizer(list(references), add_special_tokens=False)["input_ids"])
        max_new_tokens = longest * 3 // 2 + 8
    measure = score_json if is_json_task(references) else score_text
    result: dict[str, Any] = {"n": len(examples), "max_new_tokens": max_new_tokens}
    answers = {}
    for system in systems:
        options = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "progress": (lambda done, s=system: progress(s, done, len(prompts))) if progress else None,
        }
        if system == "base":
            with get_bank(model).disabled():
                found = generate(model, tokenizer, prompts, **options)
        else:
            found = generate(model, tokenizer, prompts, **options)
        answers[system] = [g.text for g in found]
        cut = sum(g.finish_reason == "length" for g in found)
        result[system] = measure(answers[system], references).as_dict() | {"cut_off": cut}
    result["samples"] = [
        {"prompt": prompts[i], "reference": references[i], **{s: answers[s][i] for s in systems}}
        for i in range(min(SAMPLES, len(prompts)))
    ]
    return result
