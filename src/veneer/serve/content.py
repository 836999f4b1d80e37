"""One adapter's weights as they are served, whatever name points to them: checked, hashed, packed into one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import AdapterFormatError
from veneer.formats.adapter_file import AdapterFile, Factors, read_adapter
from veneer.formats.peft import CONFIG, PROVENANCE, TENSORS
from veneer.serve.errors import AdapterRefused
from veneer.serve.stored import Stored, stamps_of

CONFIG_BYTES = 4 << 20
"""More than any adapter_config.json or veneer.json needs."""


@dataclass(eq=False)
class Content:
    """One adapter's factors. `shapes` maps target → (d_in, rank, d_out).

    `host` is one flat tensor, target after target A (rank, d_in) and then s·B (d_out, rank) in the model's dtype, or
    None where they are on disk alone. On a GPU, which transposes in no time, these are as in the files, and pinned;
    elsewhere (`turned`) transposed, as the pool has them. `users` counts requests in flight, `named` says whether a name
    points here still, `stored` where they can be read again from files that are known to be the same.
    """

    hash: str
    path: Path
    shapes: dict[str, tuple[int, int, int]]
    scalings: dict[str, float]
    itemsize: int
    turned: bool
    host: Tensor | None = None
    stored: Stored | None = None
    pinned: bool = False
    users: int = 0
    named: bool = True
    used: float = 0.0
    on_device: bool = False
    loading: Future | None = None

    @property
    def rank(self) -> int:
        """The largest rank of its targets."""
        return max(rank for _, rank, _ in self.shapes.values())

    @property
    def bytes(self) -> int:
        """Size of its factors in the model's dtype."""
        return sum((d_in + d_out) * rank for d_in, rank, d_out in self.shapes.values()) * self.itemsize

    @property
    def tier(self) -> str:
        """The fastest memory that holds it: device, host or disk."""
        return "device" if self.on_device else "disk" if self.host is None else "host"

    def factors(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views of (Aᵀ, s·Bᵀ) by target into `host`, or into a copy of it elsewhere."""
        return self._views(flat, self.turned)

    def pack(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """What `host` is, from all A (rank, d_in) and B (d_out, rank) as they are stored; `flat` may be overwritten."""
        flat = flat if flat.dtype == dtype else flat.to(torch.promote_types(dtype, torch.float32))
        stored = self._views(flat, False)
        for path, (_, b) in stored.items():
            if self.scalings[path] != 1:
                b.mul_(self.scalings[path])
        if not self.turned:
            ready = flat.dtype == dtype and flat.is_pinned()
            return flat if ready else torch.empty_like(flat, dtype=dtype, pin_memory=True).copy_(flat)
        host = torch.empty_like(flat, dtype=dtype)
        for path, pair in self._views(host, True).items():
            for new, old in zip(pair, stored[path]):
                new.copy_(old)
        return host

    def _views(self, flat: Tensor, turned: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """(Aᵀ, Bᵀ) by target, of a tensor that holds them so (`turned`) or as A and B."""
        found, at = {}, 0
        for path, (d_in, rank, d_out) in self.shapes.items():
            middle, end = at + d_in * rank, at + (d_in + d_out) * rank
            a, b = flat[at:middle], flat[middle:end]
            if turned:
                found[path] = a.view(d_in, rank), b.view(rank, d_out)
            else:
                found[path] = a.view(rank, d_in).t(), b.view(d_out, rank).t()
            at = end
        return found


def check_files(path: Path, allowed: list[Path], max_bytes: int) -> None:
    """Raise `AdapterRefused` for files outside the allowed folders (links are followed) or too large."""
    for name, most in ((CONFIG, CONFIG_BYTES), (PROVENANCE, CONFIG_BYTES), (TENSORS, max_bytes)):
        file = (path / name).resolve()
        if not file.exists():
            continue  # what must be there is missed when it is read
        if not file.is_file() or not any(file.is_relative_to(folder) for folder in allowed):
            raise AdapterRefused(f"{name} lies outside the folders that adapters may be loaded from")
        if file.stat().st_size > most:
            raise AdapterRefused(f"{name} has {file.stat().st_size:,} bytes, and {most:,} are allowed")


def read_content(
    path: Path, targets: Mapping[str, tuple[int, int]], dtype: torch.dtype, pin: bool, max_rank: int
) -> Content:
    """Read an adapter directory for linears `targets` (name → (d_out, d_in)).

    Raises `AdapterFormatError` (damaged, does not fit) and `AdapterRefused` (more than lora_A and lora_B on linears, or
    a rank above `max_rank`).
    """
    stamps = stamps_of(path)
    adapter = read_adapter(path, mapped=False)  # what is hashed must be what is packed, whatever happens to the files
    _check_plain(adapter)
    for name, f in adapter.layers.items():
        _check_fits(name, f, targets, max_rank)
    layers = dict(sorted(adapter.layers.items()))  # one order for all files of a content
    shapes = {name: (f.lora_A.shape[1], f.rank, f.lora_B.shape[0]) for name, f in layers.items()}
    scalings = {name: f.scaling for name, f in layers.items()}
    content = Content(_hash(adapter), path, shapes, scalings, dtype.itemsize, not pin)
    parts = [factor.flatten() for f in layers.values() for factor in (f.lora_A, f.lora_B)]
    flat = torch.cat(parts)
    content.stored = Stored.find(path, stamps, list(shapes), flat) if stamps else None
    content.host = content.pack(flat, dtype)
    if not content.host.isfinite().all():
        raise AdapterFormatError(f"the adapter has values that {dtype} cannot hold: serve the base in another dtype")
    return content


def read_again(content: Content, dtype: torch.dtype) -> Tensor | None:
    """A content's `host` from its files without hashing them; None if they are not known to be the same (`stored`)."""
    stored = content.stored
    if stored is None:
        return None
    ready = stored.dtype == dtype and not content.turned
    flat = torch.empty(content.bytes // content.itemsize, dtype=stored.dtype, pin_memory=ready)
    return content.pack(flat, dtype) if stored.read(content.path, flat) else None


def _check_plain(adapter: AdapterFile) -> None:
    """Rows of one batch can share no more than products of factors."""
    fields = adapter.fields
    if fields.get("use_dora"):
        what = "is a DoRA adapter"
    elif fields.get("alora_invocation_tokens"):
        what = "acts from its invocation tokens on (aLoRA)"
    elif fields.get("modules_to_save"):
        what = f"brings whole modules ({', '.join(map(str, fields['modules_to_save']))})"
    elif adapter.rest:
        what = f"holds more than lora_A and lora_B ({next(iter(adapter.rest))})"
    elif any(f.embedding for f in adapter.layers.values()):
        what = "adapts an embedding"
    else:
        return
    raise AdapterRefused(f"the adapter {what}, which rows of one batch cannot share: merge it, or train plain LoRA")


def _check_fits(name: str, f: Factors, targets: Mapping[str, tuple[int, int]], max_rank: int) -> None:
    if name not in targets:
        raise AdapterRefused(f"{name} is no linear layer of this base")
    d_out, d_in = targets[name]
    if f.experts != 1 or tuple(f.lora_A.shape) != (f.rank, d_in) or tuple(f.lora_B.shape) != (d_out, f.rank):
        raise AdapterFormatError(
            f"{name} has factors {tuple(f.lora_A.shape)} and {tuple(f.lora_B.shape)}; the base's layer is {d_out}×{d_in}"
        )
    if not 0 < f.rank <= max_rank:
        raise AdapterRefused(f"{name} has rank {f.rank}, and {max_rank} is the most that is served here (--max-rank)")


def _hash(adapter: AdapterFile) -> str:
    """SHA-256 over what the factors mean: targets, shapes, scalings and values, not names of files or adapters."""
    digest = hashlib.sha256()
    for name in sorted(adapter.layers):
        f = adapter.layers[name]
        digest.update(
            f"{name} {f.lora_A.dtype} {tuple(f.lora_A.shape)} {tuple(f.lora_B.shape)} {f.scaling!r}\n".encode()
        )
        for factor in (f.lora_A, f.lora_B):
            digest.update(factor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
