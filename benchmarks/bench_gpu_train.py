"""Training steps on one GPU against PEFT, PEFT with Liger's kernels, Unsloth and TRL: real forward, backward and update.

    python benchmarks/bench_gpu_train.py --out results.json              all cases
    python benchmarks/bench_gpu_train.py --only "8B bf16 4x2048"         one of them

Each measurement runs in a process of its own, with PyTorch's expandable segments as in `veneer train`: random weights from
the real configuration, random tokens, rank 16 on all seven projections, AdamW in float32. Reported: the median step,
tokens/s, peak allocated memory of all steps, seconds to load and to the first step ("again": in a second process, whose
compiled code is on disk). With --at-once several of them load and compile at the same time, and wait for each other to be
timed, one after the other: that makes "start" longer. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

LOCK = FileLock(Path(tempfile.gettempdir()) / f"veneer-bench-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}.lock")
"""Held while steps are timed, one process at a time on a GPU; of a case by length, while longer ones than the first run."""
CONFIGS = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, head_dim=64),
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT = [int(64 * 1.08 ** (i % 37)) for i in range(0, 370, 7)]
"""Lengths of the examples of a packed row, in the way of chats: 64 to about 1,000 tokens."""
CHAT = CHAT[: next(i for i in range(len(CHAT)) if sum(CHAT[: i + 1]) > 8192)]
CASES = {
    "8B bf16 4x2048": ("8B", "bf16", [2048] * 4,
        ["veneer:keep", "veneer:selective", "veneer:selective:again", "unsloth:none", "liger-nocast", "peft-nocast", "peft"]),
    "8B bf16 4x2048 in less memory": ("8B", "bf16", [2048] * 4,
        ["veneer:mixed", "veneer:mixed/0/8", "veneer:mixed/0/16", "veneer:mixed/0/24", "veneer:recompute-offload",
         "unsloth:ckpt", "liger-nocast:ckpt"]),
    "8B nf4 4x2048": ("8B", "nf4", [2048] * 4,
        ["veneer:mixed/0/0/host", "veneer:recompute-offload/0/0/host", "veneer:recompute", "unsloth:ckpt"]),
    "8B nf4 1x2048": ("8B", "nf4", [2048],
        ["veneer:recompute/0/0/host", "veneer:recompute-offload/0/0/host", "unsloth:ckpt"]),
    "1B bf16 8x1024": ("1B", "bf16", [1024] * 8, ["veneer:keep", "veneer:selective", "unsloth:none", "liger-nocast"]),
    "1B bf16 1x512": ("1B", "bf16", [512], ["veneer:keep", "veneer:selective", "unsloth:none", "liger-nocast"]),
    "8B bf16 packed chats": ("8B", "bf16", CHAT, ["veneer:selective", "unsloth:none", "trl:none", "trl:ckpt"]),
    "8B bf16 1x32768": ("8B", "bf16", [32768], ["veneer:mixed", "veneer:recompute-offload", "unsloth:ckpt"]),
    "8B bf16 by length": ("8B", "bf16", [512, 2048, 8192, 32768],
        ["veneer:mixed", "unsloth:ckpt", "liger-nocast:ckpt", "peft-nocast:ckpt", "veneer:selective"]),
}  # fmt: skip
"""Name → (shape, precision, lengths of a step, who). Veneer's are veneer:DIAL/ROW/KEEP/EMBEDDING: `train.checkpointing`,
tokens of a row (0: the whole step in one), `train.keep_blocks`, `train.embedding`. "by length": steps of one sequence, of
each length in turn."""


def config_of(shape: str):
    from transformers import LlamaConfig

    return LlamaConfig(rope_theta=500000.0, max_position_embeddings=131072, **CONFIGS[shape])


def build(shape: str, precision: str):
    """Random weights, made on the GPU; NF4 by loading them from memory-backed disk."""
    import torch
    from transformers import AutoModelForCausalLM

    if precision == "nf4":
        from transformers import BitsAndBytesConfig

        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(
            saved(shape), quantization_config=quant, dtype=torch.bfloat16, device_map={"": 0}
        )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    torch.set_default_dtype(torch.float32)
    return model


def saved(shape: str) -> str:
    """A directory with random weights and some tokenizer, for what loads from disk only."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"veneer-bench-{shape}"
    with FileLock(f"{path}.lock"):
        if (path / "tokenizer.json").exists():
            return str(path)
        model = build(shape, "bf16")
        model.save_pretrained(path)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.train_from_iterator(["a b c"], trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<pad>"]))
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        fast.save_pretrained(path)
        del model
        torch.cuda.empty_cache()
    return str(path)


def veneer_model(shape: str, precision: str, lengths: list[int], mode: str):
    """steps(lengths) → (step, value) of one model; the blocks are compiled once."""
    import numpy as np

    import veneer
    from veneer.base.host_embedding import embedding_to_host
    from veneer.data.example import TokenizedExample
    from veneer.training.accelerate import Accelerated
    from veneer.training.flat import FlatOptimizer
    from veneer.training.forward import RowModel
    from veneer.training.graphs import RowGraphs

    given = mode.split("/")
    dial, row, keep, embedding = given + ["keep", "0", "0", "device"][len(given) :]
    model = build(shape, precision)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=16, alpha=32), seed=0)
    model.train()
    if embedding == "host":
        embedding_to_host(model)
    most = int(row) or max(sum(lengths), *lengths)
    options = veneer.OptimConfig(lr=1e-4, micro_batch_tokens=most)
    optimizer = FlatOptimizer(bank.parameters("default"), options)
    rows_of, say = RowModel(model), lambda text: print(text, file=sys.stderr)
    fast = Accelerated(model, modes=dial, keep=int(keep), dynamic=len(set(lengths)) > 1, note=say)
    graphs = RowGraphs(rows_of, fast, options, say)
    random = np.random.default_rng(0)

    def steps(lengths: list[int]):
        examples = [
            TokenizedExample(random.integers(5, model.config.vocab_size - 5, n).astype(np.int32), np.ones(n, bool))
            for n in lengths
        ]
        rows = rows_of.pack(examples, most, False)
        supervised = sum(len(row.targets) for row in rows)

        def step() -> float:
            optimizer.zero_grad()
            losses = []
            for row in rows:
                fast.start(unchanged=bool(losses))
                losses.append(graphs.backward(row, 1 / supervised))
            optimizer.step()
            return sum(losses)

        return step, lambda value: float(value) / supervised

    steps.contexts = rows_of.attention(), fast  # held with the steps: a dropped context would end
    for context in steps.contexts:
        context.__enter__()
    return steps


