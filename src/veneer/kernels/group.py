"""Frozen linears of one input with their adapters, as one function over one packed matrix: for compiled code.

The weights W_i (O_i, I) of a group and their adapters' factors lie in one matrix P (O+R, I+R), O = Σ O_i, R = Σ R_i:

    P = [ W_0  s_0 B_0     0    ]
        [ W_1     0     s_1 B_1 ]
        [ A_0     ·        ·    ]
        [ A_1     ·        ·    ]

With x̃ = [x, x Aᵀ] each output is one product, y_i = x̃ P_iᵀ, and with g̃ = [g, g·sB] so is the gradient of the input,
∂L/∂x = g̃ P[:, :I]. The compiler writes x and g straight into the wide buffers, so the adapter costs neither a second
pass over y nor one over ∂L/∂x. `graph_groups` finds linears of one input in a traced graph and puts them together.

A group's `source` is (P,), or for 4-bit weights what `unpack` makes P of, anew in each pass.

Legend: T tokens, I input width, O output width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import reference
from veneer.kernels.operators import define
from veneer.kernels.unpack import unpack


def append_product(wide: Tensor, matrix: Tensor) -> Tensor:
    """Write x matrixᵀ beside x, in place: wide (T, I+R) holds x in its first I columns, matrix (R, I) → (T, R).

    A custom operator, so that the compiler lets the product be written into a buffer that it has filled itself.
    """
    product = wide[:, : matrix.shape[1]] @ matrix.t()
    wide[:, matrix.shape[1] :].copy_(product)
    return product


def _shape_only(wide: Tensor, matrix: Tensor) -> Tensor:
    return wide.new_empty(wide.shape[0], matrix.shape[0])


define(
    "append_product(Tensor(a!) wide, Tensor matrix) -> Tensor",
    {"CompositeExplicitAutograd": append_product},
    _shape_only,
)


def packed_size(sizes: Sequence[int], ranks: Sequence[int], width: int) -> tuple[int, int]:
    """The shape of P."""
    return sum(sizes) + sum(ranks), width + sum(ranks)


def parts(packed: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views of P by linear: its W_i (O_i, I), A_i (R_i, I) and s_i B_i (O_i, R_i)."""
    width, total = packed.shape[1] - sum(ranks), sum(sizes)
    weights = packed[:total, :width].split(list(sizes))
    factors = factor_views(packed[:total, width:], packed[total:, :width], sizes, ranks)
    return [(weight, a, b) for weight, (a, b) in zip(weights, factors)]


