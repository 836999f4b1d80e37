"""What `explain` says from a configuration equals what `attach` does to the model, and what `save_adapter` writes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conformance.models import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

import veneer
from veneer.base.skeleton import skeleton
from veneer.config import AdapterConfig
from veneer.errors import BaseModelError, ConfigError, TargetError
from veneer.plan import bytes as size
from veneer.plan.explain import explain, scalings

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
CASES = [
    *[(name, {}) for name in BY_NAME],
    ("Llama", {"dora": True, "rslora": True}),
    ("Llama", {"lora_bias": True}),
    ("Llama", {"init": "pissa"}),
    ("Llama", {"lora_fa": True, "layers": [1]}),
    ("Llama", {"target_modules": ["q_proj"], "trainable_tokens": [3, 8], "modules_to_save": ["lm_head"]}),
    ("Llama", {"target_modules": [], "trainable_tokens": [3, 8, 9]}),
    ("Llama", {"target_modules": "mlp", "rank_pattern": {"up_proj": 3}, "exclude_modules": ["down_proj"]}),
    ("Gemma 2", {"target_modules": ["embed_tokens", "q_proj"], "tied_head": "both"}),
    ("Gemma 2", {"target_modules": [], "trainable_tokens": [3]}),
    ("Qwen3-MoE", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("Mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj", "gate.weight"]}),
    ("GPT-2", {"target_modules": ["c_attn", "wte"], "bias": "lora_only", "tied_head": "embedding"}),
    ("GPT-2", {"bias": "all", "dora": True}),
    ("T5", {"target_modules": ["q", "v"], "trainable_tokens": {"shared": [4, 5]}}),
    ("T5", {"target_modules": "attention", "layers": [0]}),
    ("ViT, image classification", {"target_modules": ["projection", "classifier"]}),
    ("ViT, image classification", {"dtype": "base", "dora": True}),
    ("Llama, sequence classification", {"target_modules": ["v_proj"], "bias": "none"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(architecture)`: a directory with nothing but the architecture's config.json."""
    made = {}

    def make(name, model):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("config")
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(made[name])
            assert os.listdir(made[name]) == ["config.json"]
        return made[name]

    return make


@pytest.mark.parametrize(
    "name, options", CASES, ids=lambda value: json.dumps(value) if isinstance(value, dict) else value
)
def test_what_is_said_is_what_attach_does(name, options, folder, tmp_path):
    model = BY_NAME[name].model()
    config = AdapterConfig(**{"rank": 2, "alpha": 5} | options)
    said = explain(folder(name, model), config)
    own = sum(p.numel() for p in model.parameters())
    report = veneer.attach(model, config, seed=0).report()
    assert (said.trainable_parameters, said.total_parameters) == (report.trainable_parameters, report.total_parameters)
    assert said.base_parameters == own and said.architecture == type(model).__name__
    bank = veneer.get_bank(model)
    assert [t.name for t in said.targets] == bank.entries["default"].targets
    for target in said.targets:
        layer = bank.layers[target.name]
        assert (target.d_out, target.d_in, target.rank) == (layer.d_out, layer.d_in, layer.rank["default"])
        assert target.lora_A == layer.lora_A["default"].shape and target.lora_B == layer.lora_B["default"].shape
        assert target.scaling == layer.scaling["default"]
        assert target.lora_parameters == sum(p.numel() for p in layer.trained("default").values())
    assert sum(said.trained_by_part.values()) == said.trainable_parameters
    path = veneer.save_adapter(model, tmp_path / "adapter")
    assert said.adapter_bytes == (path / "adapter_model.safetensors").stat().st_size
    json.dumps(said.as_dict())


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Mixtral"])
def test_what_is_adapted_and_what_is_left_add_up_to_the_model(name, folder):
    said = explain(folder(name, BY_NAME[name].model()), AdapterConfig(rank=2))
    left = sum(group.parameters for group in said.left_out)
    assert sum(t.full_parameters for t in said.targets) + left == said.base_parameters


