"""PEFT's format both ways: saved files, logits and gradients compared with PEFT itself."""

import json
import shutil

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, AdapterStateError, WrongBaseError

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55]])
BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "all-linear": ({}, {}, {}),
    "attention": ({}, {"target_modules": "attention"}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "regex": (
        {},
        {"target_modules": r".*\.1\..*(q_proj|up_proj)"},
        {"target_modules": r".*\.1\..*(q_proj|up_proj)"},
    ),
    "rslora": ({}, {"rslora": True}, {"use_rslora": True}),
    "patterns": (
        {},
        {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    ),
    "layers": (
        {},
        {"layers": [1], "target_modules": ["q_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    ),
    "exclude": ({}, {"exclude_modules": ["down_proj"]}, {"exclude_modules": ["down_proj"]}),
    "head": ({}, {"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"]}),
    "bias-all": (BIASED, {"bias": "all", "target_modules": ["q_proj"]}, {"bias": "all", "target_modules": ["q_proj"]}),
    "bias-lora": (
        BIASED,
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    ),
    "saved-head": ({}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "saved-norm": ({}, {"modules_to_save": ["model.norm"]}, {"modules_to_save": ["model.norm"]}),
    "saved-norms": ({}, {"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}),  # to PEFT: all that end so
    "gaussian": ({}, {"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "lora_bias-gaussian": ({}, {"lora_bias": True, "init": "gaussian"}, {"lora_bias": True}),  # PEFT: not with gaussian
    "dropout": ({}, {"dropout": 0.3}, {"lora_dropout": 0.3}),
}


def peft_config(options):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    )


def veneer_config(options):
    return veneer.AdapterConfig(**{"rank": 4, "alpha": 6} | options)


def randomise(parameters):
    torch.manual_seed(5)
    for p in parameters:
        p.data.normal_(std=0.3)


def adapter_tensors(path):
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_what_veneer_saves_peft_loads(case, tmp_path):
    base, ours, _ = CASES[case]
    model = tiny_llama(**base)
    bank = veneer.attach(model, veneer_config(ours))
    randomise(bank.parameters("default").values())
    out = model(IDS).logits
    out.square().sum().backward()
    path = veneer.save_adapter(model, tmp_path / "a")

    theirs = peft.PeftModel.from_pretrained(tiny_llama(**base), path, is_trainable=True).eval()
    theirs_out = theirs(IDS).logits
    torch.testing.assert_close(theirs_out, out, rtol=1e-5, atol=1e-5)
    theirs_out.square().sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for key, p in bank.parameters("default").items():
        name, leaf = f"base_model.model.{key}", key.rpartition(".")[2]
        candidates = (f"{name}.default.weight", name, name.replace(".bias", ".base_layer.bias"))
        candidates += (f"{name.rpartition('.')[0]}.modules_to_save.default.{leaf}",)
        candidates += (name.replace(".lora_bias", ".lora_B.default.bias"),)
        grad = next(grads.pop(c) for c in candidates if c in grads)
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))
    assert not grads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_veneer_loads_and_saves_again_alike(case, tmp_path):
    base, _, options = CASES[case]
    theirs = peft.get_peft_model(tiny_llama(**base), peft_config(options)).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "peft")
    model = tiny_llama(**base)
    plain = model(IDS).logits
    bank = veneer.load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with bank.disabled():
        assert torch.equal(model(IDS).logits, plain)
    veneer.save_adapter(model, tmp_path / "ours")
    one, two = adapter_tensors(tmp_path / "peft"), adapter_tensors(tmp_path / "ours")
    one.pop("base_model.model.lm_head.base_layer.weight", None)  # PEFT's copy of a frozen head that it adapts
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_config_file_is_pefts(tmp_path):
    model = tiny_llama()
    veneer.attach(model, veneer_config({"rslora": True, "layers": [0], "rank_pattern": {"q_proj": 2}}))
    veneer.save_adapter(model, tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    known = peft.LoraConfig(r=1).to_dict()
    assert set(fields) <= set(known)
    config = peft.LoraConfig.from_pretrained(tmp_path / "a")
    assert config.r == 4 and config.lora_alpha == 6 and config.use_rslora and config.rank_pattern == {"q_proj": 2}
    assert all(t.startswith("model.layers.0.") for t in config.target_modules)


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    bank = veneer.attach(model, veneer_config({"target_modules": ["q_proj", "up_proj"]}))
    randomise(bank.parameters("default").values())
    return veneer.save_adapter(model, tmp_path / "adapter")


def change(path, edit):
    tensors = adapter_tensors(path)
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "edit,words",
    [
        (lambda t: t.pop(KEY), "q_proj lacks lora_A"),
        (lambda t: (t.pop(KEY), t.pop(KEY.replace("_A", "_B"))), "missing for 1 modules.*q_proj"),
        (lambda t: t.update({KEY: torch.zeros(3, 36)}), r"lora_A is \(3, 36\), not \(4, 36\)"),
        (lambda t: t.update({KEY: torch.full((4, 36), float("nan"))}), "NaN"),
        (
            lambda t: t.update({KEY.replace("q_", f"{x}_").replace("A.", f"{f}."): torch.zeros(s) for x in "k"
                                for f, s in (("A", (4, 36)), ("B", (12, 4)))}),
            "config leaves out.*k_proj",
        ),
        (lambda t: t.update({f"base_model.model.other.lora_{x}.weight": torch.zeros(1) for x in "AB"}), "none that can be"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(1)}), "no place in this model.*lm_head"),
        (lambda t: t.clear(), "holds no lora_A/lora_B pair"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused_and_the_model_stays_as_it_was(saved, edit, words):
    change(saved, edit)
    model = tiny_llama()
    before = model(IDS).logits
    with pytest.raises(AdapterFormatError, match=words):
        veneer.load_adapter(model, saved)
    assert torch.equal(model(IDS).logits, before) and not any("lora" in n for n, _ in model.named_parameters())


def test_damaged_files_are_refused(saved, tmp_path):
    model = tiny_llama()
    with pytest.raises(AdapterFormatError, match="no such adapter directory"):
        veneer.load_adapter(model, tmp_path / "nothing")
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterFormatError, match="damaged or cut short"):
        veneer.load_adapter(model, saved)
    file.unlink()
    (saved / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterFormatError, match="pickle"):
        veneer.load_adapter(model, saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFormatError, match="damaged"):
        veneer.load_adapter(model, saved)


@pytest.mark.parametrize("field", ["use_qalora", "layer_replication", "kasa_config"])
def test_kinds_that_veneer_cannot_hold_are_refused_by_name(saved, field):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {field: ["x"]}))
    with pytest.raises(AdapterFormatError, match=field):
        veneer.load_adapter(tiny_llama(), saved)


def test_another_base_is_refused_unless_forced(saved):
    other = tiny_llama(seed=1)
    with pytest.raises(WrongBaseError, match="other weights"):
        veneer.load_adapter(other, saved)
    with pytest.raises(WrongBaseError, match="shapes differ"):
        veneer.load_adapter(tiny_llama(num_hidden_layers=3), saved)
    veneer.load_adapter(other, saved, force=True)
    veneer.load_adapter(tiny_llama().to(torch.bfloat16), saved)  # the same base in another dtype is the same base


def test_saving_replaces_an_adapter_but_nothing_else(saved, tmp_path):
    model = tiny_llama()
    veneer.load_adapter(model, saved)
    (saved / "left-over.txt").write_text("x")
    veneer.save_adapter(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "veneer.json",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(AdapterStateError, match="no adapter directory"):
        veneer.save_adapter(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not list(tmp_path.glob(".*"))


def test_plain_modules_save_and_load(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["0", "1"]))
    randomise(bank.parameters("default").values())
    x = torch.randn(3, 6)
    expected = model(x)
    veneer.save_adapter(model, tmp_path / "a")
    veneer.detach(model)
    veneer.load_adapter(model, tmp_path / "a", name="again")
    assert torch.equal(model(x), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 8),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.25, 64)),
    rslora=st.booleans(),
    names=st.sets(
        st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]), min_size=1
    ),
    own_rank=st.integers(1, 8),
)
def test_round_trip_of_any_configuration(tmp_path, rank, alpha, rslora, names, own_rank):
    config = veneer.AdapterConfig(
        rank=rank, alpha=alpha, rslora=rslora, target_modules=sorted(names), rank_pattern={min(names): own_rank}
    )
    model = tiny_llama()
    randomise(veneer.attach(model, config).parameters("default").values())
    expected = model(IDS).logits
    path = veneer.save_adapter(model, tmp_path / "round")
    again = tiny_llama()
    veneer.load_adapter(again, path)
    assert torch.equal(again(IDS).logits, expected)
    shutil.rmtree(path)
