"""Reduce a saved adapter's rank by SVD, and say what that loses: for the rank-2r files of PiSSA and its kin above all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.adapter.math import alpha_of, scaling
from veneer.adapter.targets import matches_pattern
from veneer.errors import AdapterFormatError, ConfigError
from veneer.files import new_directory, read_object, write_text
from veneer.formats.peft import CONFIG, PROVENANCE, TENSORS, read_config, read_tensors
from veneer.formats.peft_config import as_patterns
from veneer.formats.peft_tensors import PREFIX

ENDS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class Reduction:
    """What `reduce_adapter` wrote, and its errors: ‖ΔW − ΔW_r‖/‖ΔW‖ (Frobenius) of each module and of all together."""

    path: Path
    errors: dict[str, float]
    total: float


def truncate(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of rank r for B·A (Eckart and Young 1936), without the dense product.

    lora_A (R, d_in), lora_B (d_out, R) → (r, d_in), (d_out, r), ‖B·A − B'·A'‖², ‖B·A‖². In float64.
    """
    q_out, r_out = torch.linalg.qr(lora_B.double())
    q_in, r_in = torch.linalg.qr(lora_A.double().t())
    u, s, vh = torch.linalg.svd(r_out @ r_in.t())
    root, rest, whole = s[:rank].sqrt(), s[rank:].square().sum(), s.square().sum()
    return root[:, None] * (vh[:rank] @ q_in.t()), (q_out @ u[:, :rank]) * root, float(rest), float(whole)


def reduce_adapter(adapter: str | Path, out: str | Path, rank: int) -> Reduction:
    """Write a saved adapter with at most `rank` in each module and the same scalings; no base is needed.

    Linears, convolutions and embeddings; whole modules, biases and trained tokens are kept as they are. Raises
    `AdapterFormatError` (DoRA, target_parameters, attention modules and grouped convolutions are not reduced) and
    `ConfigError` (`out` is taken, a rank below 1).
    """
    path, out = Path(adapter), Path(out)
    fields, tensors = read_config(path), read_tensors(path)
    if rank < 1 or out.exists():
        raise ConfigError(f"{out} exists: choose another place" if out.exists() else "rank must be at least 1")
    for key in ("use_dora", "target_parameters"):
        if fields.get(key):
            raise AdapterFormatError(f"{path}: adapters with {key} are not reduced")
    rslora, written, norms = bool(fields.get("use_rslora")), {}, {}
    for key in [key for key in tensors if key.endswith(tuple(ENDS))]:
        end = next(end for end in ENDS if key.endswith(end))
        name, other = key.removesuffix(f".{end}"), key.removesuffix(end) + ENDS[end]
        lora_A, lora_B = tensors[key], tensors[other]
        old = lora_A.shape[0]
        if ".base_layer" in name or lora_B.shape[1] != old:
            raise AdapterFormatError(f"{path}: {name} is an attention or a grouped convolution, which is not reduced")
        alpha = next(
            (a for p, a in (fields.get("alpha_pattern") or {}).items() if matches_pattern(p, name)),
            fields["lora_alpha"],
        )
        flat_A, flat_B = lora_A.flatten(1), lora_B.flatten(1)
        s, new = scaling(old, alpha, rslora), min(rank, old, flat_A.shape[1], len(flat_B))
        written[name] = new, alpha_of(new, s, rslora)
        small_A, small_B, lost, whole = truncate(flat_A, flat_B, new)
        norms[name] = s * s * lost, s * s * whole
        tensors[key] = small_A.to(lora_A.dtype).reshape(new, *lora_A.shape[1:]).contiguous()
        tensors[other] = small_B.to(lora_B.dtype).reshape(len(lora_B), new, *lora_B.shape[2:]).contiguous()
    if not written:
        raise AdapterFormatError(f"{path}: holds no low-rank factors to reduce")
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    fields |= dict(zip(keys, as_patterns(written), strict=True))
    with new_directory(out) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        write_text(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        save_file({PREFIX + key: value for key, value in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
        if (folder / PROVENANCE).exists():
            record = read_object(folder / PROVENANCE)
            write_text(folder / PROVENANCE, json.dumps(record | {"reduced_to_rank": rank}, indent=2) + "\n")
    share = {name: (lost / whole) ** 0.5 if whole else 0.0 for name, (lost, whole) in norms.items()}
    lost, whole = (sum(pair[i] for pair in norms.values()) for i in (0, 1))
    return Reduction(out, share, (lost / whole) ** 0.5 if whole else 0.0)
