"""A run held to a budget on a GPU, and what a plan says of it."""

from __future__ import annotations

import pytest
import torch

from veneer.config import TrainConfig
from veneer.plan.fit import Plan
from veneer.training.budget import hold
from veneer.training.loop import Trainer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def test_the_allocator_is_held_to_the_budget_and_let_go():
    torch.cuda.empty_cache()
    with hold(700_000_000, DEVICE, None):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(800_000_000, dtype=torch.uint8, device=DEVICE)
    assert torch.empty(800_000_000, dtype=torch.uint8, device=DEVICE).numel() == 800_000_000


def test_a_run_within_a_budget(model_dir, chat_file, tmp_path):
    config = TrainConfig(
        model=str(model_dir), data=str(chat_file), out=str(tmp_path / "run"), device="cuda", adapter={"rank": 4},
        train={"vram": "3GB", "max_steps": 2, "batch_size": 4, "compile": "off"},
    )  # fmt: skip
    trainer = Trainer(config)
    torch.cuda.reset_peak_memory_stats()
    assert trainer.run().steps == 2
    assert isinstance(trainer.plan, Plan)
    assert torch.cuda.max_memory_reserved() < 3e9
