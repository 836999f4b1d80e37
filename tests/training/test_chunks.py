"""MLPs that take a row's tokens in chunks give the whole rows' losses and gradients, and those that cannot run whole."""

import pytest
import torch
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.training import chunks
from veneer.training.accelerate import Accelerated
from veneer.training.chunks import token_modules, token_wise

IDS = torch.randint(1, 400, (1, 45), generator=torch.Generator().manual_seed(0))


def gradients(long, mode="recompute", compile=False, dropout=0.0):
    model = tiny_llama(num_hidden_layers=3).double().train()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, dropout=dropout), seed=0)
    parameters = bank.parameters("default")
    torch.manual_seed(1)
    for p in parameters.values():
        p.data = torch.randn_like(p, dtype=torch.float64)
    notes, sizes = [], []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-2]))
    with Accelerated(model, modes=mode, compile=compile, note=notes.append, long=long) as fast:
        fast.start()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        with torch.no_grad():
            assert torch.isfinite(model(input_ids=IDS).logits).all()
    assert all("forward" not in part.__dict__ for part in model.modules())
    return loss.detach(), {name: p.grad for name, p in parameters.items()}, notes, max(sizes)


@pytest.mark.parametrize("mode", ["recompute", "recompute-offload"])
def test_gradients_are_the_whole_rows(mode, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    loss, wanted, _, whole = gradients(0, mode)
    again, found, notes, most = gradients(40, mode)
    assert (whole, most, notes) == (45, 16, [])
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    assert gradients(45, mode)[3] == 45  # not longer than that


def test_dropout_is_drawn_again_in_the_recomputation(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)
    _, found, notes, _ = gradients(40, dropout=0.5)
    assert not notes and all(torch.isfinite(grad).all() for grad in found.values())


class MixingMLP(nn.Module):
    """Looks at all tokens at once, whatever its name says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) + x.mean(-2, keepdim=True)


def test_an_mlp_is_found_by_structure_and_tried():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    block = tiny_llama().model.layers[0]
    assert token_modules(block) == [block.mlp]
    assert token_wise(block.mlp, block.mlp.forward, torch.randn(1, 20, 36))
    mixing = MixingMLP()
    assert not token_wise(mixing, mixing.forward, torch.randn(1, 20, 8))
    sizes = dict(vocab_size=42, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=2,
                 num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    assert token_modules(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).model.layers[0]) == []  # experts are not linears


def test_an_mlp_that_mixes_tokens_runs_whole(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)
    notes, mixing = [], MixingMLP()
    block = nn.Sequential(mixing)
    call = chunks.Chunked(False, notes.append).block(block, block.forward)
    x = torch.randn(1, 40, 8)
    assert torch.equal(call(x), block(x))
    assert len(notes) == 1 and "MixingMLP" in notes[0]
