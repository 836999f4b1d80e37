"""What a transformers model is for, in PEFT's words, and the head that such a task trains in full."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

TASKS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForImageClassification": (None, ("classifier",)),
    "ForAudioClassification": (None, ("classifier", "projector")),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
}
"""Ending of the model's class → PEFT's task_type (None: PEFT has none), and its new head."""


def task_type(model: nn.Module, whole: Collection[str]) -> str | None:
    """PEFT's task_type for an adapter of a model, of which it trains the modules `whole` in full.

    None where PEFT's model class for the task would not take the model's inputs, or would look for a head in the file
    that is not among `whole` (one that is adapted, or left as it is).
    """
    if getattr(model, "main_input_name", None) != "input_ids" or not task_heads(model).keys() <= set(whole):
        return None
    name = type(model).__name__
    known = next((task for ending, (task, _) in TASKS.items() if name.endswith(ending)), None)
    return known or ("FEATURE_EXTRACTION" if name.endswith("Model") else None)


def task_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads that are new with the task (a classifier's) and must be trained in full, by name."""
    name = type(model).__name__
    heads = next((heads for ending, (_, heads) in TASKS.items() if name.endswith(ending)), ())
    return {head: getattr(model, head) for head in heads if isinstance(getattr(model, head, None), nn.Module)}
