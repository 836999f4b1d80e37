"""Write the bundled task: a free-text message into a strict JSON object, by one of four schemas.

    python -m veneer.data.bundled.generate [--check]

Seeded: the committed files are what this writes (`--check` compares). Train and held-out share neither sentence
templates nor values: pools are disjoint, dates fall in other months, times in other minutes, amounts and quantities
have digit sums or parities of their own.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator

from veneer.data.bundled import SPLITS, bundled_path
from veneer.data.bundled.vocabulary import PHRASES, SYSTEM, TEMPLATES, VALUES

SIZES = {"train": 640, "heldout": 160}
MONTHS = {"train": range(1, 9), "heldout": range(9, 13)}
MINUTES = {"train": (0, 15, 30, 45), "heldout": (5, 10, 20, 25, 35, 40, 50, 55)}
PARITY = {"train": 0, "heldout": 1}


class Values:
    """Draws values of one split."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self.split, self.rng = split, rng

    def pick(self, kind: str) -> str:
        """One of a pool."""
        return self.rng.choice(VALUES[self.split][kind].split(","))

    def phrase(self, kind: str) -> tuple[str, str]:
        """A label and a phrase that implies it."""
        label = self.rng.choice(list(PHRASES[self.split][kind]))
        return label, self.rng.choice(PHRASES[self.split][kind][label].split(","))

    def date(self) -> str:
        return f"2026-{self.rng.choice(MONTHS[self.split]):02d}-{self.rng.randint(1, 28):02d}"

    def time(self) -> str:
        return f"{self.rng.randint(8, 19):02d}:{self.rng.choice(MINUTES[self.split]):02d}"

    def amount(self) -> int | float:
        """An amount that JSON writes as the message does; the sum of its digits is even in train, odd in held-out."""
        while True:
            whole, cents = self.rng.randint(3, 480), self.rng.choice((0, 0, self.rng.randint(1, 99)))
            value = whole if not cents else float(f"{whole}.{cents:02d}")
            if sum(int(c) for c in str(value) if c.isdigit()) % 2 == PARITY[self.split]:
                return value

    def quantity(self) -> int:
        return 2 * self.rng.randint(1, 30) + PARITY[self.split]

    def version(self) -> str:
        return f"{self.rng.randint(1, 9)}.{2 * self.rng.randint(0, 6) + PARITY[self.split]}"


def fields(schema: str, values: Values) -> tuple[dict, dict]:
    """(answer, further slots) of one example; the answer's fields stand in the schema's order."""
    if schema == "expense":
        category, thing = values.phrase("category")
        answer = {"merchant": values.pick("merchant"), "amount": values.amount()}
        answer |= {"currency": values.rng.choice(("EUR", "USD", "GBP")), "category": category, "date": values.date()}
        return answer, {"thing": thing}
    if schema == "calendar":
        answer = {"title": values.pick("title"), "date": values.date(), "time": values.time()}
        answer |= {"place": values.pick("place"), "with": values.pick("person")}
        return answer, {"person": answer["with"]}
    if schema == "order":
        express, speed = values.phrase("express")
        answer = {"item": values.pick("item"), "quantity": values.quantity(), "customer": values.pick("customer")}
        return answer | {"city": values.pick("city"), "express": express == "true"}, {"speed": speed}
    priority, cue = values.phrase("priority")
    answer = {"product": values.pick("product"), "version": values.version()}
    answer |= {"email": f"{values.pick('user')}@{values.pick('domain')}", "priority": priority}
    return answer, {"cue": cue}


def written(schema: str, template: str, values: Values) -> tuple[str, dict]:
    """A message of a template with drawn values, and its answer."""
    answer, extra = fields(schema, values)
    if template.startswith("~"):
        left_out, template = template[1:].split(" ", 1)
        answer[left_out] = None
    slots = answer | extra
    slots |= {name.capitalize(): slots[name][0].upper() + slots[name][1:] for name in ("speed", "cue") if name in slots}
    slots |= {"cue": slots["cue"][0].lower() + slots["cue"][1:]} if "cue" in slots else {}
    return template.format(**slots), answer


def chat(system: str, user: str, assistant: str) -> dict:
    """One example in the messages format."""
    turns = {"system": system, "user": user, "assistant": assistant}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def examples(split: str) -> Iterator[dict]:
    """The split's examples: schemas and templates in turn, in a shuffled order, no message twice."""
    rng = random.Random(f"veneer messages_to_json {split}")
    values, seen, found = Values(split, rng), set(), []
    while len(found) < SIZES[split]:
        schema = list(SYSTEM)[len(found) % len(SYSTEM)]
        templates = TEMPLATES[split][schema]
        template = templates[len(found) // len(SYSTEM) % len(templates)]
        message, answer = written(schema, template, values)
        if message not in seen:
            seen.add(message)
            found.append((schema, message, answer))
    rng.shuffle(found)
    for schema, message, answer in found:
        yield chat(SYSTEM[schema], message[0].upper() + message[1:], json.dumps(answer, ensure_ascii=False))


def text(split: str) -> str:
    """The split's file."""
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples(split))


def main(arguments: list[str]) -> int:
    """Write both files, or with --check compare them; 1 if they differ."""
    for split in SPLITS:
        path = bundled_path(split)
        if "--check" in arguments:
            if path.read_text(encoding="utf-8") != text(split):
                print(f"{path} is not what the generator writes", file=sys.stderr)
                return 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text(split), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
