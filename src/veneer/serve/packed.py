"""Frozen linears in the layout that oneDNN's kernels read: on a CPU, a product of few rows is up to 3× as fast.

A product over a plain weight packs it anew at each call, which costs more than the product itself while the batch is a
few tokens. What is packed once is the same float32 numbers in another order, and can be put back bit by bit.
"""

from __future__ import annotations

from contextlib import suppress

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 16
"""Rows that the layout is chosen for; it is right for any."""
SPARE = 4
"""A weight that another module reads too is packed beside it if so many times its bytes are free."""


def pack(weight: Tensor) -> Tensor:
    """weight (O, I) float32 on the CPU → the same, opaque; `to_dense` gives it back."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (…, I) and a packed W → (…, O). `torch.nn.functional.linear` is its definition.

    Rows are filled up to one of few numbers: oneDNN keeps half a MiB of code for each number of rows and each shape of a
    weight that it ever saw, up to a thousand of them.
    """
    rows = x.reshape(-1, x.shape[-1])
    more = filled(len(rows)) - len(rows)
    y = torch.ops.mkldnn._linear_pointwise(F.pad(rows, (0, 0, 0, more)) if more else rows, packed, bias, "none", [], "")
    return y[: len(rows)].view(*x.shape[:-1], -1)


def filled(rows: int) -> int:
    """At least so many rows: up to 16 as they are, then eight numbers for each doubling, an eighth more at most."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def can_pack() -> bool:
    """Whether this torch packs weights on this machine, and computes with them what the definition says."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((5, 70), (33, 70), (33,)))
    with suppress(Exception), torch.inference_mode():  # another processor, or a torch without oneDNN
        packed = pack(weight)
        near = torch.allclose(linear(x, packed, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
        return near and torch.equal(packed.to_dense(), weight)
    return False


class PackedLinear(nn.Module):
    """A linear over a packed copy of its weight, of which the plain one is let go unless `shared`; `unpack` undoes it."""

    def __init__(self, plain: nn.Linear, shared: bool) -> None:
        super().__init__()
        self.__dict__["plain"] = plain  # not a part: its weight may be empty
        self.packed, self.shared = pack(plain.weight), shared
        # models look at a weight for its dtype, and at nothing else; who reads it all the same finds no number
        self.weight = plain.weight if shared else torch.full((1, 1), float("nan")).expand(plain.weight.shape)
        if not shared:
            plain.weight.data = plain.weight.data.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.plain.bias)

    def unpack(self) -> nn.Linear:
        """The plain linear, as it was."""
        if not self.shared:
            self.plain.weight.data = self.packed.to_dense()
        return self.plain


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear over a matrix of numbers. Under the same class torchao keeps tensors of kinds of its own."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def packable(model: nn.Module) -> dict[str, bool]:
    """Names of the linears whose packing pays, and whether another module reads the same weight.

    Plain float32 linears on the CPU; a shared weight where memory for a second copy is there.
    """
    if not can_pack():
        return {}
    readers: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        readers[id(parameter)] = readers.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        weight = module.weight if is_plain(module) else None
        if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
            continue
        shared = readers[id(weight)] > 1
        if not shared or SPARE * weight.nbytes < psutil.virtual_memory().available:
            found[name] = shared
    return found
