"""Veneer: low-rank adaptation of large models on one ordinary machine.

model, tokenizer = veneer.load_base("smollm2-135m-instruct")
bank = veneer.attach(model, veneer.AdapterConfig(rank=16, alpha=32))
veneer.save_adapter(model, "my-adapter")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from veneer.version import __version__

if TYPE_CHECKING:
    from veneer.adapter.attach import attach, detach, get_bank, merge
    from veneer.adapter.slot import reserve
    from veneer.base.generate import generate, stream
    from veneer.base.load import load_base
    from veneer.config import AdapterConfig, DataConfig, OptimConfig, TrainConfig
    from veneer.data.load import read_examples
    from veneer.data.prepare import prepare
    from veneer.errors import VeneerError
    from veneer.formats.adapter_file import swap_adapter
    from veneer.formats.combine import combine
    from veneer.formats.exchange import export_adapter, export_merged, import_adapter
    from veneer.formats.extract import extract
    from veneer.formats.merge_stream import merge_checkpoint
    from veneer.formats.merged import merge_into_float
    from veneer.formats.peft import load_adapter, save_adapter
    from veneer.formats.resize import diff, resize
    from veneer.interop.accelerate import accelerate, decelerate
    from veneer.interop.from_peft import from_peft
    from veneer.plan.explain import explain
    from veneer.plan.spectrum import analyse
    from veneer.training.loop import Trainer, train
    from veneer.training.sweep import train_many
    from veneer.training.tune import tune_weights

_WHERE = {
    "attach": "adapter.attach",
    "detach": "adapter.attach",
    "get_bank": "adapter.attach",
    "merge": "adapter.attach",
    "reserve": "adapter.slot",
    "swap_adapter": "formats.adapter_file",
    "generate": "base.generate",
    "stream": "base.generate",
    "load_base": "base.load",
    "AdapterConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "TrainConfig": "config",
    "read_examples": "data.load",
    "prepare": "data.prepare",
    "VeneerError": "errors",
    "extract": "formats.extract",
    "merge_checkpoint": "formats.merge_stream",
    "combine": "formats.combine",
    "export_adapter": "formats.exchange",
    "export_merged": "formats.exchange",
    "import_adapter": "formats.exchange",
    "merge_into_float": "formats.merged",
    "load_adapter": "formats.peft",
    "save_adapter": "formats.peft",
    "resize": "formats.resize",
    "diff": "formats.resize",
    "accelerate": "interop.accelerate",
    "decelerate": "interop.accelerate",
    "from_peft": "interop.from_peft",
    "explain": "plan.explain",
    "analyse": "plan.spectrum",
    "Trainer": "training.loop",
    "train": "training.loop",
    "train_many": "training.sweep",
    "tune_weights": "training.tune",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    """Import on first use: `veneer --help` must not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(import_module(f"veneer.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
