"""What a sweep tries: parsing, grid, draws, halving."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.training.search import Range, better_half, grid, parse_space, rungs, sample, split


def test_values_are_yaml_and_commas_inside_brackets_belong_to_them():
    fixed, space = parse_space(
        ["adapter.target_modules=[q_proj, v_proj],all-linear", "train.lr=1e-4,3e-4", "seed=3", 'adapter.init="a,b"']
    )
    assert fixed == {"seed": 3, "adapter.init": "a,b"}
    assert space == {"adapter.target_modules": [["q_proj", "v_proj"], "all-linear"], "train.lr": [1e-4, 3e-4]}
    assert split("a,{b: [1,2]},'c,d'") == ["a", "{b: [1,2]}", "'c,d'"]


def test_a_grid_is_every_combination_once():
    points = grid({"a": [1, 2, 3], "b": ["x", "y"]})
    assert points[:3] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}] and len(points) == 6
    assert grid({}) == [{}]
    with pytest.raises(ConfigError, match="--search random"):
        grid({"a": Range(0.1, 1.0, False)})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5))
def test_draws_differ_lie_in_their_ranges_and_follow_from_the_seed(trials, seed):
    _, space = parse_space(["train.lr=1e-5..1e-2", "adapter.rank=1..64", "x=0.1..0.4", "adapter.dropout=0,0.1"])
    points = sample(space, trials, seed)
    assert len(points) == trials == len({repr(p) for p in points}) and points == sample(space, trials, seed)
    for p in points:
        assert 1e-5 <= p["train.lr"] <= 1e-2 and 0.1 <= p["x"] <= 0.4 and p["adapter.dropout"] in (0, 0.1)
        assert isinstance(p["adapter.rank"], int) and 1 <= p["adapter.rank"] <= 64


def test_wide_ranges_are_drawn_by_their_logarithm():
    points = sample({"lr": Range(1e-5, 1e-1, False), "x": Range(0.1, 0.5, False)}, 400, 0)
    below = sum(p["lr"] < 1e-3 for p in points) / 400
    assert 0.4 < below < 0.6
    assert 0.4 < sum(p["x"] < 0.3 for p in points) / 400 < 0.6


def test_ranges_of_a_factor_of_ten_are_drawn_by_their_logarithm_whatever_the_division_rounds_to():
    values = [Range(3e-5, 3e-4, False).draw(random.Random(i)) for i in range(400)]
    assert 0.4 < sum(value < 9.5e-5 for value in values) / 400 < 0.6


def test_draws_stay_in_narrow_ranges_and_whole_numbers_are_as_likely_as_each_other():
    narrow = Range(0.123456, 0.123457, False)
    assert all(narrow.low <= narrow.draw(random.Random(i)) <= narrow.high for i in range(20))
    counts = Counter(Range(1, 4, True).draw(random.Random(i)) for i in range(2000))
    assert counts.keys() == {1, 2, 3, 4} and min(counts.values()) > 400


def test_draws_from_lists_have_no_repeats():
    assert sorted(p["a"] for p in sample({"a": [1, 2, 3]}, 9, 0)) == [1, 2, 3]


@pytest.mark.parametrize("trials, shares", [(1, []), (2, [0.5]), (4, [0.25, 0.5]), (5, [0.125, 0.25, 0.5])])
def test_rungs_double(trials, shares):
    assert rungs(trials) == shares


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.just(math.nan), st.floats(0, 9)), min_size=1, max_size=17))
def test_halving_keeps_the_better_half_and_ends_with_one(losses):
    scores = {str(i): loss for i, loss in enumerate(losses)}
    sound = [loss for loss in losses if loss is not None and not math.isnan(loss)]
    kept = better_half(scores)
    assert len(kept) == min(len(sound), math.ceil(len(losses) / 2))
    assert sorted(scores[name] for name in kept) == sorted(sound)[: len(kept)]
    alive = {str(i): float(i) for i in range(len(losses))}
    for _ in rungs(len(losses)):
        alive = {name: alive[name] for name in better_half(alive)}
    assert list(alive) == ["0"]
