"""Merging into a checkpoint file by file, against the merge in memory and dense float64 references."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import veneer
from conftest import tiny_llama
from veneer.base.checkpoint import DTYPES, TensorFile, open_checkpoint, write_tensors
from veneer.errors import AdapterFormatError, AdapterStateError, BaseModelError, ConfigError, WrongBaseError
from veneer.formats import merge_write
from veneer.formats.changes import Change, as_matrices, changed_rows, column_norm, reference_row, spans
from veneer.formats.merge_plan import NotStreamable
from veneer.formats.merge_stream import merge_checkpoint
from veneer.formats.merge_write import PLAN, stochastic_rounding


def trained(model, folder: Path, tokenizer=None, seed: int = 0, **config) -> Path:
    """A saved adapter with random values everywhere; the model keeps it."""
    values = {"rank": 3, "alpha": 7, "target_modules": "all-linear"} | config
    bank = veneer.attach(model, veneer.AdapterConfig(**values), seed=seed)
    torch.manual_seed(seed)
    for name, parameter in bank.parameters("default").items():
        if name.endswith("magnitude_vector"):
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return veneer.save_adapter(model, folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=36, n_layer=2, n_head=6, vocab_size=420, n_positions=64, eos_token_id=0, bos_token_id=0)
    )


def granite_moe():
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6}
    return GraniteMoeForCausalLM(
        GraniteMoeConfig(**sizes, num_key_value_heads=2, vocab_size=420, num_local_experts=3, num_experts_per_tok=2)
    )


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=420, num_local_experts=3))


CASES = {
    "llama": (tiny_llama, {}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}, "rslora": True}),
    "dora": (tiny_llama, {"dora": True}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"], "tied_head": "embedding"}),
    "embedding, dora": (tiny_llama, {"target_modules": ["embed_tokens"], "dora": True, "tied_head": "embedding"}),
    "both tied": (tiny_llama, {"target_modules": ["embed_tokens"], "tied_head": "both"}),
    "head alone": (tiny_llama, {"target_modules": ["lm_head"]}),
    "own head": (tiny_llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "norms whole": (tiny_llama, {"target_modules": ["v_proj"], "modules_to_save": ["norm"]}),
    "tokens": (tiny_llama, {"target_modules": ["v_proj"], "trainable_tokens": [3, 400, 17]}),
    "conv1d": (gpt2, {"target_modules": "all-linear"}),
    "conv1d, dora": (gpt2, {"target_modules": "all-linear", "dora": True}),
    "conv1d, biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "conv1d, lora_bias": (gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "beside experts": (mixtral, {"target_modules": ["q_proj", "v_proj"]}),
}
UNTIED = ("embedding", "embedding, dora", "head alone", "own head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_files_hold_what_the_merge_in_memory_holds(case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.formats.changes.BLOCK", 500)  # many blocks, the last one smaller
    make, config = CASES[case]
    model = make().to(dtype).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="25KB")
    adapter = trained(model, tmp_path / "adapter", **config)
    before = files_of(tmp_path / "base") | files_of(adapter)
    report = merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    assert report.rows and report.files == len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    veneer.merge(model).save_pretrained(tmp_path / "wanted")
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted")
    assert found.keys() == wanted.keys() and report.untied == (
        case in ("embedding", "embedding, dora", "head alone", "own head")
    )
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        # the sum is in float32 in both, in another order: at most a float32 step, and where that crosses a tie one bfloat16
        error = (found[key].double() - value.double()).abs()
        step = torch.finfo(dtype).eps * value.double().abs() + 1e-6
        assert (error <= step).all() and (dtype == torch.float32 or (error > 0).double().mean() < 0.01), key
    config_found = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config_found["tie_word_embeddings"]
        == json.loads((tmp_path / "wanted/config.json").read_text())["tie_word_embeddings"]
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in found.values())
    assert files_of(tmp_path / "base") | files_of(adapter) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "wanted"]


def test_logits_of_the_files_are_those_of_base_and_adapter(tmp_path, tokenizer):
    for folder, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        model = tiny_llama().to(dtype)
        model.save_pretrained(tmp_path / folder / "base")
        tokenizer.save_pretrained(tmp_path / folder / "base")
        adapter = trained(model, tmp_path / folder / "adapter")
        report = merge_checkpoint(adapter, tmp_path / folder / "base", tmp_path / folder / "out", device="cpu")
        assert report.logits.mean < 0.05 * report.effect.mean and report.logits.top1 > 0.9
        if dtype == torch.float32:
            assert report.logits.max < 1e-5 and report.logits.top1 == 1
        _, again = veneer.load_base(tmp_path / folder / "out", device="cpu")
        assert again.chat_template == tokenizer.chat_template


def test_experts_that_the_checkpoint_holds_as_the_model_does(tmp_path):
    model = granite_moe()
    model.save_pretrained(tmp_path / "base")
    names = [n for n, p in model.named_parameters() if p.ndim == 3]
    adapter = trained(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names[:1])
    try:
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    except NotStreamable:
        assert names[0] not in open_checkpoint(tmp_path / "base").where
        pytest.skip("this version of transformers stores them in another form")
    veneer.merge(model).save_pretrained(tmp_path / "wanted")
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_experts_in_another_form_go_through_memory(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(NotStreamable, match="another form"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 4),
    by_column=st.booleans(),
    dora=st.booleans(),
    seed=st.integers(0, 99),
)
@example(shape=(1, 1, 8), rank=2, by_column=True, dora=True, seed=83)  # W + L·R nearly cancels
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_dense_sum(shape, rank, by_column, dora, seed):
    torch.manual_seed(seed)
    experts, rows, columns = shape
    weight = torch.randn(shape).to(torch.bfloat16)
    left, right = torch.randn(experts, rows, rank), torch.randn(experts, rank, columns)
    m = torch.rand(columns if by_column else rows) + 0.5 if dora else None
    change = Change(left, right, m, by_column, rows={0: torch.ones(columns)} if seed % 3 == 0 else {})
    dense = weight.double() + left.double() @ right.double()
    if dora:
        c = m.double() / dense.norm(dim=1 if by_column else 2)
        dense = dense * c.unsqueeze(1 if by_column else 2)
    if change.rows:
        dense[:, 0] = 1.0
    found = torch.cat(
        [changed_rows(weight, change, span, column_norm(weight, change, span[0])) for span in spans(weight)]
    )
    torch.testing.assert_close(found.double(), dense.flatten(0, 1), rtol=1e-4, atol=1e-5)
    e, row = seed % experts, seed % rows
    torch.testing.assert_close(reference_row(weight, change, e, row), dense[e, row], rtol=1e-9, atol=1e-9)


def test_dtype_is_converted_once(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", dtype="bfloat16", device="cpu")
    found, wanted = tensors_of(tmp_path / "out"), veneer.merge(model).state_dict()
    for key, value in found.items():
        assert value.dtype == torch.bfloat16
        assert (
            (value.double() - wanted[key].double()).abs() <= 0.501 * 2**-7 * wanted[key].double().abs() + 1e-6
        ).all()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_stochastic_rounding_is_right_on_average():
    exact = torch.tensor([1.0, 1.001, -1.003, 3e-5, -7.77, 1e30, 0.0]).repeat(4000, 1)

    def rounded(number):
        return stochastic_rounding(3, "w")(exact, number, torch.empty_like(exact, dtype=torch.bfloat16)).double()

    found = rounded(0)
    lower = exact.to(torch.bfloat16).double()
    step = 2**-7 * exact[0].double().abs()
    assert ((found - exact.double()).abs() <= step * 1.01).all()
    assert ((found.mean(0) - exact[0].double()).abs() <= 0.02 * step + 1e-45).all()
    assert (found[:, 0] == 1).all() and (found[:, 6] == 0).all() and found[:, 1].unique().numel() == 2
    assert not (lower.mean(0) - exact[0].double()).abs()[1:5].le(0.02 * step[1:5]).all()  # to nearest is not
    assert torch.equal(rounded(0), found) and not torch.equal(rounded(1), found)


def test_stochastic_rounding_reports_both_errors(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    report = merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", seed=5, device="cpu")
    exact = veneer.merge(tiny_with(adapter, tmp_path / "base")).state_dict()
    found = tensors_of(tmp_path / "out")
    changed = [key for key in found if "proj" in key]
    count = sum(found[key].numel() for key in changed)
    wanted = sum(float((found[k].double() - exact[k].double()).abs().sum()) for k in changed) / count
    nearest = (
        sum(float((exact[k].to(torch.bfloat16).double() - exact[k].double()).abs().sum()) for k in changed) / count
    )
    assert report.rounding.means() == pytest.approx((nearest, wanted), rel=1e-3) and 1.2 * nearest < wanted
    assert report.tensors == len(changed) and report.rounding.count == count
    with pytest.raises(ConfigError, match="bfloat16"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "b", seed=5, dtype="float16", device="cpu")


def tiny_with(adapter: Path, base: Path):
    """The base in float32 with the adapter on it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    veneer.load_adapter(model, adapter)
    return model


