"""Packing keeps every example whole: tokens, positions, targets, and what each token may see."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.example import TokenizedExample
from veneer.data.pack import MIN_PREFIX, common_prefix, group_by_prefix, pack


@st.composite
def example_sets(draw, largest=8):
    prefixes = draw(st.lists(st.lists(st.integers(1, 3), max_size=24), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, largest))):
        prompt = draw(st.sampled_from(prefixes)) + draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
        answer = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
        ids = np.array(prompt + answer, np.int32)
        found.append(TokenizedExample(ids, np.arange(len(ids)) >= len(prompt)))
    return found


def seen_by(row, segment):
    """Token ids, positions and targets of the sequence that ends in a segment."""
    where = np.r_[np.arange(segment.prefix_start, segment.prefix_end), np.arange(segment.start, segment.end)]
    return row.input_ids[where], row.position_ids[where]


@settings(max_examples=150, deadline=None)
@given(example_sets(), st.integers(1, 80), st.booleans(), st.booleans())
def test_every_example_is_in_some_row(examples, max_tokens, packing, share):
    rows = pack(examples, max_tokens, packing=packing, share_prefix=share)
    wanted = sorted(e.input_ids.tolist() for e in examples)
    found, targets = [], []
    for row in rows:
        assert row.segments[0].start == 0 and row.segments[-1].end == len(row.input_ids)
        assert all(a.end == b.start for a, b in zip(row.segments, row.segments[1:]))
        prefixes = {(s.prefix_start, s.prefix_end) for s in row.segments if s.prefix_end > s.prefix_start}
        for s in row.segments:
            if (s.start, s.end) in prefixes:
                continue
            ids, positions = seen_by(row, s)
            assert positions.tolist() == list(range(len(ids)))
            found.append(ids.tolist())
        targets += row.targets.tolist()
        assert len(row.targets) == len(row.predictors)
        longest = max(len(e.input_ids) for e in examples)
        assert len(row.input_ids) <= max(max_tokens, longest)
    assert sorted(found) == wanted
    assert sorted(targets) == sorted(int(t) for e in examples for t in e.input_ids[1:][e.supervised[1:]])


@settings(max_examples=100, deadline=None)
@given(example_sets())
def test_predictors_stand_right_before_their_targets(examples):
    for row in pack(examples, 1000):
        for at, target in zip(row.predictors, row.targets):
            after = [at + 1] if at + 1 < len(row.input_ids) else []
            starts = [s.start for s in row.segments if s.prefix_end > s.prefix_start and s.prefix_end - 1 == at]
            assert any(row.input_ids[i] == target for i in after + starts)


@settings(max_examples=100, deadline=None)
@given(example_sets())
def test_a_shared_prefix_holds_nothing_supervised_and_saves_tokens(examples):
    groups = group_by_prefix(examples)
    for group in groups:
        for e in group.examples:
            assert not e.supervised[: group.prefix].any() and group.prefix < len(e.input_ids)
            assert common_prefix(e.input_ids, group.examples[0].input_ids) >= group.prefix
        assert group.prefix == 0 or group.prefix >= MIN_PREFIX
    assert sum(g.tokens for g in groups) <= sum(len(e.input_ids) for e in examples)


def partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for chosen in combinations(range(len(rest)), size):
            left = [rest[i] for i in range(len(rest)) if i not in chosen]
            for others in partitions(left):
                yield [[first, *(rest[i] for i in chosen)], *others]


@settings(max_examples=40, deadline=None)
@given(example_sets(largest=5))
def test_the_partition_is_the_best_there_is(examples):
    def cost(group):
        if len(group) == 1:
            return len(group[0].input_ids)
        shared = min(common_prefix(group[0].input_ids, e.input_ids) for e in group)
        shared = min(shared, *(int(np.flatnonzero(e.supervised)[0]) for e in group))
        shared = shared if shared >= MIN_PREFIX else 0
        return shared + sum(len(e.input_ids) - shared for e in group)

    best = min(sum(map(cost, p)) for p in partitions(examples))
    assert sum(g.tokens for g in group_by_prefix(examples)) == best
