"""Veneer against the Hugging Face Trainer with PEFT on a CPU: the bundled data, SmolLM2-135M, rank 16, all linears.

    python benchmarks/bench_cpu_train.py [--epochs 1] [--batch-size 16] [--out benchmarks/results/cpu_train.json]

Both sides train in a process of their own on the same tokens and masks, from the same initial adapter, in the same
order, with the same effective batch and a constant learning rate (the Trainer's warm-up begins with a step of rate 0,
Veneer's does not, so a schedule would not be the same); the Trainer pads each batch to its longest example,
as its collator does by default. The final loss of both is taken by one function on the same held-out examples.
Times leave out loading and tokenising on both sides; peak memory is the process's, from start to end.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL, LR = "smollm2-135m-instruct", 1e-3


def peak_gib() -> float:
    scale = 2**20 if sys.platform == "linux" else 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def run_veneer(args: argparse.Namespace, folder: Path) -> dict:
    from veneer.config import TrainConfig
    from veneer.training.loop import Trainer

    config = TrainConfig(
        model=MODEL,
        data="bundled",
        out=str(folder / "veneer"),
        train={
            "lr": LR,
            "warmup": 0,
            "schedule": "constant",
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "save_every": 10**6,
        },
    )
    trainer = Trainer(config, observe=lambda r: print(r, file=sys.stderr) if r["type"] == "note" else None)
    trainer.validate()
    began = time.monotonic()
    trainer.run()
    seconds = time.monotonic() - began
    return {"seconds": seconds, "examples": round(args.epochs * len(trainer.setup.train)), "peak_gib": peak_gib()}


def run_peft(args: argparse.Namespace, folder: Path) -> dict:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from veneer.config import TrainConfig
    from veneer.training.setup import prepare_run

    config = TrainConfig(model=MODEL, data="bundled", out="unused", train={"batch_size": args.batch_size})
    setup = prepare_run(config, lambda text: None)
    steps = max(1, round(args.epochs * setup.steps_per_epoch(config.train)))
    order = [i for step in range(steps) for i in setup.batch(step, config)]
    rows = [
        {
            "input_ids": e.input_ids.tolist(),
            "labels": [int(t) if s else -100 for t, s in zip(e.input_ids, e.supervised)],
        }
        for e in (setup.train[i] for i in order)
    ]
    assert LoraConfig(r=1).peft_type.value == "LORA"
    model = PeftModel.from_pretrained(setup.model, folder / "initial", is_trainable=True)

    class InOrder(Trainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_steps=5,
        disable_tqdm=True,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(setup.tokenizer, padding=True),
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    peak = peak_gib()
    model.save_pretrained(folder / "peft")
    return {"seconds": seconds, "examples": len(rows), "peak_gib": peak}


def make_initial(folder: Path) -> None:
    """The adapter that Veneer's own run starts from."""
    import veneer

    model, _ = veneer.load_base(MODEL)
    veneer.attach(model, veneer.AdapterConfig(), seed=0)
    veneer.save_adapter(model, folder / "initial")


def final_loss(adapter: Path) -> float:
    """Held-out loss of an adapter, in nats per supervised token."""
    import veneer
    from veneer.data.load import read_examples
    from veneer.training.evaluate import heldout_loss
    from veneer.training.forward import RowModel

    model, tokenizer = veneer.load_base(MODEL)
    data = veneer.prepare(read_examples("bundled:heldout"), tokenizer, content_hash="", cache_dir=None)
    veneer.load_adapter(model, adapter)
    return heldout_loss(RowModel(model, packing=False), data, 2048, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_train.json"))
    parser.add_argument("--side", choices=("veneer", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"veneer": run_veneer, "peft": run_peft}[args.side](args, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, sides = Path(name), {}
        make_initial(folder)
        for side in ("veneer", "peft"):
            command = [sys.executable, __file__, "--side", side, "--folder", name]
            command += ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sides[side] = json.loads(done.stdout.strip().splitlines()[-1])
            sides[side]["examples_per_second"] = sides[side]["examples"] / sides[side]["seconds"]
            print(side, sides[side], flush=True)
        sides["veneer"]["heldout_loss"] = final_loss(folder / "veneer" / "adapter")
        sides["peft"]["heldout_loss"] = final_loss(folder / "peft")
    ours, theirs = sides["veneer"], sides["peft"]
    result = sides | {
        "speedup": ours["examples_per_second"] / theirs["examples_per_second"],
        "memory_ratio": ours["peak_gib"] / theirs["peak_gib"],
        "loss_ratio": ours["heldout_loss"] / theirs["heldout_loss"],
        "machine": machine(),
        "command": "python " + " ".join(sys.argv),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def machine() -> dict:
    import os
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "peft", "veneer")}
    return {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()} | packages


if __name__ == "__main__":
    main()
