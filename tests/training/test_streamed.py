"""A streamed base trains as a resident one: the same losses and gradients, from host memory and from disk."""

from __future__ import annotations

import json

import pytest
import torch
from streamed_steps import EXAMPLES, WIDE, same, save, step

import veneer
from conftest import tiny_llama
from veneer.base.load import load_base
from veneer.base.stream_load import load_streamed
from veneer.config import TrainConfig
from veneer.errors import BaseModelError, ConfigError


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory, tokenizer):
    """Five blocks: more than twice the buffers, and an odd number."""
    return save(tiny_llama(num_hidden_layers=5), tmp_path_factory.mktemp("llama"), tokenizer)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"rank": 4, "dora": True},
        {"rank": 4, "rslora": True, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
        {"rank": 2, "layers": [2, 3]},
        {"rank": 2, "lora_fa": True, "init": "pissa"},
    ],
    ids=str,
)
def test_gradients_are_the_resident_bases(llama_dir, where, adapter):
    config = veneer.AdapterConfig(**adapter)
    wanted = step(load_base(llama_dir, device="cpu")[0], config)
    same(step(load_streamed(llama_dir, where=where, device="cpu")[0], config), wanted)


@pytest.mark.parametrize("modes", ["selective", "recompute-offload", "offload", "mixed"])
def test_every_setting_of_the_dial(llama_dir, modes, monkeypatch):
    monkeypatch.setattr("veneer.training.store.SMALL", 1)
    config = veneer.AdapterConfig(rank=4)
    wanted = step(load_base(llama_dir, device="cpu")[0], config)
    same(step(load_streamed(llama_dir, device="cpu")[0], config, modes=modes), wanted)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantised_bases(tmp_path, tokenizer, where, quant):
    model = tiny_llama(**WIDE)
    folder, config = save(model, tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    wanted = step(load_base(folder, device="cpu", quant=quant)[0], config)
    streamed = load_streamed(folder, where=where, device="cpu", quant=quant)[0]
    same(step(streamed, config), wanted)
    again = step(
        load_streamed(folder, where=where, device="cpu", quant=quant)[0], veneer.AdapterConfig(rank=4, dropout=0.5)
    )
    assert all(torch.isfinite(grad).all() for grad in again[1].values())  # dropout calls bitsandbytes' own forward


def test_dropout_is_the_same_in_the_recomputation(llama_dir):
    config = veneer.AdapterConfig(rank=4, dropout=0.3)
    one = {"tokens": 200, "data": EXAMPLES[:2]}  # one row: numbers are drawn in the resident base's order
    same(
        step(load_streamed(llama_dir, device="cpu")[0], config, **one),
        step(load_base(llama_dir, device="cpu")[0], config, **one),
    )


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    )  # fmt: skip


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=4, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    )  # fmt: skip


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=4, head_dim=8,
                         num_attention_heads=6, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=8,
                         layer_types=["sliding_attention", "full_attention"] * 2)
    )  # fmt: skip


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=420, hidden_size=36, intermediate_size=52, moe_intermediate_size=20, num_experts=4,
                       num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                       head_dim=8)
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=420, n_embd=36, n_layer=3, n_head=6, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("make", [qwen3, gemma2, gemma3, qwen3_moe, gpt2])
def test_other_architectures(tmp_path, tokenizer, where, make):
    torch.manual_seed(0)
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if make is qwen3_moe else {}
    folder, config = save(make(), tmp_path, tokenizer), veneer.AdapterConfig(rank=3, **experts)

    def run(model):
        return step(model, config, tokens=64, packing=make is not gemma2)

    same(run(load_streamed(folder, where=where, device="cpu")[0]), run(load_base(folder, device="cpu")[0]))


