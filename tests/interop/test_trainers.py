"""transformers' Trainer and TRL's SFTTrainer around accelerated models: the same losses, step by step."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import veneer
from conftest import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5


def rows(count=24):
    torch.manual_seed(9)
    ids = torch.randint(1, 400, (count, 11))
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def peft_model(**options):
    torch.manual_seed(2)
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**values | options))


def arguments(folder, kind=TrainingArguments, **options):
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 4,
    }
    return kind(**values | options)


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS and found[-1] < found[0]
    return found


def trained(model, folder, **options):
    return losses(Trainer(model=model, args=arguments(folder, **options), train_dataset=rows()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_gives_the_same_losses_and_adapter(tmp_path, checkpointing):
    plain, fast = peft_model(), peft_model()
    assert len(veneer.accelerate(fast).accelerated) == 14
    options = {"gradient_checkpointing": checkpointing}
    one, two = trained(plain, tmp_path / "p", **options), trained(fast, tmp_path / "f", **options)
    assert two == pytest.approx(one, rel=1e-5)
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


def test_trainer_saves_and_resumes_an_accelerated_model(tmp_path):
    whole = peft_model()
    veneer.accelerate(whole)
    expected = trained(whole, tmp_path / "whole")
    first = peft_model()
    veneer.accelerate(first)
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(first, tmp_path / "cut", **options)
    again = peft_model(init_lora_weights=False)
    veneer.accelerate(again)
    trainer = Trainer(model=again, args=arguments(tmp_path / "cut", **options), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(expected, rel=1e-5)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (tmp_path / "cut" / "checkpoint-3").iterdir()
    }


def conversations():
    from datasets import Dataset

    turns = [
        [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"city {i * 7}"}]
        for i in range(30)
    ]
    return Dataset.from_list([{"messages": turn} for turn in turns])


def sft(model, folder, tokenizer, **options):
    trl = pytest.importorskip("trl")
    args = arguments(folder, trl.SFTConfig, gradient_checkpointing=False, max_length=64, **options)
    return trl.SFTTrainer(model=model, args=args, train_dataset=conversations(), processing_class=tokenizer)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_gives_the_same_losses(tmp_path, tokenizer, packing):
    plain, fast = peft_model(), peft_model()
    veneer.accelerate(fast)
    options = {"packing": packing}
    one = losses(sft(plain, tmp_path / "p", tokenizer, **options))
    two = losses(sft(fast, tmp_path / "f", tokenizer, **options))
    assert two == pytest.approx(one, rel=1e-5)
