"""The flat optimiser is AdamW: the same weights after every step, whoever holds the parameters, and the same on resume."""

import pytest
import torch
from torch import nn

from veneer.config import OptimConfig
from veneer.errors import ConfigError
from veneer.training.flat import FlatOptimizer
from veneer.training.optim import make_optimizer, set_lr

OPTIONS = OptimConfig(lr=1e-2, weight_decay=0.1, lora_plus_ratio=4)


def parameters(seed=0):
    torch.manual_seed(seed)
    shapes = {"a.lora_A": (3, 7), "a.lora_B": (5, 3), "b.lora_A": (2, 5, 3), "b.lora_bias": (5,), "head.weight": (4, 6)}
    found = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    found["head.weight"].data = found["head.weight"].data.bfloat16()
    found["frozen.lora_A"] = nn.Parameter(torch.randn(2, 2), requires_grad=False)
    return found


def loss(mine, step):
    torch.manual_seed(100 + step)
    return sum(
        (p.float() * torch.randn(p.shape)).sum() + p.float().square().sum() for p in mine.values() if p.requires_grad
    )


def test_every_step_is_adamws():
    mine, theirs = parameters(), parameters()
    flat, plain = FlatOptimizer(mine, OPTIONS), make_optimizer(theirs, OPTIONS)
    held = dict(mine)  # whoever held the parameters before still sees them
    assert len(flat.buffers) == 4 and {p.dtype for p in flat.buffers} == {torch.float32, torch.bfloat16}
    for step in range(5):
        set_lr(flat, 1e-2 / (step + 1)), set_lr(plain, 1e-2 / (step + 1))
        flat.zero_grad(), plain.zero_grad()
        for part in range(2):  # gradients add up over rows
            loss(mine, 2 * step + part).backward()
            loss(theirs, 2 * step + part).backward()
        torch.testing.assert_close(
            flat.norm().float(),
            torch.nn.utils.get_total_norm([p.grad.float() for p in theirs.values() if p.grad is not None]),
            rtol=1e-3,
            atol=0,
        )
        flat.step(), plain.step()
        for name in mine:
            assert torch.equal(held[name], theirs[name]), name


def test_gradients_that_are_put_in_place_count_and_missing_ones_are_zero():
    mine = parameters()
    flat = FlatOptimizer(mine, OPTIONS)
    loss(mine, 0).backward()
    mine["a.lora_A"].grad, mine["a.lora_B"].grad = torch.ones(3, 7), None
    flat.gather()
    assert (mine["a.lora_A"].grad == 1).all() and (mine["a.lora_B"].grad == 0).all()
    assert any((flat_.grad == 1).sum() == 21 for flat_ in flat.buffers)
    flat.scale_(0.5)
    assert (mine["a.lora_A"].grad == 0.5).all()


def test_a_saved_state_goes_on_to_the_same_weights():
    mine, again = parameters(), parameters()
    one = FlatOptimizer(mine, OPTIONS)
    for step in range(6):
        if step == 3:
            two = FlatOptimizer(again, OPTIONS)
            for name, p in again.items():
                p.data.copy_(mine[name])
            two.load_state(one.state())
        for optimizer, own in [(one, mine)] + ([(two, again)] if step >= 3 else []):
            optimizer.zero_grad()
            loss(own, step).backward()
            optimizer.step()
    for name in mine:
        assert torch.equal(mine[name], again[name]), name
    with pytest.raises((KeyError, RuntimeError)):
        FlatOptimizer({"x.lora_A": nn.Parameter(torch.ones(2, 2))}, OPTIONS).load_state(one.state())


def test_eight_bit_states_need_a_gpu():
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU|needs bitsandbytes"):
        FlatOptimizer(parameters(), OPTIONS.model_copy(update={"optimizer": "adamw-8bit"}))
