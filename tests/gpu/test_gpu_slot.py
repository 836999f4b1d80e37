"""A slot on a GPU: a captured CUDA graph goes on with the factors that are swapped in."""

import pytest
import torch
from formats.adapters import saved
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.adapter.slot import prepare, swap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def captured(module, x):
    """A CUDA graph of module(x), and the tensor that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    return graph, y


def test_a_cuda_graph_gives_the_new_adapters_output_after_a_swap_from_files(tmp_path):
    targets = ["gate_proj", "up_proj", "down_proj"]
    options = {"one": {"rank": 2, "alpha": 5}, "two": {"rank": 7, "alpha": 3, "rslora": True}}
    paths = {
        n: saved(tmp_path / n, tiny_llama(), i, target_modules=targets, **o) for i, (n, o) in enumerate(options.items())
    }
    model = tiny_llama().cuda()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, target_modules=targets), name="slot")
    veneer.reserve(bank, "slot", 8)
    x = torch.randn(5, 36, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        graph, y = captured(model.model.layers[0].mlp, x)
        for name in ("one", "two", "one"):
            veneer.swap_adapter(model, paths[name], name="slot")
            graph.replay()
            truth = tiny_llama().cuda()
            veneer.load_adapter(truth, paths[name])
            torch.testing.assert_close(y, truth.model.layers[0].mlp(x), rtol=1e-3, atol=1e-4)


def test_a_cuda_graph_goes_on_after_a_swap():
    model = nn.Sequential(nn.Linear(67, 41), nn.ReLU(), nn.Linear(41, 29)).cuda()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, target_modules=["0", "2"]), name="slot", seed=0)
    veneer.reserve(bank, "slot", 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 67, generator=generator).cuda()
    others = [
        {
            name: (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 0.3)
            for name, d_in, d_out in (("0", 67, 41), ("2", 41, 29))
        }
        for rank in (8, 2)
    ]
    with torch.no_grad():
        graph, y = captured(model, x)
        for source in others:
            ready = prepare(bank, "slot", source)
            assert ready.is_pinned()
            swap(bank, "slot", ready)
            graph.replay()
            wanted = x
            for i, layer in enumerate((model[0].base_layer, model[2].base_layer)):
                lora_A, lora_B, scaling = source[str(2 * i)]
                wanted = layer(wanted) + scaling * wanted @ lora_A.cuda().t() @ lora_B.cuda().t()
                wanted = wanted.relu() if i == 0 else wanted
            torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)
