"""Combining on a GPU gives what the CPU gives."""

import pytest
import torch

from veneer.adapter.algebra import METHODS, Term, combine, plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_on_both_devices(method):
    generator = torch.Generator().manual_seed(0)
    cpu = [
        Term(torch.randn(5, 67, generator=generator), torch.randn(41, 5, generator=generator), s, w)
        for s, w in ((2.0, 0.7), (0.5, -0.4), (1.0, 1.1))
    ]
    cuda = [Term(t.lora_A.cuda(), t.lora_B.cuda(), t.scaling, t.weight) for t in cpu]
    wanted, found = (combine(terms, plan(method, seed=3), key="layer") for terms in (cpu, cuda))
    assert found.lora_A.is_cuda
    wanted, found = (m.lora_B @ m.lora_A for m in (wanted, found))
    assert torch.linalg.norm(found.cpu() - wanted) <= 1e-8 * torch.linalg.norm(wanted)
