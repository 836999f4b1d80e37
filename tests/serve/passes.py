"""Whole passes of `GraphRunner` with its kernels in triton's interpreter (TRITON_INTERPRET=1), beside their twins."""

import os
import sys
import tempfile
from pathlib import Path
from time import sleep

import torch
from serve.block_checks import bounds
from serve.served import write
from serve.test_block import tiny

from veneer.kernels import served, served_attention, served_block, served_prompts
from veneer.serve import Registry
from veneer.serve.block import Products
from veneer.serve.graphs import GraphRunner
from veneer.serve.static import StaticRows


def filled(make):
    """`make`, whose memory is not what it happens to be but NaN."""

    def made(*args, **options):
        new = make(*args, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    return made


def finite(product):
    """`product`, whose input has no row that is not a number, padding's neither: a base may have one scale for all."""

    def checked(products, x):
        assert x.isfinite().all()
        return product(products, x)

    return checked


def passes(folder):
    """Logits of prompts with padding, and of steps with tiles of one row and of many, with stacks and without."""
    registry = Registry(tiny("qwen3"), allowed=[folder])
    for name in "ab":
        registry.load(name, name)
    runner, places = GraphRunner(registry.model, registry, 7, 128), []
    for content in registry.acquire(["a", "b"]):
        while (place := runner.pool.acquire(content)) is None:
            sleep(0.01)
        places.append(place)
    a, b = ((place, weight) for place, weight in zip(places, (1.0, -0.5)))
    texts = [(0, 0, [3, 4, 5, 6, 7], (a,)), (1, 0, list(range(9, 46)), ()), (3, 0, [8], (b,))]
    yield runner.prompts(texts, [True, True, False])
    for stack in ((), (a, b)):
        yield runner.tokens([(0, 5, 9, (a,)), (1, 37, 9, stack), (3, 1, 4, (b,))])
    yield runner.tokens([(slot, 20, 9, (b,)) for slot in (0, 1, 3)])
    steps = {tuple(tiling) for kind, _, *tiling in runner.steps if kind is StaticRows}
    assert runner.fused and steps == {(0, 1, 16), (1, 7, 1), (2, 7, 16), (1, 2, 16)}
    runner.close()


def main(targets):
    assert os.environ["TRITON_INTERPRET"] == "1"
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, own) in enumerate((("a", targets), ("b", "all"))):
            write(Path(folder) / name, seed, targets=own, model=tiny("qwen3"))
        served.range = served_attention.range = served_block.range = served_prompts.range = bounds
        torch.empty, torch.empty_like = filled(torch.empty), filled(torch.empty_like)
        torch.Tensor.new_empty = filled(torch.Tensor.new_empty)
        Products.__call__ = finite(Products.__call__)
        found = [logits.clone() for logits in passes(folder)]
        for module in (served, served_attention, served_block, served_prompts):
            module._runs = lambda x: False
        for got, wanted in zip(found, passes(folder), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(*sys.argv[1:])