def factor_views(side: Tensor, bottom: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Views of A_i and s_i B_i in P's right-hand columns, side (O, R), and its last rows, bottom (R, I)."""
    blocks = side.split(list(sizes))
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    return [
        (a, b[:, start : start + rank]) for a, b, start, rank in zip(bottom.split(list(ranks)), blocks, starts, ranks)
    ]


def matrix_of(source: Sequence[Tensor], again: bool) -> Tensor:
    """P of a group's source. `again` tells the backward pass's call, which must not be taken for the forward's."""
    return source[0] if len(source) == 1 else unpack(source, again)


def products(
    x: Tensor, packed: Tensor, sizes: Sequence[int], ranks: Sequence[int], biases: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """[y_i (T, O_i)…] and x Aᵀ (T, R) of x (T, I)."""
    total, width = sum(sizes), x.shape[1]
    wide = F.pad(x, (0, sum(ranks)))
    low = torch.ops.veneer.append_product(wide, packed[total:, :width])
    return [F.linear(wide, p, b) for p, b in zip(packed[:total].split(list(sizes)), biases)], low


class LoraGroup(torch.autograd.Function):
    """y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ + bias_i; only x and the factors get gradients, and only x, x Aᵀ are kept.

    With u_i = s_i g_i B_i: ∂L/∂x = Σ g_i W_i + u_i A_i, ∂L/∂A_i = u_iᵀ x, ∂L/∂B_i = s_i g_iᵀ (x A_iᵀ).
    """

    @staticmethod
    def forward(ctx, x, scaling, sizes, ranks, biases, again, count, *tensors):
        source, factors = tensors[:count], tensors[count:]
        packed = matrix_of(source, False)
        x2 = x.reshape(-1, x.shape[-1])
        outs, low = products(x2, packed, sizes, ranks, biases)
        ctx.save_for_backward(x2, low, scaling, *source)
        ctx.sizes, ctx.ranks, ctx.shape, ctx.again = sizes, ranks, x.shape, again
        ctx.dtypes = [factor.dtype for factor in factors]
        return tuple(y.view(*x.shape[:-1], -1) for y in outs)

    @staticmethod
    def backward(ctx, *grads):
        x, low, scaling, *source = ctx.saved_tensors
        flat = [g.reshape(-1, size) for g, size in zip(grads, ctx.sizes)]
        gradients = joined_gradients if len(flat) <= JOINED else separate_gradients
        packed = matrix_of(source, ctx.again)
        grad_x, factors = gradients(flat, x, low, packed, scaling, ctx.sizes, ctx.ranks, ctx.needs_input_grad[0])
        factors = [d.to(dtype) for d, dtype in zip(factors, ctx.dtypes)]
        return None if grad_x is None else grad_x.view(ctx.shape), *[None] * (6 + len(source)), *factors


JOINED = 2
"""Most linears whose gradients are put side by side for one product. Gate and up write theirs there in one kernel with
the activation's derivative; for q, k and v, whose gradients come through rotations and transposes, that kernel took
four times what it saved (H100)."""


def joined_gradients(
    grads: Sequence[Tensor], x: Tensor, low: Tensor, packed: Tensor, scaling: Tensor, sizes, ranks, need_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """∂L/∂x (T, I) and [∂L/∂A_i…, ∂L/∂B_i…] from g_i (T, O_i), by one product over g̃."""
    wide = beside_ranks(grads, ranks)
    u, grad_x = input_gradient(wide, packed, ranks, need_x)
    return grad_x, factor_gradients(wide, u, x, low, scaling, sizes, ranks)


def beside_ranks(grads: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """[g, 0] (T, O+R): what `input_gradient` makes g̃ of."""
    return torch.cat([*grads, grads[0].new_zeros(grads[0].shape[0], sum(ranks))], dim=1)


def input_gradient(wide: Tensor, packed: Tensor, ranks: Sequence[int], need_x: bool) -> tuple[Tensor, Tensor | None]:
    """g·sB (T, R), also written into wide's last columns, and ∂L/∂x (T, I)."""
    total, width = packed.shape[0] - sum(ranks), packed.shape[1] - sum(ranks)
    u = torch.ops.veneer.append_product(wide, packed[:total, width:].t())
    return u, wide @ packed[:, :width] if need_x else None


def factor_gradients(wide: Tensor, u: Tensor, x: Tensor, low: Tensor, scaling: Tensor, sizes, ranks) -> list[Tensor]:
    """[∂L/∂A_i…, ∂L/∂B_i…] from g̃, contiguous: autograd copies what is not before it keeps it."""
    grad_b = ((wide[:, : sum(sizes)].t() @ low) * scaling).split(list(sizes))
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    grad_b = [d[:, start : start + rank].contiguous() for d, start, rank in zip(grad_b, starts, ranks)]
    return [*(u.t() @ x).split(list(ranks)), *grad_b]


def separate_gradients(
    grads: Sequence[Tensor], x: Tensor, low: Tensor, packed: Tensor, scaling: Tensor, sizes, ranks, need_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """`joined_gradients` with a product for each linear."""
    views = parts(packed, sizes, ranks)
    u = torch.cat([g @ b for g, (_, _, b) in zip(grads, views)], dim=1)
    grad_x = None
    if need_x:
        grad_x = u @ packed[sum(sizes) :, : x.shape[1]] + sum(g @ w for g, (w, _, _) in zip(grads, views))
    pairs = zip(grads, low.split(list(ranks), dim=1), scaling.split(list(ranks)))
    return grad_x, [*(u.t() @ x).split(list(ranks)), *[(g.t() @ h) * s for g, h, s in pairs]]


@torch._dynamo.allow_in_graph
def lora_group(
    x: Tensor,
    source: Sequence[Tensor],
    scaling: Tensor,
    sizes: Sequence[int],
    ranks: Sequence[int],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    again: bool = True,
) -> tuple[Tensor, ...]:
    """x (…, I), P (O+R, I+R) in x's dtype, lora_A[i] (R_i, I), lora_B[i] (O_i, R_i) → y_i (…, O_i) for each i.

    `scaling` (R) holds each s_i R_i times. The values of A_i and s_i B_i are those in P; lora_A and lora_B receive the
    gradients. Without `again` the backward pass uses the P that recomputing the forward pass makes.
    """
    return LoraGroup.apply(x, scaling, sizes, ranks, biases, again, len(source), *source, *lora_A, *lora_B)


@torch._dynamo.allow_in_graph
def lora_member(
    x: Tensor,
    source: Sequence[Tensor],
    scaling: Tensor,
    sizes: Sequence[int],
    ranks: Sequence[int],
    index: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
) -> Tensor:
    """Linear `index` of a group alone: its definition, and what runs where the group is not found whole."""
    weight, _, _ = parts(matrix_of(source, False), sizes, ranks)[index]
    return reference.lora_linear(x, weight, bias, lora_A, lora_B, scaling[sum(ranks[:index])].to(x.dtype))


def graph_groups(graph: torch.fx.GraphModule, again: bool = True) -> None:
    """Replace the `lora_member` calls of one input and one source by one `lora_group`, where all are there."""
    found: dict[tuple, list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is lora_member:
            found.setdefault((node.args[0], tuple(node.args[1])), []).append(node)
    for (x, source), members in found.items():
        scaling, sizes, ranks = members[0].args[2:5]
        members = sorted(members, key=lambda node: node.args[5])
        if [node.args[5] for node in members] != list(range(len(sizes))):
            continue
        biases, lora_A, lora_B = (tuple(node.args[i] for node in members) for i in (6, 7, 8))
        first = next(node for node in graph.graph.nodes if node in members)
        needed = [n for n in (*biases, *lora_A, *lora_B) if n is not None]
        if any(node.op != "placeholder" for node in needed):
            continue
        with graph.graph.inserting_before(first):
            arguments = (x, source, scaling, sizes, ranks, biases, lora_A, lora_B, again)
            group = graph.graph.call_function(lora_group, arguments)
            for i, node in enumerate(members):
                item = graph.graph.call_function(getitem, (group, i))
                item.meta = dict(node.meta)
                node.replace_all_uses_with(item)
        for node in members:
            graph.graph.erase_node(node)
    graph.recompile()
