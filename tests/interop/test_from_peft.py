"""from_peft: the Veneer model computes, trains and saves what the live PEFT model did."""

import peft
import pytest
import torch
from live import BIASED, IDS, config, randomise, run
from safetensors.torch import load_file
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, AdapterStateError
from veneer.formats.peft_tensors import PREFIX, slots

pytestmark = pytest.mark.filterwarnings("ignore")
UNTIED = {"tie_word_embeddings": False}
CASES = {
    "plain": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "patterns": ({}, {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 3}}),
    "regex": ({}, {"target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    "layers": ({}, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": None}),
    "layers-pattern": ({}, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ({}, {"exclude_modules": ["down_proj"]}),
    "dropout": ({}, {"lora_dropout": 0.4}),
    "bias-all": (BIASED, {"bias": "all", "target_modules": ["q_proj"]}),
    "bias-lora": (BIASED, {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]}),
    "saved-norms": ({}, {"modules_to_save": ["norm"]}),  # PEFT's endswith: every norm
    "saved-head": ({}, {"modules_to_save": ["lm_head"]}),
    "dora": ({}, {"use_dora": True}),
    "lora-bias": (BIASED, {"lora_bias": True}),
    "head": ({}, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": (UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ({}, {"trainable_token_indices": [3, 8, 21]}),
    "alora": ({}, {"alora_invocation_tokens": [8, 13]}),
    "pissa": ({}, {"init_lora_weights": "pissa"}),
}


def live(case, **more):
    base, options = CASES[case]
    return randomise(peft.get_peft_model(tiny_llama(**base), config(**options | more))).eval()


