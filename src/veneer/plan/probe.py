"""What this machine can do, measured once and kept in Veneer's cache: `veneer bench --calibrate`."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from veneer.base.paths import cache_dir
from veneer.files import write_text
from veneer.plan import constants
from veneer.plan.roofline import Rates

FILE = "rates.json"


def tight_malloc(threshold: int = 1 << 20) -> bool:
    """Let glibc give blocks from this size on back to the system when they are freed; False without glibc.

    It else keeps up to 32 MiB blocks for itself, 10 to 30 % of a step's memory on a CPU; the price is page faults.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(-3, threshold))  # M_MMAP_THRESHOLD
    except (OSError, AttributeError):
        return False


Clock = Callable[[], float]


def matmul_rate(
    device: torch.device, dtype: torch.dtype, seconds: float = 1.0, clock: Clock = time.perf_counter
) -> float:
    """FLOP/s of a large product on random data in this dtype, kept up for some time."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _each(lambda: a @ b, device, seconds, clock=clock)


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.5, clock: Clock = time.perf_counter) -> Rates:
    """The rates of a device, each in about so many seconds of `clock` (time.process_time: of this process's own work)."""
    count = (256 if device.type == "cuda" else 32) << 20
    a, b = torch.empty(count, dtype=torch.uint8, device=device), torch.empty(count, dtype=torch.uint8, device=device)
    bandwidth = 2 * count / _each(lambda: b.copy_(a), device, seconds / 2, clock=clock)
    copy = bandwidth / 2
    if device.type == "cuda":
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        copy = count / _each(lambda: b.copy_(host, non_blocking=True), device, seconds / 2)
    small = torch.zeros(64, device=device)
    call = _each(lambda: small.add_(1), device, seconds / 4, 256, clock)
    products = matmul_rate(device, dtype, seconds, clock)
    return Rates(products, bandwidth, copy, disk_rate(), call, queued=device.type == "cuda")


def _each(
    action: Callable[[], Any], device: torch.device, seconds: float, batch: int = 4, clock: Clock = time.perf_counter
) -> float:
    """Seconds of one action, in the mean of batches for so long."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    action(), wait()
    began, count = clock(), 0
    while (took := clock() - began) < seconds or not count:
        for _ in range(batch):
            action()
        wait()
        count += batch
    return took / count


def disk_rate(count: int = 64 << 20) -> float:
    """Bytes a second read from the disk of Veneer's cache, from a file that is not in memory any more."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache_dir()) as file:
        file.write(os.urandom(1 << 20) * (count >> 20))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(8 << 20):
                pass
        return count / (time.perf_counter() - began)


def device_name(device: torch.device) -> str:
    """The card's name, or of a CPU how many threads torch uses."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.get_num_threads()}"


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_dir() / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(key: str, value: Any) -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    write_text(cache_dir() / FILE, json.dumps(_read() | {key: value}, indent=1) + "\n")


def known(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The rates that were measured here before."""
    try:
        return Rates(**_read()[f"{device_name(device)} {dtype}"])
    except (KeyError, TypeError):
        return None


def calibrate(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure and keep."""
    rates = measure(device, dtype)
    _write(f"{device_name(device)} {dtype}", rates.as_dict())
    return rates


def cached(device: str | torch.device, dtype: str | torch.dtype) -> Rates:
    """The rates of a device here, measured the first time."""
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return known(device, dtype) or calibrate(device, dtype)


def process_bytes() -> float:
    """What this process holds before it has a model, as a step on a CPU will find it."""
    return psutil.Process().memory_info().rss + constants.HOST_KERNELS
