"""A trial of a served block's kernels: random rows through each of them, and through its twin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from veneer.kernels import served, served_attention, served_block, served_block_twins, served_prompts
from veneer.kernels.served import Table
from veneer.kernels.served_block_twins import Update

PLACES = 4
KERNELS = SimpleNamespace(
    **vars(served_block), attend_parts=served_attention.attend_parts, gather=served_attention.gather
)
TWINS = SimpleNamespace(
    **vars(served_block_twins), attend_parts=served_attention.attend_parts_twin, gather=served_attention.gather_twin
)


def table_of(places: list[int], size: int, device: torch.device | str) -> Table:
    """A table of rows with these places (-1 for none) in tiles of `size`, with random weights."""
    rows = [[] if place < 0 else [place] for place in places]
    if size == served_prompts.ROWS:
        runs = [[n for n, _ in run] for _, run in groupby(enumerate(places), lambda pair: pair[1])]
        tiles = served_prompts.use_tiles([(run[0], run[-1] + 1, rows[run[0]]) for run in runs], 1, len(rows))[0]
    else:
        tiles = torch.tensor(served.tile_rows(rows, 1, size)).view(len(rows), 1 + size)
    weights = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(3)) + 0.5
    return Table(tiles.to(device), weights.to(device))


class Trial:
    """Rows, some of them without an adapter, in tiles of `size`, and factors of a rank, all random.

    D is the width of the residual stream, I of the gated activation, `heads` are (key heads, queries of each, width), C
    is the context; `norms`: whether q and k are normed by head. Tried is what a server of adapters for all linears and of
    the base runs: with them, and without; `full` tries everything with and without everything else.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str, size: int, *, rows: int = 21, rank: int = 16, D: int = 84,
        I: int = 136, heads: tuple[int, int, int] = (2, 3, 12), C: int = 70, norms: bool = False,
        full: bool = False,
    ) -> None:  # fmt: skip # noqa: E741
        self.draw, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device
        self.rows, self.rank, self.D, self.I, (self.K, self.G, self.E), self.C = rows, rank, D, I, heads, C
        self.norms, self.full = norms, full
        self.places = torch.randint(-1, PLACES, (rows,), generator=self.draw).tolist()
        self.places[:3], self.places[-1] = [1, 1, 1], -1
        self.table = table_of(self.places, size, device)

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(what it is, a kernel's output, its twin's) of every kernel, with and without adapters."""
        for name, run in (*self._norms(), *self._rotations(), *self._attentions(), *self._gates()):
            for found, wanted in zip(run(KERNELS), run(TWINS), strict=True):
                yield name, found, wanted

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (scale * torch.randn(*shape, generator=self.draw)).to(self.device, self.dtype)

    def factors(self, d_in: int, *d_outs: int) -> tuple[Tensor, list[Tensor]]:
        """A (P, d_in, n·R) and B's (P, R, d_out)."""
        A = self.random(PLACES, d_in, len(d_outs) * self.rank, scale=d_in**-0.5)
        return A, [self.random(PLACES, self.rank, d_out, scale=self.rank**-0.5) for d_out in d_outs]

    def update(self, parts: int, *d_outs: int) -> Update:
        """h in so many parts, and B's."""
        hidden = torch.randn(parts, self.rows, len(d_outs) * self.rank, generator=self.draw).to(self.device)
        return Update(hidden, self.factors(8, *d_outs)[1])

    def _norms(self):
        x, y, weight = self.random(self.rows, self.D), self.random(self.rows, self.D), self.random(self.D)
        o, down = (self.update(parts, self.D) for parts in (self.K * self.G, -(-self.I // served_block.GATED)))
        qkv, gated = (self.factors(self.D, *[8] * count)[0] for count in (3, 2))

        def add(module: ModuleType, *given) -> list[Tensor]:
            mine, (y, update, A) = x.clone(), given
            parts = module.add(mine, y, update, self.table, weight, A)
            normed, hidden = module.norm(mine, None, weight, 1e-5, parts)
            return [mine, normed, *self._with_adapter(hidden)]

        def norm(module: ModuleType, y: Tensor | None) -> list[Tensor]:
            mine = x.clone()
            return [module.norm(mine, y, weight, 1e-5)[0], mine]

        for given in ((y, o, gated), (y, down, qkv), *([(y, o, None), (None, None, qkv), (y, None, qkv)] * self.full)):
            yield "add", lambda module, given=given: add(module, *given)
        for given in (y, *[None] * self.full):
            yield "norm", lambda module, given=given: norm(module, given)

    def _rotations(self):
        widths = self.K * self.G * self.E, self.K * self.E, self.K * self.E
        qkv, update = self.random(self.rows, sum(widths)).split(widths, 1), self.update(1, *widths)
        turn, norms = [self.random(self.rows, self.E) for _ in range(2)], [self.random(self.E) for _ in range(2)]
        where = self.where()

        def rotate(module: ModuleType, update: Update | None, normed: bool) -> list[Tensor]:
            keys, values = (torch.zeros(self.rows, self.K, self.C, self.E).to(qkv[0]) for _ in range(2))
            options = norms if normed else None, 1e-5, turn
            return [module.rotate(qkv, update, self.table, *options, *where, keys, values), keys, values]

        for normed in (self.norms, *[not self.norms] * self.full):
            for given in (update, None):
                yield "rotate", lambda module, given=given, normed=normed: rotate(module, given, normed)

    def _attentions(self):
        q, A = self.random(self.rows, self.K, self.G, self.E), self.factors(self.K * self.G * self.E, 8)[0]
        keys, values = (self.random(self.rows, self.K, self.C, self.E) for _ in range(2))
        where = self.where()

        def attend(module: ModuleType, window: int | None, A: Tensor | None) -> list[Tensor]:
            y, hidden = module.gather(module.attend_parts(q, keys, values, *where, 0.3, window), self.table, A, q)
            return [y, *self._with_adapter(hidden)]

        for given in ((None, A), (9, A), (None, None)):
            yield "attend", lambda module, given=given: attend(module, *given)

    def _gates(self):
        gate, up = self.random(self.rows, 2 * self.I).split(self.I, 1)
        update, A = self.update(1, self.I, self.I), self.factors(self.I, 8)[0]

        def gated(module: ModuleType, update: Update | None, A: Tensor | None) -> list[Tensor]:
            out, parts = module.gated(gate, up, update, self.table, A)
            return [out, *self._with_adapter(parts)]

        for given in ((update, A), (None, None), *([(update, None), (None, A)] * self.full)):
            yield "gate", lambda module, given=given: gated(module, *given)

    def where(self) -> tuple[Tensor, Tensor]:
        """Slots and positions."""
        slots = torch.randperm(self.rows, generator=self.draw)
        return slots.to(self.device), torch.randint(0, self.C, (self.rows,), generator=self.draw).to(self.device)

    def _with_adapter(self, hidden: Tensor | None) -> list[Tensor]:
        """h of the rows that have one, summed: nobody reads the others'."""
        used = (torch.tensor(self.places) >= 0).to(self.device)
        return [] if hidden is None else [hidden.sum(0)[used]]
