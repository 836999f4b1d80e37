"""Devices as tensors name them, and copies to one that nothing waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def indexed(device: torch.device | str) -> torch.device:
    """A device with its index, as tensors there have it: "cuda" is the current GPU, and differs from "cuda:0" by ==."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device; to a GPU through pinned memory, so that the host does not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
