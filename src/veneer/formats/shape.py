"""A base model's names and sizes without its weights: what converting an adapter needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.base.load import locate
from veneer.base.quiet import quiet_transformers
from veneer.errors import BaseModelError


@dataclass(frozen=True)
class BaseShape:
    """`modules`: adaptable modules by name, on the meta device. `tied`: the embedding that the output head shares."""

    name: str
    config: Any
    modules: dict[str, Any]
    embeddings: frozenset[str]
    tied: str | None
    gguf: Path | None
    """The GGUF file, where the base is one."""

    @property
    def blocks(self) -> int:
        return self.config.num_hidden_layers

    def heads(self, leaf: str) -> int:
        """Attention heads of q_proj, key-value heads of k_proj."""
        heads = self.config.num_attention_heads
        return heads if leaf == "q_proj" else getattr(self.config, "num_key_value_heads", None) or heads


def base_shape(base: str | Path) -> BaseShape:
    """Read a base's config and build it without weights. Raises `BaseModelError`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from veneer.adapter.targets import candidates, output_head

    source = locate(str(base))
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source.where, **source.options)
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{base}: cannot read its configuration: {' '.join(str(error).split())[:200]}") from None
    modules = candidates(model)
    embeddings = frozenset(name for name, module in modules.items() if isinstance(module, torch.nn.Embedding))
    inputs, head = model.get_input_embeddings(), output_head(model)
    shared = head is not None and getattr(config.get_text_config(), "tie_word_embeddings", False)
    tied = next((name for name, module in modules.items() if shared and module is inputs), None)
    file = Path(source.where) / source.options["gguf_file"] if "gguf_file" in source.options else None
    return BaseShape(str(base), config.get_text_config(), modules, embeddings, tied, file)
