"""Training over a streamed base, on one GPU whose memory is capped to play a smaller card, and on a CPU from disk.

    python benchmarks/bench_stream.py --out results.json             all GPU cases
    python benchmarks/bench_stream.py --cases a,c                    some of them
    python benchmarks/bench_stream.py --smoke                        the same code on a CPU with a tiny shape
    python benchmarks/bench_stream.py --cpu-8b DIR --out FILE        `veneer train --stream disk` on an 8B shape in DIR

Cases: a 8B bfloat16 against the resident run · b 8B NF4 against the resident run · c 70B NF4 against its own compute ·
d Qwen3-30B-A3B · x the same with adapted experts · e 8B NF4, 1x2048, in 8 and 6 GB · f longest sequence of 8B QLoRA in
8/12/16/24 GB · p peers that offload to the host. Each runs in a process of its own, in the order given, and is independent
of the others. Random weights of the real shapes (one block's, in every block, each in memory of its own), random tokens,
rank 16 on all linears, learning rate 0 so that every run sees the same weights. A budget of n GB caps the allocator at
n·10⁹ bytes. "no copies" is the same step with the blocks' copies left out: what computing alone takes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA = dict(rope_theta=500000.0, max_position_embeddings=131072, vocab_size=128256, tie_word_embeddings=False,
             num_key_value_heads=8, model_type="llama")  # fmt: skip
SHAPES = {
    "8B": LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": LLAMA | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "30B-A3B": dict(model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
                    num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, intermediate_size=6144,
                    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, vocab_size=151936,
                    tie_word_embeddings=False, max_position_embeddings=40960),
    "tiny": LLAMA | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512),
    "tiny-moe": dict(model_type="qwen3_moe", hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, num_experts=4,
                     num_experts_per_tok=2, vocab_size=512, tie_word_embeddings=False),
}  # fmt: skip
UNSLOTH = {8: 2972, 12: 21848, 16: 40724, 24: 78475}
"""Published longest context of 8B QLoRA by GB of GPU memory."""
LENGTHS = {8: (32768, 20480, 3716), 12: (57344, 40960, 27310), 16: (81920, 65536, 50905), 24: (122880, 98304)}
"""Tried one after the other until one fits; the last is 1.25 times the published one or just above."""


class Bench:
    """One model on the host, and what is measured with it."""

    def __init__(self, shape: str, quant: str | None, smoke: bool, **adapter) -> None:
        import torch

        self.torch, self.smoke = torch, smoke
        torch._dynamo.config.recompile_limit = 64  # several settings are compiled in one process
        self.adapter = {"rank": 16, "alpha": 32} | adapter
        self.device = torch.device("cpu" if smoke else "cuda:0")
        self.dtype = torch.float32 if smoke else torch.bfloat16
        began = time.time()
        self.cap(None)
        self.shape = ("tiny-moe" if "A3B" in shape else "tiny") if smoke else shape
        self.model, self.modules, self.blocks, self.head = host_model(
            SHAPES[self.shape], quant, self.device, self.dtype
        )
        self.stream()
        self.adapt()
        self.load_seconds = time.time() - began

    def note(self) -> dict:
        """How long loading took and what the host holds."""
        host = sum(block.nbytes for block in self.blocks)
        return {"load_seconds": round(self.load_seconds, 1), "host_gb": round(host / 1e9, 1)}

    def stream(self, slots: int = 2, resident: int = 0) -> None:
        from veneer.base.stream import StreamedBase

        self.base = StreamedBase(
            self.model, self.modules, self.blocks, self.head, self.device, self.dtype, slots, resident
        )

    def adapt(self) -> None:
        import veneer
        from veneer.training.flat import FlatOptimizer

        bank = veneer.attach(self.model, veneer.AdapterConfig(**self.adapter), seed=0)
        self.base.settle()
        parameters = bank.parameters("default")
        self.torch.manual_seed(1)
        for parameter in parameters.values():
            parameter.data.add_(0.01 * self.torch.randn_like(parameter))
        self.model.train()
        self.gradient: list | None = None
        self.optimizer = FlatOptimizer(parameters, veneer.OptimConfig(lr=1e-30))

    def to_device(self) -> None:
        """End streaming: every weight on the device."""
        from veneer.base.held import view_of

        self.base.uninstall()
        self.model.get_input_embeddings().__dict__.pop("forward")
        self.model.get_output_embeddings().__dict__.pop("forward")
        self.base = self.model.veneer_stream = None
        self.cap(None)
        for block in self.blocks:
            flat = block.flat.to(self.device)
            for leaf in block.leaves:
                for place in leaf.places:
                    place.put(view_of(flat, leaf.offset, leaf.home, leaf.dtype))
        self.model.get_input_embeddings().to(self.device)
        self.model.get_output_embeddings().to(self.device)

    def cap(self, gigabytes: float | None) -> None:
        """Let the allocator have no more than this."""
        gc.collect()
        if self.smoke:
            return
        self.torch.cuda.empty_cache()
        total = self.torch.cuda.get_device_properties(0).total_memory
        self.torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * 1e9 / total)

    def rows(self, rows_of, lengths: list[int], most: int) -> list:
        """Sequences of these lengths in rows of `most` tokens."""
        import numpy as np

        from veneer.data.example import TokenizedExample

        random = np.random.default_rng(0)
        examples = [
            TokenizedExample(random.integers(5, self.model.config.vocab_size - 5, n).astype(np.int32), np.ones(n, bool))
            for n in lengths
        ]
        return rows_of.pack(examples, most, False)

    def run(
        self, lengths: list[int], dial: str, *, budget: float | None, row: int = 0, steps: int = 2,
        no_copies: bool = False, compile: bool = True, warm: bool = True, compare: bool = False,
    ) -> dict:  # fmt: skip
        """Measure steps over these sequences, in rows of `row` tokens; streamed unless `to_device` was called."""
        from veneer.training.accelerate import Accelerated
        from veneer.training.forward import RowModel
        from veneer.training.streamed import StreamedRows

        row = max(row, *lengths, 0)
        if self.smoke:
            lengths, row = [max(8, n // 256) for n in lengths], max(8, row // 256)
        options = {"modes": dial, "compile": compile and not self.smoke, "note": lambda text: print(text, flush=True)}
        self.cap(budget)
        if self.base is not None:
            rows_of = fast = StreamedRows(self.model, **options)
        else:
            rows_of, fast = RowModel(self.model), Accelerated(self.model, **options)
        packed = self.rows(rows_of, lengths, row)
        supervised = sum(len(row.targets) for row in packed)

        def step():
            self.optimizer.zero_grad()
            if self.base is not None:
                losses = rows_of.backward(packed, supervised)
            else:
                losses = []
                for one in packed:
                    fast.start(unchanged=bool(losses))
                    with rows_of.row(one) as loss:
                        (loss / supervised).backward()
                    losses.append(loss.detach())
            self.gradient = [flat.grad.clone() for flat in self.optimizer.buffers] if self.keep_gradient else None
            self.optimizer.step()
            return sum(losses) / supervised

        self.reset()
        self.keep_gradient = False
        times = []
        with rows_of.attention(), fast:
            began = time.time()
            loss = float(step())
            first = time.time() - began
            if self.base is not None and no_copies:
                self.base.conveyor.fetch = lambda i: None
            try:
                for _ in range(steps if warm else 0):
                    self.sync()
                    start = time.time()
                    step()
                    self.sync()
                    times.append(time.time() - start)
            finally:
                if self.base is not None:
                    self.base.conveyor.__dict__.pop("fetch", None)
                    self.base.conveyor.holds = [None] * len(self.base.conveyor.holds)
            peak = self.peak()
            if compare:
                self.cap(None)
                self.keep_gradient = True
                step()
        seconds = statistics.median(times) if times else first
        result = {
            "lengths": f"{len(lengths)}x{lengths[0]}", "rows": len(packed), "dial": dial, "budget_gb": budget,
            "no_copies": no_copies,
            "tokens_per_second": round(sum(lengths) / seconds, 1), "step_seconds": round(seconds, 3),
            "first_step_seconds": round(first, 2), "loss": round(loss, 5), **peak,
        }  # fmt: skip
        if self.base is not None:
            result["resident_blocks"] = len(self.base.conveyor.stay)
        return result

    def reset(self) -> None:
        if not self.smoke:
            self.torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        if not self.smoke:
            self.torch.cuda.synchronize()

    def peak(self) -> dict:
        if self.smoke:
            return {}
        allocated, reserved = self.torch.cuda.max_memory_allocated(), self.torch.cuda.max_memory_reserved()
        return {"peak_gb": round(allocated / 1e9, 3), "reserved_gb": round(reserved / 1e9, 3)}

    def difference(self, other: list) -> float:
        """The largest relative difference of a flat gradient to another run's."""
        pairs = zip(self.gradient, other, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def host_model(shape: dict, quant: str | None, device, dtype):
    """(model, blocks' modules, blocks, head) with random weights on the host; one block is made and copied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from veneer.base.held import hold, leaves_of
    from veneer.base.stream import frozen_blocks
    from veneer.base.stream_load import Files, fill_buffers, head_blocks, quantise_block

    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    fill_buffers(model)
    modules = frozen_blocks(model)
    randomise(modules[0], device)
    if quant:
        quantise_block(modules[0], quant, dtype, device)
    blocks = [hold(leaves_of(modules[0], dtype), device)]
    source = blocks[0].flat.to(device)
    parent = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and m[0] is modules[0])
    for i in range(1, len(modules)):
        parent[i] = modules[i] = copy_of(modules[0], i)
        blocks.append(held_copy(blocks[0], modules[0], modules[i], source, device))
    del source
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        randomise(part, device)
        hold(leaves_of(part, dtype), device)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner), leaf, torch.nn.Parameter(torch.ones_like(parameter, device=device), False)
            )
    return model, modules, blocks, head_blocks(model, Files(None, {}), dtype)


def randomise(module, device) -> None:
    """Random matrices and unit vectors on a device."""
    import torch

    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    torch.cuda.empty_cache()


def copy_of(module, index: int):
    """A module of the same structure, without its frozen tensors' memory."""
    import torch

    from veneer.base.held import places

    held = [(place, place.get()) for place in places(module)]
    for place, tensor in held:
        place.put(torch.empty(0, dtype=tensor.dtype))
    twin = copy.deepcopy(module)
    for place, tensor in held:
        place.put(tensor)
    for part in twin.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = index
        if hasattr(part, "quant_state"):
            part.quant_state = part.weight.quant_state
    return twin


def held_copy(block, module, twin, source, device):
    """A `Block` for `twin`, whose bytes are a copy of `source` in host memory of their own."""
    from veneer.base.held import Block, Leaf, host_buffer, places, view_of

    new = {(id(a.owner), a.name): b for a, b in zip(places(module), places(twin), strict=True)}
    leaves = [Leaf([new[id(p.owner), p.name] for p in leaf.places], leaf.home, leaf.dtype) for leaf in block.leaves]
    made = Block(leaves)
    made.flat = host_buffer(made.nbytes, device)
    made.flat.copy_(source)
    for leaf in leaves:
        leaf.home = view_of(made.flat, leaf.offset, leaf.home, leaf.dtype)
    made.put_home()
    return made


class Record:
    """Results, written as they come; a failing measurement is one of them. A process adds to what the file holds."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self.out, self.began, self.limit = out, time.time(), limit
        self.values: dict = {"cases": {}}
        if out and out.exists():
            self.values = json.loads(out.read_text(encoding="utf-8"))

    def measure(self, case: str, name: str, function) -> dict | None:
        if time.time() - self.began > self.limit:
            found = {"failed": "left out: --limit-seconds"}
        else:
            try:
                found = function()
            except Exception as error:  # noqa: BLE001 - any failure of one measurement is a result
                last = traceback.extract_tb(error.__traceback__)[-1]
                found = {
                    "failed": f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
                }
                error.__traceback__ = None
        self.values["cases"].setdefault(case, {})[name] = found
        print(f"{case} {name:28s} {json.dumps(found)}  [{time.time() - self.began:.0f} s]", flush=True)
        self.write()
        return None if "failed" in found else found

    def write(self) -> None:
        if self.out:
            self.out.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")


def fitting(record: Record, case: str, name: str, run, sizes: tuple[int, ...]) -> tuple[int, dict | None]:
    """(row size, result) of the first of these row sizes that fits in memory; the others that were tried are results."""
    for row in sizes:
        found = record.measure(case, f"{name}, rows of {row}", lambda row=row: run(row))
        if found:
            return row, found
    return sizes[-1], None


def sequences(tokens: int, row: int) -> list[int]:
    """Lengths of a step's sequences: 2048 tokens each, or a row's."""
    return [min(row, 2048)] * (tokens // min(row, 2048))


def against_resident(
    record: Record, case: str, bench: Bench, tokens: int, budget: float, sizes: tuple[int, ...]
) -> None:
    """Steps of `tokens` tokens, streamed within a budget, without copies, and with every weight on the device."""
    note, dial = bench.note(), "recompute-offload"

    def streamed(row: int, **more) -> dict:
        return bench.run(sequences(tokens, row), dial, row=row, budget=budget, **more)

    row, found = fitting(record, case, "streamed", lambda row: note | streamed(row, compare=True), sizes)
    gradient, bench.gradient = (bench.gradient if found else None), None
    if found:
        record.measure(case, "streamed, no copies", lambda: streamed(row, steps=1, no_copies=True))
    bench.to_device()
    for dial in ("recompute", "selective"):
        resident(record, case, bench, tokens, row, dial, found, gradient)


def resident(record: Record, case: str, bench: Bench, tokens: int, row: int, dial: str, streamed, gradient) -> None:
    """The same step with every weight on the device, and how the streamed one compares."""
    compare = dial == "recompute" and bool(gradient)
    found = record.measure(
        case,
        f"resident, {dial}",
        lambda: bench.run(sequences(tokens, row), dial, row=row, budget=None, compare=compare),
    )
    if found and streamed:
        found["streamed_share"] = round(streamed["tokens_per_second"] / found["tokens_per_second"], 3)
        if compare:
            found["gradient_difference"] = bench.difference(gradient)
            bench.gradient = None
        record.write()
        print(json.dumps({key: found[key] for key in found if "streamed" in key or "gradient" in key}), flush=True)


def bfloat16_8b(record: Record, smoke: bool) -> None:
    against_resident(record, "a", Bench("8B", None, smoke), 32768, 4, (4096, 2048))


def nf4_8b(record: Record, smoke: bool) -> None:
    against_resident(record, "b", Bench("8B", "nf4", smoke), 16384, 2.5, (2048, 1024))


def one_row_nf4(record: Record, smoke: bool) -> None:
    """1x2048: streamed with as many blocks on the device as go, then all on the device."""
    bench = Bench("8B", "nf4", smoke)

    def all_blocks() -> dict:
        bench.stream(resident=len(bench.blocks))
        return bench.run([2048], "recompute", budget=6, steps=4)

    record.measure("e", "6 GB, head on the host", all_blocks)
    bench.to_device()
    for budget, dial in ((8, "recompute"), (8, "selective"), (6, "recompute")):
        record.measure("e", f"{budget} GB, {dial}", lambda d=dial, b=budget: bench.run([2048], d, budget=b, steps=4))


def longest_nf4(record: Record, smoke: bool) -> None:
    bench = Bench("8B", "nf4", smoke)
    for budget, lengths in LENGTHS.items():
        for length in lengths:
            found = record.measure(
                "f", f"{budget} GB, {length} tokens",
                lambda n=length, b=budget: {"unsloth_published": UNSLOTH[b], "share": round(n / UNSLOTH[b], 2)}
                | bench.run([n], "recompute-offload", budget=b, warm=False),
            )  # fmt: skip
            if found:
                break


def nf4_70b(record: Record, smoke: bool) -> None:
    bench = Bench("70B", "nf4", smoke)
    note = bench.note()

    def run(row: int, **more) -> dict:
        return bench.run(sequences(8192, row), "recompute-offload", row=row, budget=8, steps=1, **more)

    row, found = fitting(record, "c", "streamed", lambda row: note | run(row), (2048, 1024))
    bound = record.measure("c", "no copies", lambda: run(row, no_copies=True)) if found else None
    if bound:
        found["share_of_compute_bound"] = round(found["tokens_per_second"] / bound["tokens_per_second"], 3)
        record.write()
        print(json.dumps(found), flush=True)


def moe_30b(record: Record, smoke: bool) -> None:
    bench = Bench("30B-A3B", None, smoke)
    rows = [2048] * 8
    record.measure(
        "d",
        "streamed",
        lambda: bench.note() | bench.run(rows, "recompute-offload", budget=8, steps=1, compile=False),
    )


def experts_30b(record: Record, smoke: bool) -> None:
    """Adapters on the experts too, of a rank that leaves room: 16 would be 10 GB of adapter and optimiser."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    bench = Bench("30B-A3B", None, smoke, rank=1, alpha=2, target_parameters=names)
    rows = [2048] * 4
    record.measure(
        "x",
        "streamed, experts adapted",
        lambda: bench.note() | bench.run(rows, "recompute-offload", budget=8, steps=1, compile=False),
    )


def peers(record: Record, smoke: bool) -> None:
    """PEFT with accelerate's offload of weights to the host, the same tokens a step as case a."""

    def peft_offload() -> dict:
        import accelerate
        import peft
        import torch

        bench = Bench.__new__(Bench)
        bench.torch, bench.smoke = torch, smoke
        device, dtype = torch.device("cpu" if smoke else "cuda"), torch.float32 if smoke else torch.bfloat16
        model, _, _, _ = host_model(SHAPES["tiny" if smoke else "8B"], None, device, dtype)
        model.model.norm.to("cpu")
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names))
        for name, module in model.named_modules():
            if not any(module.children()) and list(module.parameters()) and "lora_" not in name:
                accelerate.cpu_offload(module, execution_device=device, offload_buffers=False)
        for name, part in model.named_modules():
            if "lora_" in name or "rotary" in name:
                part.to(device)
        model.train()
        lengths = [64 if smoke else 4096] * 8
        ids = torch.randint(5, model.config.vocab_size - 5, (len(lengths), lengths[0]), device=device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        bench.cap(4)
        bench.reset()

        def step() -> None:
            optimizer.zero_grad()
            for row in ids.split(1):
                (model(input_ids=row, labels=row, use_cache=False).loss / len(ids)).backward()
            optimizer.step()
            bench.sync()

        began = time.time()
        step()
        seconds = time.time() - began
        return {
            "tokens_per_second": round(ids.numel() / seconds, 1),
            "first_step_seconds": round(seconds, 2),
            **bench.peak(),
        }

    record.measure("p", "PEFT, accelerate offload", peft_offload)


def write_8b(folder: Path) -> None:
    """An 8B checkpoint of random bfloat16 weights in shards, and some tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from veneer.base.checkpoint import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    values = dict(SHAPES["8B"])
    config = AutoConfig.for_model(
        values.pop("model_type"), dtype="bfloat16", architectures=["LlamaForCausalLM"], **values
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    torch.manual_seed(0)
    pool = (torch.randn(1 << 25) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    ones = torch.ones(4096).bfloat16().view(torch.uint8).numpy().tobytes()

    def pieces(name: str):
        left, at = 2 * torch.Size(shapes[name]).numel(), zlib.crc32(name.encode()) % (1 << 20) * 2
        if len(shapes[name]) == 1:
            yield ones[:left]
            return
        while left:
            part = pool[at : at + left]
            yield part
            left, at = left - len(part), 0

    names = list(shapes)
    shards = [names[i : i + 37] for i in range(0, len(names), 37)]
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {n: ("BF16", shapes[n]) for n in shard}, {"format": "pt"}, pieces)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(2 * torch.Size(s).numel() for s in shapes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a b c"], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)


def cpu_8b(record: Record, folder: Path) -> None:
    """`veneer train --stream disk` as a user runs it, and the memory of its process by kind."""
    if not (folder / "model.safetensors.index.json").exists():
        write_8b(folder)
    data, out = folder / "data.jsonl", folder / "run"
    text = "The frozen base stays on the disk and its blocks pass through two buffers."
    data.write_text(json.dumps({"text": text[:60]}) + "\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "veneer", "train", "--model", str(folder), "--data", str(data), "--out", str(out), "--device",
        "cpu", "--dtype", "float32", "--stream", "disk", "--max-steps", "1", "--batch-size", "1", "--rank", "8",
        "--max-length", "64", "--set", "data.train_on=all",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in peak:
                    peak[key] = max(peak[key], 1024 * int(value.split()[0]))
            time.sleep(0.02)

    watcher, began = threading.Thread(target=watch), time.time()
    watcher.start()
    said = process.communicate()[0]
    watcher.join()

    def result() -> dict:
        if process.returncode:
            raise RuntimeError(said[-2000:])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if line["type"] == "train"]
        return {
            "weights_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
            "peak_rss_bytes": peak["VmRSS"], "peak_anonymous_bytes": peak["RssAnon"], "peak_file_bytes": peak["RssFile"],
            "step_seconds": [round(s["seconds"], 1) for s in steps], "tokens": steps[-1]["tokens"],
            "losses": [round(s["loss"], 4) for s in steps], "grad_norms": [round(s["grad_norm"], 4) for s in steps],
            "load_average": round(os.getloadavg()[1], 1), "cores": os.cpu_count(),
            "whole_run_seconds": round(time.time() - began, 1), "budget_bytes": 6 << 30,
            "within_budget": peak["VmRSS"] <= 6 << 30,
        }  # fmt: skip

    record.values["command"] = "veneer " + " ".join(c if c != str(folder) else "DIR" for c in command[3:]).replace(
        str(folder), "DIR"
    )
    record.measure("cpu", "8B bfloat16 from disk", result)


CASES = {
    "a": bfloat16_8b, "b": nf4_8b, "e": one_row_nf4, "f": longest_nf4, "c": nf4_70b, "d": moe_30b, "x": experts_30b,
    "p": peers,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="a,b,e,f,c,d,x", help="letters with commas, in any order")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--limit-seconds", type=float, default=600, help="start no measurement after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--cpu-8b", type=Path, metavar="DIR", help="the CPU case alone; 16 GB are written to DIR")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the one case, in this process
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if not options.alone and options.out:
        options.out.unlink(missing_ok=True)
    if not options.alone and not options.cpu_8b:
        sys.exit(in_processes(options, cases))
    import torch
    import transformers

    if options.smoke:
        torch.set_num_threads(1)
    record = Record(options.out, options.limit_seconds)
    device = "cpu" if options.smoke or options.cpu_8b else torch.cuda.get_device_name(0)
    record.values |= {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    if options.cpu_8b:
        record.limit = float("inf")
        cpu_8b(record, options.cpu_8b)
        return
    for case in cases:
        try:
            CASES[case](record, options.smoke)
        except Exception as error:  # noqa: BLE001 - a result like any other
            record.values["cases"].setdefault(case, {})["failed"] = repr(error)[:500]
            traceback.print_exc()
            record.write()


def in_processes(options: argparse.Namespace, cases: list[str]) -> int:
    """Each case in a process of its own, one after the other, so that no memory of one is another's; 1 if one died."""
    end, died = time.time() + options.limit_seconds, 0
    for case in cases:
        if time.time() > end:
            print(f"{case} left out: --limit-seconds", flush=True)
            continue
        command = [sys.executable, __file__, "--alone", "--cases", case, "--limit-seconds", str(end - time.time())]
        command += ["--smoke"] * options.smoke + (["--out", str(options.out)] if options.out else [])
        died |= bool(subprocess.run(command).returncode)
    return died


if __name__ == "__main__":
    main()
