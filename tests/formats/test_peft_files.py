"""Adapter files as other tools and accidents leave them: read as PEFT reads them, or one line that says what is wrong."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.adapter.pretrained import trained_state
from veneer.errors import AdapterFormatError
from veneer.formats.adapter_file import read_adapter
from veneer.formats.merge_stream import merge_checkpoint
from veneer.report.info import describe

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55]])
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = "base_model.model.model.layers.0.input_layernorm.weight"


@pytest.fixture
def saved(tmp_path):
    """PEFT's adapter on q_proj, up_proj and all norms, far from its start."""
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"], "init_lora_weights": False}
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, **options)).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def rewrite(path, tensors=None, **fields):
    """Other tensors or other fields in an adapter's files."""
    if tensors is not None:
        save_file(tensors, path / TENSORS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | fields))


def both(path, make=tiny_llama, inputs=IDS):
    """The outputs of PEFT and of Veneer with an adapter."""

    def out(model):
        y = model.eval()(inputs)
        return getattr(y, "logits", y)

    theirs, model = out(peft.PeftModel.from_pretrained(make(), path)), make()
    veneer.load_adapter(model, path)
    return theirs, out(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_tensors_of_any_floating_dtype(saved, dtype):
    rewrite(saved, {key: value.to(dtype) for key, value in load_file(saved / TENSORS).items()})
    theirs, ours = both(saved)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert read_adapter(saved).layers and describe(saved).modules == 4


@pytest.mark.parametrize(
    "key, change, words",
    [
        (A, lambda x: x.to(torch.int32), "lora_A is int32, no floating-point numbers"),
        (A, lambda x: x.to(torch.complex64), "lora_A is complex64, no floating"),
        (A, lambda x: x.mul(float("nan")).to(torch.float8_e4m3fn), "lora_A holds NaN"),
        (A, lambda x: torch.tensor(1.0), r"lora_A"),
        (NORM, lambda x: x * float("nan"), "input_layernorm.weight holds NaN"),
        (NORM, lambda x: x.to(torch.int64), "input_layernorm.weight is int64, no floating-point numbers"),
        (NORM, None, "1 tensors are missing, first model.layers.0.input_layernorm.weight"),
    ],
)
def test_tensors_that_cannot_be_meant(saved, key, change, words):
    tensors = load_file(saved / TENSORS)
    old = tensors.pop(key)
    rewrite(saved, tensors | ({key: change(old)} if change else {}))
    model = tiny_llama()
    with pytest.raises(AdapterFormatError, match=words):
        veneer.load_adapter(model, saved)
    assert not any("lora" in name for name, _ in model.named_parameters())
    if key == A:
        with pytest.raises(AdapterFormatError):
            read_adapter(saved)


@pytest.mark.parametrize("shape", [(), (0, 36), (36,)])
def test_info_of_a_factor_without_a_rank(saved, shape):
    rewrite(saved, load_file(saved / TENSORS) | {A: torch.zeros(shape)})
    with pytest.raises(AdapterFormatError, match="no factor of a rank"):
        describe(saved)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 1e300},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"init_lora_weights": {"a": 1}},
        {"modules_to_save": 3},
        {"target_parameters": 3},
        {"layers_pattern": "("},
    ],
    ids=lambda fields: f"{fields}"[:40],
)
def test_fields_that_cannot_be_meant(saved, fields):
    rewrite(saved, **fields)
    for read in (describe, read_adapter, lambda path: veneer.load_adapter(tiny_llama(), path)):
        with pytest.raises(AdapterFormatError, match=f"{next(iter(fields))} is damaged") as caught:
            read(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [5, [5], "abc"], ids=str)
def test_new_tokens_that_are_none(saved, tokens):
    (saved / "veneer.json").write_text(json.dumps({"config": {"new_tokens": tokens}}))
    with pytest.raises(AdapterFormatError, match=r"veneer\.json is damaged: new_tokens is no list of texts"):
        veneer.load_adapter(tiny_llama(), saved)


def test_fields_of_the_future_and_empty_ones(saved):
    rewrite(saved, future={"x": 1}, base_model_name_or_path=None, layers_to_transform=[], target_parameters=[])
    theirs, ours = both(saved)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """Blocks of linears, numbered at two levels of their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [[nn.ModuleDict({"w": nn.Linear(6, 6)}) for _ in range(3)] for _ in range(4)]
        layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(experts)}) for experts in blocks)
        self.model = nn.ModuleDict({"layers": layers})

    def forward(self, x):
        for block in self.model["layers"]:
            for expert in block["experts"]:
                x = x + expert["w"](x).tanh()
        return x


@pytest.mark.parametrize("pattern", [None, "layers", ["experts"], ["none", "experts"]], ids=str)
def test_layers_are_counted_where_layers_pattern_says(tmp_path, pattern):
    options = {"target_modules": ["w"], "layers_to_transform": [1, 2], "layers_pattern": pattern}
    model = peft.get_peft_model(Experts(), peft.LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    model.save_pretrained(tmp_path / "a")
    theirs, ours = both(tmp_path / "a", Experts, torch.randn(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    veneer.get_bank(veneer.from_peft(model)).check("default")


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).mean((2, 3)))


PARTS = {"target_modules": ["convolution", "head"], "modules_to_save": ["norm"]}


def test_running_means_of_a_whole_module_are_saved_with_it(tmp_path):
    x = torch.randn(7, 3, 9, 9)
    model = peft.get_peft_model(Normalised(), peft.LoraConfig(r=2, init_lora_weights=False, **PARTS)).train()
    model(x)
    model.eval().save_pretrained(tmp_path / "peft")
    theirs, ours = both(tmp_path / "peft", Normalised, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(veneer.from_peft(model).eval()(x), theirs, rtol=1e-5, atol=1e-6)

    model = Normalised()
    veneer.attach(model, veneer.AdapterConfig(rank=2, **PARTS))
    model.train()(x)
    veneer.save_adapter(model.eval(), tmp_path / "ours")
    theirs, ours = both(tmp_path / "ours", Normalised, x)
    for got in (theirs, ours):
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6)
    assert "base_model.model.norm.num_batches_tracked" in load_file(tmp_path / "ours" / TENSORS)
    assert torch.equal(trained_state(veneer.get_bank(model))["norm.running_mean"], model.norm.running_mean)


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=60, num_labels=3, **sizes)).eval()


@pytest.mark.parametrize("names", [["query"], ["query", "classifier"]], ids=str)
def test_a_classifier_whose_head_is_adapted_or_left_as_it_is(tmp_path, names):
    """A task_type of SEQ_CLS would make PEFT look for a head that is trained in full."""
    model = peft.get_peft_model(classifier(), peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    ours = classifier()
    veneer.load_adapter(ours, tmp_path / "peft")
    veneer.save_adapter(ours, tmp_path / "ours")
    torch.manual_seed(8)
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours")
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits, rtol=1e-5, atol=1e-6)


def test_a_dora_adapter_without_magnitudes_is_not_merged_as_a_plain_one(saved, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    rewrite(saved, use_dora=True)
    with pytest.raises(AdapterFormatError, match="lacks a lora_magnitude_vector"):
        merge_checkpoint(saved, str(tmp_path / "base"), tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()


def test_one_config_with_null_and_one_with_an_empty_list_combine(saved, tmp_path):
    other = tmp_path / "b"
    other.mkdir()
    for name in (CONFIG, TENSORS):
        (other / name).write_bytes((saved / name).read_bytes())
    rewrite(other, target_parameters=[])
    veneer.combine([saved, other], tmp_path / "both")
    assert (tmp_path / "both" / CONFIG).exists()
