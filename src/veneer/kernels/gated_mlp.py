"""A gated multi-layer perceptron down(act(gate x)·up x) whose linears are packed, as one function: for compiled code.

Gate and up are one group, down is another (`veneer.kernels.group`). As one function, one kernel (`veneer.kernels.gated`)
can make the gradients of gate and up where they are used, and the input of down for its gradient.
`graph_gated_mlps` finds such groups in a traced graph.

Legend: T tokens, I input width, O output width, R rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from veneer.kernels.gated import gated
from veneer.kernels.group import (
    beside_ranks,
    factor_gradients,
    input_gradient,
    lora_group,
    matrix_of,
    products,
)


class Group(NamedTuple):
    """The arguments of `lora_group` between x and `again`."""

    source: Sequence[Tensor]
    scaling: Tensor
    sizes: Sequence[int]
    ranks: Sequence[int]
    biases: Sequence[Tensor | None]
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]


class GatedMlp(torch.autograd.Function):
    """y = h W₂ᵀ + …, h = act(g)·u, [g, u] = x W₁ᵀ + …, by the groups' matrices; keeps x, g, u, x A₁ᵀ and h A₂ᵀ, not h.

    With `low_again` h A₂ᵀ is not kept either, but made of the h that the backward pass makes.
    """

    @staticmethod
    def forward(ctx, x, kind, first, last, again, low_again, *factors):
        x2 = x.reshape(-1, x.shape[-1])
        (gate, up), low = products(x2, matrix_of(first.source, False), first.sizes, first.ranks, first.biases)
        h = gated(gate, up, kind)
        (y,), low_h = products(h, matrix_of(last.source, False), last.sizes, last.ranks, last.biases)
        kept = () if low_again else (low_h,)
        ctx.save_for_backward(x2, low, gate, up, first.scaling, last.scaling, *first.source, *last.source, *kept)
        ctx.count, ctx.count2, ctx.low_again = len(first.source), len(last.source), low_again
        ctx.sizes, ctx.ranks = (first.sizes, last.sizes), (first.ranks, last.ranks)
        ctx.kind, ctx.again, ctx.shape, ctx.dtypes = kind, again, x.shape, [factor.dtype for factor in factors]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, low, gate, up, scaling, scaling2, *rest = ctx.saved_tensors
        (sizes, sizes2), (ranks, ranks2), count = ctx.sizes, ctx.ranks, ctx.count

        packed2 = matrix_of(rest[count : count + ctx.count2], ctx.again)
        wide2 = beside_ranks([grad.reshape(-1, grad.shape[-1])], ranks2)
        u2, h = input_gradient(wide2, packed2, ranks2, True)
        lora_A = packed2[sum(sizes2) :, : h.shape[1]]
        wide = torch.ops.veneer.gated_backward(gate, up, h, sum(ranks), ctx.kind)  # h was ∂L/∂h until here
        low2 = h @ lora_A.t() if ctx.low_again else rest[-1]
        last = factor_gradients(wide2, u2, h, low2, scaling2, sizes2, ranks2)
        del packed2, lora_A, h  # before the larger matrix is unpacked
        u, grad_x = input_gradient(wide, matrix_of(rest[:count], ctx.again), ranks, ctx.needs_input_grad[0])
        factors = [*factor_gradients(wide, u, x, low, scaling, sizes, ranks), *last]
        factors = [d.to(dtype) for d, dtype in zip(factors, ctx.dtypes)]
        return None if grad_x is None else grad_x.view(ctx.shape), *[None] * 5, *factors


@torch._dynamo.allow_in_graph
def gated_mlp(x: Tensor, kind: str, first: Sequence, last: Sequence, again: bool, low_again: bool) -> Tensor:
    """x (…, I) → (…, O): `first` is the group of gate and up, `last` that of down alone, both as in `Group`.

    `kind` is one of `veneer.kernels.gated.ACTIVATIONS`, `again` as in `lora_group`.
    """
    first, last = Group(*first), Group(*last)
    factors = (*first.lora_A, *first.lora_B, *last.lora_A, *last.lora_B)
    return GatedMlp.apply(x, kind, first, last, again, low_again, *factors)


def graph_gated_mlps(graph: GraphModule, low_again: bool = False) -> None:
    """Replace groups of a traced graph that are a gated MLP, their values used nowhere else, by one `gated_mlp`."""
    for down in graph.graph.find_nodes(op="call_function", target=lora_group):
        between = _gated_input(down)
        if between is None:
            continue
        product, active, gate, up, first = between
        (out,) = down.users
        arguments = (first.args[0], _activation(active), first.args[1:-1], down.args[1:-1], down.args[-1], low_again)
        with graph.graph.inserting_before(down):
            call = graph.graph.call_function(gated_mlp, arguments)
        call.meta = dict(out.meta)
        out.replace_all_uses_with(call)
        for node in (out, down, product, active, gate, up, first):
            graph.graph.erase_node(node)
    graph.recompile()


def _gated_input(down: Node) -> tuple[Node, ...] | None:
    """The product, activation, gate, up and their group that make the input of a group of one; None if they do not."""
    product = down.args[0]
    if len(down.args[3]) != 1 or len(down.users) != 1 or not _alone(product, (operator.mul, torch.mul)):
        return None
    for active, up in (product.args, product.args[::-1]):
        if _activation(active) is None or not all(_alone(n, (operator.getitem,)) for n in (active.args[0], up)):
            continue
        (first, i), (other, j) = active.args[0].args, up.args
        if first is other and first.target is lora_group and (i, j, len(first.args[3])) == (0, 1, 2):
            return product, active, active.args[0], up, first
    return None


def _alone(node: object, targets: Sequence) -> bool:
    """Whether a node calls one of these functions and its value is used once."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets and len(node.users) == 1


def _activation(node: object) -> str | None:
    """Which of ACTIVATIONS a node computes."""
    if not _alone(node, (F.silu, F.gelu)) or node.kwargs.get("inplace"):
        return None
    if node.target is F.silu:
        return "silu"
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
