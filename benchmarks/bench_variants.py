"""What each LoRA variant costs on this CPU: parameters, memory kept for the backward pass, and time of a step.

    python benchmarks/bench_variants.py [--rounds 12] [--tokens 512] [--out benchmarks/results/variants.json]

One random Llama (6 blocks, width 512) carries an adapter of each variant, and they take turns. A step is forward,
backward and AdamW; its time is the CPU time of the one thread, the least of all rounds, so that other work on the
machine counts as little as may be.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import veneer
from veneer.config import AdaLoraConfig, OptimConfig
from veneer.training.adalora import AdaLora
from veneer.training.optim import correct_lora_fa, make_optimizer

RANK = 16
INVOCATION = [7, 8, 9]
VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
    "LoRA+": {},
    "LoRA-FA": {"lora_fa": True},
    "AdaLoRA": {"rank": 24},
    "aLoRA": {"invocation": INVOCATION},
    "lora_bias": {"lora_bias": True},
}


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Variant:
    """One adapter of the model, and how it is trained."""

    def __init__(self, model, label: str) -> None:
        self.model, self.name = model, label.replace("+", "_plus").replace("-", "_")
        config = veneer.AdapterConfig(**{"rank": RANK} | VARIANTS[label])
        self.bank = veneer.attach(model, config, name=self.name, seed=0)
        self.fa, self.adalora, self.steps = config.lora_fa, None, 0
        if label == "AdaLoRA":
            self.adalora = AdaLora(self.bank, self.name, AdaLoraConfig(target_rank=RANK), total=10**6)
        parameters = self.adalora.parameters() if self.adalora else self.bank.parameters(self.name)
        ratio = 16 if label == "LoRA+" else 1
        self.optimizer = make_optimizer(parameters, OptimConfig(lr=1e-4, lora_plus_ratio=ratio))
        self.trained = sum(p.numel() for p in parameters.values() if p.requires_grad)

    def step(self, ids) -> float:
        self.bank.activate(self.name)
        began = time.process_time()
        self.optimizer.zero_grad()
        self.model(input_ids=ids, labels=ids).loss.backward()
        if self.adalora:
            self.adalora.backward()
        if self.fa:
            correct_lora_fa(self.bank, self.name)
        self.optimizer.step()
        self.steps += 1
        if self.adalora:
            self.adalora.step(self.steps)
        return time.process_time() - began

    def kept(self, ids) -> int:
        """Bytes that the forward pass keeps for the backward pass, besides parameters, each storage once."""
        frozen = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.bank.activate(self.name)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = self.model(input_ids=ids, labels=ids).loss
        del loss
        return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    ids = torch.randint(10, 4096, (1, args.tokens))
    ids[0, args.tokens // 2 : args.tokens // 2 + 3] = torch.tensor(INVOCATION)
    variants = {label: Variant(model, label) for label in VARIANTS}
    times = {label: [] for label in VARIANTS}
    for turn in range(args.rounds + 1):
        for label, variant in variants.items():
            seconds = variant.step(ids)
            if turn:  # the first one warms up
                times[label].append(seconds)
    rows = {
        label: {
            "trained_parameters": variant.trained,
            "kept_mib": variant.kept(ids) / 2**20,
            "step_ms": 1000 * min(times[label]),
            "time_ratio": min(times[label]) / min(times["LoRA"]),
        }
        for label, variant in variants.items()
    }
    print("| variant | trained parameters | kept for backward | step | against LoRA |\n|---|---|---|---|---|")
    for label, row in rows.items():
        cells = f"{row['trained_parameters']:,} | {row['kept_mib']:.0f} MiB | {row['step_ms']:.0f} ms"
        print(f"| {label} | {cells} | {row['time_ratio']:.2f}× |")
    if args.out:
        record = {"rows": rows, "tokens": args.tokens, "torch": torch.__version__}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
