"""Answers held to a JSON schema, by llguidance (extra `json`): which tokens may come next, one answer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from veneer.serve.problems import ApiError

PARAM = "response_format"


class Guide:
    """Compiles schemas for one tokenizer. `vocabulary` is the width of the logits, `ends` the tokens that end an answer."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, ends: list[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends

    @cached_property
    def _wrapped(self) -> Any:
        """llguidance's view of the tokenizer; takes about a second to make."""
        try:
            import llguidance.hf
        except ImportError:
            raise ApiError(
                400,
                "response_format needs llguidance, which this server lacks: pip install 'veneer[json]'",
                param=PARAM,
                code="unsupported_parameter",
            ) from None
        try:
            return llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=self.ends)
        except ValueError as error:
            raise ApiError(
                400, f"response_format: this model's tokenizer is not supported ({error})", param=PARAM
            ) from None

    def json(self, schema: dict[str, Any]) -> Callable[[], JsonGrammar]:
        """Makes grammars of `schema`, one for each answer. 400 for a schema that is not valid or not supported."""
        tokenizer = self._wrapped
        from llguidance import LLMatcher

        try:
            # No free white space: a model that is not sure of itself may else write blanks for ever.
            text = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            problem = LLMatcher.validate_grammar(text, tokenizer)
            if not problem or problem.startswith("WARNING"):
                JsonGrammar(LLMatcher(tokenizer, text, log_level=0), self.vocabulary).allowed()  # some fail only now
        except (ValueError, RuntimeError) as error:
            problem = str(error)
        if problem and not problem.startswith("WARNING"):
            said = " ".join(problem.split())[:300]
            raise ApiError(400, f"{PARAM}: the schema cannot be followed: {said}", param=PARAM)
        return lambda: JsonGrammar(LLMatcher(tokenizer, text, log_level=0), self.vocabulary)


class JsonGrammar:
    """One answer's state; see `veneer.serve.request.Grammar`. Once the JSON is whole only an end token is allowed."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def allowed(self) -> Any:
        """A bool tensor (vocabulary,)."""
        import torch

        bias = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        if self.matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self.matcher.get_error()[:200]}".partition("\n")[0])
        return bias[: self.vocabulary] != 0

    def accept(self, token: int) -> None:
        """A token was chosen."""
        self.matcher.consume_token(token)
