"""Generate text: batched with a KV cache, sorted by length; or streamed, one conversation at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch

from veneer.base.quiet import quiet_transformers
from veneer.errors import DataError, TemplateError, VeneerError

Prompt = Sequence[dict[str, str]] | str
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Generation:
    """One answer. `tokens` counts what was generated; `finish_reason` is "stop" or "length"."""

    text: str
    tokens: int
    finish_reason: str


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: messages through the chat template, text as it is."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise TemplateError("the tokenizer has no chat template: pass --chat-template FILE, or the prompt as text")
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template's own code raises
        raise TemplateError(f"the chat template refuses the prompt: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and the end-of-turn marks its template writes."""
    found = model.generation_config.eos_token_id
    ids = set(found if isinstance(found, (list, tuple)) else [found]) | {tokenizer.eos_token_id}
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_added_vocab()
    ids |= {vocabulary[mark] for mark in END_OF_TURN if mark in vocabulary and mark in template}
    return sorted(i for i in ids if i is not None)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Answers to `prompts`, in their order. Temperature 0 is greedy; `progress(done)` is called after each batch.

    Raises `DataError` for a prompt that leaves no room in the model's context: nothing is cut silently.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        raise DataError("prompts is a list of them: for a single one write [prompt]")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    _check_room(model, ids, max_new_tokens)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    ends, found = end_tokens(model, tokenizer), {}
    if seed is not None:
        torch.manual_seed(seed)
    with _ready(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = _left_padded([ids[i] for i in batch], tokenizer.pad_token_id or 0, model.device)
            out = model.generate(**inputs, **_options(tokenizer, ends, max_new_tokens, temperature, top_p))
            width = inputs["input_ids"].shape[1]
            found |= {i: _answer(tokenizer, row[width:].tolist(), ends) for i, row in zip(batch, out, strict=True)}
            if progress:
                progress(len(found))
    return [found[i] for i in range(len(prompts))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of one answer as they are made; closing the iterator stops the generation."""
    from transformers import StoppingCriteria, TextIteratorStreamer

    ids = prompt_ids(tokenizer, prompt)
    _check_room(model, [ids], max_new_tokens)
    stop, failure = Event(), []

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = _options(tokenizer, end_tokens(model, tokenizer), max_new_tokens, temperature, top_p)
    inputs = _left_padded([ids], tokenizer.pad_token_id or 0, model.device)

    def work() -> None:
        try:
            if seed is not None:
                torch.manual_seed(seed)
            with _ready(model):  # here and not around the yield, where it would hold for the reader's code too
                model.generate(**inputs, **options, streamer=pieces, stopping_criteria=[Stopped()])
        except Exception as error:  # handed to the reader of the iterator below
            failure.append(error)
            pieces.on_finalized_text("", stream_end=True)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0] if isinstance(failure[0], VeneerError) else VeneerError(f"generation failed: {failure[0]}")


def _options(tokenizer: Any, ends: list[int], max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id or 0,
        use_cache=True,
        **(sampling or {"do_sample": False}),
    )
    return {"generation_config": config}


def _left_padded(ids: list[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in ids)
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return {"input_ids": padded, "attention_mask": mask}


def _answer(tokenizer: Any, tokens: list[int], ends: list[int]) -> Generation:
    where = next((i for i, token in enumerate(tokens) if token in ends), None)
    kept = tokens if where is None else tokens[:where]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Generation(text, len(kept) + (where is not None), "length" if where is None else "stop")


def _check_room(model: Any, ids: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is at least 1, not {max_new_tokens}")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(ids, 1):
        if not row:
            raise DataError(f"prompt {number} is empty")
        if room and len(row) + max_new_tokens > room:
            raise DataError(
                f"prompt {number} has {len(row)} tokens; with {max_new_tokens} new ones it exceeds the model's context "
                f"of {room}: shorten it or lower --max-new-tokens"
            )


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Eval mode, no gradients, no advice on the terminal; the former mode returns."""
    training = model.training
    model.eval()
    try:
        with quiet_transformers(), torch.inference_mode():
            yield
    finally:
        model.train(training)
