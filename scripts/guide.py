"""Run the guide's blocks and put what they print into its pages, or check that they still print it.

    python scripts/guide.py run docs/guide/1-idea.md       # run the page's blocks in order, write their output and plots
    python scripts/guide.py check docs/guide/*.md          # run, compare with what is shown, change nothing
    python scripts/guide.py check --short docs/guide/*.md  # the same blocks with --model DIR and two steps, for CI

In a page, `python` and `bash` fences are run in order, in one empty directory and one Python process for each page; a
`text` fence right after one is what it prints (of a command that fails also what it says on stderr). A comment before a
fence says what is special about it: <!-- guide: exit 2 --> (it must fail so), <!-- guide: skip --> (not run),
<!-- guide: within 30% --> (numbers may differ by that; 5 % if not said), <!-- guide: loose --> (numbers are times or the
like and are not compared). Files that the page links as results/NAME are copied from the directory to there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
FENCE = re.compile(
    r"(?:^<!-- guide: (?P<note>.*?) -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```\n", re.M | re.S
)
OUTPUT = re.compile(r"\n*^```text\n(?P<text>.*?)^```\n", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
MODEL = "smollm2-135m-instruct"
SHORTER = (
    (r"max[-_]steps(\"?(?: |=|: ))\d+", r"max_steps\g<1>2"),
    (r"--max_steps", "--max-steps"),
    (r"\bsteps=\d+", "steps=2"),
    (r"\bcount=\d+", "count=2"),
    (r"(--limit|--max-new-tokens|--tune-steps) \d+", r"\g<1> 2"),
    (r"max_new_tokens=\d+", "max_new_tokens=2"),
    (r"eval_examples(\"?(?:=|: ))\d+", r"eval_examples\g<1>2"),
)
"""What makes a block short: pattern → replacement."""


@dataclass
class Block:
    """One fence that is run. `start` and `end` are where its output stands, or should stand, in the page."""

    language: str
    code: str
    note: str
    line: int
    start: int
    end: int
    shown: str | None

    @property
    def exit(self) -> int:
        found = re.search(r"exit (\d+)", self.note)
        return int(found[1]) if found else 0

    @property
    def tolerance(self) -> float | None:
        """Relative; None where numbers are not compared."""
        found = re.search(r"within (\d+) ?%", self.note)
        return None if "loose" in self.note else int(found[1]) / 100 if found else 0.05


class Mistake(Exception):
    """A block that did not do what the page says."""


def blocks(page: str) -> Iterator[Block]:
    for found in FENCE.finditer(page):
        output = OUTPUT.match(page, found.end())
        start, end = (output.start(), output.end()) if output else (found.end(), found.end())
        line = page.count("\n", 0, found.start()) + 1
        shown = output["text"] if output else None
        yield Block(found["language"], found["code"], found["note"] or "", line, start, end, shown)


class Runner:
    """Runs the blocks of one page. With `tiny`, the directory of a small model, in the short setting and in this process."""

    def __init__(self, directory: Path, tiny: Path | None = None) -> None:
        self.directory, self.tiny, self.names = directory, tiny, {"__name__": "__main__"}

    def __call__(self, block: Block) -> str:
        """What the block prints. Raises `Mistake` on another exit code than the page's."""
        code = block.code
        if self.tiny:
            for pattern, put in SHORTER:
                code = re.sub(pattern, put, code)
            code = code.replace(MODEL, str(self.tiny))
        with contextlib.chdir(self.directory) if sys.version_info >= (3, 11) else _chdir(self.directory):
            status, text = self._python(code) if block.language == "python" else self._bash(code, block.exit)
        if status != block.exit:
            raise Mistake(f"line {block.line}: exit code {status} instead of {block.exit}\n{text}")
        text = text.replace(str(self.tiny), MODEL) if self.tiny else text
        return re.sub(r"[ \t]+$", "", re.sub(r"\x1b\[[0-9;]*m", "", text), flags=re.M).strip("\n") + "\n"

    def _python(self, code: str) -> tuple[int, str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(code, "block", "exec"), self.names)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
                return 2, out.getvalue()
        return 0, out.getvalue()

    def _bash(self, code: str, status: int) -> tuple[int, str]:
        if self.tiny and not re.search(r"^(?!veneer |#|$)|[|<>&;]", code.replace("\\\n", ""), re.M):
            return self._veneer(code.replace("\\\n", ""))
        code = re.sub(r"^veneer ", f"{shlex.quote(sys.executable)} -m veneer ", code, flags=re.M)
        code = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", code, flags=re.M)
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", code], capture_output=True, text=True)
        return done.returncode, done.stdout + (done.stderr if done.returncode else "")

    def _veneer(self, code: str) -> tuple[int, str]:
        """Commands in this process: importing torch takes longer than they do."""
        from veneer.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        for line in filter(None, code.splitlines()):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main(shlex.split(line, comments=True)[1:])
                except SystemExit as ended:
                    if ended.code:
                        return int(ended.code), out.getvalue() + err.getvalue()
        return 0, out.getvalue()


@contextlib.contextmanager
def _chdir(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def difference(shown: str, printed: str, tolerance: float | None) -> str | None:
    """How two outputs differ: in their words, or in numbers by more than `tolerance`; None if they do not."""
    for there, here in zip(shown.splitlines() + [""] * 99, printed.splitlines() or [""], strict=False):
        words = [re.sub(r"[\s─━-]+", " ", NUMBER.sub("#", line)).strip() for line in (there, here)]
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (there, here)]
        near = tolerance is None or all(abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in zip(*numbers))
        if words[0] != words[1] or not near:
            return f"shown:   {there}\nprinted: {here}"
    if len(shown.splitlines()) > len(printed.splitlines()):
        return f"shown:   {shown.splitlines()[len(printed.splitlines())]}\nprinted: nothing more"
    return None


def go(path: Path, directory: Path, *, write: bool = False, tiny: Path | None = None) -> list[str]:
    """Run a page in `directory`; write its outputs, or return what differs from what it shows."""
    page, wrong, moved = path.read_text(encoding="utf-8"), [], 0
    runner, written = Runner(directory, tiny), page
    for block in blocks(page):
        if "skip" in block.note:
            continue
        began = time.monotonic()
        printed = runner(block)
        print(f"{path.name}:{block.line}  {time.monotonic() - began:.0f} s", file=sys.stderr)
        if write:
            put = f"\n```text\n{printed}```\n" if printed.strip() else ""
            written = written[: block.start + moved] + put + written[block.end + moved :]
            moved += len(put) - (block.end - block.start)
            path.write_text(written, encoding="utf-8")
        elif block.exit or not tiny:
            if found := difference(block.shown or "", printed, None if tiny else block.tolerance):
                wrong.append(f"{path}:{block.line}\n{found}")
    for name in sorted(set(re.findall(r"\(results/([\w.-]+)\)", page))):
        if write and (directory / name).exists():
            shutil.copy(directory / name, path.parent / "results" / name)
        elif not (path.parent / "results" / name).exists():
            wrong.append(f"{path}: results/{name} is linked and not there")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "check"))
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--short", type=Path, metavar="MODEL", help="a small model's directory: two steps of that")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    wrong = []
    for page in options.pages:
        with tempfile.TemporaryDirectory() as directory:
            wrong += go(page, Path(directory), write=options.what == "run", tiny=options.short)
    print("\n".join(wrong) or "all as shown")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
