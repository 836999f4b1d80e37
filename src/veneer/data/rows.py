"""One row of a data source, and the error for a row that can be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError


@dataclass(frozen=True)
class Row:
    """A row as the file has it. `where` names it for messages to the user, as ``file:line``."""

    values: dict[str, Any]
    where: str


class RowError(DataError):
    """One bad row. `reason` is the kind of fault, the same for every row that has it; the message has the details."""

    def __init__(self, where: str, reason: str, detail: str = "", at: str = "") -> None:
        super().__init__(f"{where}: {at + ' ' if at else ''}{reason}{detail}")
        self.where = where
        self.reason = reason


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
