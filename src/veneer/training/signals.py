"""Ctrl-C and SIGTERM as a flag that a loop looks at, so that it can save before it ends."""

from __future__ import annotations

import signal
import sys
from typing import Any


class Interrupt:
    """Inside a `with` block, the first Ctrl-C or SIGTERM makes this true; the second ends the program."""

    def __init__(self) -> None:
        self.count = 0
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.count > 0

    def _stop(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        print("\nstopping: saving a checkpoint (press Ctrl-C again to quit now)", file=sys.stderr, flush=True)

    def __enter__(self) -> Interrupt:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._stop)
        except ValueError:  # not in the main thread: whoever runs us handles signals
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
