"""Checks of a served block's kernels that run on the CPU, in triton's interpreter and on a GPU."""

from __future__ import annotations

import torch

from veneer.kernels import served, served_attention, served_block, served_block_twins, served_prompts
from veneer.kernels.served import Table
from veneer.kernels.served_block_twins import Update

PLACES = 4


def table_of(places, size, device):
    """A table of rows (place, -1 for none) in tiles of `size`: 32 as prompts have them."""
    rows = [[] if place < 0 else [place] for place in places]
    if size == served_prompts.ROWS:
        runs = [(n, n + 1, row) for n, row in enumerate(rows)]
        tiles = served_prompts.use_tiles(runs, 1, len(rows))[0]
    else:
        tiles = torch.tensor(served.tile_rows(rows, 1, size)).view(len(rows), 1 + size)
    weights = torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(3)) + 0.5
    return Table(tiles.to(device), weights.to(device))


class Case:
    """Rows, some of them without an adapter, and factors of rank `rank`, all random."""

    def __init__(self, dtype, device="cpu", rows=21, size=16, rank=16, D=84, I=136, heads=(2, 3, 12), C=70):  # noqa: E741
        self.draw, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device
        self.rows, self.rank, self.D, self.I, (self.K, self.G, self.E), self.C = rows, rank, D, I, heads, C
        self.places = torch.randint(-1, PLACES, (rows,), generator=self.draw).tolist()
        self.places[:3], self.places[-1] = [1, 1, 1], -1
        self.table = table_of(self.places, size, device)

    def random(self, *shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=self.draw)).to(self.device, self.dtype)

    def factors(self, d_in, *d_outs):
        """A (P, d_in, n·R) and B's (P, R, d_out)."""
        A = self.random(PLACES, d_in, len(d_outs) * self.rank, scale=d_in**-0.5)
        return A, [self.random(PLACES, self.rank, d_out, scale=self.rank**-0.5) for d_out in d_outs]

    def update(self, parts, *d_outs):
        hidden = torch.randn(parts, self.rows, len(d_outs) * self.rank, generator=self.draw).to(self.device)
        return Update(hidden, self.factors(8, *d_outs)[1])

    def runs(self):
        """Every kernel with and without updates: (name, function of a module of kernels → what it made)."""
        yield from self._norms()
        yield from self._rotations()
        yield from self._attentions()
        yield from self._gates()

    def _norms(self):
        x, y, weight = self.random(self.rows, self.D), self.random(self.rows, self.D), self.random(self.D)
        update, (A, _) = self.update(3, self.D), self.factors(self.D, 5, 5, 5)

        def add(module, y, update, A):
            mine = x.clone()
            parts = module.add(mine, y, update, self.table, weight, A)
            normed, hidden = module.norm(mine, None, weight, 1e-5, parts)
            return [mine, normed, *self.with_adapter(hidden)]

        def norm(module, y):
            mine = x.clone()
            return [module.norm(mine, y, weight, 1e-5)[0], mine]

        for name, options in (("all", (y, update, A)), ("no next", (y, update, None)), ("first", (None, None, A))):
            yield f"add, {name}", lambda module, options=options: add(module, *options)
        for given in (y, None):
            yield "norm", lambda module, given=given: norm(module, given)

    def _rotations(self):
        widths = self.K * self.G * self.E, self.K * self.E, self.K * self.E
        qkv, update = [self.random(self.rows, width) for width in widths], self.update(1, *widths)
        turn, norms = [self.random(self.rows, self.E) for _ in range(2)], [self.random(self.E) for _ in range(2)]
        slots = torch.randperm(self.rows, generator=self.draw).to(self.device)
        positions = torch.randint(0, self.C, (self.rows,), generator=self.draw).to(self.device)

        def rotate(module, update, norms):
            mine = torch.cat(qkv, 1).split([t.shape[1] for t in qkv], 1)
            keys, values = (torch.zeros(self.rows, self.K, self.C, self.E).to(mine[0]) for _ in range(2))
            q = module.rotate(mine, update, self.table, norms, 1e-5, turn, slots, positions, keys, values)
            return [q, keys, values]

        for update, norms in ((update, norms), (update, None), (None, norms), (None, None)):
            yield "rotate", lambda module, update=update, norms=norms: rotate(module, update, norms)

    def _attentions(self):
        q, A = self.random(self.rows, self.K, self.G, self.E), self.factors(self.K * self.G * self.E, 5)[0]
        keys, values = (self.random(self.rows, self.K, self.C, self.E) for _ in range(2))
        slots = torch.randperm(self.rows, generator=self.draw).to(self.device)
        positions = torch.randint(0, self.C, (self.rows,), generator=self.draw).to(self.device)

        def attend(module, window, A):
            plain = module is served_block_twins
            of = served_attention
            parts = of.attend_parts_twin if plain else of.attend_parts
            attended = parts(q, keys, values, slots, positions, 0.3, window)
            y, hidden = (of.gather_twin if plain else of.gather)(attended, self.table, A, q)
            return [y, *self.with_adapter(hidden)]

        for window, A in ((None, A), (9, A), (None, None)):
            yield "attend", lambda module, window=window, A=A: attend(module, window, A)

    def _gates(self):
        gate, up = self.random(self.rows, 2 * self.I).split(self.I, 1)
        update, A = self.update(1, self.I, self.I), self.factors(self.I, 5)[0]

        def gated(module, update, A):
            out, parts = module.gated(gate, up, update, self.table, A)
            return [out, *self.with_adapter(parts)]

        for update, A in ((update, A), (update, None), (None, A), (None, None)):
            yield "gate", lambda module, update=update, A=A: gated(module, update, A)

    def with_adapter(self, hidden):
        """h of the rows that have one, summed: nobody reads the others'."""
        used = torch.tensor(self.places) >= 0
        return [] if hidden is None else [hidden.sum(0)[used.to(hidden.device)]]


def check_block(tolerance, *args, **options):
    """Every kernel gives what its twin gives."""
    case = Case(*args, **options)
    for name, run in case.runs():
        for mine, twin in zip(run(served_block), run(served_block_twins), strict=True):
            assert mine.shape == twin.shape and mine.dtype == twin.dtype
            off = (mine.float() - twin.float()).abs().max() / twin.float().abs().max()
            assert off <= tolerance, (name, float(off), options)


def check_base_rows(*args, **options):
    """Rows without an adapter are to the last bit what they are in a pass without any, whatever the tiles."""
    case = Case(*args, **options)
    x, y, weight = (case.random(*shape) for shape in ((case.rows, case.D), (case.rows, case.D), (case.D,)))
    gate, up = case.random(case.rows, case.I), case.random(case.rows, case.I)
    base, plain = torch.tensor(case.places) < 0, table_of([-1] * case.rows, served.ROWS, case.device)
    update, wide = case.update(3, case.D), case.update(1, case.I, case.I)
    A, down = case.factors(case.D, 5)[0], case.factors(case.I, 5)[0]
    mine = x.clone()
    parts = served_block.add(mine, y, update, case.table, weight, A)
    normed = served_block.norm(mine, None, weight, 1e-5, parts)[0]
    own = served_block.gated(gate, up, wide, case.table, down)[0]
    wanted = x.clone()
    wanted_normed = served_block.norm(wanted, y, weight, 1e-5)[0]
    alone = served_block.gated(gate, up, None, plain, None)[0]
    for got, other in ((mine, wanted), (normed, wanted_normed), (own, alone)):
        assert torch.equal(got[base], other[base]) and not torch.equal(got[~base], other[~base])
