"""Minutes of random load on `veneer serve`: mixed adapters, loads, unloads, clients that leave, bad requests.

    python benchmarks/soak_serve.py                              # 20 minutes, SmolLM2-135M on the CPU
    python benchmarks/soak_serve.py --minutes 1 --base DIR       # any base

Afterwards these must hold, or the exit code is 1: every request that was accepted was answered whole; every greedy answer
equals what its adapter answers alone, from the library with transformers' own generation; a name that was loaded anew
never answered with its old weights; refusals are 4xx with a body; nothing runs or waits at the end; resident memory is
flat; SIGTERM ends the process with code 0. Results are written as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import openai
import psutil
import torch
from transformers import GenerationConfig

import veneer
from veneer.base.generate import end_tokens, prompt_ids

ASKED = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea, and then another one about mountains and rivers.",
    "hello",
    "Count from one to five.",
    "Which is larger, seven or twelve? Say why in a few words.",
]
STACKS = {"base:a0*0.5+a1*0.75": (("a0", 0.5), ("a1", 0.75)), "base:a2*-1+a3": (("a2", -1.0), ("a3", 1.0))}
TOKENS = 16
SURE = 1e-3
"""A truth counts only if each token led the next by this much in logits: two right engines may differ by rounding."""
BAD = [
    ({"model": "nobody"}, 404),
    ({"model": "base:a0*x"}, 400),
    ({"temperature": "hot"}, 400),
    ({"max_tokens": 10**6}, 400),
    ({"messages": []}, 400),
    ({"tools": [{"type": "function"}]}, 400),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, 400),
]


def make_adapters(base: str, folder: Path, count: int) -> None:
    """Random adapters of several ranks and targets that change what is answered."""
    for number in range(count):
        model, _ = veneer.load_base(base, device="cpu")
        rank, targets = ((8, "all-linear"), (12, ["q_proj", "v_proj"]), (4, "all-linear"))[number % 3]
        bank = veneer.attach(
            model, veneer.AdapterConfig(rank=rank, alpha=2 * rank, target_modules=targets), seed=number
        )
        generator = torch.Generator().manual_seed(number)
        for name, parameter in bank.parameters("default").items():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
        veneer.save_adapter(model, folder / f"a{number}")


@torch.inference_mode()
def greedy(model, tokenizer, messages) -> tuple[str, float]:
    """(answer by transformers' generation, the smallest lead in logits of a chosen token over the next best)."""
    ids, ends = prompt_ids(tokenizer, messages), end_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    found = model.generate(torch.tensor([ids]), generation_config=config)
    best = torch.cat(found.logits).float().topk(2).values
    text = tokenizer.decode(found.sequences[0, len(ids) :], skip_special_tokens=True)
    return text, float((best[:, 0] - best[:, 1]).min())


def find_truth(base: str, folder: Path, names: list[str]) -> tuple[dict, int]:
    """{(model, question): the answer alone}, and how many were left out as too close to call."""
    model, tokenizer = veneer.load_base(base, device="cpu")
    for name in names:
        veneer.load_adapter(model, folder / name, name=name, trainable=False)
    bank, truth, unsure = veneer.get_bank(model), {}, 0
    who = {"base": {}} | {name: {name: 1.0} for name in names} | {key: dict(stack) for key, stack in STACKS.items()}
    for key, weights in who.items():
        bank.activate(weights or None)
        for question in ASKED:
            text, lead = greedy(model, tokenizer, [{"role": "user", "content": question}])
            if lead >= SURE:
                truth[key, question] = text
            else:
                unsure += 1
    return truth, unsure


@dataclass
class Names:
    """What the changing names mean, over time: spans [from, to, adapter or None] of each."""

    spans: dict[str, list[list]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def _of(self, name: str) -> list[list]:
        return self.spans.setdefault(name, [[0.0, float("inf"), None]])

    def change(self, name: str, adapter: str | None, call: Callable[[], object]) -> None:
        """While `call` changes the meaning the old and the new one are right; afterwards the new one alone."""
        with self.lock:
            old = self._of(name)[-1]
            self._of(name).append([time.monotonic(), float("inf"), adapter])
        call()
        with self.lock:
            old[1] = time.monotonic()

    def meant(self, name: str, begin: float, end: float) -> set[str | None]:
        """Everything that `name` may have meant between two moments."""
        with self.lock:
            return {adapter for start, stop, adapter in self._of(name) if start <= end and stop >= begin}


class Soak:
    def __init__(self, url: str, truth: dict, names: list[str], folder: Path, seed: int) -> None:
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="-", max_retries=0, timeout=300)
        self.truth, self.fixed, self.folder = truth, names, folder
        self.counts, self.wrong, self.lost = Counter(), [], []
        self.names, self.stop, self.seed = Names(), threading.Event(), seed

    def work(self, number: int) -> None:
        """One client: requests at random until it is time."""
        draw = random.Random(self.seed * 1000 + number)
        while not self.stop.is_set():
            kind = draw.choices(["whole", "stream", "leave", "bad", "changing"], [45, 20, 10, 10, 15])[0]
            try:
                getattr(self, kind)(draw)
            except openai.RateLimitError as error:
                self.counts["overloaded"] += 1
                if "retry-after" not in error.response.headers:
                    self.lost.append("429 without Retry-After")
                time.sleep(min(3.0, float(error.response.headers.get("retry-after", 1))) * (0.5 + draw.random()))
            except Exception as error:  # whatever it is, the request is lost
                self.lost.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
            time.sleep(draw.random() * 0.05)

    def _ask(self, model: str, question: str, **more):
        messages = [{"role": "user", "content": question}]
        options = {"messages": messages, "temperature": 0, "max_tokens": TOKENS} | more
        return self.client.chat.completions.create(model=model, **options)

    def _check(self, kind: str, model: str, question: str, text: str, right: set[str]) -> None:
        self.counts[kind] += 1
        if text not in right:
            self.wrong.append(
                {"kind": kind, "model": model, "question": question, "text": text, "right": sorted(right)}
            )

    def whole(self, draw: random.Random) -> None:
        model, question = draw.choice(list(self.truth))
        done = self._ask(model, question)
        self._check("whole", model, question, done.choices[0].message.content, {self.truth[model, question]})

    def stream(self, draw: random.Random) -> None:
        model, question = draw.choice(list(self.truth))
        pieces = list(self._ask(model, question, stream=True))
        if pieces[-1].choices[0].finish_reason not in ("stop", "length"):
            self.lost.append("a stream ended early")
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        self._check("stream", model, question, text, {self.truth[model, question]})

    def leave(self, draw: random.Random) -> None:
        model, question = draw.choice(list(self.truth))
        found = self._ask(model, question, stream=True, max_tokens=4 * TOKENS)
        for _ in zip(range(draw.randrange(6)), found):
            pass
        found.response.close()
        self.counts["left"] += 1

    def bad(self, draw: random.Random) -> None:
        change, status = draw.choice(BAD)
        try:
            self._ask(**{"model": "base", "question": "hello"} | change)
            self.lost.append(f"{list(change)} was accepted")
        except openai.APIStatusError as error:
            if error.status_code == 429:
                raise
            if error.status_code != status or "message" not in (error.body or {}):
                self.lost.append(f"{list(change)}: {error.status_code} instead of {status}")
            self.counts["bad"] += 1

    def changing(self, draw: random.Random) -> None:
        model, question = f"changing-{draw.randrange(3)}", draw.choice(ASKED)
        begin = time.monotonic()
        try:
            text = self._ask(model, question).choices[0].message.content
        except openai.NotFoundError:
            text = None
        meant = self.names.meant(model, begin, time.monotonic())
        right = {None if one is None else self.truth.get((one, question), ...) for one in meant}
        if ... not in right:  # else one of them was too close to call
            self.counts["changing"] += 1
            if text not in right:
                self.wrong.append({"kind": "changing", "model": model, "question": question, "text": text})

    def change(self) -> None:
        """Loads, reloads under the same name and unloads, one after another."""
        draw = random.Random(self.seed)
        while not self.stop.is_set():
            name, adapter = f"changing-{draw.randrange(3)}", draw.choice([*self.fixed, None])
            body = {"lora_name": name}
            if adapter is not None:
                body |= {"lora_path": str(self.folder / adapter), "load_inplace": True}
            elif self.names.meant(name, time.monotonic(), time.monotonic()) == {None}:
                continue
            path = "/load_lora_adapter" if adapter else "/unload_lora_adapter"
            try:
                self.names.change(name, adapter, partial(self.client.post, path, cast_to=str, body=body))
                self.counts["loads" if adapter else "unloads"] += 1
            except Exception as error:
                self.lost.append(f"change {name} to {adapter}: {type(error).__name__}: {str(error)[:200]}")
            time.sleep(draw.random() * 1.5)


def start(base: str, folder: Path, options: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """The server as a user starts it, small enough for queue and tiers to be at work."""
    code = f"import torch; torch.set_num_threads({options.threads})\nfrom veneer.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "serve", base, "--adapters", str(folder), "--port", "0", "--name", "soaked"]
    command += ["--slots", "6", "--queue", "4", "--context", "512", "--host-adapters", "3", "--device-adapters", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"VENEER_API_KEY": ""})
    said = ""
    while not (found := re.search(r"at (http://127\.0\.0\.1:\d+)", said)):
        line = process.stderr.readline()
        if not line:
            raise SystemExit(f"the server did not start: {said}")
        said += line
    threading.Thread(
        target=lambda: [print(line, end="", file=sys.stderr) for line in process.stderr], daemon=True
    ).start()
    return process, found[1]


def verdict(record: dict, soak: Soak) -> dict[str, bool]:
    """What must hold, by name."""
    memory = [one["rss_mib"] for one in record["memory"]]
    quarter = max(1, len(memory) // 4)
    early, late = statistics.median(memory[quarter : 2 * quarter] or memory), statistics.median(memory[-quarter:])
    record["rss_mib"] = {"second_quarter": round(early, 1), "last_quarter": round(late, 1), "peak": max(memory)}
    return {
        "no accepted request lost": not soak.lost,
        "every answer equals its adapter's alone": not soak.wrong,
        "memory is flat (2 % or 16 MiB)": late - early <= max(16, 0.02 * early),
        "nothing runs or waits at the end": record["at_end"] == {"running": 0, "waiting": 0},
        "SIGTERM ends it with code 0": record["exit_code"] == 0,
    }


def numbers(soak: Soak) -> dict[str, int]:
    text = soak.client.get("/../metrics", cast_to=str)
    return {key: int(float(re.search(rf"^veneer_{key} (\S+)", text, re.M)[1])) for key in ("running", "waiting")}


def run(options: argparse.Namespace, folder: Path) -> bool:
    names = [f"a{number}" for number in range(options.adapters)]
    torch.set_num_threads(options.threads)
    make_adapters(options.base, folder, options.adapters)
    truth, unsure = find_truth(options.base, folder, names)
    process, url = start(options.base, folder, options)
    soak = Soak(url, truth, names, folder, options.seed)
    record = {"base": Path(options.base).name, "minutes": options.minutes, "clients": options.clients, "memory": []}
    record |= {"adapters": options.adapters, "truths": len(truth), "too_close_to_call": unsure}
    threads = [threading.Thread(target=soak.work, args=(n,), daemon=True) for n in range(options.clients)]
    threads.append(threading.Thread(target=soak.change, daemon=True))
    began, server = time.monotonic(), psutil.Process(process.pid)
    for thread in threads:
        thread.start()
    while (passed := time.monotonic() - began) < 60 * options.minutes and process.poll() is None:
        time.sleep(min(options.every, 60 * options.minutes - passed))
        record["memory"].append({"s": round(passed), "rss_mib": round(server.memory_info().rss / 2**20, 1)})
        record |= {"counts": dict(soak.counts), "lost": soak.lost[:50], "wrong": soak.wrong[:50]}
        options.out and options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{passed:6.0f} s  {record['memory'][-1]['rss_mib']:8.1f} MiB  {dict(soak.counts)}", flush=True)
    soak.stop.set()
    for thread in threads:
        thread.join(120)
    for _ in range(100):
        record["at_end"] = numbers(soak)
        if not any(record["at_end"].values()):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    record["exit_code"] = process.wait(60)
    record |= {"counts": dict(soak.counts), "lost": soak.lost[:50], "wrong": soak.wrong[:50]}
    record["holds"] = verdict(record, soak)
    options.out and options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("counts", "rss_mib", "lost", "wrong", "holds")}, indent=1))
    return all(record["holds"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks at the memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        held = run(options, Path(folder))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
