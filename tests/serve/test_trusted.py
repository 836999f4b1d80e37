"""What a machine is trusted with: graphs only with right kernels."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from serve.served import GraphEngine, ask, engine_of, read, write

from conftest import tiny_llama
from veneer.serve import Registry, static, trusted
from veneer.serve.graphs import GraphRunner, OwnBlocks
from veneer.serve.runner import Runner


@pytest.fixture
def registry(monkeypatch):
    """As of a model on a GPU."""
    monkeypatch.setattr(trusted, "find_spec", lambda name: name)
    model = tiny_llama()
    targets = {"q": (64, 48), "k": (16, 48), "head": (900, 48), "up": (128, 48), "down": (48, 128)}
    return SimpleNamespace(model=model, targets=targets, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "sound, blocks, chosen", [(True, True, GraphRunner), (True, False, OwnBlocks), (False, True, Runner)]
)
def test_kernels_that_fail_their_trial_are_not_used(registry, monkeypatch, sound, blocks, chosen):
    monkeypatch.setattr(trusted, "sound", lambda device, dtype, shapes, cache: sound)
    monkeypatch.setattr(trusted, "sound_blocks", lambda device, dtype, shapes: blocks)
    with nullcontext() if chosen is GraphRunner else pytest.warns(UserWarning, match="slower"):
        assert trusted.runner_for(registry) is chosen


def test_the_models_own_blocks_answer_alike(tokenizer, tmp_path, monkeypatch):
    """Where the kernels of whole blocks are not trusted."""
    write(tmp_path / "a", 1)
    answers = []
    for kind in (OwnBlocks, GraphRunner):
        monkeypatch.setattr(GraphEngine, "_runner", staticmethod(lambda registry, kind=kind: kind))
        engine, _ = engine_of(tokenizer, tmp_path, kind=GraphEngine, adapters="a")
        answers.append([read(ask(engine, "either way", 9, stack)) for stack in ((), [("a", 1.0)])])
        assert engine.runner.fused == (kind is GraphRunner)
        engine.shutdown(0)
    assert answers[0] == answers[1]


def test_the_trial_has_the_models_shapes(registry):
    shapes = trusted.shapes_of(registry)
    config = registry.model.config
    keys, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert shapes.linears == ((48, (16, 64, 128)), (128, (48,)))
    assert shapes.heads == (min(2, keys), config.num_attention_heads // keys, width)
    assert shapes.block == (config.hidden_size, config.intermediate_size, False)


def test_a_registry_without_a_gpu_is_served_plainly(tmp_path):
    write(tmp_path / "a", 1)
    assert trusted.runner_for(Registry(tiny_llama(), allowed=[tmp_path])) is Runner


def test_what_cannot_be_captured_runs_without_and_the_rest_is_captured(tokenizer, tmp_path, monkeypatch):
    engine, _ = engine_of(tokenizer, tmp_path, kind=GraphEngine)
    wanted = read(ask(engine, "to be", 5))
    runner = engine.runner
    runner.steps.clear()
    runner.captures = {*runner.buckets}
    captured = []

    def capture(step):
        if isinstance(step.batch, static.StaticPieces):
            raise KeyError  # whatever a compiler says
        captured.append(step)

    monkeypatch.setattr(runner, "_capture", capture)
    with pytest.warns(UserWarning, match="reads prompts without CUDA graphs: KeyError"):
        runner.prompts([(0, 0, [1, 2], ())], [True])
    engine.slots.forget()
    assert read(ask(engine, "to be", 5)) == wanted
    assert captured and runner.captures == {static.StaticRows}
    engine.shutdown(0)