def test_a_bfloat16_file_is_computed_with_in_float32(tmp_path, tokenizer):
    folder, config = save(tiny_llama(num_hidden_layers=3).bfloat16(), tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    wanted = step(load_base(folder, device="cpu", dtype="float32")[0], config)
    for where in ("host", "disk"):
        model = load_streamed(folder, where=where, device="cpu", dtype="float32")[0]
        assert {leaf.home.dtype for leaf in model.veneer_stream.conveyor.blocks[0].leaves} == {
            torch.float32 if where == "host" else torch.bfloat16
        }
        same(step(model, config), wanted)


def test_the_vocabulary_in_pieces(tmp_path, tokenizer, monkeypatch):
    """The head never stands on the device as a whole; same gradients but for the order of sums."""
    monkeypatch.setattr("veneer.base.stream_load.CHUNK_BYTES", 36 * 4 * 97)
    model = tiny_llama(num_hidden_layers=3)
    folder, config = save(model, tmp_path, tokenizer), veneer.AdapterConfig(rank=4)
    wanted = step(load_base(folder, device="cpu")[0], config)
    for where, together in (("host", 8192), ("disk", 50)):
        monkeypatch.setattr("veneer.training.streamed.HEAD_ROWS", together)
        monkeypatch.setattr("veneer.kernels.streamed_head.ROWS", 13 if where == "disk" else 8192)
        streamed = load_streamed(folder, where=where, device="cpu")[0]
        head = streamed.veneer_stream.head
        assert len(head.blocks) == 5
        found = step(streamed, config)
        if where == "host":  # all rows' positions at once: every piece came once, and the first again for the next step
            assert head.copied <= 2 * sum(b.nbytes for b in head.blocks) + head.blocks[0].nbytes
        torch.testing.assert_close(torch.stack(found[0]), torch.stack(wanted[0]), rtol=1e-6, atol=0)
        for name, grad in wanted[1].items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()) + 1e-12)


def test_the_model_itself_runs_and_its_weights_are_the_hosts(llama_dir):
    resident, streamed = load_base(llama_dir, device="cpu")[0], load_streamed(llama_dir, device="cpu")[0]
    ids = torch.arange(1, 30)[None]
    assert torch.equal(resident(input_ids=ids).logits, streamed(input_ids=ids).logits)
    assert torch.equal(streamed.generate(ids, max_new_tokens=5), resident.generate(ids, max_new_tokens=5))
    mine, theirs = dict(resident.named_parameters()), dict(streamed.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert streamed.veneer_stream.conveyor.nbytes < sum(p.nbytes for p in streamed.model.layers.parameters()) / 2


def run(folder, data, out, **train):
    """A run's configuration."""
    train = {
        "epochs": 2,
        "max_steps": 4,
        "batch_size": 6,
        "micro_batch_tokens": 64,
        "save_every": 2,
        "eval_every": 2,
    } | train
    return TrainConfig(
        model=str(folder),
        data={"train": str(data), "heldout_fraction": 0.2},
        out=str(out),
        device="cpu",
        train=train,
        adapter={"rank": 4},
    )


def test_a_run_is_the_resident_run_and_resumes(llama_dir, chat_file, tmp_path):
    from veneer.training.loop import train

    def records(out):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [(r["type"], r["step"], r["loss"], r.get("grad_norm")) for r in lines if r["type"] in ("train", "eval")]

    train(run(llama_dir, chat_file, tmp_path / "resident"))
    for stream in ("host", "disk"):
        train(run(llama_dir, chat_file, tmp_path / stream, stream=stream))
        assert records(tmp_path / stream) == records(tmp_path / "resident")
    half = run(llama_dir, chat_file, tmp_path / "half", stream="host")
    from veneer.training.loop import Trainer

    trainer = Trainer(half, observe=lambda r: r["type"] == "train" and r["step"] == 2 and trainer.stop())
    trainer.stop = lambda: setattr(trainer, "_interrupted", 1)
    assert trainer.run().stopped == "interrupted"
    train(half, resume=True)
    assert records(tmp_path / "half") == records(tmp_path / "resident")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "tied_head": "embedding"}, "embed_tokens is adapted"),
        ({"modules_to_save": ["model.norm"]}, "modules_to_save"),
        ({"invocation": [5, 6]}, "aLoRA"),
    ],
)
def test_what_cannot_stream_is_refused(llama_dir, chat_file, tmp_path, adapter, words):
    from veneer.training.loop import Trainer

    config = run(llama_dir, chat_file, tmp_path / "out", stream="host")
    config = config.model_copy(update={"adapter": veneer.AdapterConfig(rank=2, **adapter)})
    with pytest.raises(ConfigError, match=words):
        Trainer(config).dry_run()


