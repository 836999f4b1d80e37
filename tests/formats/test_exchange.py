"""Adapters in other programs' formats: exact round trips, the files' definitions, PEFT and Veneer on what vLLM gets."""

import json
import stat

import gguf
import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, BaseModelError, ConfigError
from veneer.formats.adapter_file import read_adapter, write_adapter
from veneer.formats.gguf import halved, interleaved, read_factors, read_gguf, write_gguf
from veneer.formats.gguf_model import merge_gguf
from veneer.formats.mlx import read_mlx, write_mlx
from veneer.formats.portable import padded
from veneer.formats.shape import base_shape
from veneer.formats.torchtune import read_torchtune
from veneer.formats.verify import verify_adapter
from veneer.formats.vllm import RANKS, for_vllm

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55]])
EMBEDDING = "model.embed_tokens"
MIXED = {
    "rank": 4,
    "alpha": 6,
    "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 5},
    "alpha_pattern": {"v_proj": 3.5, "k_proj": 7},
}


def adapter(path, base=None, dtype=None, **options):
    """A saved adapter with random factors, and the logits of base + adapter."""
    model = base or tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(**{"rank": 4, "alpha": 6} | options))
    torch.manual_seed(3)
    for p in bank.parameters("default").values():
        p.data.normal_(std=0.3)
    veneer.save_adapter(model, path)
    if dtype:
        file = path / "adapter_model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    return path


def deltas(file):
    return {path: f.scaling * (f.lora_B.double() @ f.lora_A.double()) for path, f in file.layers.items()}


def assert_same_layers(one, two, exact=True):
    assert one.layers.keys() == two.layers.keys()
    for path, f in one.layers.items():
        g = two.layers[path]
        assert f.embedding == g.embedding
        if exact:
            assert f.scaling == pytest.approx(g.scaling, rel=1e-7)
            assert torch.equal(f.lora_A, g.lora_A) and torch.equal(f.lora_B, g.lora_B), path
    for path, delta in deltas(one).items():
        torch.testing.assert_close(deltas(two)[path], delta, rtol=1e-6, atol=1e-6 * float(delta.abs().max()))


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("untied")
    tiny_llama(tie_word_embeddings=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shape(untied):
    return base_shape(untied)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [{}, {"rslora": True}, MIXED, {"rank": 9}, {"layers": [1]}, {"target_modules": "attention"}],
                         ids=["plain", "rslora", "mixed", "rank-9", "layer-1", "attention"])  # fmt: skip
def test_vllm_form_is_the_same_adapter_to_peft_and_veneer(case, tmp_path):
    source = adapter(tmp_path / "a", **case)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    write_adapter(for_vllm(read_adapter(source)), tmp_path / "v")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    fields = json.loads((tmp_path / "v/adapter_config.json").read_text())
    assert fields["r"] in RANKS and not (fields["rank_pattern"] or fields["alpha_pattern"] or fields["use_rslora"])
    assert isinstance(fields["target_modules"], list) and fields["bias"] == "none" and not fields["modules_to_save"]
    scale = fields["lora_alpha"] / fields["r"]
    tensors = load_file(tmp_path / "v/adapter_model.safetensors")
    for path, delta in deltas(read_adapter(source)).items():  # as vLLM reads it: r and lora_alpha alone
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert a.shape[0] == b.shape[1] == fields["r"]
        torch.testing.assert_close(scale * (b @ a), delta, rtol=1e-6, atol=1e-6)
    ours, theirs = tiny_llama(), peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "v")
    wanted = tiny_llama()
    veneer.load_adapter(wanted, source)
    veneer.load_adapter(ours, tmp_path / "v")
    for model in (ours, theirs):
        torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=1e-5, atol=1e-5)


