"""What a transformers model is for, in PEFT's words, and the head that such a task trains in full."""

from __future__ import annotations

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


def task_type(model: nn.Module) -> str | None:
    """PEFT's task_type of a model; None where PEFT's model class for it would not take the model's inputs."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    name = type(model).__name__
    known = next((task for ending, (task, _) in TASKS.items() if name.endswith(ending)), None)
    return known or ("FEATURE_EXTRACTION" if name.endswith("Model") else None)


def task_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads that are new with the task (a classifier's) and must be trained in full, by name."""
    name = type(model).__name__
    heads = next((heads for ending, (_, heads) in TASKS.items() if name.endswith(ending)), ())
    return {head: getattr(model, head) for head in heads if isinstance(getattr(model, head, None), nn.Module)}
