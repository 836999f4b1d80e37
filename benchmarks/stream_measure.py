"""What `bench_stream.py` measures with: one model, and steps of it within a memory budget."""

from __future__ import annotations

import gc
import statistics
import time
from functools import partial

from stream_model import SHAPES, host_model


class Bench:
    """One model on the host, and what is measured with it."""

    def __init__(self, shape: str, quant: str | None, smoke: bool, optimizer: str = "adamw", **adapter) -> None:
        import torch

        self.torch, self.smoke = torch, smoke
        torch._dynamo.config.recompile_limit = 64  # several settings are compiled in one process
        self.adapter = {"rank": 16, "alpha": 32} | adapter
        self.kind = "adamw" if smoke else optimizer
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
        self.optimizer = FlatOptimizer(parameters, veneer.OptimConfig(lr=1e-30, optimizer=self.kind))

    def to_device(self, embedding: str = "device") -> None:
        """End streaming: every weight on the device, but the embedding's if that is to stay on the host."""
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
        if embedding == "host":
            from veneer.base.host_embedding import embedding_to_host

            embedding_to_host(self.model)

    def cap(self, gigabytes: float | None) -> None:
        """Let the allocator have no more than this."""
        gc.collect()
        if self.smoke:
            return
        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()
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
        compile: bool = True, warm: bool = True, bound: bool = False, compare: bool = False,
    ) -> dict:  # fmt: skip
        """Measure steps over these sequences, in rows of `row` tokens; streamed unless `to_device` was called.

        `bound`: then one more without the blocks' copies. `compare`: keep the gradient of one more, outside the budget.
        """
        row = max(row, *lengths, 0)
        if self.smoke:
            lengths, row = [max(8, n // 256) for n in lengths], max(8, row // 256)
        self.cap(budget)
        rows_of, fast = self.running(dial, compile)
        packed = self.rows(rows_of, lengths, row)
        step = partial(self.step, rows_of, fast, packed, sum(len(row.targets) for row in packed))
        self.reset()
        with rows_of.attention(), fast:
            began = time.time()
            loss = float(step())
            first = time.time() - began
            times = [self.timed(step) for _ in range(steps if warm else 0)] or [(first, first)]
            peak = self.peak()
            without = self.without_copies(step) if bound else None
            if compare:
                self.cap(None)
                step()
                self.gradient = [flat.grad.clone() for flat in self.optimizer.buffers]
        seconds, host = (statistics.median(t) for t in zip(*times))
        result = {
            "lengths": f"{len(lengths)}x{lengths[0]}", "rows": len(packed), "dial": dial,
            "optimizer": self.kind, "budget_gb": budget,
            "tokens_per_second": round(sum(lengths) / seconds, 1), "step_seconds": round(seconds, 3),
            "host_seconds": round(host, 3), "first_step_seconds": round(first, 2), "loss": round(loss, 5), **peak,
        }  # fmt: skip
        if without:
            result["no_copies_tokens_per_second"] = round(sum(lengths) / without, 1)
            result["share_of_no_copies"] = round(without / seconds, 3)
        if self.base is not None:
            result["resident_blocks"] = len(self.base.conveyor.stay)
        return result

    def running(self, dial: str, compile: bool) -> tuple:
        """(what makes losses of rows, the context in which it is fast)"""
        from veneer.training.accelerate import Accelerated
        from veneer.training.forward import RowModel
        from veneer.training.streamed import StreamedRows

        options = {"modes": dial, "compile": compile and not self.smoke, "note": lambda text: print(text, flush=True)}
        if self.base is None:
            return RowModel(self.model), Accelerated(self.model, **options)
        rows = StreamedRows(self.model, **options)
        return rows, rows

    def step(self, rows_of, fast, packed: list, supervised: int):
        """Gradients of all rows, and an update; the mean loss on the device."""
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
        self.optimizer.step()
        return sum(losses) / supervised

    def timed(self, step) -> tuple[float, float]:
        """Seconds of a step, and of what the host does in it: where both are the same, the device waits for the host."""
        self.sync()
        start = time.time()
        step()
        host = time.time() - start
        self.sync()
        return time.time() - start, host

    def without_copies(self, step) -> float:
        """Seconds of a step whose blocks are computed with whatever is in the buffers."""
        conveyor = self.base.conveyor
        conveyor.fetch = lambda i: None
        try:
            return self.timed(step)[0]
        finally:
            del conveyor.fetch
            conveyor.holds = [None] * len(conveyor.holds)

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
        retries = self.torch.cuda.memory_stats()["num_alloc_retries"]
        return {
            "peak_gb": round(allocated / 1e9, 3), "reserved_gb": round(reserved / 1e9, 3), "allocator_retries": retries
        }  # fmt: skip

    def difference(self, other: list) -> float:
        """The largest relative difference of a flat gradient to another run's."""
        pairs = zip(self.gradient, other, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)