REFUSED = {
    "dora": ({"dora": True}, "DoRA"),
    "whole": ({"modules_to_save": ["model.norm"]}, "modules_to_save"),
    "rows": ({"trainable_tokens": [3, 4]}, "token rows"),
    "update-bias": ({"lora_bias": True}, "lora_bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_does_not_hold_is_refused_by_name(case, tmp_path, shape):
    options, words = REFUSED[case]
    source = read_adapter(adapter(tmp_path / "a", tiny_llama(tie_word_embeddings=False), **options))
    with pytest.raises(AdapterFormatError, match=f"{words}.*vLLM"):
        for_vllm(source)
    with pytest.raises(AdapterFormatError, match=f"{words}.*GGUF"):
        write_gguf(source, tmp_path / "x.gguf", shape)
    with pytest.raises(AdapterFormatError, match=f"{words}.*MLX"):
        write_mlx(source, tmp_path / "x", 2, None, None)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.gguf").exists()


def test_biases_alora_and_huge_ranks(tmp_path, shape):
    base = tiny_llama(attention_bias=True)
    source = adapter(tmp_path / "bias", base, bias="all", target_modules=["q_proj"])
    with pytest.raises(AdapterFormatError, match="trained biases"):
        for_vllm(read_adapter(source))
    source = adapter(tmp_path / "alora", invocation=[5, 6])
    with pytest.raises(AdapterFormatError, match="aLoRA"):
        for_vllm(read_adapter(source))
    write_gguf(read_adapter(source), tmp_path / "alora.gguf", shape)  # llama.cpp knows the tokens
    assert read_gguf(tmp_path / "alora.gguf", shape).fields["alora_invocation_tokens"] == [5, 6]
    large = read_adapter(adapter(tmp_path / "rank", target_modules=["q_proj"]))
    large.layers = {path: padded(f, 513) for path, f in large.layers.items()}
    with pytest.raises(AdapterFormatError, match="513 is over"):
        for_vllm(large)


SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"]


@SETTINGS
@given(
    rank=st.integers(1, 6),
    own_rank=st.integers(1, 6),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.25, 64)),
    own_alpha=st.integers(1, 9),
    rslora=st.booleans(),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    names=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_round_trips(tmp_path_factory, shape, rank, own_rank, alpha, own_alpha, rslora, dtype, names):
    """Through GGUF and MLX and back: ΔW to 1e-6, and bit for bit where nothing has to be folded or padded."""
    folder = tmp_path_factory.mktemp("round")
    source = read_adapter(
        adapter(
            folder / "a", tiny_llama(tie_word_embeddings=False), dtype, rank=rank, alpha=alpha, rslora=rslora,
            target_modules=sorted(names), rank_pattern={min(names): own_rank}, alpha_pattern={max(names): own_alpha},
        )
    )  # fmt: skip
    uniform = len({(f.rank, f.scaling) for f in source.layers.values()}) == 1
    write_gguf(source, folder / "a.gguf", shape)
    write_adapter(read_gguf(folder / "a.gguf", shape), folder / "back")
    same_alpha = len({f.rank * f.scaling for f in source.layers.values()}) == 1
    assert_same_layers(source, read_adapter(folder / "back"), exact=same_alpha and dtype is None)
    write_mlx(source, folder / "mlx", shape.blocks, None, "base")
    write_adapter(read_mlx(folder / "mlx", set(shape.embeddings), None, "base"), folder / "again")
    assert_same_layers(source, read_adapter(folder / "again"), exact=uniform)


def test_gguf_file_is_as_llama_cpp_defines_it(tmp_path, shape):
    """Against the definition written out: alpha / rank of each tensor, rows of q and k in pairs, token_embd transposed."""
    names = ["q_proj", "k_proj", "up_proj", "embed_tokens", "lm_head"]
    source = read_adapter(adapter(tmp_path / "a", tiny_llama(tie_word_embeddings=False), **MIXED | {"target_modules": names,
                                  "alpha_pattern": {"k_proj": 7}}))  # fmt: skip
    write_gguf(source, tmp_path / "a.gguf", shape)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    text = {key: field.contents() for key, field in reader.fields.items()}
    assert text["general.type"] == "adapter" and text["adapter.type"] == "lora"
    assert text["general.architecture"] == "llama"
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert len(tensors) == 2 * len(source.layers) == 16

    def delta(name, transpose=False):
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        return text["adapter.lora.alpha"] / b.shape[1] * (b @ (a.T if transpose else a))

    wanted = deltas(source)
    np.testing.assert_allclose(delta("blk.1.ffn_up"), wanted["model.layers.1.mlp.up_proj"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(delta("output"), wanted["lm_head"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(delta("token_embd", True), wanted[EMBEDDING], rtol=1e-5, atol=1e-6)
    for leaf, name, heads in (("q_proj", "attn_q", 6), ("k_proj", "attn_k", 2)):
        rows = wanted[f"model.layers.0.self_attn.{leaf}"].numpy()
        half = 36 // 6 // 2
        order = [h * 2 * half + i % 2 * half + i // 2 for h in range(heads) for i in range(2 * half)]
        np.testing.assert_allclose(delta(f"blk.0.{name}"), rows[order], rtol=1e-5, atol=1e-6)


@given(heads=st.integers(1, 5), half=st.integers(1, 4), rank=st.integers(1, 3))
def test_rotary_orders_are_inverses(heads, half, rank):
    rows = torch.arange(heads * 2 * half * rank).reshape(-1, rank)
    assert torch.equal(halved(interleaved(rows, heads), heads), rows)
    assert torch.equal(interleaved(halved(rows, heads), heads), rows)


def test_mlx_file_is_as_mlx_defines_it(tmp_path, shape):
    source = read_adapter(adapter(tmp_path / "a", layers=[1], **MIXED))
    write_mlx(source, tmp_path / "m", shape.blocks, None, "base")
    config = json.loads((tmp_path / "m/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "m/adapters.safetensors")
    one = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 1 and one["rank"] == 5
    assert "self_attn.q_proj" in one["keys"] and "mlp.down_proj" in one["keys"] and len(one["keys"]) == 7
    x = torch.randn(3, 36)
    for path, delta in deltas(source).items():
        if delta.shape[1] == 36:
            found = one["scale"] * (x @ tensors[f"{path}.lora_a"]) @ tensors[f"{path}.lora_b"]
            torch.testing.assert_close(found, (x.double() @ delta.T).float(), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_never_adapted_behind_the_users_back(tmp_path, model_dir):
    shape = base_shape(model_dir)
    assert shape.tied == EMBEDDING
    both = read_adapter(adapter(tmp_path / "both", target_modules=["embed_tokens", "q_proj"], tied_head="both"))
    one = read_adapter(adapter(tmp_path / "one", target_modules=["embed_tokens", "q_proj"], tied_head="embedding"))
    head = read_adapter(adapter(tmp_path / "head", target_modules=["lm_head"]))
    for source in (both, one, head):
        with pytest.raises(AdapterFormatError, match="one tensor for both"):
            write_gguf(source, tmp_path / "x.gguf", shape)
    for source, words in ((one, "adapt both"), (head, "does not have")):
        with pytest.raises(AdapterFormatError, match=words):
            write_mlx(source, tmp_path / "x", 2, shape.tied, None)
    done = veneer.export_adapter(tmp_path / "both", tmp_path / "mlx", "mlx", model_dir, device="cpu")
    assert done.verified.effect.max > 100 * done.verified.error.max
    assert not [key for key in load_file(tmp_path / "mlx/adapters.safetensors") if "lm_head" in key]


@pytest.mark.parametrize("ours", ["up_proj", "q_proj", "k_proj"])
def test_torchtune(tmp_path, shape, ours):
    """torchtune's Llama applies its rotary to pairs of rows: rows of q and k stand in another order."""
    theirs = {"up_proj": "mlp.w3", "q_proj": "attn.q_proj", "k_proj": "attn.k_proj"}[ours]
    source = read_adapter(adapter(tmp_path / "a", target_modules=[ours]))
    tensors = {}
    for path, f in source.layers.items():
        name = f"layers.{path.split('.')[2]}.{theirs}"
        b = interleaved(f.lora_B, shape.heads(ours)) if ours != "up_proj" else f.lora_B
        tensors |= {f"{name}.lora_a.weight": f.lora_A, f"{name}.lora_b.weight": b.contiguous()}
    save_file(tensors, tmp_path / "adapter_0.safetensors")
    with pytest.raises(AdapterFormatError, match="--alpha"):
        read_torchtune(tmp_path / "adapter_0.safetensors", shape)
    write_adapter(read_torchtune(tmp_path / "adapter_0.safetensors", shape, 6), tmp_path / "b")
    assert_same_layers(source, read_adapter(tmp_path / "b"))
    assert_same_layers(source, read_torchtune(tmp_path / "a", shape))  # what torchtune writes in PEFT's format
    (tmp_path / "adapter_0.pt").write_bytes(b"x")
    with pytest.raises(AdapterFormatError, match="opens no pickle"):
        read_torchtune(tmp_path / "adapter_0.pt", shape)


def test_damaged_and_foreign_files_are_refused(tmp_path, shape):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(4))
    with pytest.raises(AdapterFormatError, match="damaged"):
        read_factors(tmp_path / "a.gguf")
    other = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    other.add_type("model")
    other.add_tensor("output.weight", np.zeros((2, 2), np.float32))
    other.write_header_to_file(), other.write_kv_data_to_file(), other.write_tensors_to_file(), other.close()
    with pytest.raises(AdapterFormatError, match="not of a LoRA adapter"):
        read_factors(tmp_path / "model.gguf")
    source = read_adapter(adapter(tmp_path / "a", target_modules=["q_proj"]))
    write_mlx(source, tmp_path / "m", 2, None, None)
    tensors = load_file(tmp_path / "m/adapters.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "m/adapters.safetensors")
    with pytest.raises(AdapterFormatError, match="lacks one"):
        read_mlx(tmp_path / "m", set(), None, None)
    write_gguf(source, tmp_path / "b.gguf", shape)
    from transformers import Qwen2Config

    Qwen2Config(num_hidden_layers=2, hidden_size=36).save_pretrained(tmp_path / "qwen")
    with pytest.raises(AdapterFormatError, match="for llama models"):
        read_gguf(tmp_path / "b.gguf", base_shape(tmp_path / "qwen"))


def test_an_export_that_is_wrong_is_not_put_in_place(tmp_path, model_dir, monkeypatch):
    from veneer.formats import exchange

    adapter(tmp_path / "a")
    monkeypatch.setattr(exchange, "for_vllm", lambda a: _halved_scaling(a))
    with pytest.raises(BaseModelError, match="is not the base with its adapter"):
        veneer.export_adapter(tmp_path / "a", tmp_path / "v", "peft", model_dir, engine="vllm", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _halved_scaling(file):
    file.fields["lora_alpha"] /= 2
    for path, f in file.layers.items():
        file.layers[path] = type(f)(f.lora_A, f.lora_B, f.scaling / 2)
    return file


def test_a_merged_model_may_differ_by_its_own_rounding_only(tmp_path, model_dir, tokenizer):
    adapter(tmp_path / "a")
    model = tiny_llama()
    veneer.load_adapter(model, tmp_path / "a")
    veneer.merge(model).to(torch.float16).save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    paths = model_dir, tmp_path / "a", tmp_path / "merged"
    found = verify_adapter(*paths, merged_as=torch.float16, device="cpu", dtype="float32")
    assert 0 < found.error.max < 0.1 * found.effect.max
    with pytest.raises(BaseModelError, match="allowed"):
        verify_adapter(*paths, merged_as=torch.float32, device="cpu", dtype="float32")
    adapter(tmp_path / "other", alpha=9)
    with pytest.raises(BaseModelError, match="allowed"):
        verify_adapter(model_dir, tmp_path / "other", paths[2], merged_as=torch.float16, device="cpu", dtype="float32")


CONVERTER = """
import pathlib, sys
source, out = pathlib.Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
assert (source / "model.safetensors").exists() and (source / "tokenizer.json").exists()
assert sys.argv[sys.argv.index("--outtype") + 1] == "f16"
"""


def test_merged_through_a_converter(tmp_path, model_dir):
    adapter(tmp_path / "a")
    with pytest.raises(ConfigError, match="--converter"):
        veneer.export_merged(tmp_path / "a", tmp_path / "m.gguf", model_dir, device="cpu")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER + "pathlib.Path(out).write_bytes(b'GGUF')\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    options = {"converter": tmp_path, "device": "cpu", "verify": False}
    done = veneer.export_merged(tmp_path / "a", tmp_path / "m.gguf", model_dir, **options)
    assert done.path.read_bytes() == b"GGUF"
    script.write_text("raise SystemExit('no such architecture')")
    with pytest.raises(BaseModelError, match="no such architecture"):
        veneer.export_merged(tmp_path / "a", tmp_path / "n.gguf", model_dir, **options)
    assert not (tmp_path / "n.gguf").exists()


@pytest.mark.parametrize("out_type", ["f32", "f16", "bf16"])
def test_merged_over_a_gguf_base(tmp_path, shape, out_type):
    """Every weight is W + s·B·A rounded once, the metadata stays, and the base's file too."""
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_string("general.name", "tiny"), writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_uint32("llama.block_count", 2), writer.add_array("some.numbers", [1, 2, 3])
    weights = {
        f"blk.{i}.{n}.weight": torch.randn(s) for i in (0, 1) for n, s in (("attn_q", (36, 36)), ("ffn_up", (52, 36)))
    }
    for name, weight in weights.items():
        writer.add_tensor(name, weight.numpy())
    writer.add_tensor("output_norm.weight", np.ones(36, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    source = read_adapter(adapter(tmp_path / "a", target_modules=["q_proj", "up_proj"], alpha_pattern={"q_proj": 5}))
    write_gguf(source, tmp_path / "a.gguf", shape)
    before = (tmp_path / "base.gguf").read_bytes()
    merge_gguf(tmp_path / "base.gguf", tmp_path / "a.gguf", tmp_path / "m.gguf", out_type)
    assert (tmp_path / "base.gguf").read_bytes() == before
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    text = {key: field.contents() for key, field in reader.fields.items()}
    assert text["general.name"] == "tiny" and text["some.numbers"] == [1, 2, 3]
    assert text["tokenizer.ggml.tokens"] == ["a", "b"]
    found = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[out_type]
    assert found.pop("output_norm.weight").equal(torch.ones(36))
    for name, weight in weights.items():
        layer = f"model.layers.{name.split('.')[1]}."
        path = layer + ("self_attn.q_proj" if "attn_q" in name else "mlp.up_proj")
        delta = deltas(source)[path]
        delta = interleaved(delta, 6) if "attn_q" in name else delta
        wanted = (weight.double() + delta).float()
        torch.testing.assert_close(found[name], wanted, rtol=2 * torch.finfo(kind).eps, atol=1e-6)
        assert torch.equal(found[name], found[name].to(kind).float())
