import io
import json

import pytest
import torch
from rich.console import Console
from runs import make_run
from safetensors.torch import save_file

from veneer.errors import AdapterFormatError, RunError
from veneer.report.info import describe, print_info

PREFIX = "base_model.model.model.layers"


def make_adapter(path, dtype=torch.float32, extra=None, **fields):
    path.mkdir(parents=True, exist_ok=True)
    tensors = dict(extra or {})
    for layer in range(2):
        for name, rank, d_out in (("self_attn.q_proj", 4, 8), ("mlp.down_proj", 2, 16)):
            tensors[f"{PREFIX}.{layer}.{name}.lora_A.weight"] = torch.zeros(rank, 8, dtype=dtype)
            tensors[f"{PREFIX}.{layer}.{name}.lora_B.weight"] = torch.zeros(d_out, rank, dtype=dtype)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"down_proj": 2}, **fields}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "veneer.json").write_text(json.dumps({"base": {"name_or_path": "tiny"}}))
    return path


def printed(info):
    console = Console(file=io.StringIO(), width=100)
    print_info(info, console)
    return console.file.getvalue()


def test_adapter(tmp_path):
    info = describe(make_adapter(tmp_path / "adapter"))
    assert (info.kind, info.base, info.modules) == ("adapter", "tiny", 4)
    assert info.targets == {"q_proj": 2, "down_proj": 2}
    assert info.ranks == [2, 4] and info.alphas == [8] and info.scalings == [2, 4]
    assert info.parameters == 2 * (4 * 8 + 8 * 4 + 2 * 8 + 16 * 2) and info.dtypes == ["F32"]
    assert info.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert json.loads(json.dumps(info.as_dict()))["scalings"] == [2, 4]
    assert "q_proj × 2" in printed(info) and "scaling     2, 4" in printed(info)


def test_rslora_and_alpha_pattern(tmp_path):
    fields = {"use_rslora": True, "alpha_pattern": {r"layers\.1\..*q_proj": 6}}
    info = describe(make_adapter(tmp_path, dtype=torch.bfloat16, **fields))
    assert info.alphas == [6, 8] and info.dtypes == ["BF16"]
    assert info.scalings == pytest.approx([3, 4, 8 / 2**0.5])
    assert "rsLoRA" in printed(info)


def test_fused_experts_have_the_rank_of_the_config_and_the_name_of_their_parameter(tmp_path):
    experts = {
        f"{PREFIX}.0.mlp.experts{depth}.lora_{factor}.weight": torch.zeros(3 * rank, 8)
        if factor == "A"
        else torch.zeros(8, 3 * rank)
        for depth, rank in (("", 4), (".base_layer", 5))
        for factor in "AB"
    }
    names = [f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    ranks = {"down_proj": 2, "experts.gate_up_proj": 5}
    info = describe(make_adapter(tmp_path, extra=experts, target_parameters=names, rank_pattern=ranks))
    assert info.ranks == [2, 4, 5] and info.modules == 6
    assert info.targets == {"q_proj": 2, "down_proj": 3, "gate_up_proj": 1}


def test_peft_adapter_without_veneer_json(tmp_path):
    head = {"base_model.model.lm_head.weight": torch.zeros(5, 8)}
    make_adapter(tmp_path, extra=head, modules_to_save=["lm_head"], base_model_name_or_path="org/base")
    (tmp_path / "veneer.json").unlink()
    info = describe(tmp_path)
    assert info.base == "org/base" and info.modules == 4 and info.modules_to_save == ["lm_head"]
    assert info.parameters == 224 + 40


def test_run(tmp_path):
    run = make_run(tmp_path / "run")
    info = describe(run)
    assert info.kind == "run" and info.steps == 300 and info.modules == 0 and info.report is None
    assert 0.2 < info.last_loss < 0.4 and info.base == "smollm2-135m-instruct"
    assert "not saved yet" in printed(info)
    make_adapter(run / "adapter")
    (run / "report.html").write_text("")
    info = describe(run)
    assert info.modules == 4 and info.report == str(run / "report.html")
    assert [row["name"] for row in info.scores][:2] == ["Valid JSON", "Exact match"]
    assert "85.0\xa0%" in printed(info)


def test_markup_in_names_is_printed_as_it_is(tmp_path):
    make_adapter(tmp_path)
    (tmp_path / "veneer.json").write_text(json.dumps({"base": {"name_or_path": "[bold]x[/nope]"}}))
    assert "[bold]x[/nope]" in printed(describe(tmp_path))


def test_run_with_a_damaged_part(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "eval.json").write_text("{")
    assert "warning: eval.json is damaged" in printed(describe(run))


def test_nothing_there(tmp_path):
    with pytest.raises(RunError, match="no such directory"):
        describe(tmp_path / "none")
    with pytest.raises(RunError, match="neither an adapter"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_model.safetensors", b"\x10\x00\x00", "damaged or cut short"),
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_config.json", b"{", "adapter_config.json is damaged"),
        ("adapter_config.json", b"[]", "not an object"),
        ("adapter_config.json", b'{"lora_alpha": "x"}', "lora_alpha is damaged"),
        ("adapter_config.json", b'{"peft_type": "ADALORA", "rank_pattern": {"x": [true]}}', "an? ADALORA adapter"),
        ("adapter_config.json", b'{"alpha_pattern": {"(": 1}}', "alpha_pattern is damaged"),
        ("veneer.json", b"\xff", "veneer.json is damaged"),
    ],
)
def test_damaged_adapters(tmp_path, name, content, message):
    make_adapter(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_cut_short_and_no_lora(tmp_path):
    file = make_adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterFormatError, match="damaged or cut short"):
        describe(tmp_path)
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(AdapterFormatError, match="holds no lora_A"):
        describe(tmp_path)
