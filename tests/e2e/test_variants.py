"""Every variant through the command line: it trains, resumes exactly, is used by each command and loads in PEFT."""

from __future__ import annotations

import json
import re
import shutil
from typing import get_args

import pytest
import torch

from veneer.cli.common import open_adapter
from veneer.config import AdapterConfig, TrainConfig

pytest_plugins = ["commands"]

INITS = set(get_args(AdapterConfig.model_fields["init"].annotation)) - {"kaiming", "loftq"}  # loftq: quantised bases
VARIANTS = {
    "plain": [],
    "rslora": ["--rslora"],
    "dora": ["--dora"],
    "lora_bias": ["--lora-bias"],
    "lora_plus": ["--lora-plus", 8],
    "lora_fa": ["--lora-fa"],
    "lora_fa_dora": ["--lora-fa", "--dora", "--set", "train.lora_fa_correction=false"],
    "adalora": ["--adalora", 2, "--set", "adapter.adalora.tinit=0", "--set", "adapter.adalora.tfinal=1"],
    "invocation": ["--invocation", "INVOCATION"],
    "invocation_text": ["--invocation", "<|im_start|>assistant"],
    "new_tokens": ["--new-tokens", "<tool>", "--new-tokens", "number"],
    "trainable_tokens": ["--trainable-tokens", "0,1"],
    "tokens_alone": ["--trainable-tokens", "0,1", "--set", "adapter.target_modules=[]"],
    "embedding": ["--targets", "embed_tokens,q_proj", "--tied-head", "embedding"],
    "tied_head": ["--targets", "embed_tokens,q_proj", "--tied-head", "both"],
    "experts": ["--targets", "q_proj", "--target-parameters", "experts.down_proj"],
    "nf4": ["--quant", "nf4"],
    "nf4_lora_fa": ["--quant", "nf4", "--lora-fa"],
    "nf4_adalora": ["--quant", "nf4", "--adalora", 2],
    "nf4_loftq": ["--quant", "nf4", "--init", "loftq"],
    "modules_to_save": ["--set", "adapter.modules_to_save=[model.norm]"],
} | {init: ["--init", init] for init in sorted(INITS)}


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory, tokenizer):
    """A tiny mixture of experts on disk."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=420, hidden_size=36, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=256, eos_token_id=0, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("moe")
    MixtralForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_page(monkeypatch):
    """The report page has tests of its own, and takes longer than all the rest."""
    monkeypatch.setattr("veneer.report.page.write_report", lambda run: run / "report.html")


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, no_page, cli, model_dir, moe_dir, tokenizer, chat_file, tmp_path):
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    base, run = moe_dir if name == "experts" else model_dir, tmp_path / "run"
    marker = tokenizer("<|im_start|>assistant", add_special_tokens=False)["input_ids"]
    flags = [",".join(map(str, marker)) if flag == "INVOCATION" else flag for flag in VARIANTS[name]]
    done = cli(
        "train", "--model", base, "--data", chat_file, "--out", run, "--rank", 4, "--max-steps", 3, "--batch-size", 4,
        "--lr", "2e-2", "--set", "train.save_every=1", *flags,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert_resumes(cli, run)
    for arguments in (
        ["eval", run, "--data", chat_file, "--limit", 2, "--max-new-tokens", 3],
        ["info", run],
        ["info", run / "adapter"],
        ["generate", run, "--prompt", "hello", "--max-new-tokens", 3],
    ):
        used = cli(*arguments)
        assert used.code == 0, (arguments, used.err)
    if name == "experts":
        printed = cli("info", run).out
        assert re.search(r"^rank +4 *$", printed, re.M) and re.search(r"^scaling +8 *$", printed, re.M), printed
        assert "down_proj × 1" in printed
    assert_same_in_peft(base, run / "adapter", marker)


def assert_resumes(cli, run):
    """Without its last checkpoint and its adapter, the run goes on from step 2 to the same bytes."""
    files = ["adapter_model.safetensors", "adapter_config.json"]
    before = [(run / "adapter" / file).read_bytes() for file in files]
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    done = cli("train", run, "--resume")
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert [(run / "adapter" / file).read_bytes() for file in files] == before


def assert_same_in_peft(base, adapter, marker):
    """On the float base, also for an adapter of a quantised one: the question is what the files say."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    opened = open_adapter(adapter, None, device="cpu", dtype="float32", force=False, quant="none").model
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 0, 1, *range(20, 30), *marker, 7, 1, 300]])
    with torch.no_grad():
        bare = plain(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()(input_ids=ids).logits
        mine = opened(input_ids=ids).logits
    scale = float(mine.abs().max())
    assert float((mine - bare).abs().max()) > 1e-4 * scale  # the adapter acts
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * scale)


