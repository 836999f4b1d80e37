"""A run within its memory: what is chosen, and what happens when memory runs out all the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import veneer
from veneer.config import TrainConfig
from veneer.errors import PlanError, RunError
from veneer.training import budget, store
from veneer.training.forward import RowModel
from veneer.training.gradients import Gradients
from veneer.training.loop import Trainer


def config(model_dir, chat_file, out, **train):
    return TrainConfig(
        model=str(model_dir),
        data=str(chat_file),
        out=str(out),
        device="cpu",
        adapter={"rank": 4},
        train={"batch_size": 4, "lr": 5e-3, "max_steps": 3} | train,
    )


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


class Scarce:
    """A `RowModel.row` that runs out of memory in chosen calls."""

    def __init__(self, failing):
        self.calls, self.failing, self.row = 0, set(failing), RowModel.row

    def install(self, monkeypatch):
        scarce = self

        def row(self, packed):
            scarce.calls += 1
            if scarce.calls in scarce.failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return scarce.row(self, packed)

        monkeypatch.setattr(RowModel, "row", row)


def notes_of(run, monkeypatch=None, failing=()):
    if failing:
        Scarce(failing).install(monkeypatch)
    notes = []
    result = Trainer(run, observe=lambda r: notes.append(r["text"]) if r["type"] == "note" else None).run()
    return result, notes


@pytest.fixture(autouse=True)
def no_check(monkeypatch):
    """The comparison of packed and plain rows would take the first calls."""
    monkeypatch.setattr(RowModel, "check", lambda self, examples, required=False: None)


def test_out_of_memory_is_a_step_down_and_not_the_end(model_dir, chat_file, tmp_path, monkeypatch):
    plain, _ = notes_of(config(model_dir, chat_file, tmp_path / "plain", checkpointing="keep"))
    result, notes = notes_of(config(model_dir, chat_file, tmp_path / "scarce"), monkeypatch, failing=[2])
    said = [note for note in notes if "out of memory" in note]
    assert len(said) == 1 and "checkpointing recompute" in said[0] and "done again" in said[0]
    assert result.stopped == "finished" and result.steps == plain.steps == 3
    for name, value in weights(tmp_path / "plain").items():  # recomputing gives the same bits on a CPU
        assert torch.equal(value, weights(tmp_path / "scarce")[name]), name


def test_the_way_down_ends_with_one_line(model_dir, chat_file, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="data.max_length") as raised:
        notes_of(config(model_dir, chat_file, tmp_path / "run"), monkeypatch, failing=range(1, 100))
    assert "\n" not in str(raised.value)


def test_other_errors_are_not_taken_for_it(model_dir, chat_file, tmp_path, monkeypatch):
    def broken(self, row):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(RowModel, "row", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        notes_of(config(model_dir, chat_file, tmp_path / "run"))
    assert not budget.is_out_of_memory(RuntimeError("shapes do not match"))
    assert budget.is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:114] . not enough memory"))
    assert budget.is_out_of_memory(MemoryError())


def test_a_budget_chooses_and_is_written_down(model_dir, chat_file, tmp_path):
    run = config(model_dir, chat_file, tmp_path / "run", vram="1.5GB").model_copy(update={"device": "cpu"})
    result, notes = notes_of(run)
    assert any(note.startswith("chosen for 1.50 GB on the CPU") for note in notes)
    written = TrainConfig.load(tmp_path / "run" / "config.yaml").train
    assert written.vram == 1_500_000_000 and written.stream == "off" and written.checkpointing in ("keep", "recompute")
    again = config(model_dir, chat_file, tmp_path / "run", vram="2GB", max_steps=3)
    assert Trainer(again).run(resume=True).steps == result.steps  # a resumed run keeps what was chosen


def test_trying_the_longest_rows_first_changes_nothing(model_dir, chat_file, tmp_path, monkeypatch):
    fixed = {"checkpointing": "keep", "micro_batch_tokens": 128, "optimizer": "adamw", "stream": "off"}
    seen = []
    own = Gradients.try_longest
    monkeypatch.setattr(Gradients, "try_longest", lambda self: (own(self), seen.append(self.config.train.vram)))
    notes_of(config(model_dir, chat_file, tmp_path / "plain", **fixed))
    notes_of(config(model_dir, chat_file, tmp_path / "held", **fixed, vram="2GB"))
    assert seen == [None, 2_000_000_000]
    for name, value in weights(tmp_path / "plain").items():
        assert torch.equal(value, weights(tmp_path / "held")[name]), name


def test_a_budget_that_nothing_fits_is_said_before_anything_is_loaded(model_dir, chat_file, tmp_path):
    with pytest.raises(PlanError, match="nothing fits 100 MB: the least is"):
        Trainer(config(model_dir, chat_file, tmp_path / "run", vram="100MB")).run()


def test_without_a_budget_a_small_run_is_left_alone(model_dir, chat_file, tmp_path):
    run = config(model_dir, chat_file, tmp_path / "run")
    chosen, plan = budget.choose(run, print)
    assert chosen == run and plan is None


def test_without_a_budget_only_what_does_not_fit_is_changed(model_dir, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_ample", lambda config: False)
    run = config(model_dir, chat_file, tmp_path / "run")
    chosen, plan = budget.choose(run, print)
    assert plan is not None and chosen.train.model_dump() == run.train.model_dump() and chosen.quant == "none"


def test_ways_down_without_a_plan(model_dir, chat_file, tmp_path):
    run = config(model_dir, chat_file, tmp_path / "run", micro_batch_tokens=1024)
    assert budget.ways_down(run, None, True, 300) == [
        ("selective", 1024), ("recompute", 1024), ("recompute-offload", 1024), ("recompute-offload", 512),
        ("recompute-offload", 300),
    ]  # fmt: skip
    assert budget.ways_down(run, None, False, 1024) == [("recompute", 1024)]
    assert veneer.errors.PlanError is PlanError


class FailsAt(TorchDispatchMode):
    """Runs out of memory in its operation number `at`; keeps weak references to all that was made before."""

    def __init__(self, at, known):
        super().__init__()
        self.at, self.known, self.count, self.made = at, known, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        out = func(*args, **(kwargs or {}))
        if self.count < self.at:
            storages = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.made += [weakref.ref(s) for s in storages if s._cdata not in self.known and s.nbytes() > 256]
        return out

    def alive(self):
        return sum(ref() is not None for ref in self.made)


@pytest.mark.parametrize("dial", ["keep", "recompute", "recompute-offload", "offload", "mixed"])
def test_what_a_failed_step_made_is_freed_before_the_next(dial, model_dir, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1)
    trainer = Trainer(config(model_dir, chat_file, tmp_path / "run", checkpointing=dial))
    setup, _ = trainer._open(False)
    gradients, examples, seen = trainer.gradients, [setup.train[i] for i in range(4)], []
    step_down = Gradients.step_down
    monkeypatch.setattr(Gradients, "step_down", lambda self, error: (step_down(self, error), seen.append(mode.alive())))
    with gradients.running():
        gradients.of(examples, 0)
        parts = [*trainer.parameters.values(), *trainer.optimizer.buffers]
        own = [*setup.model.parameters(), *setup.model.buffers(), *parts, *[p.grad for p in parts]]
        known = {t.untyped_storage()._cdata for t in own}
        with FailsAt(10**9, known) as mode:
            gradients.of(examples, 0)
        whole = mode.count
        for tenth in range(1, 10):
            gradients.ways_down = [(dial, gradients.row_tokens)]
            with FailsAt(whole * tenth // 10, known) as mode:
                gradients.of(examples, 0)
    assert seen == [0] * 9
