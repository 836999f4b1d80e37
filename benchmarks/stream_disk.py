"""`veneer train --stream disk` on an 8B shape on a CPU, for `bench_stream.py`, and the memory of its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

from stream_model import SHAPES
from stream_record import Record


def write_8b(folder: Path) -> None:
    """An 8B checkpoint of random bfloat16 weights in shards, and some tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

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
    some_tokenizer().save_pretrained(folder)


def some_tokenizer():
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["a b c"], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


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
