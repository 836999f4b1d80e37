"""The machine to plan for: this one's device, or a card that is not here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from veneer.config import AdapterConfig
from veneer.errors import ConfigError
from veneer.plan import devices, probe
from veneer.plan.fit import Budget, text
from veneer.plan.profile import Profile, profile
from veneer.plan.roofline import Rates

HOST = 64e9
"""Bytes of host memory of a machine that is not here, where nobody says how much it has."""
HOST_UNKNOWN = f"host memory: taken as {HOST / 1e9:.0f} GB; say how much there is with --ram"
KEEP_FREE = 0.05
"""Share of the host's available memory that a plan leaves alone."""


@dataclass
class Machine:
    """What a plan is made for. `name` says it in words; `notes` what was assumed."""

    name: str
    budget: Budget
    rates: Rates
    dtype: str
    rows: str
    compile: bool
    notes: list[str] = field(default_factory=list)

    def profile(self, model: str, adapter: AdapterConfig) -> Profile:
        """A model's profile in the dtype and with the attention that a run has here."""
        return profile(model, adapter, dtype=self.dtype, rows=self.rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"name": self.name, "budget": asdict(self.budget), "rates": self.rates.as_dict(), "dtype": self.dtype}


def machine(device: str, vram: float | None, ram: float | None, dtype: str = "auto") -> Machine:
    """The machine for `device` (auto, cpu, cuda:N, or card: one that is not here) and budgets in bytes (None: what is free).

    With a budget of device memory and no GPU here, a card of that memory. Raises `ConfigError`.
    """
    if device.split(":")[0] not in ("auto", "cpu", "cuda", "card"):
        raise ConfigError(f"--device {device!r}: plans are for cuda or cpu")
    there = torch.cuda.is_available() and device != "card"
    if device == "cpu" or (device == "auto" and vram is None and not there):
        return _cpu(vram, dtype)
    if there:
        return _gpu(torch.device("cuda" if device == "auto" else device), vram, ram, dtype)
    if device == "card" and vram is None:
        vram = devices.CARDS[-1].usable
    if vram is None:
        raise ConfigError("this machine has no GPU: say how much memory yours has, such as --vram 8GB, or see --gpus")
    card = devices.card_for(vram)
    notes = [f"rates: those of the {card.name} as its maker states them; `veneer bench --calibrate` measures a machine"]
    if ram is None:
        notes.append(HOST_UNKNOWN)
        ram = HOST
    budget = Budget(min(vram, card.memory) if vram > card.memory * 1.05 else vram, ram)
    kind = "bfloat16" if dtype == "auto" else dtype
    return Machine(f"a card of {text(vram)}", budget, card.rates, kind, "mixed", True, notes)


def _gpu(device: torch.device, vram: float | None, ram: float | None, dtype: str) -> Machine:
    free, total = torch.cuda.mem_get_info(device)
    kind = dtype if dtype != "auto" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    context = held(device)
    notes, budget = [], vram if vram is not None else free + torch.cuda.memory_reserved(device) + context
    if vram is not None and vram > free + torch.cuda.memory_reserved(device) + context:
        notes.append(f"warning: only {text(free)} of the device's {text(total)} are free now")
    if ram is None:
        ram = psutil.virtual_memory().available * (1 - KEEP_FREE)
    name = f"{text(budget)} of {torch.cuda.get_device_name(device)}"
    rates = probe.cached(device, kind)
    return Machine(
        name, Budget(budget, ram, True, context), rates, kind, "mixed", find_spec("triton") is not None, notes
    )


def held(device: torch.device) -> float:
    """Bytes that this process holds on a GPU besides tensors, as far as the driver's count of all processes tells."""
    from veneer.plan.constants import CONTEXT

    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return float(min(CONTEXT, total - free - torch.cuda.memory_reserved(device)))


def _cpu(limit: float | None, dtype: str) -> Machine:
    kind = dtype if dtype != "auto" else "float32"
    rates = probe.known(torch.device("cpu"), getattr(torch, kind)) or devices.CPU
    budget = limit if limit is not None else psutil.virtual_memory().available * (1 - KEEP_FREE)
    notes = (
        [] if rates is not devices.CPU else ["rates: a guess at two cores; `veneer bench --calibrate` measures yours"]
    )
    context = probe.process_bytes()
    return Machine(
        f"{text(budget)} on the CPU", Budget(budget, None, False, context), rates, kind, "split", False, notes
    )
