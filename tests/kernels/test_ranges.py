"""Token ranges of different adapters through one frozen linear: every way against float64 truth, and nothing crosses."""

from __future__ import annotations

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterStateError
from veneer.kernels import dispatch, ranges, reference

T, I, O = 37, 23, 29
RANKS, LENGTHS, SCALES = (3, 1, 8, 5), {"a": 11, "b": 0, "c": 7, "d": 19}, (0.5, 2.0, 1.0, 1.7)


def case(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = {
        "x": torch.randn(1, T, I, dtype=dtype, requires_grad=True),
        "weight": torch.randn(O, I, dtype=dtype),
        "bias": torch.randn(O, dtype=dtype),
        "A": [torch.randn(r, I, dtype=dtype, requires_grad=True) for r in RANKS],
        "B": [torch.randn(O, r, dtype=dtype, requires_grad=True) for r in RANKS],
    }
    return made, ranges.Ranges.of(LENGTHS, torch.device("cpu"))


def truth(made):
    """Each adapter's own tokens by themselves."""
    parts = [
        reference.lora_linear(x, made["weight"], made["bias"], a, b, s)
        for x, a, b, s in zip(made["x"].split(list(LENGTHS.values()), dim=1), made["A"], made["B"], SCALES)
    ]
    return torch.cat(parts, dim=1)


def stacked(made, where):
    return ranges.stacked_lora_linear(made["x"], made["weight"], made["bias"], stack_of(made, where), where)


def stacked_dequantised(made, where):
    weight = lambda dtype: made["weight"].to(dtype)  # noqa: E731
    return ranges.stacked_lora_linear(made["x"], weight, made["bias"], stack_of(made, where), where)


def stack_of(made, where):
    return ranges.Stack.of(made["A"], made["B"], SCALES, list(LENGTHS), where, made["x"].dtype)


def stacked_function(made, where):
    mask = where.mask(list(LENGTHS), RANKS)
    factors = [f for pair in zip(made["A"], made["B"]) for f in pair]
    return ranges.StackedLora.apply(made["x"], made["weight"], made["bias"], mask, SCALES, *factors)


def by(impl):
    def run(made, where):
        weight = made["weight"]
        args = (made["bias"], made["A"], made["B"], SCALES, list(LENGTHS), where)
        return dispatch.ranged_lora_linear(made["x"], weight, *args, impl=impl)

    return run


def dequantised(made, where):
    args = (made["bias"], made["A"], made["B"], SCALES, list(LENGTHS), where)
    return dispatch.ranged_lora_linear(made["x"], lambda dtype: made["weight"].to(dtype), *args, impl="fast")


def compiled(made, where):
    torch._dynamo.reset()
    return torch.compile(by("fast"), backend="aot_eager", dynamic=True)(made, where)


WAYS = {
    "reference": by("reference"),
    "loop": by("fast"),
    "dequantised": dequantised,
    "stacked": stacked,
    "stacked dequantised": stacked_dequantised,
    "stacked function": stacked_function,
    "compiled": compiled,
}


def leaves(made):
    return [made["x"], *made["A"], *made["B"]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_way_is_each_adapter_on_its_own_tokens(way, dtype):
    exact, _ = case()
    made, where = case()
    made = {
        k: [f.detach().to(dtype).requires_grad_(f.requires_grad) for f in v]
        if isinstance(v, list)
        else v.detach().to(dtype).requires_grad_(v.requires_grad)
        for k, v in made.items()
    }
    wanted, got = truth(exact), WAYS[way](made, where)
    grad = torch.randn(1, T, O, dtype=torch.float64)
    wanted.backward(grad)
    got.backward(grad.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    for mine, other in zip(leaves(made), leaves(exact)):
        found, expected = (torch.zeros(1) if t.grad is None else t.grad for t in (mine, other))
        assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def test_a_nan_stays_with_its_adapter_in_the_loop():
    made, where = case()
    clean, _ = case()
    with torch.no_grad():
        made["x"][0, 13] = float("nan")  # one of c's
    for one in (made, clean):
        out = by("fast")(one, where)
        grad = torch.ones_like(out)
        grad[0, 14] = float("inf")
        out.backward(grad)
    for n in (0, 3):
        assert torch.equal(made["A"][n].grad, clean["A"][n].grad) and made["A"][n].grad.isfinite().all()
        assert torch.equal(made["B"][n].grad, clean["B"][n].grad) and made["B"][n].grad.isfinite().all()
    assert not made["A"][2].grad.isfinite().all()


def test_frozen_factors_get_no_gradient():
    for way in ("loop", "stacked function"):
        made, where = case()
        for a in made["A"]:
            a.requires_grad_(False)
        WAYS[way](made, where).sum().backward()
        assert all(a.grad is None for a in made["A"]) and made["B"][0].grad is not None


def test_the_model_with_routed_tokens_is_each_adapter_on_its_row():
    """Linears, an embedding, DoRA and a lora_bias, through a whole model one token run at a time."""
    model = tiny_llama().double()
    variants = [
        {"rank": 2},
        {"rank": 5, "target_modules": ["q_proj", "embed_tokens"], "tied_head": "embedding"},
        {"rank": 3, "dora": True},
        {"rank": 4, "lora_bias": True, "target_modules": "mlp"},
    ]
    for i, values in enumerate(variants):
        bank = veneer.attach(model, veneer.AdapterConfig(**values), name=f"n{i}", seed=i)
        for p in bank.parameters(f"n{i}").values():
            p.data += 0.1 * torch.randn_like(p)
    ids = torch.arange(1, 41)[None]
    embed = model.get_input_embeddings()
    layer = model.model.layers[0].mlp.up_proj
    lengths = {"n0": 9, "n1": 12, "n2": 6, "n3": 13}
    for module, x in ((embed, ids), (layer, torch.randn(1, 40, 36, dtype=torch.float64))):
        with bank.route_tokens(lengths):
            got = module(x)
        at = 0
        for name, length in lengths.items():
            bank.activate(name)
            torch.testing.assert_close(got[:, at : at + length], module(x[:, at : at + length]), rtol=1e-9, atol=1e-12)
            at += length
    with bank.route_tokens(lengths), pytest.raises(AdapterStateError, match="40 tokens are routed"):
        layer(torch.randn(2, 40, 36, dtype=torch.float64))
    assert bank.routing.ranges is None


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"modules_to_save": ["norm"]}, "whole modules"),
        ({"trainable_tokens": [3, 4]}, "embedding rows"),
        ({"invocation": [5, 6]}, "aLoRA"),
        ({"target_modules": ["lm_head"]}, "output head"),
        ({"target_modules": ["embed_tokens"], "tied_head": "both"}, "output head"),
    ],
)
def test_what_cannot_share_a_row_is_refused(values, reason):
    bank = veneer.attach(tiny_llama(), veneer.AdapterConfig(rank=2, **values))
    assert reason in bank.lone("default")
    with pytest.raises(AdapterStateError, match=reason.replace("(", r"\(")), bank.route_tokens({"default": 4}):
        pass


def test_a_block_compiles_into_one_graph_whatever_the_lengths():
    """One adapter or several: no break and, with other lengths, nothing compiled anew."""
    model, seen = tiny_llama(), []
    mlp = model.model.layers[0].mlp

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    for i in range(3):
        bank = veneer.attach(model, veneer.AdapterConfig(rank=2 + i), name=f"n{i}", seed=i)
        for p in bank.parameters(f"n{i}").values():
            p.data += 0.1 * torch.randn_like(p)
    torch._dynamo.reset()
    call = torch.compile(mlp, backend=backend, dynamic=True, fullgraph=True)
    x = torch.randn(1, 31, 36)
    torch.testing.assert_close(call(x), mlp(x))
    assert len(seen) == 1
    for lengths in ((5, 6, 7), (9, 3, 11), (0, 4, 9)):
        x = torch.randn(1, sum(lengths), 36)
        with bank.route_tokens(dict(zip(bank.names, lengths))):
            torch.testing.assert_close(call(x), mlp(x))
    assert len(seen) == 2