REFUSED = [
    (["--dora", "--adalora", 2], "adapter.dora"),
    (["--lora-fa", "--adalora", 2], "lora_fa freezes"),
    (["--lora-bias", "--adalora", 2], "adapter.lora_bias would go"),
    (["--init", "gaussian", "--adalora", 2], "has its own start"),
    (["--adalora", 4], "must be below adapter.rank"),
    (["--adalora", 9], "must be below adapter.rank"),
    (["--adalora", 0], "adapter.adalora.target_rank"),
    (["--adalora", 2, "--set", "adapter.adalora.tinit=3", "--max-steps", 2], "leave none of the run's 2"),
    (["--adalora", 2, "--set", "adapter.adalora.tfinal=7"], "leave none of the run's 3"),
    (["--adalora", 2, "--set", "adapter.adalora.total=7"], "unknown configuration key 'adapter.adalora.total'"),
    (["--adalora", 2, "--set", "adapter.rank_pattern={q_proj: 3}"], "chooses each module's rank itself"),
    (["--adalora", 2, "--set", "train.early_stop=2"], "could end the run before"),
    (["--adalora", 2, "--target-parameters", "experts.down_proj"], "not the experts"),
    (["--adalora", 2, "--targets", "embed_tokens,q_proj", "--tied-head", "both"], "tied_head: embedding"),
    (["--lora-fa", "--lora-plus", 4], "does not train A"),
    (["--lora-fa", "--dora"], "lora_fa_correction is derived for"),
    (["--lora-fa", "--targets", "embed_tokens", "--tied-head", "embedding"], "starts at 0, so nothing would be learnt"),
    (["--lora-fa", "--target-parameters", "experts.down_proj"], "saves no memory"),
    (["--set", "train.lora_plus_embedding_lr=1e-6"], "is part of LoRA+"),
    (["--lora-bias", "--dora"], "lora_bias is not defined with dora"),
    (["--dora", "--target-parameters", "experts.down_proj"], "go without dora"),
    (["--dora", "--invocation", "1,2"], "not defined with dora"),
    (["--invocation", "1,2", "--set", "train.pack=on"], "rows cannot be packed"),
    (["--invocation", "5,5,5"], "no training example holds"),
    (["--invocation", "zebra"], "no training example holds"),
    (["--trainable-tokens", "fox"], "adapter.trainable_tokens"),
    (["--targets", "embed_tokens"], "tied_head: both"),
    (["--trainable-tokens", "9999"], "9999 is beyond"),
    (["--trainable-tokens", "3,3"], "given twice"),
    (["--target-parameters", "experts.down_proj"], "experts.down_proj"),
    (["--init", "magic"], "adapter.init"),
    (["--init", "loftq"], "is not quantised"),
    (["--init", "pissa", "--set", "adapter.init_options.eva_rho=3"], "has no effect with init 'pissa'"),
    (["--init", "pissa", "--adalora", 2], "has its own start"),
    (["--tied-head", "none"], "adapter.tied_head"),
]


@pytest.mark.parametrize("flags, reason", REFUSED, ids=[" ".join(map(str, f)) for f, _ in REFUSED])
@pytest.mark.parametrize("dry", [False, True], ids=["", "dry"])
def test_refused_with_one_line_that_says_why(flags, reason, dry, cli, model_dir, chat_file, tmp_path):
    given = {
        "--model": model_dir,
        "--data": chat_file,
        "--out": tmp_path / "run",
        "--rank": 4,
        "--max-steps": 3,
        "--batch-size": 4,
    }
    given = {flag: value for flag, value in given.items() if flag not in flags}
    done = cli("train", *[part for pair in given.items() for part in pair], *flags, *["--dry-run"] * dry)
    assert done.code == 2, done
    line = done.err[done.err.index("error:") :]
    assert line.count("\n") == 1 and "Traceback" not in done.err, done.err
    assert reason in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_example_without_the_invocation_is_counted(cli, model_dir, tokenizer, tmp_path):
    word = tokenizer("fox jumps", add_special_tokens=False)["input_ids"]
    data = tmp_path / "chat.jsonl"
    rows = [[("user", "fox jumps"), ("assistant", "a")], [("user", "b"), ("assistant", "c")]]
    data.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    done = cli(
        "train", "--model", model_dir, "--data", data, "--out", tmp_path / "run", "--rank", 2, "--max-steps", 1,
        "--invocation", ",".join(map(str, word)),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "1 training examples do not hold" in done.err


def test_sections_written_empty_have_their_defaults():
    config = TrainConfig.from_dict({"data": "a", "out": "b", "adapter": None, "train": None})
    assert config.adapter == AdapterConfig() and config.adapter.adalora is None
    assert TrainConfig.from_dict({"data": "a", "out": "b", "adapter": {"adalora": {}}}).adapter.adalora.target_rank == 8


def test_every_variant_has_a_flag_or_says_so_in_the_template(cli, tmp_path):
    assert cli("init", "chat", "--out", tmp_path / "v.yaml").code == 0
    text = (tmp_path / "v.yaml").read_text()
    for key in AdapterConfig.model_fields:
        assert f"# {key}:" in text, key
    assert "#   target_rank: 8" in text
