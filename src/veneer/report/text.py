"""Numbers as people read them; "–" stands for a value that is not there."""

from __future__ import annotations

from typing import Any

from veneer.report.run import is_number

NONE = "–"
NBSP = "\N{NO-BREAK SPACE}"


def number(value: Any) -> str:
    """A count with its thousands separated, or a measurement with four significant digits."""
    if not is_number(value):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage, its parts held together."""
    return f"{100 * value:.{digits}f}{NBSP}%" if is_number(value) else NONE


def size(value: Any) -> str:
    """Bytes, in powers of 1024."""
    if not is_number(value):
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g}{NBSP}{unit}"
        value /= 1024
    return f"{value:.3g}{NBSP}GiB"


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
