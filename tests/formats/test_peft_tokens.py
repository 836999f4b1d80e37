"""Adapters of trained tokens alone: PEFT's TRAINABLE_TOKENS, both ways."""

import json
import warnings

import peft
import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError
from veneer.report.info import describe

IDS = torch.tensor([[1, 5, 8, 13, 5, 34, 300]])


def randomise(parameters):
    torch.manual_seed(5)
    for parameter in parameters:
        parameter.data += torch.randn_like(parameter)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], None])
def test_what_peft_saves_comes_back_to_it_alike(tied, targets, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[1, 5, 300], target_modules=targets)
    theirs = peft.get_peft_model(tiny_llama(tie_word_embeddings=tied), config)
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "peft")
    mine = tiny_llama(tie_word_embeddings=tied)
    before = logits(mine)
    veneer.load_adapter(mine, tmp_path / "peft")
    assert (logits(mine) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(mine), logits(theirs))
    veneer.save_adapter(mine, tmp_path / "veneer")
    assert describe(tmp_path / "veneer").tokens == describe(tmp_path / "peft").tokens
    with warnings.catch_warnings(record=True) as caught:  # one for the deprecated name at most: no key may be missing
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "veneer")
    assert not any("missing" in str(w.message) for w in caught)
    torch.testing.assert_close(logits(again), logits(mine))


def test_ids_that_differ_by_module_are_veneers_alone_and_said_so(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    rows = {"embed_tokens": [1, 5], "lm_head": [1]}
    bank = veneer.attach(model, veneer.AdapterConfig(target_modules=[], trainable_tokens=rows))
    randomise(bank.parameters("default").values())
    with pytest.warns(UserWarning, match="PEFT does not"):
        veneer.save_adapter(model, tmp_path)
    other = tiny_llama(tie_word_embeddings=False)
    veneer.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize(
    "change, words", [({"target_modules": ".*embed.*"}, "make it a list"), ({"token_indices": []}, "empty")]
)
def test_what_cannot_be_read_is_refused(change, words, tmp_path):
    model = tiny_llama()
    veneer.attach(model, veneer.AdapterConfig(target_modules=[], trainable_tokens=[1, 5]))
    veneer.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "TRAINABLE_TOKENS" and fields["token_indices"] == [1, 5]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | change))
    with pytest.raises(AdapterFormatError, match=words):
        veneer.load_adapter(tiny_llama(), tmp_path)
