"""The bundled task: what the generator writes, and nothing shared between train and held-out."""

import json

import pytest

from veneer.data.bundled import SPLITS, bundled_path
from veneer.data.bundled.generate import text
from veneer.data.bundled.vocabulary import PHRASES, SYSTEM, TEMPLATES, VALUES
from veneer.errors import DataError

COPIED = (
    "merchant",
    "date",
    "title",
    "time",
    "place",
    "with",
    "item",
    "customer",
    "city",
    "product",
    "version",
    "email",
)


def rows(split):
    return [json.loads(line)["messages"] for line in bundled_path(split).read_text(encoding="utf-8").splitlines()]


def answers(split):
    return [json.loads(messages[2]["content"]) for messages in rows(split)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_files_are_what_the_generator_writes(split):
    assert bundled_path(split).read_text(encoding="utf-8") == text(split)


def test_sizes_and_schemas():
    assert len(rows("train")) >= 600 and len(rows("heldout")) >= 150
    for split in SPLITS:
        for system, user, assistant in rows(split):
            assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
            schema = next(name for name, prompt in SYSTEM.items() if prompt == system["content"])
            listed = [
                part.split("(")[0].strip() for part in SYSTEM[schema].split(": ", 1)[1].split(". ")[0].split(", ")
            ]
            fields = list(json.loads(assistant["content"]))
            assert fields == [name for name in listed if name in fields] and 4 <= len(fields) <= 5


@pytest.mark.parametrize("split", SPLITS)
def test_copied_values_stand_in_the_message(split):
    for _, user, assistant in rows(split):
        answer = json.loads(assistant["content"])
        for name in COPIED:
            if answer.get(name) is not None:
                assert answer[name].lower() in user["content"].lower()
        for name in ("amount", "quantity"):
            if name in answer:
                assert str(answer[name]) in user["content"]


def test_nothing_is_shared():
    for schema in SYSTEM:
        assert not set(TEMPLATES["train"][schema]) & set(TEMPLATES["heldout"][schema])
    for kind in VALUES["train"]:
        assert not set(VALUES["train"][kind].split(",")) & set(VALUES["heldout"][kind].split(",")), kind
    for kind in PHRASES["train"]:
        for label in PHRASES["train"][kind]:
            one, two = (set(PHRASES[s][kind][label].lower().split(",")) for s in SPLITS)
            assert not one & two, (kind, label, one & two)
    for name in (*COPIED, "amount", "quantity"):
        one, two = ({a[name] for a in answers(s) if a.get(name) is not None} for s in SPLITS)
        assert not one & two, name
    assert not {m[1]["content"] for m in rows("train")} & {m[1]["content"] for m in rows("heldout")}


def test_no_message_twice_and_no_other_split():
    for split in SPLITS:
        messages = [m[1]["content"] for m in rows(split)]
        assert len(set(messages)) == len(messages)
    with pytest.raises(DataError, match="train or heldout"):
        bundled_path("test")
