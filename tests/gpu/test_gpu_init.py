"""Starts computed on an NVIDIA GPU are those computed on the CPU."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_llama
from veneer.adapter.init import DATA_DRIVEN, start
from veneer.adapter.targets import select
from veneer.config import AdapterConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def starts(device: str, dtype: torch.dtype, init: str):
    model = tiny_llama()
    for weight in (p for p in model.parameters() if p.dim() == 2):  # singular values fall, as in trained weights
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u * 0.8 ** torch.arange(len(s)) @ vh)
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(1, 420, (1, 50), generator=generator) for _ in range(6)]
    data = [{"input_ids": i, "labels": torch.where(torch.arange(50) < 9, -100, i)} for i in ids]
    model, config = model.to(device, dtype), AdapterConfig(rank=4, alpha=6, init=init)
    return start(model, select(model, config), config, seed=3, calibration=data if init in DATA_DRIVEN else None)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "corda", "lora_ga", "eva"])
def test_starts_on_the_gpu_are_the_cpus(init):
    for here, there in zip(starts("cpu", torch.float32, init), starts("cuda", torch.float32, init), strict=True):
        assert there.lora_A.device.type == there.lora_B.device.type == "cpu"
        if init == "eva":
            k = min(3, len(here.lora_A), len(there.lora_A))  # equal components: B is 0, and signs are free
            assert abs(len(here.lora_A) - len(there.lora_A)) <= 1 and not there.lora_B.any()
            pair = [one.lora_A[:k].t() @ one.lora_A[:k] for one in (here, there)]
        elif init == "lora_ga":  # B and A hold other components of one gradient, whose signs are free and do not cancel
            pair = [one.lora_A.t() @ one.lora_A for one in (here, there)]
            lefts = [one.lora_B @ one.lora_B.t() for one in (here, there)]
            assert (lefts[0] - lefts[1]).norm() <= 2e-2 * lefts[0].norm()
        else:
            pair = [one.lora_B @ one.lora_A for one in (here, there)]
            assert torch.allclose(here.lora_A.norm(dim=1), there.lora_A.norm(dim=1), rtol=2e-2)
        assert (pair[0] - pair[1]).norm() <= 2e-2 * pair[0].norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_starts_of_half_precision_models_are_finite_and_not_zero(init, dtype):
    for one in starts("cuda", dtype, init):
        assert one.lora_A.isfinite().all() and one.lora_B.isfinite().all()
        assert one.lora_A.dtype == torch.float32 and one.lora_A.any() and (init == "eva" or one.lora_B.any())
