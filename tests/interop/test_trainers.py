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
    args = arguments(folder, trl.SFTConfig, **{"gradient_checkpointing": False, "max_length": 64} | options)
    return trl.SFTTrainer(model=model, args=args, train_dataset=conversations(), processing_class=tokenizer)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_gives_the_same_losses(tmp_path, tokenizer, packing):
    plain, fast = peft_model(), peft_model()
    veneer.accelerate(fast)
    options = {"packing": packing}
    one = losses(sft(plain, tmp_path / "p", tokenizer, **options))
    two = losses(sft(fast, tmp_path / "f", tokenizer, **options))
    assert two == pytest.approx(one, rel=1e-5)


def attached(tmp_path, name="default", seed=None, **options):
    """A Veneer-attached model; with the factors of `peft_model` unless there is a seed."""
    model = tiny_llama()
    config = veneer.AdapterConfig(rank=4, alpha=8, dropout=options.pop("dropout", 0.1), **options)
    if seed is not None:
        veneer.attach(model, config, seed=seed, name=name)
        return model
    peft_model().save_pretrained(tmp_path / "initial")
    veneer.load_adapter(model, tmp_path / "initial", name=name)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_an_attached_model_as_it_does_pefts(tmp_path, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    one = trained(peft_model(), tmp_path / "p", **options)
    assert trained(attached(tmp_path), tmp_path / "v", **options) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_trains_an_attached_model_as_it_does_pefts(tmp_path, tokenizer, checkpointing):
    options = {"gradient_checkpointing": checkpointing}
    one = losses(sft(peft_model(), tmp_path / "p", tokenizer, **options))
    assert losses(sft(attached(tmp_path), tmp_path / "v", tokenizer, **options)) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["model.norm"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_trainer_saves_an_attached_models_adapter_and_resumes_from_it(tmp_path, options):
    expected = trained(attached(tmp_path, seed=1, **options), tmp_path / "whole")
    saving = {"save_strategy": "steps", "save_steps": 3}
    model = attached(tmp_path, seed=1, **options)
    trained(model, tmp_path / "cut", **saving)
    again = attached(tmp_path, seed=2, **options)
    trainer = Trainer(model=again, args=arguments(tmp_path / "cut", **saving), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(expected, rel=1e-5)
    names = {p.name for p in (tmp_path / "cut" / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "veneer.json", "model.safetensors"} <= names
    ids = rows(1)[0]["input_ids"][None]
    trainer.save_model(str(tmp_path / "cut"))  # beside the checkpoints, which stay
    assert (tmp_path / "cut" / "checkpoint-3").is_dir() and not (tmp_path / "cut" / "model.safetensors").exists()
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut")
    torch.testing.assert_close(back(input_ids=ids).logits, again.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_trainer_loads_an_attached_models_best_checkpoint(tmp_path):
    model = attached(tmp_path, seed=1)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}  # so that the first is the best
    args = arguments(tmp_path / "out", **options)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    again = tiny_llama()
    veneer.load_adapter(again, best)
    ids = rows(1)[0]["input_ids"][None]
    torch.testing.assert_close(model.eval()(ids).logits, again(ids).logits)


def test_save_pretrained_of_an_attached_model_writes_its_adapters(tmp_path):
    model = attached(tmp_path)
    veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["q_proj"]), name="second")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    own = {"adapter_config.json", "adapter_model.safetensors", "veneer.json"}
    assert files == own | {f"second/{name}" for name in own} | {"notes.txt"}
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out" / "second")
    assert loaded.peft_config["default"].r == 2
    with pytest.raises(veneer.VeneerError, match=r"save_pretrained\(push_to_hub=…\).*merge"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    veneer.detach(model)
    model.save_pretrained(tmp_path / "base")
    assert type(model).from_pretrained(tmp_path / "base").num_parameters() == model.num_parameters()


def test_trainer_takes_an_adapted_quantised_base(tmp_path):
    """transformers refuses to train a quantised model that it does not know to be adapted."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(tmp_path / "base")

    def load():
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": quantised, "device_map": "cpu", "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load(), config)
    theirs.save_pretrained(tmp_path / "initial")
    one = trained(theirs, tmp_path / "p")
    fast = peft.PeftModel.from_pretrained(load(), tmp_path / "initial", is_trainable=True)
    veneer.accelerate(fast)
    assert trained(fast, tmp_path / "f") == pytest.approx(one, rel=1e-4)
    ours = load()
    veneer.load_adapter(ours, tmp_path / "initial")
    assert trained(ours, tmp_path / "v") == pytest.approx(one, rel=1e-4)
    ours.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def preferences():
    from datasets import Dataset

    def answer(text):
        return [{"role": "assistant", "content": text}]

    prompt = [[{"role": "user", "content": f"number {i}"}] for i in range(30)]
    columns = {
        "prompt": prompt,
        "chosen": [answer(f"city {i * 7}") for i in range(30)],
        "rejected": [answer(f"town {i * 3}") for i in range(30)],
    }
    return Dataset.from_dict(columns)


def dpo(model, folder, tokenizer, **options):
    trl = pytest.importorskip("trl")
    args = arguments(folder, trl.DPOConfig, **{"gradient_checkpointing": False} | options)
    return trl.DPOTrainer(model=model, args=args, train_dataset=preferences(), processing_class=tokenizer)


def test_dpo_trains_an_attached_model_as_it_does_pefts(tmp_path, tokenizer):
    """The trained adapter itself is the reference, and the adapter's dropout is off, as TRL wants it."""
    options = {"init_lora_weights": False, "lora_dropout": 0.4}
    one = losses(dpo(peft_model(**options), tmp_path / "p", tokenizer))
    peft_model(**options).save_pretrained(tmp_path / "initial")
    model = tiny_llama()
    veneer.load_adapter(model, tmp_path / "initial")
    two = losses(dpo(model, tmp_path / "v", tokenizer, precompute_ref_log_probs=True))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "tied_head": "both"},
        {"target_modules": ["q_proj"], "trainable_tokens": [3, 5]},
    ],
    ids=str,
)
def test_trl_stops_where_it_would_pass_an_adapted_head_by(tmp_path, tokenizer, make, options):
    more = {"precompute_ref_log_probs": True} if make is dpo else {}
    with pytest.raises(veneer.VeneerError, match="the output head is adapted, and TRL computes the loss from its"):
        make(attached(tmp_path, seed=1, **options), tmp_path / "out", tokenizer, **more).train()


def test_trl_trains_the_head_as_a_whole_and_beside_an_adapted_embedding(tmp_path, tokenizer):
    losses(sft(attached(tmp_path, seed=1, modules_to_save=["lm_head"]), tmp_path / "a", tokenizer))
    options = {"target_modules": ["embed_tokens", "q_proj"], "tied_head": "embedding"}
    losses(sft(attached(tmp_path, seed=1, **options), tmp_path / "b", tokenizer))


def test_accelerates_way_of_saving(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(attached(tmp_path, seed=1))
    state = accelerator.get_state_dict(model)
    options = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "out", **options, state_dict=state)
    again = tiny_llama()
    veneer.load_adapter(again, tmp_path / "out")
    ids = rows(1)[0]["input_ids"][None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    key = next(key for key in state if key.endswith("lora_A.default"))
    with pytest.raises(veneer.VeneerError, match=r"save_pretrained\(state_dict=…\) got other values"):
        model.save_pretrained(tmp_path / "other", state_dict=state | {key: state[key] + 1})
    assert not (tmp_path / "other").exists()
