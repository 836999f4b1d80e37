"""A model whose embedding table stays in host memory computes what it did before."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import veneer
from conftest import tiny_llama
from veneer.adapter.attach import get_bank
from veneer.base.host_embedding import HostEmbedding, embedding_to_host
from veneer.errors import ConfigError
from veneer.kernels.host_rows import host_rows

IDS = torch.tensor([[1, 5, 5, 9, 0, 2, 11]])


def scaled_gemma():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = Gemma2Config(**sizes, head_dim=8, vocab_size=64, tie_word_embeddings=False, attn_implementation="eager")
    return Gemma2ForCausalLM(config).requires_grad_(False).eval()


def losses_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in get_bank(model).parameters("default").items()}


@pytest.mark.parametrize("make", [lambda: tiny_llama(tie_word_embeddings=False), scaled_gemma], ids=["llama", "gemma"])
def test_losses_and_gradients_are_the_same(make):
    model = make()
    veneer.attach(model, veneer.AdapterConfig(rank=3), seed=0)
    before, wanted = losses_and_gradients(model)
    table = model.get_input_embeddings().weight.clone()
    embedding_to_host(model)
    embedding_to_host(model)  # a second adapter of a run on the same base asks again
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert all(p.data_ptr() != model.get_input_embeddings().weight.data_ptr() for p in model.parameters())
    after, found = losses_and_gradients(model)
    assert torch.equal(before, after)
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())


def test_rows_are_those_of_the_table():
    table = torch.randn(9, 5)
    assert torch.equal(host_rows(table, torch.tensor([3, 0, 3]), torch.float64), table[[3, 0, 3]].double())


def test_what_gains_nothing_or_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="needs the same table"):
        embedding_to_host(tiny_llama(tie_word_embeddings=True))
    model = tiny_llama(tie_word_embeddings=False)
    veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ConfigError, match="is adapted"):
        embedding_to_host(model)
    model = tiny_llama(tie_word_embeddings=False)
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ConfigError, match="trained"):
        embedding_to_host(model)
