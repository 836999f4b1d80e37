"""Gradients added many at a time: the sums that autograd makes one by one, bit for bit, in fewer kernels."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from conftest import tiny_llama
from veneer.config import OptimConfig
from veneer.training import sums
from veneer.training.accelerate import Accelerated
from veneer.training.flat import FlatOptimizer

ROWS = [torch.arange(1, 30)[None], torch.arange(5, 34)[None], torch.arange(3, 32)[None]]
MODES = ["keep", "selective", "recompute", "recompute-offload", "offload", "mixed"]
SETTINGS = [*((mode, False) for mode in MODES), ("recompute", True)]


class Ops(TorchDispatchMode):
    """Counts operators inside of it, without those that give a view."""

    supports_higher_order_operators = True
    VIEWS = {"detach", "view", "t"}

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "overloadpacket", func).__name__
        self.count[name] += name not in self.VIEWS
        return func(*args, **(kwargs or {}))


def adapted(dtype=torch.float32, **config):
    model = tiny_llama(num_hidden_layers=2).to(dtype).train()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, alpha=7, **config), seed=0)
    torch.manual_seed(1)
    parameters = bank.parameters("default")
    for p in parameters.values():
        p.data.normal_().mul_(0.1)
    return model, parameters


def backward(model, row):
    model(input_ids=row, labels=row, use_cache=False).loss.backward()


def one_by_one(model, parameters, rows=ROWS):
    """What autograd sums up itself."""
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    for row in rows:
        backward(model, row)
    return {name: p.grad.clone() for name, p in parameters.items()}


@pytest.mark.parametrize(("mode", "compile"), SETTINGS)
def test_rows_add_up_on_every_setting_of_the_dial(mode, compile, monkeypatch):
    if compile:  # the graph of autograd as the compiler makes it, without its code for a CPU
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", torch._dynamo.backends.debugging.aot_eager)
    found = []
    for flat in (False, True):
        torch._dynamo.reset()
        model, parameters = adapted(torch.bfloat16)
        notes = []
        with Accelerated(model, modes=mode, compile=compile, dynamic=False, note=notes.append) as fast:
            optimizer = FlatOptimizer(parameters, OptimConfig()) if flat else None
            for _ in range(2):  # the second time all is compiled and packed
                if flat:
                    optimizer.zero_grad()
                else:
                    for p in parameters.values():
                        p.grad = torch.zeros_like(p)
                for row in ROWS:
                    fast.start()
                    backward(model, row)
                    with torch.no_grad():  # an evaluation in between
                        model(input_ids=row, use_cache=False)
            found.append({name: p.grad.clone() for name, p in parameters.items()})
        assert not notes
        if flat:
            assert all(p.grad is grad for p, grad in optimizer.members)
            assert torch.equal(optimizer.norm(), torch.nn.utils.get_total_norm([f.grad for f in optimizer.buffers]))
    one, other = found
    assert all(torch.equal(one[name], other[name]) and one[name].any() for name in one)


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_a_few_kernels_take_the_place_of_one_for_each_factor(compile, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", torch._dynamo.backends.debugging.aot_eager)
    counts, found = [], []
    for flat in (False, True):
        torch._dynamo.reset()
        model, parameters = adapted(torch.bfloat16)
        with Accelerated(model, modes="selective", compile=compile, dynamic=False, note=pytest.fail) as fast:
            if flat:
                held = FlatOptimizer(parameters, OptimConfig())
            for p in parameters.values() if not flat else ():
                p.grad = torch.zeros_like(p)
            for counting in (nullcontext(), Ops()):  # the first time all is compiled and packed
                fast.start()
                loss = model(input_ids=ROWS[0], labels=ROWS[0], use_cache=False).loss
                with counting:
                    loss.backward()
        counts.append(counting.count)
        found.append([p.grad.clone() for p in parameters.values()])
        assert not flat or held.sums
    assert all(map(torch.equal, *found))
    before, after = counts
    assert len(parameters) == 28 and after["_foreach_add_"] == 1
    assert before["add_"] - after["add_"] == 28
    assert sum(after.values()) == sum(before.values()) - 27  # no copies: autograd puts the gradients themselves there


@pytest.mark.parametrize(("most", "size", "small"), [(3, 1 << 20, 1 << 20), (64, 100, 1 << 20), (64, 1 << 20, 400)])
def test_any_portion_gives_the_same_sums(most, size, small, monkeypatch):
    wanted = one_by_one(*adapted())
    monkeypatch.setattr(sums, "MOST", most), monkeypatch.setattr(sums, "BYTES", size)
    monkeypatch.setattr(sums, "SMALL", small)
    model, parameters = adapted()
    optimizer = FlatOptimizer(parameters, OptimConfig(lora_plus_ratio=4))
    assert len(optimizer.buffers) == 2
    for row in ROWS:
        backward(model, row)
    assert all(torch.equal(p.grad, wanted[name]) for name, p in parameters.items())


def test_a_parameter_used_by_several_passes_at_once_and_one_that_none_reaches():
    p, q, unused = (nn.Parameter(torch.randn(3, 4)) for _ in range(3))
    optimizer = FlatOptimizer({"a.lora_A": p, "b.lora_A": q, "c.lora_A": unused}, OptimConfig())
    ((p * 2).sum() + torch.utils.checkpoint.checkpoint(lambda x: (x * p * q).sum(), p, use_reentrant=True)).backward()
    torch.testing.assert_close(p.grad, 2 + 2 * p * q)
    torch.testing.assert_close(q.grad, p * p)
    assert not unused.grad.any() and all(p.grad is grad for p, grad in optimizer.members)


def test_gradients_that_are_asked_for_are_not_added():
    p = nn.Parameter(torch.randn(3))
    optimizer = FlatOptimizer({"a.lora_A": p}, OptimConfig())
    (asked,) = torch.autograd.grad(p.square().sum(), p)
    assert torch.equal(asked, 2 * p) and p.grad is optimizer.members[0][1] and not p.grad.any()


def test_a_pass_that_failed_leaves_nothing_behind():
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = FlatOptimizer({"a.lora_A": p, "b.lora_A": q}, OptimConfig())

    def fail(_):
        raise MemoryError

    later = q * 1.0
    later.register_hook(fail)
    with pytest.raises(MemoryError):
        (later.sin() + p).sum().backward()
    optimizer.zero_grad()
    assert not p.grad.any() and p.grad is optimizer.members[0][1]
    (2 * p + q).sum().backward()
    assert (p.grad == 2).all() and (q.grad == 1).all()


def test_another_optimiser_takes_over_and_a_dropped_one_frees_its_memory():
    p = nn.Parameter(torch.randn(3))
    old = FlatOptimizer({"a.lora_A": p}, OptimConfig())
    new = FlatOptimizer({"a.lora_A": p}, OptimConfig())
    p.sum().backward()
    assert (new.buffers[0].grad == 1).all() and not old.buffers[0].grad.any()
    gc.disable()
    try:
        gone = weakref.ref(old.sums[0])
        del old
        assert gone() is None and len(p._backward_hooks) == 1
        del new
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    finally:
        gc.enable()
