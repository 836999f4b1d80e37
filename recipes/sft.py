"""Train an adapter with the library alone, without run directory, resume or command line: the loop laid flat.

python recipes/sft.py [STEPS]
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import veneer
from veneer.config import OptimConfig
from veneer.training.forward import RowModel
from veneer.training.optim import lr_factor, make_optimizer, set_lr


def main(steps: int = 20, batch_size: int = 16, lr: float = 1e-3) -> None:
    torch.manual_seed(0)
    model, tokenizer = veneer.load_base("smollm2-135m-instruct")
    bank = veneer.attach(model, veneer.AdapterConfig(rank=16, alpha=32), seed=0)
    parameters = bank.parameters("default")
    optimizer = make_optimizer(parameters, OptimConfig(lr=lr))

    data = veneer.prepare(veneer.read_examples("bundled"), tokenizer)
    order = np.random.default_rng(0).permutation(len(data))
    rows_of = RowModel(model)
    rows_of.check([data[i] for i in range(8)])  # packed rows give the model's own loss, or packing is switched off

    model.train()
    with rows_of.attention():
        for step in range(1, steps + 1):
            set_lr(optimizer, lr * lr_factor(step, steps, 1, "cosine"))
            batch = [data[int(i)] for i in order[(step - 1) * batch_size : step * batch_size]]
            rows = rows_of.pack(batch, max_tokens=2048, share_prefix=True)
            supervised = sum(len(row.targets) for row in rows)
            total = 0.0
            for row in rows:
                with rows_of.row(row) as loss:
                    (loss / supervised).backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {total / supervised:.3f}")

    model.eval()
    path = veneer.save_adapter(model, "adapter-sft")
    example = next(iter(veneer.read_examples("bundled:heldout")))
    prompt = [{"role": m.role, "content": m.content} for m in example.messages[:-1]]
    print(prompt[-1]["content"], "→", veneer.generate(model, tokenizer, [prompt])[0].text)
    print(f"saved {path}")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]))
