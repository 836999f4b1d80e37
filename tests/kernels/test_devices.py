"""A device that a user names without an index is the one that tensors there name with it."""

import torch

from conftest import tiny_llama
from veneer.kernels.devices import indexed, sent
from veneer.training.accelerate import Accelerated
from veneer.training.forward import RowModel
from veneer.training.store import Host


def test_devices_have_their_index_wherever_they_enter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    wanted = torch.device("cuda", 3)
    assert indexed("cuda") == wanted and indexed("cuda:1") == torch.device("cuda", 1) and indexed("cpu").index is None
    model, cuda = tiny_llama(), torch.device("cuda")
    assert Host(cuda).device == Host(cuda).stream == wanted
    fast = Accelerated(model, device=cuda, compile=False)
    assert fast.device == fast.store.host.device == wanted
    assert RowModel(model, place=(cuda, torch.bfloat16)).device == wanted


def test_a_streamed_base_has_the_index(monkeypatch):
    from veneer.base import stream

    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(stream, "Conveyor", lambda blocks, device, *rest: made.append(device))
    monkeypatch.setattr(stream.StreamedBase, "settle", lambda self: None)
    model = tiny_llama()
    base = stream.StreamedBase(model, stream.frozen_blocks(model), [], [], torch.device("cuda"), torch.float32)
    assert {base.device, *made} == {torch.device("cuda", 3)}


def test_what_is_sent_arrives():
    x = torch.arange(5)
    assert torch.equal(sent(x, torch.device("cpu")), x)
