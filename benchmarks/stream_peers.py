"""What others do in the same place, for `bench_stream.py`: weights offloaded to the host, and QLoRA in little memory."""

from __future__ import annotations

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

from stream_measure import Bench
from stream_model import SHAPES, host_model
from stream_record import Record

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def offloaded_peft(record: Record, smoke: bool) -> None:
    """PEFT with accelerate's offload of weights to the host: the tokens a step of case a, in rows of 4096."""
    record.measure("p", "PEFT, accelerate's CPU offload", partial(_offloaded, smoke, _by_accelerate))


def offloaded_fsdp(record: Record, smoke: bool) -> None:
    """PEFT with FSDP2's offload to the host, on one device."""
    record.measure("q", "PEFT, FSDP2's CPU offload", partial(_offloaded, smoke, _by_fsdp))


def unsloth_in(record: Record, smoke: bool) -> None:
    """Unsloth's 8B QLoRA, 1x2048, in the memory of cases e6 and e8. A smoke run has PEFT's model in its place."""
    model = _peft_4_bit(quantised_folder(smoke)) if smoke else _unsloth()
    for budget in (8, 6):
        run = partial(_steps, model, smoke, [8 if smoke else 2048], budget, 4)
        record.measure("u", f"Unsloth, {budget} GB", run)


def _unsloth():
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    from unsloth import FastLanguageModel  # before transformers, which it changes

    model, _ = FastLanguageModel.from_pretrained(
        str(quantised_folder(False)), max_seq_length=2048, load_in_4bit=True, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth", max_seq_length=2048,
    )  # fmt: skip


def _peft_4_bit(folder: Path):
    from transformers import AutoModelForCausalLM

    return _adapted(AutoModelForCausalLM.from_pretrained(folder))


def _offloaded(smoke: bool, offload) -> dict:
    import torch

    device, dtype = torch.device("cpu" if smoke else "cuda"), torch.float32 if smoke else torch.bfloat16
    model, _, _, _ = host_model(SHAPES["tiny" if smoke else "8B"], None, device, dtype)
    model.model.norm.to("cpu")
    model = offload(_adapted(model), device)
    return _steps(model, smoke, [8 if smoke else 4096] * 8, None, 1)


def _adapted(model):
    """With PEFT's adapter and checkpointing, in training."""
    import peft

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()


def _by_accelerate(model, device):
    """Frozen weights come to the device before each module's forward pass; factors and buffers are there."""
    import accelerate

    for name, module in list(model.named_modules()):
        if not any(module.children()) and list(module.parameters()) and "lora_" not in name:
            accelerate.cpu_offload(module, execution_device=device, offload_buffers=False)
    for name, part in model.named_modules():
        if "lora_" in name or "rotary" in name:
            part.to(device)
    return model


def _by_fsdp(model, device):
    """Each block's weights and factors come to the device together, and the update is the host's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,))
    options = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu")}
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for part in model.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)
    return model


def _steps(model, smoke: bool, lengths: list[int], budget: float | None, count: int) -> dict:
    """A first step and some more, one sequence after the other."""
    import torch

    bench = Bench.__new__(Bench)
    bench.torch, bench.smoke = torch, smoke
    bench.cap(budget)
    ids = torch.randint(5, model.config.vocab_size - 5, (len(lengths), lengths[0]), device="cpu" if smoke else "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        for row in ids.split(1):
            (model(input_ids=row, labels=row, use_cache=False).loss / len(ids)).backward()
        optimizer.step()

    times = [bench.timed(step)[0] for _ in range(1 + count)]
    seconds = statistics.median(times[1:])
    return {
        "lengths": f"{len(lengths)}x{lengths[0]}", "budget_gb": budget,
        "tokens_per_second": round(ids.numel() / seconds, 1), "step_seconds": round(seconds, 3),
        "first_step_seconds": round(times[0], 2), **bench.peak(),
    }  # fmt: skip


def quantised_folder(smoke: bool) -> Path:
    """A directory with an 8B model in NF4 (a tiny one in a smoke run) and some tokenizer, for what loads from disk.

    In memory-backed storage where there is some; made once. bitsandbytes' own format: 5.7 GB in place of 16.
    """
    import torch
    from transformers import BitsAndBytesConfig

    folder = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    shape, dtype, device = ("tiny", torch.float32, "cpu") if smoke else ("8B", torch.bfloat16, "cuda")
    folder /= f"veneer-bench-stream-{shape}-nf4"
    if (folder / "tokenizer.json").exists():
        return folder
    model, _, _, _ = host_model(SHAPES[shape], "nf4", torch.device(device), dtype)
    config = model.config
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    ).to_dict()
    config.dtype, config.architectures = dtype, [type(model).__name__]
    write(model, config, folder)
    return folder


def write(model, config, folder: Path) -> None:
    """The model's files: 4-bit weights beside their states, as bitsandbytes saves them."""
    from safetensors.torch import save_file
    from stream_disk import some_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data.to("cpu", copy=True)
        state = getattr(parameter, "quant_state", None)
        for key, value in (state.as_dict(packed=True) if state is not None else {}).items():
            tensors[f"{name}.{key}"] = value.cpu().clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    some_tokenizer().save_pretrained(folder)
