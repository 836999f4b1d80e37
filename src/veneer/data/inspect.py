"""Look at data as training sees it: counts, duplicates, and examples with their supervised tokens in colour."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer.data.example import Example, TokenizedExample
from veneer.data.prepare import Counts, PreparedData


@dataclass(frozen=True)
class Inspection:
    """What `veneer data inspect` shows. `overlap` counts held-out examples that training holds too."""

    counts: Counts
    duplicates: int
    overlap: int | None
    shown: list[TokenizedExample]
    tokenizer: Any


def identity(example: Example) -> str:
    """A hash of what a reader sees of an example."""
    parts = [(m.role, m.content.strip()) for m in example.messages] or [example.prompt, example.completion.strip()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def inspect_data(
    examples: Sequence[Example], prepared: PreparedData, tokenizer: Any, heldout: Sequence[Example] | None = None
) -> Inspection:
    """Count duplicates within the data and against the held-out data."""
    seen = {identity(e) for e in examples}
    overlap = sum(identity(e) in seen for e in heldout) if heldout is not None else None
    return Inspection(
        prepared.counts,
        len(examples) - len(seen),
        overlap,
        [prepared[i] for i in range(min(8, len(prepared)))],
        tokenizer,
    )


def render_inspection(found: Inspection, console: Console, show: int = 3) -> None:
    """Print the counts, then a few examples; supervised tokens are green, alternately underlined to show their edges."""
    c = found.counts
    table = Table(show_header=False, title="data as training sees it")
    table.add_column("what")
    table.add_column("count", justify="right")
    rows = [
        ("examples read", c.read),
        ("examples trained on", c.examples),
        ("tokens", c.tokens),
        ("supervised tokens", c.supervised_tokens),
        ("longest example, tokens", c.longest),
        ("truncated", c.truncated),
        ("split", c.split),
        *((f"dropped: {reason}", number) for reason, number in c.dropped.items()),
        ("without a trained end-of-turn", c.end_of_turn_untrained),
        ("double BOS", c.double_bos),
        ("duplicates", found.duplicates),
    ]
    if found.overlap is not None:
        rows.append(("held-out examples that training holds too", found.overlap))
    wrong = ("truncated", "dropped", "without", "double", "duplicates", "held-out")
    for what, number in rows:
        bad = number and what.startswith(wrong)
        table.add_row(Text(what, style="yellow" if bad else ""), Text(f"{number:,}", style="yellow" if bad else ""))
    trained = "no" if c.end_of_turn_untrained == c.read else "yes" if not c.end_of_turn_untrained else "partly"
    table.add_row("end-of-turn is trained", trained)
    console.print(table)
    for number, example in enumerate(found.shown[:show], 1):
        console.print(
            Text(
                f"example {number}: {len(example.input_ids)} tokens, {int(example.supervised.sum())} supervised", "bold"
            )
        )
        console.print(_coloured(example, found.tokenizer), soft_wrap=True)


def _coloured(example: TokenizedExample, tokenizer: Any) -> Text:
    """Tokens in colour; those that hold parts of one character are shown together."""
    text, waiting, number = Text(), [], 0
    for token, supervised in zip(example.input_ids.tolist(), example.supervised):
        waiting.append(token)
        piece = tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if piece.endswith("\ufffd") and len(waiting) < 8:
            continue
        text.append(piece, style=("green underline" if number % 2 else "green bold") if supervised else "dim")
        waiting, number = [], number + 1
    if waiting:
        text.append(tokenizer.decode(waiting, skip_special_tokens=False), style="dim")
    return text
