"""Which runner a machine is trusted with: kernels, and the stream beside the base, are tried before they serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from veneer.kernels import served
from veneer.kernels.served_check import RANK, Shapes, sound
from veneer.serve.pool import Stack
from veneer.serve.registry import Registry
from veneer.serve.runner import Runner, head_sizes

KEPT: list[torch.cuda.CUDAGraph] = []
"""Graphs of trials: a graph that goes takes a memory pool and its stream's cuBLAS workspace along, beside a server's."""


def runner_for(registry: Registry) -> type[Runner]:
    """Captured graphs where there is a GPU whose triton kernels compute what they should, plain torch elsewhere."""
    if registry.device.type != "cuda" or find_spec("triton") is None:
        return Runner
    from veneer.serve import static
    from veneer.serve.graphs import GraphRunner

    cache = registry.model.get_input_embeddings().weight.dtype
    if not sound(registry.device, registry.dtype, shapes_of(registry), cache):
        warnings.warn("the serving kernels are wrong on this GPU: plain torch serves, slower", stacklevel=3)
        return Runner
    if static.OVERLAP and not overlap_holds(registry.device, registry.dtype):
        static.OVERLAP = False
        warnings.warn("a second stream gives other results on this GPU: serving uses one, slower", stacklevel=3)
    return GraphRunner


def shapes_of(registry: Registry) -> Shapes:
    """The model's own: its heads, and its widest inputs with the narrowest linears that read them."""
    outs: dict[int, set[int]] = {}
    for d_out, d_in in registry.targets.values():
        outs.setdefault(d_in, set()).add(d_out)
    linears = tuple((d_in, tuple(sorted(outs[d_in])[:3])) for d_in in sorted(outs)[-3:])
    queries, keys, width = head_sizes(registry.model.config.get_text_config())
    return Shapes(linears, (min(keys, 2), queries // keys, width))


def overlap_holds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether shrinks beside the base's products change nothing, captured and replayed on new numbers.

    Layers follow each other and let go of what they made at once, so that memory reused too soon would be seen.
    """
    from veneer.serve.static import Tiles

    draw, rows, width = torch.Generator().manual_seed(0), served.ROWS, 512
    random = lambda *shape: torch.randn(*shape, generator=draw).to(device, dtype)  # noqa: E731
    layers = [
        (random(width, width), Stack(random(2, width, RANK), [random(2, RANK, width)]), random(width, width))
        for _ in range(8)
    ]
    table = torch.tensor(served.tile_rows([[n % 2] for n in range(rows)], 1)).view(1, rows, 1 + served.ROWS)
    tiles, x = Tiles(table.to(device), torch.ones(rows, 1, device=device)), random(rows, width)

    def chain(shrink: Callable, expand: Callable) -> Tensor:
        y = x
        for one, stack, other in layers:
            hidden = shrink(y, stack)
            z = y @ one @ other / width
            expand(hidden, stack, [z])
            y = z / z.float().square().mean().sqrt().to(dtype)
        return y

    def plainly() -> Tensor:
        return chain(
            lambda y, stack: served.shrink(y, stack.A, tiles.tiles),
            lambda h, stack, ys: served.expand(h, stack.B, tiles.tiles, tiles.weights, ys),
        )

    try:
        run = captured(lambda: chain(tiles.shrink, tiles.expand), device)
        differences = []
        for _ in range(4):
            x.copy_(random(rows, width))
            wanted = plainly().float()
            differences.append((run().float() - wanted).abs().max() / wanted.abs().max())
        return float(torch.stack(differences).max()) <= (1e-3 if dtype == torch.float32 else 5e-2)
    except Exception:  # noqa: BLE001 one stream serves as well
        return False


def captured(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that replays a CUDA graph of another and returns its result; the function itself elsewhere."""
    if device.type != "cuda":
        return function
    with torch.cuda.stream(torch.cuda.current_stream(device)):  # which a capture that fails would leave another
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            result = function()
    KEPT.append(graph)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def on(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the thread's own, which triton and captures go by; nothing elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
