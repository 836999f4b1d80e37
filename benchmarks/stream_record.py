"""Results of `bench_stream.py`, written as they come."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path


class Record:
    """Results, written as they come; a failing measurement is one of them. A process adds to what the file holds."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self.out, self.began, self.limit = out, time.time(), limit
        self.values: dict = {"cases": {}}
        if out and out.exists():
            self.values = json.loads(out.read_text(encoding="utf-8"))

    def measure(self, case: str, name: str, function) -> dict | None:
        if time.time() - self.began > self.limit:
            found = {"failed": "left out: --limit-seconds"}
        else:
            try:
                found = function()
            except Exception as error:  # noqa: BLE001 - any failure of one measurement is a result
                last = traceback.extract_tb(error.__traceback__)[-1]
                found = {
                    "failed": f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
                }
                error.__traceback__ = None
        self.values["cases"].setdefault(case, {})[name] = found
        print(f"{case} {name:28s} {json.dumps(found)}  [{time.time() - self.began:.0f} s]", flush=True)
        self.write()
        return None if "failed" in found else found

    def write(self) -> None:
        if self.out:
            self.out.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