def files(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_gradients_and_files(case, tmp_path):
    theirs = live(case)
    logits, _ = run(theirs)
    live_state = theirs.state_dict(keep_vars=True)
    state = peft.get_peft_model_state_dict(theirs, live_state, save_embedding_layers=False)
    grads = {key: value.grad for key, value in state.items()}
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    base = theirs.get_base_model()
    model = veneer.from_peft(theirs)
    assert model is base and not any("peft" in type(m).__module__ for m in model.modules())
    own_logits, own = run(model)
    torch.testing.assert_close(own_logits, logits, rtol=1e-5, atol=1e-5)
    trained = {PREFIX + key: value for key, (value, *_) in slots(veneer.get_bank(model), "default").items()}
    assert trained.keys() == grads.keys() and len(own) == len(grads)
    for key, parameter in trained.items():
        scale = float(grads[key].abs().max())
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-4, atol=1e-4 * scale, msg=lambda m, k=key: k + m)
    veneer.save_adapter(model, tmp_path / "veneer")
    one, two = files(tmp_path / "peft"), files(tmp_path / "veneer")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    if case != "pissa":
        again = peft.PeftModel.from_pretrained(tiny_llama(**CASES[case][0]), tmp_path / "veneer").eval()
        if case not in ("bias-all", "bias-lora"):  # PEFT trains the base's own biases in place
            with veneer.get_bank(model).disabled():
                torch.testing.assert_close(model(IDS).logits, tiny_llama(**CASES[case][0])(IDS).logits)
        torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_several_adapters_keep_names_state_and_requires_grad():
    theirs = live("patterns")
    theirs.add_adapter("second", config(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.set_adapter("second")
    torch.manual_seed(7)
    for name, p in theirs.named_parameters():
        if ".second." in name:
            p.data.normal_(std=0.3)
    expected = {}
    for name in ("default", "second"):
        theirs.set_adapter(name)
        expected[name] = theirs(input_ids=IDS).logits
    theirs.train()
    model = veneer.from_peft(theirs)
    bank = veneer.get_bank(model)
    assert bank.names == ["default", "second"] and bank.active == {"second": 1.0} and model.training
    assert all(p.requires_grad for p in bank.parameters("second").values())
    assert not any(p.requires_grad for p in bank.parameters("default").values())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    model.eval()
    for name in bank.names:
        bank.activate(name)
        torch.testing.assert_close(model(IDS).logits, expected[name], rtol=1e-5, atol=1e-5)


def test_several_active_and_rescaled_adapters():
    theirs = live("plain")
    theirs.add_adapter("second", config(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.base_model.set_adapter(["default", "second"])
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.set_scale("default", 0.25)
    expected = theirs(input_ids=IDS).logits
    model = veneer.from_peft(theirs)
    assert veneer.get_bank(model).active == {"default": 1.0, "second": 1.0}
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_accelerated_model_and_transformers_own_adapters():
    theirs = live("plain")
    expected = theirs(input_ids=IDS).logits
    veneer.accelerate(theirs)
    torch.testing.assert_close(veneer.from_peft(theirs)(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    own = tiny_llama()
    own.add_adapter(config(task_type=None))
    expected = randomise(own).eval()(IDS).logits
    assert veneer.from_peft(own) is own
    torch.testing.assert_close(own(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    veneer.detach(own)
    torch.testing.assert_close(own(IDS).logits, tiny_llama()(IDS).logits)
    own.add_adapter(config(task_type=None))  # nothing of PEFT's is left behind


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        return self.out(self.attention(y, y, y)[0])


def test_other_kinds_of_layers():
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["conv", "attention", "out"]}
    theirs = randomise(peft.get_peft_model(Mixed(), peft.LoraConfig(**options)))
    out = theirs.base_model.model.attention.base_layer.out_proj
    nn.init.zeros_(out.lora_B["default"].weight)  # of which PEFT adds the update twice
    x = torch.randn(2, 3, 6, 6)
    expected = theirs(x)
    torch.testing.assert_close(veneer.from_peft(theirs)(x), expected, rtol=1e-5, atol=1e-5)


def test_fused_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 64}
    base = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    theirs = randomise(peft.get_peft_model(base, config(r=2, **options | {"rank_pattern": {"experts.down_proj": 3}})))
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(veneer.from_peft(theirs)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_configuration_with_or_without_a_model():
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    ours = veneer.from_peft(peft.LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=1, **options))
    wanted = {"rank": 3, "alpha": 5, "dropout": 0.1, "rslora": True, "rank_pattern": {"q_proj": 2}, "layers": [1]}
    assert ours == veneer.AdapterConfig(target_modules=["q_proj", "up_proj"], tied_head="embedding", **wanted)
    with pytest.raises(AdapterFormatError, match=r"from_peft\(config, model\)"):
        veneer.from_peft(peft.LoraConfig())
    for options in (
        {},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["norm"]},
        {"exclude_modules": ["v_proj"]},
    ):
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options))
        base = tiny_llama()
        model = veneer.from_peft(peft.LoraConfig(**options), base)
        assert model is base
        sizes = [sorted(tuple(p.shape) for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
        assert sizes[0] == sizes[1]


def test_initialisations_and_their_settings():
    def converted(**options):
        config = veneer.from_peft(peft.LoraConfig(target_modules=["q_proj"], **options))
        return config.init, config.init_options.model_dump(exclude_defaults=True)

    assert converted() == ("kaiming", {}) and converted(init_lora_weights="olora") == ("olora", {})
    assert converted(init_lora_weights="pissa_niter_4") == ("pissa", {"pissa_iterations": 4})
    eva = peft.EvaConfig(rho=3.0, whiten=True)
    assert converted(init_lora_weights="eva", eva_config=eva) == ("eva", {"eva_rho": 3.0, "eva_whiten": True})
    corda = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    assert converted(init_lora_weights="corda", corda_config=corda) == ("corda", {"corda_method": "kpm"})
    with pytest.raises(AdapterFormatError, match="eva_config's tau=0.5"):
        converted(init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.5))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"init_lora_weights": "mica"}, "init"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(options, words):
    with pytest.raises(AdapterFormatError, match=words):
        veneer.from_peft(peft.LoraConfig(target_modules=["q_proj"], **options))
    with pytest.raises(AdapterFormatError, match="IA3"):
        veneer.from_peft(peft.IA3Config())


def test_a_failed_conversion_leaves_peft_as_it_was():
    theirs = live("plain")
    theirs.add_adapter("broken", config(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.base_model.model.model.layers[1].self_attn.q_proj.lora_A["broken"].weight.data.fill_(float("nan"))
    modules, before = list(theirs.modules()), theirs(input_ids=IDS).logits
    flags = [p.requires_grad for p in theirs.parameters()]
    with pytest.raises(AdapterFormatError, match="'broken'.*NaN"):
        veneer.from_peft(theirs)
    assert all(one is two for one, two in zip(modules, theirs.modules(), strict=True))
    assert torch.equal(theirs(input_ids=IDS).logits, before)
    assert [p.requires_grad for p in theirs.parameters()] == flags
    own = tiny_llama()
    own.add_adapter(config(task_type=None))
    next(p for n, p in own.named_parameters() if "lora_A" in n).data.fill_(float("nan"))
    with pytest.raises(AdapterFormatError, match="NaN"):
        veneer.from_peft(own)
    assert own.active_adapters() == ["default"] and "default" in own.peft_config
    theirs.delete_adapter("broken")
    theirs.merge_adapter()
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        veneer.from_peft(theirs)
    with pytest.raises(AdapterStateError, match="veneer.attach"):
        veneer.from_peft(tiny_llama())
    with pytest.raises(AdapterFormatError, match="PREFIX_TUNING"):
        veneer.from_peft(
            peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        )


def test_an_adapted_embedding_with_its_tied_head(tmp_path):
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(tiny_llama(), config(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)  # in place: the head's factors are the embedding's, seen from the other side
    logits = theirs(IDS).logits.detach()
    model = veneer.from_peft(theirs)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    assert veneer.get_bank(model).check("default").config.tied_head == "both"
