"""What a program may do to an adapted model besides training it, by mistake or on purpose."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterStateError, ConfigError

IDS = torch.arange(1, 12).view(1, 11)


def adapted(*names: str) -> torch.nn.Module:
    """A tiny Llama with an adapter of its own random numbers under each name; the last one acts."""
    model = tiny_llama()
    for seed, name in enumerate(names or ["default"]):
        bank = veneer.attach(model, veneer.AdapterConfig(rank=3), name=name, seed=seed)
        for parameter in bank.parameters(name).values():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_an_adapted_model_can_be_pickled_whole(save, tmp_path):
    model, file = adapted("a", "b"), io.BytesIO()
    save(model, file)
    twin = pickle.load(io.BytesIO(file.getvalue())) if save is pickle.dump else None
    if twin is None:
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert veneer.get_bank(twin).model is twin
    assert torch.equal(logits(twin), logits(model))
    veneer.get_bank(twin).activate({"a": 0.5, "b": 1.0})
    veneer.get_bank(model).activate({"a": 0.5, "b": 1.0})
    assert torch.equal(logits(twin), logits(model))
    twin.save_pretrained(tmp_path / "out")  # the adapters alone, as the model that was pickled
    assert (tmp_path / "out" / "a" / "adapter_config.json").exists()
    assert torch.equal(logits(veneer.detach(twin)), logits(tiny_llama()))


def test_a_pickled_alora_adapter_still_finds_its_invocation():
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, invocation=[4, 5]))
    for parameter in bank.parameters("default").values():
        torch.nn.init.normal_(parameter, std=0.1)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(twin), logits(model))
        assert torch.equal(logits(veneer.detach(twin)), logits(tiny_llama()))


WRAPPERS = {"compiled": lambda m: torch.compile(m, backend="eager"), "data parallel": torch.nn.DataParallel}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_under_the_models_own_names(wrap, tmp_path):
    model = adapted()
    outer = wrap(model)
    assert veneer.get_bank(outer) is veneer.get_bank(model)
    veneer.save_adapter(outer, tmp_path / "wrapped")
    veneer.save_adapter(model, tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapter_config.json", "veneer.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert veneer.merge(outer) is outer
    assert not hasattr(model, "veneer_bank")


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_adapter_goes_on_the_model_before_it_is_wrapped(wrap, tmp_path):
    outer, saved = wrap(tiny_llama()), veneer.save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterStateError, match=r"the model is wrapped .* inside, \.(module|_orig_mod)"):
        veneer.attach(outer, veneer.AdapterConfig(rank=3))
    with pytest.raises(AdapterStateError, match="the model is wrapped"):
        veneer.load_adapter(outer, saved)


def test_attach_says_what_it_takes():
    with pytest.raises(AdapterStateError, match=r"torch\.nn\.Module, not on str 'smollm2'"):
        veneer.attach("smollm2", veneer.AdapterConfig())
    with pytest.raises(ConfigError, match=r"veneer\.AdapterConfig, not a dict"):
        veneer.attach(tiny_llama(), {"rank": 3})
    with pytest.raises(AdapterStateError, match="adapter name 3"):
        veneer.attach(tiny_llama(), veneer.AdapterConfig(rank=3), name=3)


def test_a_model_that_accelerate_offloaded(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    parts = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map=places, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(AdapterStateError, match=r"model\.layers\.1\.\S+: its weights are offloaded by accelerate"):
        veneer.attach(model, veneer.AdapterConfig(rank=2))


@pytest.mark.parametrize("name", ["train", "type", "keys", "update", "training", "_keys"])
def test_a_name_that_torchs_tables_cannot_hold(llama, name):
    with pytest.raises(AdapterStateError, match=f"adapter name '{name}' is that of an attribute of torch's modules"):
        veneer.attach(llama, veneer.AdapterConfig(rank=2), name=name)
    assert not any("lora" in key for key in llama.state_dict())
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=2))
    with pytest.raises(AdapterStateError, match="attribute"):
        bank.rename("default", name)


def test_blocks_end_well_though_their_adapter_was_renamed_or_removed():
    model = adapted("a", "b")
    bank, acting = veneer.get_bank(model), logits(model)
    with bank.disabled():
        bank.rename("b", "c")
    assert bank.active == {"c": 1.0} and torch.equal(logits(model), acting)
    bank.activate({"a": 0.5, "c": 1.0})
    with bank.disabled(), bank.route(["a"]):
        bank.remove("c")
    assert bank.active == {"a": 0.5}


def test_merging_nothing_is_an_error():
    """A base that is written as merged would pass for the adapter's model."""
    model = adapted("a")
    bank = veneer.get_bank(model)
    with bank.disabled():
        for merge in (bank.merge, lambda: veneer.merge(model)):
            with pytest.raises(AdapterStateError, match="no adapter is active, so nothing to merge; there are: a"):
                merge()
    assert bank.active == {"a": 1.0} and bank.merged is None


def test_an_unknown_or_last_adapter_is_told_when_saving(tmp_path):
    model = adapted("a")
    with pytest.raises(AdapterStateError, match="no adapter 'b' here; there are: a"):
        veneer.save_adapter(model, tmp_path / "x", name="b")
    bank = veneer.get_bank(model)
    bank.remove("a")
    for act in (
        lambda: veneer.save_adapter(model, tmp_path / "x"),
        lambda: model.save_pretrained(tmp_path / "y"),
        bank.report,
    ):
        with pytest.raises(AdapterStateError, match="no adapter"):
            act()


def test_a_prompt_that_is_no_list_is_told(make_tokenizer):
    """Text would be taken letter by letter, one prompt each."""
    model, tokenizer = tiny_llama(), make_tokenizer()
    for prompts in ("Hello", [{"role": "user", "content": "Hello"}]):
        with pytest.raises(veneer.VeneerError, match=r"prompts is a list of them: for a single one write \[prompt\]"):
            veneer.generate(model, tokenizer, prompts)
    for call in (veneer.generate, lambda m, t, p, **o: next(veneer.stream(m, t, p[0], **o))):
        with pytest.raises(veneer.VeneerError, match="max_new_tokens is at least 1, not 0"):
            call(model, tokenizer, ["Hello"], max_new_tokens=0)


def test_functions_say_what_they_take(model_dir):
    assert veneer.load_base(model_dir, device=torch.device("cpu"))[0].device.type == "cpu"
    with pytest.raises(ConfigError, match=r"veneer\.AdapterConfig, not a dict"):
        veneer.explain(model_dir, {"rank": 3})
    with pytest.raises(veneer.VeneerError, match="a model's name or path, not a LlamaForCausalLM"):
        veneer.explain(tiny_llama())
    with pytest.raises(ConfigError, match="adapters is a list of directories, not 'first'"):
        veneer.combine("first")
    with pytest.raises(ConfigError, match="rank must be a whole number"):
        veneer.combine(["first", "second"], method="svd", rank=2.5)
