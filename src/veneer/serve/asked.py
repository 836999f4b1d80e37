"""From a request's body to what the engine is asked: prompts as token ids, sampling, adapters; nothing ignored silently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.base.generate import prompt_ids
from veneer.errors import TemplateError
from veneer.serve.guided import Guide
from veneer.serve.names import Stack
from veneer.serve.problems import ApiError
from veneer.serve.request import Request, Sampling
from veneer.serve.schema import MAX_CHOICES, ChatRequest, CompletionRequest, JsonSchemaFormat, Message, Sampled

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "prefill": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "length_penalty": (1, 1.0),
    "prompt_embeds": (),
}
"""Parameters of OpenAI's or vLLM's that change the answer and are not served, with the values that change nothing.

Any other unknown key is ignored, as OpenAI's servers do with what only labels or routes a request.
"""
OF_MESSAGES = ("tool_calls", "function_call", "audio")
"""Keys of messages that would change the prompt."""
COMPLETION_TOKENS = 16
"""How long a text completion is without `max_tokens`, as in OpenAI's API."""


@dataclass(frozen=True)
class Asked:
    """Everything the engine needs for one HTTP request: `requests` in the order of the choices, `n` to a prompt."""

    requests: list[Request]
    n: int
    usage_chunk: bool


def check_known(body: Sampled) -> None:
    """400 for a parameter that would change the answer and is not served."""
    for key, value in (body.model_extra or {}).items():
        if key in NEUTRAL and value is not None and value not in NEUTRAL[key]:
            raise ApiError(400, f"{key} is not supported by this server", param=key, code="unsupported_parameter")


class Reader:
    """Reads bodies for one model. `context` is the engine's, `vocabulary` the number of tokens that the model knows,
    `most` the answers that it can have at work and waiting."""

    def __init__(self, tokenizer: Any, *, context: int, vocabulary: int, guide: Guide, most: int) -> None:
        self.tokenizer, self.context, self.vocabulary, self.guide = tokenizer, context, vocabulary, guide
        self.most = min(most, MAX_CHOICES)

    def chat(self, body: ChatRequest, adapters: Stack) -> Asked:
        """A chat as engine requests. Raises `ApiError`."""
        check_known(body)
        for number, message in enumerate(body.messages):
            if key := next((key for key in OF_MESSAGES if (message.model_extra or {}).get(key)), None):
                said = f"messages.{number}.{key} is not supported by this server"
                raise ApiError(400, said, param="messages", code="unsupported_parameter")
        try:
            prompt = prompt_ids(self.tokenizer, [as_message(message) for message in body.messages])
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages") from None
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        room = max(self.context - len(prompt), 1)
        return self._asked(body, [prompt], adapters, body.max_completion_tokens or body.max_tokens or room, logprobs)

    def completion(self, body: CompletionRequest, adapters: Stack) -> Asked:
        """A text completion as engine requests, one for each prompt and choice. Raises `ApiError`."""
        check_known(body)
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if isinstance(given[0], int):
            given = [given]
        prompts = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in given]
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, "a prompt is empty", param="prompt")
            if max(prompt) >= self.vocabulary:
                raise ApiError(
                    400, f"token {max(prompt)} is not in the vocabulary of {self.vocabulary}", param="prompt"
                )
        return self._asked(body, prompts, adapters, body.max_tokens or COMPLETION_TOKENS, body.logprobs)

    def _asked(
        self, body: Sampled, prompts: list[list[int]], adapters: Stack, max_tokens: int, logprobs: int | None
    ) -> Asked:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options goes with stream: true", param="stream_options")
        n = body.n or 1
        if n * len(prompts) > self.most:
            said = f"{n} choices of {len(prompts)} prompts are over {self.most} answers, the most for a request here"
            raise ApiError(400, said, param="n")
        grammar, values = self._grammar(body), self._sampling(body, max_tokens, logprobs)
        requests = []
        for prompt in prompts:
            for choice in range(n):
                seed = None if body.seed is None else body.seed + choice
                sampling = Sampling(**values, seed=seed, grammar=grammar() if grammar else None)
                requests.append(Request(prompt, sampling, adapters, continues=isinstance(body, CompletionRequest)))
        return Asked(requests, n, bool(body.stream_options and body.stream_options.include_usage))

    def _sampling(self, body: Sampled, max_tokens: int, logprobs: int | None) -> dict[str, Any]:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return {
            "max_tokens": max_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": max(body.top_k or 0, 0),
            "stop": tuple(stop),
            "logprobs": logprobs,
            "ignore_eos": bool(body.ignore_eos),
        }

    def _grammar(self, body: Sampled) -> Callable[[], Any] | None:
        """Makes the grammar of one answer, for a response_format other than text."""
        wanted = body.response_format
        if wanted is None or wanted.type == "text":
            return None
        schema = wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
        return self.guide.json(schema)


def as_message(message: Message) -> dict[str, str]:
    """A message as chat templates take it: its text parts joined; "developer" is OpenAI's newer word for "system"."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": text}
