"""Measure every cell of the conformance table and write docs/conformance.md.

    python scripts/conformance_table.py [--feature NAME] [--architecture NAME] [--out FILE]

With a choice of features or architectures only those are measured, and the table is printed instead of written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conformance.compare import TOLERANCE  # noqa: E402
from conformance.features import FEATURES, Cell, run  # noqa: E402
from conformance.models import ARCHITECTURES  # noqa: E402
from conformance.toys import TOYS  # noqa: E402

from veneer import __version__  # noqa: E402

HEAD = """# Conformance with PEFT

Written by `python scripts/conformance_table.py`; do not edit. Veneer {veneer}, PEFT {peft}, transformers {transformers},
torch {torch}, float32 on a CPU, one thread. The models are tiny, made from configs with odd sizes and random weights.

Each cell puts one adapter with random weights through PEFT's file into Veneer, and through Veneer's file back into
PEFT. It compares the model's answers, the loss, every gradient of every adapter parameter, the tensors of both files
(keys, shapes, dtypes, bits) and the fields of both configs, and shows the largest relative error, max|a − b| / max|b|.
Above {tolerance:.0e} a cell counts as different (1e-04 for starts that move the base, which go through an SVD or QR).

- `init: …` also starts that adapter in Veneer and checks that the model's answers do not change; for `pissa` and
  `olora` it compares the starting s·B·A of every module with PEFT's, and PEFT's converted file with its live model.
- `several adapters`: two adapters of different ranks and targets, each alone, both stacked, none (bit for bit the
  base), and each batch row its own.
- `merge`: merged by both, compared with the unmerged adapter; unmerging must restore the base bit for bit.

The second table does the same for every kind of layer, in small models outside transformers.

`–` the combination does not exist in PEFT; `R` Veneer refuses it; `P` PEFT's result is wrong. Notes below the table
say why.

"""
TEXT = ("embeddings", "trainable tokens", "target_parameters", "aLoRA", "layers_to_transform")
"""Features of whole transformers models."""
SIGNS = {"not in PEFT": "–", "refused": "R", "PEFT is wrong": "P", "DIFFERS": "**differs**"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feature", action="append", help="measure only this column")
    parser.add_argument("--architecture", action="append", help="measure only this row")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [a for a in (*ARCHITECTURES, *TOYS) if not options.architecture or a.name in options.architecture]
    columns = [f for f in FEATURES if not options.feature or f.name in options.feature]
    cells = {(a.name, f.name): measure(a, f) for f in columns for a in rows if a not in TOYS or f.name not in TEXT}
    text = page(cells)
    if options.feature or options.architecture:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    counts = {s: sum(cell.status == s for cell in cells.values()) for s in ("passed", *SIGNS)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), file=sys.stderr)
    for (architecture, feature), cell in cells.items():
        if cell.status == "DIFFERS":
            print(f"{architecture} × {feature}: {cell.reason}", file=sys.stderr)
    return 1 if counts["DIFFERS"] else 0


def measure(architecture, feature) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        return run(architecture, feature, Path(folder))


def page(cells: dict[tuple[str, str], Cell]) -> str:
    """The whole page: head, counts, both tables, notes. Cells with the same reason share a note."""
    reasons = [cell.reason for cell in cells.values() if cell.reason]
    number = {reason: n for n, reason in enumerate(dict.fromkeys(reasons), 1)}

    def shown(cell: Cell) -> str:
        return f"{cell.error:.0e}" if cell.status == "passed" else f"{SIGNS[cell.status]} [{number[cell.reason]}]"

    versions = {
        "veneer": __version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    counts = ", ".join(f"{sum(cell.status == s for cell in cells.values())} {s}" for s in ("passed", *SIGNS))
    lines = [HEAD.format(tolerance=TOLERANCE, **versions) + f"{len(cells)} cells: {counts}."]
    toys = {toy.name for toy in TOYS}
    for table in ([k for k in cells if k[0] not in toys], [k for k in cells if k[0] in toys]):
        rows, columns = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
        if rows:
            lines += ["", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {row} | " + " | ".join(shown(cells[row, column]) for column in columns) + " |" for row in rows]
    lines += ["", "## Notes", ""] + [f"{n}. {_escaped(reason)}" for reason, n in number.items()]
    return "\n".join(lines) + "\n"


def _escaped(reason: str) -> str:
    return reason.replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    raise SystemExit(main())
