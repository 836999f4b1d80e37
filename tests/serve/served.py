"""A tiny base, adapters for it on disk, and what each of them answers alone."""

from __future__ import annotations

import time

import torch

import veneer
from conftest import tiny_llama
from veneer.serve import Engine, Registry, Request, Sampling
from veneer.serve.graphs import GraphRunner

TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear", "mlp": ["up_proj", "down_proj", "o_proj"]}
TARGETS |= {"k": ["k_proj"], "down": ["down_proj"], "head": ["lm_head"]}


class GraphEngine(Engine):
    """The GPU's way of decoding, with its kernels' twins and without graphs."""

    @staticmethod
    def _runner(registry):
        return GraphRunner


def write(folder, seed, rank=4, targets="all", model=None, **options):
    """An adapter with factors large enough to change what the base says."""
    model = model or tiny_llama()
    config = veneer.AdapterConfig(rank=rank, alpha=2 * rank, target_modules=TARGETS[targets], **options)
    bank = veneer.attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters("default").values():
        parameter.data.normal_(std=0.3, generator=generator)
    veneer.save_adapter(model, folder)
    veneer.detach(model)
    return folder


class Alone:
    """Greedy answers of one adapter, a stack or the base, by `veneer.generate`."""

    def __init__(self, tokenizer, adapters, model=None):
        self.tokenizer, self.model = tokenizer, model or tiny_llama()
        for name, path in adapters.items():
            self.bank = veneer.load_adapter(self.model, path, name=name)

    def __call__(self, stack, prompt, new):
        self.bank.activate(dict(stack) or None)
        (answer,) = veneer.generate(self.model, self.tokenizer, [prompt], max_new_tokens=new)
        return answer.text, answer.tokens, answer.finish_reason


def engine_of(tokenizer, folder, model=None, kind=Engine, adapters=(), registry=(), **options):
    """A started engine and its registry, with adapters loaded by the names of their folders."""
    model = model or tiny_llama()
    registry = Registry(model, allowed=[folder], **dict(registry))
    for name in adapters:
        registry.load(name, name)
    engine = kind(model, tokenizer, registry, **{"slots": 3, "context": 128} | options)
    engine.chunk = 8
    engine.start()
    return engine, registry


def ask(engine, prompt, new=8, adapters=(), **rules):
    """Submit a prompt, text or tokens."""
    ids = engine.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    return engine.submit(Request(ids, Sampling(new, **{"temperature": 0.0} | rules), tuple(adapters)))


def read(ticket):
    """(text, tokens counted, finish reason) of a whole answer."""
    pieces = list(ticket)
    return "".join(p.text for p in pieces), pieces[-1].usage.completion, pieces[-1].finish_reason


def check_growth(tokenizer, folder, model_of, kind):
    """Adapters that need more rank or targets than the pool has, one under an old name, and all gone: no old answer."""
    for name, seed, rank, targets in (("a", 1, 3, "qv"), ("b", 2, 12, "all"), ("c", 3, 5, "mlp"), ("d", 4, 30, "mlp")):
        write(folder / name, seed, rank=rank, targets=targets)
    alone = Alone(tokenizer, {name: folder / name for name in "abcd"}, model_of())
    engine, registry = engine_of(tokenizer, folder, model_of(), kind, "a", slots=4, registry={"device_slots": 2})
    text, versions = "what grows while others are answered", set()

    def answers(*named):
        """Ask for (name, what it should be) at once, and the base."""
        asked = [(stack, ask(engine, text, 12, stack and [(name, 1.0)])) for name, stack in ((None, []), *named)]
        for stack, ticket in asked:
            assert read(ticket) == alone(stack, text, 12)
        versions.add(engine.runner.pool.version)

    a, b, c, d = ([(name, 1.0)] for name in "abcd")
    answers(("a", a))
    long = ask(engine, text, 60, a)
    registry.load("b", "b")
    answers(("a", a), ("b", b))
    registry.load("a", "c", replace=True)
    answers(("a", c), ("b", b))
    assert read(long) == alone(a, text, 60)
    registry.load("d", "d")
    answers(("d", d), ("b", b), ("a", c))
    for name in "abd":
        registry.unload(name)
    while engine.runner.pool.stacks:
        time.sleep(0.01)
    registry.load("a", "d")
    answers(("a", d))
    assert len(versions) >= 4
    engine.shutdown(0)
