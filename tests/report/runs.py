"""Run directories made up for the tests, in the form that the trainer and `veneer eval` leave them."""

import json
import math
from pathlib import Path

import yaml

from veneer.config import TrainConfig

HOSTILE = """<script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)>'"&amp;{{ 7*7 }}"""

EVAL = {
    "heldout": "receipts-heldout.jsonl",
    "n": 60,
    "base": {"n": 60, "valid_json": 0.1, "exact_match": 0.0, "field_f1": {"amount": 0.3, "date": 0.1}},
    "adapter": {"n": 60, "valid_json": 1.0, "exact_match": 0.85, "field_f1": {"amount": 0.97, "date": 0.95}},
    "samples": [
        {
            "prompt": [
                {"role": "system", "content": "Extract the amount and the date as JSON."},
                {"role": "user", "content": "Bakery Lindt, 3 March 2026, total 12.40 EUR"},
            ],
            "reference": '{"amount": 12.4, "date": "2026-03-03"}',
            "base": "The total amount is 12.40 EUR and the date is 3 March 2026.",
            "adapter": '{"date": "2026-03-03", "amount": 12.40}',
        },
        {
            "prompt": [{"role": "user", "content": "Taxi to the airport on 1 May 2026: 45 EUR " + "and so on " * 60}],
            "reference": '{"amount": 45, "date": "2026-05-01"}',
            "base": HOSTILE,
            "adapter": '{"amount": 45, "date": "2026-01-05"}',
        },
    ],
}
EVAL["base"]["field_f1_mean"], EVAL["adapter"]["field_f1_mean"] = 0.2, 0.96

TARGETS = [
    {"name": name, "modules": 30, "rank": 16, "d_out": d_out, "d_in": d_in, "parameters": 30 * 16 * (d_in + d_out)}
    for name, d_out, d_in in (
        ("q_proj", 576, 576),
        ("k_proj", 192, 576),
        ("v_proj", 192, 576),
        ("down_proj", 576, 1536),
    )
]

PROVENANCE = {
    "veneer": "0.1.0",
    "torch": "2.9.1",
    "transformers": "5.1.0",
    "python": "3.12.3",
    "platform": "Linux x86_64",
    "base": {"name_or_path": "smollm2-135m-instruct", "fingerprint": {"architecture": "Llama", "hash": "ab12" * 16}},
    "data": {
        "train": {
            "hash": "9f" * 32,
            "counts": {
                "examples": 800,
                "tokens": 74213,
                "supervised_tokens": 22817,
                "truncated": 3,
                "dropped": {"no_supervised_token": 2, "bad_row": 1},
            },
        },
        "heldout": {
            "hash": "c4" * 32,
            "counts": {"examples": 60, "tokens": 5402, "supervised_tokens": 1711, "truncated": 0, "dropped": {}},
        },
    },
    "template_hash": "77" * 32,
    "seed": 0,
    "adapter": {
        "trainable_parameters": 4884480,
        "total_parameters": 139399488,
        "share": 0.035,
        "bytes": 19537920,
        "targets": TARGETS,
    },
    "started": "2026-11-03T10:12:44+00:00",
}


def train_records(steps: int) -> list[dict]:
    """Train records for each step and eval records every 50, with losses that fall and wobble."""
    records = []
    for step in range(1, steps + 1):
        loss = 0.3 + 2 * math.exp(-6 * step / steps) + 0.15 * math.sin(7.3 * step) * math.sin(2.1 * step)
        speed = 240 + 25 * math.sin(3.7 * step)
        record = {"type": "train", "step": step, "epoch": step / 50, "loss": loss, "lr": 2e-4 * (1 - step / steps)}
        record |= {"tokens": 1500, "tokens_per_second": speed, "seconds": 1500 / speed, "memory_bytes": 3 * 2**30}
        records.append(record)
        if step % 50 == 0:
            records.append({"type": "eval", "step": step, "loss": loss + 0.1 + step / steps / 10, "best": True})
    return records


def make_run(path: Path, steps: int = 300, evaluation: dict | None = EVAL) -> Path:
    """Write a whole run directory except its checkpoints and adapter."""
    path.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(data={"train": "receipts.jsonl", "heldout": "receipts-heldout.jsonl"}, out=path.name)
    (path / "config.yaml").write_text(config.to_yaml())
    (path / "provenance.json").write_text(json.dumps(PROVENANCE))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in train_records(steps)))
    if evaluation is not None:
        (path / "eval.json").write_text(json.dumps(evaluation))
    return path


def write_yaml(path: Path, values: object) -> None:
    path.write_text(yaml.safe_dump(values))