def test_a_model_of_two_towers(tmp_path):
    """CLIP says of no module that it is the input embedding."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = small | {"vocab_size": 30}, small | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=10, architectures=["CLIPModel"])
    )
    model.config.save_pretrained(tmp_path)
    said = explain(tmp_path, AdapterConfig(rank=2))
    assert said.trainable_parameters == veneer.attach(model, AdapterConfig(rank=2)).report().trainable_parameters
    path = veneer.save_adapter(model, tmp_path / "adapter")
    assert said.adapter_bytes == (path / "adapter_model.safetensors").stat().st_size
    veneer.merge(model)


def reasons(said):
    return {group.name: group.reason for group in said.left_out}


def test_what_is_left_out_says_why(folder):
    moe = folder("Qwen3-MoE", BY_NAME["Qwen3-MoE"].model())
    why = reasons(explain(moe, AdapterConfig(rank=2)))
    assert why["lm_head"] == "the output head"
    assert why["gate_up_proj"] == why["down_proj"] == "experts in one tensor: name it in target_parameters"
    assert why["weight"] == "a matrix that is no layer: name it in target_parameters"  # the router's
    assert why["embed_tokens"].startswith("embedding: all-linear takes linears") and why["norm"].startswith("vectors")
    llama = folder("Llama", BY_NAME["Llama"].model())
    options = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"], "layers": [1]}
    said = explain(llama, AdapterConfig(rank=2, **options))
    assert reasons(said)["up_proj"] in ("exclude_modules", "not in `layers`")
    assert reasons(said)["q_proj"] == "not in `layers`" and reasons(said)["k_proj"] == "target_modules does not name it"
    head = folder("Gemma 2", BY_NAME["Gemma 2"].model())
    assert reasons(explain(head, AdapterConfig(rank=2)))["lm_head"] == "the output head, tied to the input embedding"
    task = folder("BERT, sequence classification", BY_NAME["BERT, sequence classification"].model())
    assert reasons(explain(task, AdapterConfig(rank=2)))["classifier"] == "the task's new head: trained in full"
    why = reasons(explain(llama, AdapterConfig(rank=2, target_modules="attention")))
    assert why["up_proj"] == "not in an attention module"


def test_notes_say_what_the_counts_leave_out(folder):
    llama = folder("Llama", BY_NAME["Llama"].model())

    def notes(**options):
        return " ".join(explain(llama, AdapterConfig(rank=4, **options)).notes)

    assert "twice its rank" in notes(init="pissa") and "even start" in notes(init="eva")
    assert "A is held and not trained" in notes(lora_fa=True) and "training ends at 2" in notes(
        adalora={"target_rank": 2}
    )
    moe = folder("Mixtral", BY_NAME["Mixtral"].model())
    assert "fused experts, which target_modules does not reach" in explain(moe, AdapterConfig(rank=2)).notes[0]


def test_new_tokens_grow_the_vocabulary_as_attach_does(model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    config = AdapterConfig(rank=2, new_tokens=["<call>", "<end>"], invocation="Turn the message")
    with pytest.raises(BaseModelError):  # no tokenizer beside a bare config.json
        explain(model_dir / "nowhere" / "config.json", config)
    said = explain(model_dir, config)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    report = veneer.attach(model, config, tokenizer=veneer.load_base(model_dir)[1]).report()
    assert (said.trainable_parameters, said.total_parameters) == (report.trainable_parameters, report.total_parameters)


def test_the_model_is_the_one_that_would_load(model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model, shown = AutoModelForCausalLM.from_pretrained(model_dir), skeleton(model_dir)
    assert {n: p.shape for n, p in shown.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in shown.parameters())
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "empty"))  # the catalogue's is known before it is fetched
    assert explain("smollm2-135m-instruct").base_parameters == 134_515_008 and not (tmp_path / "empty").exists()


@pytest.mark.model
def test_the_catalogues_shapes_are_those_of_what_is_fetched():
    from veneer.base.catalog import CATALOG, fetched

    folder = fetched("smollm2-135m-instruct")
    if folder is None:
        pytest.skip("not fetched yet")
    stored = json.loads((folder / "config.json").read_text())
    assert CATALOG["smollm2-135m-instruct"].config.items() <= stored.items()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "zork"}, "model_type 'zork' is none that this transformers knows"),
        ({"hidden_size": 4}, "it has no model_type"),
        ({"model_type": "zork", "auto_map": {"AutoConfig": "z.Z"}}, "Python code of its own"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot load the configuration"),
    ],
)
def test_a_configuration_that_cannot_be_used(values, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BaseModelError, match=words) as error:
        explain(tmp_path)
    assert "\n" not in str(error.value)


def test_what_attach_refuses(folder):
    llama = folder("Llama", BY_NAME["Llama"].model())
    for error, options in (
        (TargetError, {"target_modules": ["q_porj"]}),
        (TargetError, {"rank": 1000}),
        (ConfigError, {"init": "pissa", "target_modules": ["embed_tokens"]}),
        (ConfigError, {"init": "orthogonal", "rank": 3}),
    ):
        with pytest.raises(error):
            explain(llama, AdapterConfig(**{"rank": 2} | options))
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        explain(llama, dtype="int3")
    assert (
        explain(llama, AdapterConfig(rank=2), dtype="bfloat16").model_bytes
        == 2 * explain(llama, AdapterConfig(rank=2)).base_parameters
    )


def test_memory_of_seven_billion():
    assert size.gradients(7_000_000_000) == 28e9
    assert size.full(7_000_000_000).total == 16 * 7e9
    assert size.nf4(4096 * 4096) / 4096**2 == pytest.approx(0.516, abs=2e-4)


@pytest.mark.parametrize("shape", [(64, 64), (36, 52), (128, 640)])
def test_nf4_takes_what_bitsandbytes_takes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
    scales = (packed, state.absmax, state.state2.absmax)
    assert size.nf4(shape[0] * shape[1]) == sum(t.numel() * t.element_size() for t in scales)


def test_memory_by_way_of_training(folder):
    llama = folder("Llama", BY_NAME["Llama"].model())
    said = explain(llama, AdapterConfig(rank=2), dtype="bfloat16")
    n, trained = said.base_parameters, said.trainable_parameters
    assert said.memory["full"] == size.Memory(4 * n, 4 * n, 8 * n)
    assert said.memory["lora"] == size.Memory(2 * n + 4 * trained, 4 * trained, 8 * trained)
    packed = [t.full_parameters for t in said.targets]  # all linears but the head
    weights = sum(map(size.nf4, packed)) + 2 * (n - sum(packed)) + 4 * trained
    assert said.memory["qlora"] == size.Memory(weights, 4 * trained, 8 * trained)
    frozen = explain(llama, AdapterConfig(rank=2, lora_fa=True), dtype="bfloat16").memory["lora"]
    assert frozen.weights == said.memory["lora"].weights and frozen.optimizer < said.memory["lora"].optimizer


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text('abcé."\\_01', min_size=1, max_size=9),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 12), max_size=3).map(tuple)),
        min_size=1,
        max_size=6,
    )
)
def test_the_size_of_a_safetensors_file(tensors):
    made = {name: torch.zeros(shape, dtype=DTYPES[kind]) for name, (kind, shape) in tensors.items()}
    assert size.safetensors_size(tensors, {"format": "pt"}) == len(save_tensors(made, {"format": "pt"}))


def test_scalings_around_the_choice():
    rows = {(row["rank"], row["alpha"]): row for row in scalings(16, 32)}
    assert {rank for rank, _ in rows} == {4, 8, 16, 32, 64} and {alpha for _, alpha in rows} == {16, 32, 64}
    assert rows[16, 32]["scaling"] == 2 and rows[16, 32]["rslora_scaling"] == 8
    assert all(row["scaling"] == row["alpha"] / row["rank"] for row in rows.values())
    assert {rank for rank, _ in ((row["rank"], 0) for row in scalings(1, 1))} == {1, 2, 4}
