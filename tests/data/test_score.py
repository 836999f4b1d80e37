"""Scores against their definitions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.score import is_json_task, parse_object, same, score_json, score_text

values = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=4))
objects = st.dictionaries(st.sampled_from("abcd"), values, max_size=4)


@given(st.lists(objects, min_size=1, max_size=6))
def test_the_references_themselves_score_one(found):
    texts = [json.dumps(o) for o in found]
    scores = score_json([f"  {t}\n" for t in texts], texts)
    assert scores.valid_json == scores.exact_match == 1 and all(f == 1 for f in scores.field_f1.values())


@given(st.lists(st.tuples(objects, objects), min_size=1, max_size=6))
def test_rates_are_bounded_and_exact_match_is_equality(pairs):
    scores = score_json([json.dumps(a) for a, _ in pairs], [json.dumps(b) for _, b in pairs])
    assert scores.exact_match == sum(same(a, b) for a, b in pairs) / len(pairs)
    assert all(0 <= f <= 1 for f in scores.field_f1.values())


def test_field_f1_by_hand():
    references = ['{"a": 1, "b": 2}', '{"a": 3, "b": 4}', '{"a": 5}']
    answers = ['{"a": 1, "b": 9}', '{"a": 3}', "nonsense"]
    scores = score_json(answers, references)
    assert scores.valid_json == pytest.approx(2 / 3) and scores.exact_match == 0
    # a: two right, one missing; b: one wrong (fp and fn), one missing.
    assert scores.field_f1 == {"a": pytest.approx(4 / 5), "b": 0}


@pytest.mark.parametrize(
    "text", ["", "[]", "1", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1} more', '```{"a": 1}```', "{" * 100_000]
)
def test_what_is_no_strict_json_object(text):
    assert parse_object(text) is None


def test_types_count():
    assert not same(True, 1) and same(1, 1.0) and not same("1", 1) and not same({"a": None}, {})
    assert same({"a": [1, {"b": False}]}, {"a": [1, {"b": False}]})


def test_tasks_and_text():
    assert is_json_task(['{"a": 1}']) and not is_json_task(['{"a": 1}', "x"]) and not is_json_task([])
    assert score_text([" yes", "no"], ["yes ", "yes"]).exact_match == 0.5
    with pytest.raises(ValueError):
        score_json(["{}"], ["{}", "{}"])