def peft_model(shape: str, precision: str, name: str, mode: str):
    import peft
    import torch

    if name.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = build(shape, precision)
    if precision == "nf4":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=mode == "ckpt")
    elif mode == "ckpt":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
    if name.endswith("nocast"):
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return plain_steps(model)


def unsloth_model(shape: str, precision: str, lengths: list[int], mode: str):
    import torch

    os.environ.setdefault(
        "UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-")
    )  # not shared with another one
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        saved(shape), max_seq_length=longest(lengths), dtype=torch.bfloat16, load_in_4bit=precision == "nf4",
        local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth" if mode == "ckpt" else False,
        max_seq_length=longest(lengths),
    )  # fmt: skip
    return plain_steps(model)


def longest(lengths: list[int]) -> int:
    """The longest sequence that `plain_steps` makes of them."""
    return max(lengths) if len(set(lengths)) == 1 else sum(lengths)


def plain_steps(model):
    """Forward with labels, backward, AdamW, on a batch of equal lengths; several lengths as one long sequence, which is
    what packing without a varlen kernel does (examples then see each other)."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def steps(lengths: list[int]):
        shape = (len(lengths), lengths[0]) if len(set(lengths)) == 1 else (1, sum(lengths))
        ids = torch.randint(5, model.config.vocab_size - 5, shape, device="cuda")

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, float

    return steps


def trl_steps(shape: str, precision: str, lengths: list[int], mode: str, count: int) -> dict:
    """TRL's own trainer with packing, timed from step to step: each step is one packed row of all these examples."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    began, times, total = time.time(), [], sum(lengths)
    model = build(shape, precision)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), packing=True, max_length=total, per_device_train_batch_size=1, max_steps=3 + count,
        bf16=True, gradient_checkpointing=mode == "ckpt", learning_rate=1e-4, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    rows = [torch.randint(5, model.config.vocab_size - 5, (n,)).tolist() for n in lengths] * (3 + count)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            if not times:
                LOCK.acquire()
            times.append(time.time())

    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_dict({"input_ids": rows}), peft_config=lora, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(saved(shape)),
    )  # fmt: skip
    ready = time.time()
    try:
        loss = trainer.train().training_loss
    finally:
        LOCK.release()
    middle = statistics.median(b - a for a, b in zip(times[2:], times[3:]))
    return {
        "load_s": round(ready - began, 1), "first_step_s": round(times[0] - ready, 1),
        "tokens_per_second": round(total / middle), "step_ms": round(1000 * middle, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "loss": round(loss, 4),
    }  # fmt: skip


def worker(case: str, who: str, count: int) -> dict:
    """One measurement; of a case by length one for each length under "by_length", until memory runs out."""
    import torch

    shape, precision, lengths, _ = CASES[case]
    began = time.time()
    name, mode = (*who.split(":"), "")[:2]
    if name == "trl":
        return {"who": who} | trl_steps(shape, precision, lengths, mode, count)
    if name == "unsloth":
        steps = unsloth_model(shape, precision, lengths, mode)
    elif name == "veneer":
        steps = veneer_model(shape, precision, lengths, mode)
    else:
        steps = peft_model(shape, precision, name, mode)
    torch.cuda.synchronize()
    ready = time.time()
    start = {"who": who, "load_s": round(ready - began, 1)}
    if not case.endswith("by length"):
        return start | measured(steps, lengths, count)
    found = []
    for i, length in enumerate(lengths):
        with LOCK if i else nullcontext():
            try:
                found.append({"tokens": length} | measured(steps, [length], max(3, count // 2)))
            except torch.OutOfMemoryError:
                found.append({"tokens": length, "failed": "out of memory"})
                break
            torch.cuda.empty_cache()
    return start | {"by_length": found}


def measured(steps, lengths: list[int], count: int) -> dict:
    """A first step, two more to warm up, and the median of some."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ready = time.time()
    step, value = steps(lengths)
    loss = step()
    torch.cuda.synchronize()
    first, times = time.time(), []
    with LOCK:
        for i in range(2 + count):
            start = time.time()
            step()
            torch.cuda.synchronize()
            times += [time.time() - start] * (i > 1)
    middle = statistics.median(times)
    return {
        "tokens_per_second": round(sum(lengths) / middle), "step_ms": round(1000 * middle, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "first_step_s": round(first - ready, 1),
        "loss": round(value(loss), 4),
    }  # fmt: skip


def ceiling() -> float:
    """Sustained matmul rate in TFLOP/s: a 8192³ bfloat16 product on random data for two seconds."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, count = time.time(), 0
    while time.time() - start < 2:
        for _ in range(50):
            a @ b
        torch.cuda.synchronize()
        count += 50
    return 2 * 8192**3 * count / (time.time() - start) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, help="measure this case (may be repeated)")
    parser.add_argument("--who", action="append", help="of each case these alone, e.g. veneer:keep")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--limit-seconds", type=float, default=1e9, help="start no further measurement after so long")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=1, help="processes that load and compile at once")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case, who = options.worker
        print("RESULT " + json.dumps(worker(case, who, options.steps)), flush=True)
        return
    import torch
    import transformers

    record = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "transformers": transformers.__version__,
        "matmul_tflops": round(ceiling(), 1), "cases": {},
    }  # fmt: skip
    print(json.dumps({k: v for k, v in record.items() if k != "cases"}), flush=True)
    began = time.time()
    torch.cuda.empty_cache()

    def measure(case: str, who: str) -> None:
        if time.time() - began > options.limit_seconds:
            return
        command = [sys.executable, __file__, "--worker", case, who, "--steps", str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        failed = {"who": who, "failed": (done.stderr or done.stdout).strip().splitlines()[-1:]}
        record["cases"].setdefault(case, []).append(json.loads(line.removeprefix("RESULT ")) if line else failed)
        print(f"{case:32s} {json.dumps(record['cases'][case][-1])}  [{time.time() - began:.0f} s]", flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    with ThreadPoolExecutor(options.at_once) as pool:
        asked = [(case, who) for case in options.only or CASES for who in CASES[case][3]]
        asked = [(case, who) for case, who in asked if not options.who or who in options.who]
        list(pool.map(lambda pair: measure(*pair), asked))


if __name__ == "__main__":
    main()