def killed_merge(blocks: int, *args, **options) -> int:
    """Merge in a child process that is killed when it comes to a block: its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left, rows = [blocks], merge_write.changed_rows

    def counted(*more):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(*more)

    try:
        merge_write.changed_rows = counted
        merge_checkpoint(*args, **options)
    finally:
        os._exit(1)


def test_a_killed_merge_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="14KB")
    adapter = trained(model, tmp_path / "adapter")
    base, out = tmp_path / "base", tmp_path / "out"
    merge_checkpoint(adapter, base, tmp_path / "whole", seed=1, device="cpu")
    assert killed_merge(9, adapter, base, out, seed=1, device="cpu") == -signal.SIGKILL and not out.exists()
    partial = tmp_path / ".out.partial"
    finished = {f.name: f.stat().st_mtime_ns for f in partial.glob("*.safetensors")}
    assert 0 < len(finished) < len(list(base.glob("*.safetensors")))
    first = min(finished)
    data = (partial / first).read_bytes()  # one of the finished files is cut short meanwhile: it is made anew
    (partial / first).write_bytes(data[:-10])
    written = []
    write = merge_write.write_tensors
    monkeypatch.setattr(
        merge_write, "write_tensors", lambda path, *rest: (written.append(path.name), write(path, *rest))[1]
    )
    report = merge_checkpoint(adapter, base, out, seed=1, device="cpu")
    assert report.reused == len(finished) - 1 and set(written) == {f.name for f in base.glob("*.safetensors")} - (
        set(finished) - {first}
    )
    assert files_of(out) == files_of(tmp_path / "whole")
    assert report.rounding.count == sum(v.numel() for k, v in tensors_of(out).items() if "proj" in k)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]


def test_another_merge_does_not_go_on_with_the_files_of_the_first(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    done = merge_checkpoint(adapter, tmp_path / "base", tmp_path / "a", device="cpu")
    (tmp_path / "a").rename(tmp_path / ".b.partial")
    record = {"identity": {"adapter": "another"}, "done": {"model.safetensors": [0, 0, 0]}}
    (tmp_path / ".b.partial" / PLAN).write_text(json.dumps(record))
    report = merge_checkpoint(adapter, tmp_path / "base", tmp_path / "b", device="cpu")
    assert report.reused == done.reused == 0


def test_a_wrong_result_is_not_put_in_place(tmp_path, tokenizer, monkeypatch):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter")
    rows = merge_write.changed_rows
    monkeypatch.setattr(merge_write, "changed_rows", lambda *args: rows(*args) * 1.001)
    with pytest.raises(BaseModelError, match="not W"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("veneer.formats.merge_stream.check_file", lambda *args: (1, None))
    with pytest.raises(BaseModelError, match="logit error"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["adapter", "base"]


def test_refusals(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    adapter = trained(model, tmp_path / "adapter")
    with pytest.raises(WrongBaseError):
        merge_checkpoint(adapter, tmp_path / "other", tmp_path / "out", device="cpu")
    merge_checkpoint(adapter, tmp_path / "other", tmp_path / "forced", force=True, device="cpu")
    with pytest.raises(ConfigError, match="not empty"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "forced", device="cpu")
    bias = trained(tiny_llama(), tmp_path / "bias", lora_bias=True)
    with pytest.raises(BaseModelError, match="would lose them"):
        merge_checkpoint(bias, tmp_path / "base", tmp_path / "out", device="cpu")
    part = trained(tiny_llama(), tmp_path / "alora", invocation=[5, 6])
    with pytest.raises(AdapterStateError, match="aLoRA"):
        merge_checkpoint(part, tmp_path / "base", tmp_path / "out", device="cpu")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace("layers.1.mlp", "layers.9.mlp"): value for key, value in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="none that can be adapted"):
        merge_checkpoint(adapter, tmp_path / "base", tmp_path / "out", device="cpu")
    data = (tmp_path / "base/model.safetensors").read_bytes()
    (tmp_path / "base/model.safetensors").write_bytes(data[:-10])
    with pytest.raises(BaseModelError, match="damaged"):
        merge_checkpoint(bias, tmp_path / "base", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6),
    codes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=6, max_size=6),
    piece=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_written_files_are_what_the_library_reads(tmp_path_factory, shapes, codes, piece):
    folder = tmp_path_factory.mktemp("w")
    torch.manual_seed(0)
    tensors = {}
    for number, (shape, code) in enumerate(zip(shapes, codes)):
        size = DTYPES[code].itemsize
        raw = torch.randint(0, 2, (*shape, size), dtype=torch.uint8)
        tensors[f"t.{number}é"] = raw.view(DTYPES[code]).reshape(shape)

    def pieces(name):
        data = tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return [data[at : at + piece] for at in range(0, len(data), piece)]

    entries = {name: (code, tuple(t.shape)) for (name, t), code in zip(tensors.items(), codes)}
    write_tensors(folder / "x.safetensors", entries, {"format": "pt"}, pieces)
    found, mine = load_file(folder / "x.safetensors"), TensorFile(folder / "x.safetensors")
    assert (
        found.keys() == tensors.keys() and mine.metadata == {"format": "pt"} and os.listdir(folder) == ["x.safetensors"]
    )
    for name, tensor in tensors.items():
        for other in (found[name], mine.tensor(name)):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_shapes_as_matrices():
    assert as_matrices(torch.zeros(3)).shape == (1, 1, 3)
    assert as_matrices(torch.zeros(4, 2, 3, 3)).shape == (1, 4, 18)
    assert as_matrices(torch.zeros(2, 4, 3)).shape == (2, 4, 3)
