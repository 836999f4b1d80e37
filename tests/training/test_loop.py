"""Training: what must be equal is equal, resume is exact, and trouble stops the run with what is needed to go on."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import children
import veneer
from conftest import tiny_llama
from veneer.config import AdapterConfig, TrainConfig
from veneer.data.example import TokenizedExample
from veneer.errors import RunError, TrainingDiverged
from veneer.training import loop, state
from veneer.training.flat import FlatOptimizer
from veneer.training.forward import RowModel
from veneer.training.metrics import read_metrics
from veneer.training.optim import lr_factor, make_optimizer, warmup_steps


def config(model_dir, chat_file, out, **train):
    return TrainConfig(
        model=str(model_dir),
        data=str(chat_file),
        out=str(out),
        device="cpu",
        adapter={"rank": 4, "dropout": train.pop("dropout", 0.0)},
        train={"batch_size": 4, "lr": 5e-3, "epochs": 2, "micro_batch_tokens": 128} | train,
    )


def final(path):
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def examples(rng, count=6, shared=12):
    start = rng.integers(1, 400, shared)
    found = []
    for _ in range(count):
        own = rng.integers(1, 400, rng.integers(4, 20))
        mask = np.zeros(shared + len(own), bool)
        mask[shared + len(own) // 2 :] = True
        found.append(TokenizedExample(np.concatenate([start, own]).astype(np.int32), mask))
    return found


def loss_and_grads(model, rows_of, parameters):
    rows = RowModel(model)
    total, count = 0.0, 0
    with rows.attention():
        for row in rows_of(rows):
            with rows.row(row) as loss:
                loss.backward()
            total, count = total + float(loss.detach()), count + len(row.targets)
    grads = {n: p.grad.clone() for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return total, count, grads


@pytest.mark.parametrize("kind", ["llama", "windowed", "gemma"])
def test_packed_shared_and_single_rows_give_one_loss_and_one_gradient(kind):
    if kind == "llama":
        model = tiny_llama()
    else:
        model = other_model(kind)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4), seed=0)
    parameters = bank.parameters("default")
    for p in parameters.values():
        p.data.normal_(std=0.1)
    data = examples(np.random.default_rng(0))

    def plain():
        total = 0.0
        for e in data:
            ids = torch.from_numpy(e.input_ids.astype(np.int64))
            logits = model(input_ids=ids[None]).logits[0]
            where = torch.from_numpy(np.flatnonzero(e.supervised))
            loss = torch.nn.functional.cross_entropy(logits[where - 1], ids[where], reduction="sum")
            loss.backward()
            total += float(loss.detach())
        grads = {n: p.grad.clone() for n, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return total, grads

    expected, expected_grads = plain()
    ways = {
        "shared": lambda r: r.pack(data, 1000, True),
        "packed": lambda r: r.pack(data, 1000, False),
        "small rows": lambda r: r.pack(data, 40, True),
    }
    for way, rows_of in ways.items():
        total, count, grads = loss_and_grads(model, rows_of, parameters)
        assert count == sum(int(e.supervised.sum()) for e in data)
        assert total == pytest.approx(expected, rel=1e-5), way
        for name, grad in grads.items():
            scale = float(expected_grads[name].abs().max())
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=way + name
            )


def other_model(kind):
    torch.manual_seed(0)
    if kind == "windowed":
        from transformers import MistralConfig, MistralForCausalLM

        c = MistralConfig(
            vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=6, sliding_window=9, eos_token_id=0, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = MistralForCausalLM(c)
    else:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        c = Gemma2Config(
            vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=6, sliding_window=9, attn_logit_softcapping=None,
            final_logit_softcapping=3.0, eos_token_id=0, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = Gemma2ForCausalLM(c)
    return model.eval().requires_grad_(False)


def test_a_model_that_cannot_be_packed_says_so_and_still_trains_right():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    c = Gemma2Config(
        vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=6, attn_logit_softcapping=5.0, _attn_implementation="eager",
    )  # fmt: skip
    rows = RowModel(Gemma2ForCausalLM(c).eval().requires_grad_(False))
    rows.check(examples(np.random.default_rng(0)))
    assert not rows.packing and "packing is off" in rows.notes[0]
    with pytest.raises(veneer.VeneerError, match="cannot be packed"):
        RowModel(rows.model).check(examples(np.random.default_rng(0)), required=True)


def test_micro_batches_do_not_change_the_result(model_dir, chat_file, tmp_path):
    runs = {}
    for name, tokens, pack in (("one", 4096, "auto"), ("many", 40, "auto"), ("off", 4096, "off")):
        veneer.train(config(model_dir, chat_file, tmp_path / name, micro_batch_tokens=tokens, pack=pack))
        runs[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    for name in ("many", "off"):
        for key, value in runs["one"].items():
            torch.testing.assert_close(runs[name][key], value, rtol=2e-2, atol=2e-4, msg=key)


def test_training_learns_writes_everything_and_leaves_the_base_alone(model_dir, chat_file, tmp_path):
    seen = []
    result = veneer.train(config(model_dir, chat_file, tmp_path / "run", epochs=6, lr=2e-2), observe=seen.append)
    assert result.stopped == "finished" and result.steps == result.total_steps == 18
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert losses[-1] < losses[0] - 0.2
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["type"] == "train"] == list(range(1, 19))
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["adapter"]["trainable_parameters"] > 0 and provenance["base"]["fingerprint"]["samples"]
    assert TrainConfig.load(tmp_path / "run" / "config.yaml").train.epochs == 6
    model, _ = veneer.load_base(model_dir)
    veneer.load_adapter(model, tmp_path / "run" / "adapter")


def test_dropout_run_resumes_bit_for_bit_in_process(model_dir, chat_file, tmp_path, monkeypatch):
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    veneer.train(config(model_dir, chat_file, plain, dropout=0.2, save_every=1))
    trainer = loop.Trainer(config(model_dir, chat_file, stopped, dropout=0.2, save_every=1))
    step = loop.Trainer._step

    def interrupt(self, setup, at, total):
        if at.step == 3:
            self._interrupted = 1
        return step(self, setup, at, total)

    monkeypatch.setattr(loop.Trainer, "_step", interrupt)
    assert trainer.run().stopped == "interrupted"
    monkeypatch.undo()
    assert not (stopped / "adapter").exists()
    veneer.train(config(model_dir, chat_file, stopped, dropout=0.2, save_every=1), resume=True)
    assert final(plain) == final(stopped)
    records = [r["step"] for r in read_metrics(stopped) if r["type"] == "train"]
    assert records == list(range(1, 7))


def kill(process):
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_points_and_resumed_ends_in_the_same_bytes(seed, model_dir, chat_file, tmp_path):
    options = {"epochs": 8, "save_every": 1, "dropout": 0.1}
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    veneer.train(config(model_dir, chat_file, plain, **options))
    yaml = tmp_path / "run.yaml"
    yaml.write_text(config(model_dir, chat_file, killed, **options).to_yaml())
    rng = np.random.default_rng(seed)
    how, kills = "start", 0
    for after in (3, 9, 15):  # steps after which to kill, then a random moment: in a step or in a checkpoint's write
        process, said = children.start(children.training, yaml, how)
        next(step for kind, step in said if kind == "train" and step >= after)
        time.sleep(float(rng.uniform(0, 0.05)))
        kills += kill(process)
        how = "resume"
    assert kills == 3
    assert not (killed / "adapter").exists()
    process, said = children.start(children.training, yaml, "resume")
    assert list(said)[-1] == ("end", 24)
    process.join()
    assert process.exitcode == 0
    assert final(plain) == final(killed)
    assert not list(killed.rglob(".*.tmp"))


@pytest.mark.parametrize("moment", ["tensors", "moments", "state", "rename"])
def test_killed_while_writing_a_checkpoint_goes_on_from_the_one_before(
    moment, model_dir, chat_file, tmp_path, monkeypatch
):
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    veneer.train(config(model_dir, chat_file, plain, save_every=2))

    class Killed(BaseException):
        pass

    calls = {"n": 0}

    def die_on_second(function):
        def wrapped(*a, **k):
            calls["n"] += 1
            if calls["n"] == 2:
                raise Killed
            return function(*a, **k)

        return wrapped

    owner, target = {
        "tensors": (state, "save_adapter"),
        "moments": (state, "save_file"),
        "state": (state, "asdict"),
        "rename": (FlatOptimizer, "state"),
    }[moment]
    monkeypatch.setattr(owner, target, die_on_second(getattr(owner, target)))
    # A kill runs no clean-up: keep what a dying write would leave.
    monkeypatch.setattr("veneer.files.shutil.rmtree", lambda *a, **k: None)
    with pytest.raises(Killed):
        veneer.train(config(model_dir, chat_file, killed, save_every=2))
    monkeypatch.undo()
    assert [p.name for p in state.checkpoints(killed)] == ["step-00000002"]
    veneer.train(config(model_dir, chat_file, killed, save_every=2), resume=True)
    assert final(plain) == final(killed)


def test_a_damaged_checkpoint_is_passed_over(model_dir, chat_file, tmp_path):
    run = tmp_path / "run"
    veneer.train(config(model_dir, chat_file, run, save_every=2))
    before = final(run)
    file = state.checkpoints(run)[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    notes = []
    veneer.train(config(model_dir, chat_file, run, save_every=2), resume=True, observe=lambda r: notes.append(str(r)))
    assert any("damaged" in n and "trying the one before" in n for n in notes)
    assert final(run) == before


def test_disk_full_at_a_checkpoint_keeps_the_one_before(model_dir, chat_file, tmp_path, monkeypatch):
    run, real, calls = tmp_path / "run", state.save_file, {"n": 0}

    def full(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(RunError, match="No space left.*kept"):
        veneer.train(config(model_dir, chat_file, run, save_every=2))
    assert [p.name for p in state.checkpoints(run)] == ["step-00000002"]
    assert not list((run / "checkpoints").glob(".*"))


def test_killed_before_it_was_a_run_starts_again(model_dir, chat_file, tmp_path, monkeypatch):
    run, real = tmp_path / "run", loop.write_text

    def killed(path, text):
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "write_text", killed)
        veneer.train(config(model_dir, chat_file, run, max_steps=2))
    assert [p.name for p in run.iterdir()] == ["provenance.json"]
    assert veneer.train(config(model_dir, chat_file, run, max_steps=2)).stopped == "finished"


def test_two_runs_do_not_share_a_directory(model_dir, chat_file, tmp_path):
    run = tmp_path / "run"

    def second(record):
        if record["type"] == "train":
            for resume in (False, True):
                with pytest.raises(RunError, match="another process is writing|already holds a run"):
                    veneer.train(config(model_dir, chat_file, run, max_steps=2), resume=resume)

    result = veneer.train(config(model_dir, chat_file, run, max_steps=2), observe=second)
    assert result.stopped == "finished" and not (run / ".lock").exists()


def test_nan_stops_the_run_and_keeps_the_batch(model_dir, chat_file, tmp_path):
    with pytest.raises(TrainingDiverged, match="bad_batch.json"):
        veneer.train(config(model_dir, chat_file, tmp_path / "run", lr=1e30, max_grad_norm=0, warmup=0, epochs=5))
    batch = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert len(batch["examples"]) == 4 and "kind" in batch["examples"][0]["text"]


def test_an_adapter_that_its_last_step_spoilt_is_no_result(model_dir, chat_file, tmp_path):
    options = {"lr": 1e30, "max_grad_norm": 0, "warmup": 0, "max_steps": 1}
    wanted = config(model_dir, chat_file, tmp_path / "run", **options)
    wanted.data.heldout = str(chat_file)
    with pytest.raises(TrainingDiverged, match="held-out loss became nan at step 1"):
        veneer.train(wanted)
    assert read_metrics(tmp_path / "run")[-1]["loss_text"] == "nan"
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("change", [{"lr": 1e-4}, {"batch_size": 3}])
def test_resume_with_another_configuration_is_refused(change, model_dir, chat_file, tmp_path):
    veneer.train(config(model_dir, chat_file, tmp_path / "run", max_steps=2))
    with pytest.raises(RunError, match=f"train.{next(iter(change))}"):
        veneer.train(config(model_dir, chat_file, tmp_path / "run", max_steps=2, **change), resume=True)


def test_resuming_what_had_ended_says_so_and_changes_nothing(model_dir, chat_file, tmp_path):
    run, notes = tmp_path / "run", []
    veneer.train(config(model_dir, chat_file, run, max_steps=2))
    before = (run / "adapter/adapter_model.safetensors").read_bytes()
    options = {"resume": True, "observe": lambda r: notes.append(r.get("text", ""))}
    result = veneer.train(config(model_dir, chat_file, run, max_steps=2), **options)
    assert result.steps == 2 and "the run had ended: there is no step left to train" in notes
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == before


def test_resume_with_other_data_is_refused(model_dir, chat_file, tmp_path):
    veneer.train(config(model_dir, chat_file, tmp_path / "run", max_steps=2))
    chat_file.write_text(chat_file.read_text().replace("number 3", "number 4"))
    with pytest.raises(RunError, match="training data"):
        veneer.train(config(model_dir, chat_file, tmp_path / "run", max_steps=2), resume=True)


def test_early_stop_keeps_the_best(model_dir, chat_file, tmp_path):
    c = config(model_dir, chat_file, tmp_path / "run", lr=1.0, epochs=20, eval_every=1, early_stop=3)
    c.data.heldout = str(chat_file)
    result = veneer.train(c)
    assert result.stopped == "early" and result.steps < result.total_steps
    assert (tmp_path / "run" / "best" / "adapter_config.json").exists()
    assert final(tmp_path / "run") == (tmp_path / "run" / "best" / "adapter_model.safetensors").read_bytes()


def test_checkpointing_changes_nothing(model_dir, chat_file, tmp_path):
    for name, on in (("off", False), ("on", True)):
        veneer.train(config(model_dir, chat_file, tmp_path / name, checkpointing=on))
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("off", "on"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_lora_plus_gives_b_its_own_rate(llama):
    bank = veneer.attach(llama, veneer.AdapterConfig(rank=2))
    options = TrainConfig(data="x", out="y", train={"lora_plus_ratio": 16}).train
    groups = make_optimizer(bank.parameters("default"), options).param_groups
    assert [g["ratio"] for g in groups] == [1.0, 16]
    assert all(p.shape[1] == 2 for p in groups[1]["params"])


def test_schedules():
    assert [round(lr_factor(s, 10, 2, "linear"), 3) for s in (1, 2, 3, 10)] == [0.5, 1.0, 0.889, 0.111]
    assert (
        lr_factor(10, 10, 0, "constant") == 1 and 0 < lr_factor(10, 10, 0, "cosine") < lr_factor(5, 10, 0, "cosine") < 1
    )
    assert warmup_steps(0.1, 50) == 5 and warmup_steps(7, 50) == 7 and warmup_steps(70, 50) == 50


VARIANTS = {
    "adalora": {"rank": 6, "adalora": {"target_rank": 3, "tinit": 2, "tfinal": 6}},
    "lora_fa": {"rank": 4, "lora_fa": True},
}


def variant(name, model_dir, chat_file, out, **train):
    plain = config(model_dir, chat_file, out, **train)
    return plain.model_copy(update={"adapter": AdapterConfig(dropout=0.1, **VARIANTS[name])})


def test_adalora_killed_and_resumed_ends_in_the_same_bytes(model_dir, chat_file, tmp_path):
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    options = {"epochs": 6, "save_every": 1}
    assert veneer.train(variant("adalora", model_dir, chat_file, plain, **options)).steps == 18
    yaml = tmp_path / "run.yaml"
    yaml.write_text(variant("adalora", model_dir, chat_file, killed, **options).to_yaml())
    for how, after in (("start", 7), ("resume", 13)):  # while the ranks fall, and after
        process, said = children.start(children.training, yaml, how)
        next(step for kind, step in said if kind == "train" and step >= after)
        assert kill(process)
    veneer.train(variant("adalora", model_dir, chat_file, killed, **options), resume=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (plain / "adapter" / file).read_bytes() == (killed / "adapter" / file).read_bytes()


@pytest.mark.parametrize("name, at", [("adalora", at) for at in (1, 5, 11, 12, 17)] + [("lora_fa", 2)])
def test_variants_interrupted_and_resumed_end_in_the_same_bytes(name, at, model_dir, chat_file, tmp_path, monkeypatch):
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    steps = {"max_steps": 18, "epochs": 6} if name == "adalora" else {"max_steps": 4}
    veneer.train(variant(name, model_dir, chat_file, plain, **steps))
    step = loop.Trainer._step

    def interrupt(self, setup, state, total):
        self._interrupted = int(state.step == at)
        return step(self, setup, state, total)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupt)
        assert veneer.train(variant(name, model_dir, chat_file, stopped, **steps)).stopped == "interrupted"
    result = veneer.train(variant(name, model_dir, chat_file, stopped, **steps), resume=True)
    assert result.stopped == "finished"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (plain / "adapter" / file).read_bytes() == (stopped / "adapter" / file).read_bytes()
    assert veneer.train(variant(name, model_dir, chat_file, stopped, **steps), resume=True).steps == result.steps
    assert final(plain) == final(stopped)


def test_adalora_ends_at_its_budget_and_says_what_it_dropped(model_dir, chat_file, tmp_path):
    seen = []
    trainer = loop.Trainer(variant("adalora", model_dir, chat_file, tmp_path / "run", epochs=6), observe=seen.append)
    trainer.run()
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = [value.shape[0] for key, value in saved.items() if key.endswith("lora_A.weight")]
    assert sum(ranks) == 3 * 14 and len(set(ranks)) > 1
    notes = [r["text"] for r in seen if r["type"] == "note"]
    assert any(f"{sum(ranks)} in all" in note for note in notes)
    assert any("kept no rank" in note for note in notes) == (len(ranks) < 14)
    model, _ = veneer.load_base(model_dir)
    veneer.load_adapter(model, tmp_path / "run" / "adapter")
    ids = torch.arange(1, 9, device=model.device)[None]
    torch.testing.assert_close(model.eval()(ids).logits, trainer.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_adalora_with_too_few_steps_is_refused_before_anything_is_written(model_dir, chat_file, tmp_path):
    with pytest.raises(veneer.VeneerError, match="leave none of the run's 6"):
        veneer.train(variant("adalora", model_dir, chat_file, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_lora_fa_leaves_A_as_it_was(model_dir, chat_file, tmp_path):
    for steps, out in ((1, "short"), (6, "long")):
        veneer.train(variant("lora_fa", model_dir, chat_file, tmp_path / out, max_steps=steps))
    short, long = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("short", "long"))
    for key in short:
        assert torch.equal(short[key], long[key]) == ("lora_A" in key), key