def test_settings_that_do_not_go_together():
    for values in (
        {"quant": "hqq", "train": {"stream": "host"}},
        {"adapter": {"init": "eva"}, "train": {"stream": "disk"}},
        {"adapter": {"trainable_tokens": [1]}, "train": {"stream": "host"}},
        {"train": {"stream": "tape"}},
    ):
        with pytest.raises(ConfigError, match="stream"):
            TrainConfig(data="x", out="y", **values)
    assert TrainConfig.from_dict({"data": "x", "out": "y", "train": {"stream": False}}).train.stream == "off"


def test_too_little_host_memory_is_said_before_loading(llama_dir, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(BaseModelError, match="host memory .* stream: disk, or quant: nf4"):
        load_streamed(llama_dir, device="cpu")
    load_streamed(llama_dir, where="disk", device="cpu")


def test_resident_blocks_are_brought_once(llama_dir):
    config = veneer.AdapterConfig(rank=4)
    wanted = step(load_base(llama_dir, device="cpu")[0], config)
    copied = []
    for resident in (0, 2, 5):
        model = load_streamed(llama_dir, device="cpu", resident=resident)[0]
        same(step(model, config), wanted)
        conveyor = model.veneer_stream.conveyor
        copied.append(conveyor.copied / conveyor.blocks[0].nbytes)
        assert len(conveyor.stay) == resident
    assert copied[2] == 5 and copied[0] > copied[1] > copied[2]


def test_a_streamed_model_has_no_gradients_of_its_own(llama_dir):
    model = load_streamed(llama_dir, device="cpu")[0]
    veneer.attach(model, veneer.AdapterConfig(rank=2))
    with pytest.raises(veneer.errors.AdapterStateError, match="veneer.train"):
        model(input_ids=torch.arange(1, 9)[None])


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (5.0, 0.5, True)])
def test_the_streamed_heads_loss_is_the_plain_one(softcap, scale, bias, monkeypatch):
    """252×507×123 in pieces of 100 rows, taken in three parts each, against float64."""
    from veneer.kernels import reference, streamed_head

    monkeypatch.setattr(streamed_head, "ROWS", 100)
    monkeypatch.setattr(streamed_head, "LOGITS", 100 * 4 * 37)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(252, 123), torch.randn(507, 123), torch.randint(0, 507, (252,))
    b = torch.randn(507) if bias else None
    pieces = lambda: ((start, weight[start : start + 100]) for start in range(0, 507, 100))  # noqa: E731
    options = {"softcap": softcap, "logit_scale": scale}

    def run(function, h, *rest):
        h = h.clone().requires_grad_()
        loss = function(h, *rest, targets, **options)
        (loss * 0.5).backward()
        return loss.detach(), h.grad

    loss, grad = run(streamed_head.streamed_cross_entropy, hidden, pieces, b)
    each = streamed_head.streamed_cross_entropy(hidden, pieces, b, targets, reduction="none", **options)
    true_each = reference.linear_cross_entropy(hidden, weight, b, targets, reduction="none", **options)
    torch.testing.assert_close(each, true_each, rtol=1e-4, atol=1e-4)
    wide = [hidden.double(), weight.double(), None if b is None else b.double()]
    truth, true_grad = run(reference.linear_cross_entropy, *wide)
    torch.testing.assert_close(loss.double(), truth.double(), rtol=1e-5, atol=0)
    plain = run(reference.linear_cross_entropy, hidden, weight, b)[1]
    error, allowed = (float((g.double() - true_grad).abs().max()) for g in (grad, plain))
    assert error <= 2 * allowed + 1e-6 * float(true_grad.abs().max())
    with torch.no_grad():
        assert streamed_head.streamed_cross_entropy(hidden, pieces, b, targets, **options) == loss
    share = torch.rand(252)  # each position's loss has a gradient of its own
    gradients = []
    for function, source in ((streamed_head.streamed_cross_entropy, pieces), (reference.linear_cross_entropy, weight)):
        h = hidden.clone().requires_grad_()
        (function(h, source, b, targets, reduction="none", **options) * share).sum().backward()
        gradients.append(h.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_models_that_do_not_stream(tmp_path, tokenizer):
    folder = save(tiny_llama(num_hidden_layers=1), tmp_path, tokenizer)
    with pytest.raises(BaseModelError, match="no list of blocks"):
        load_streamed(folder, device="cpu")
