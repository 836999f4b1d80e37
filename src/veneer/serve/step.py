"""The next token of each row, chosen from its logits: on the device at once, on the host a little later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.serve.request import TokenLogprob
from veneer.serve.sampling import choose, logprobs
from veneer.serve.slots import Running


@dataclass
class Step:
    """Tokens that were chosen for rows, on the device and (once `event` has come) on the host, where they are -1 for
    rows whose logits are no finite numbers."""

    rows: list[Running]
    chosen: Tensor
    host: Tensor
    notes: list[TokenLogprob | None]
    blocked: list[Running]
    failed: dict[Running, str]
    event: Any = None


@torch.inference_mode()
def choose_tokens(rows: list[Running], logits: Tensor) -> Step:
    """Choose each row's next token from its logits (B, V), which grammars change in place."""
    rules = [r.ticket.request.sampling for r in rows]
    broken = ~logits.amax(-1).isfinite()
    blocked, failed = restrict(rows, logits)
    chosen = choose(logits, rules, [r.draw.random() if s.temperature > 0 else 0.0 for r, s in zip(rows, rules)])
    notes = logprobs(logits, chosen, [s.logprobs for s in rules])
    told = chosen.masked_fill(broken, -1)
    if not chosen.is_cuda:
        return Step(rows, chosen, told, notes, blocked, failed)
    host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
    host.copy_(told, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Step(rows, chosen, host, notes, blocked, failed, event)


def restrict(rows: Sequence[Running], logits: Tensor) -> tuple[list[Running], dict[Running, str]]:
    """Apply grammars to the logits, in place. Returns the rows to which nothing is allowed any more, and those whose
    grammar failed, with the reason."""
    blocked, failed = [], {}
    for running, row in zip(rows, logits):
        grammar = running.ticket.request.sampling.grammar
        try:
            allowed = None if grammar is None else grammar.allowed()
        except Exception as error:  # one answer's: the others of the step go on
            failed[running], allowed = str(error).partition("\n")[0], None
        if allowed is None:
            continue
        mask = torch.as_tensor(allowed)
        if mask.dtype != torch.bool:
            mask = torch.zeros(row.shape[0], dtype=torch.bool).index_fill_(0, mask.long(), True)
        mask = torch.nn.functional.pad(mask[: row.shape[0]], (0, max(0, row.shape[0] - mask.shape[0])))
        if not mask.any():
            blocked.append(running)
        row.masked_fill_(~mask.to(row.device), float("-inf"))
    return blocked, failed
