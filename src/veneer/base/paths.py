"""Where Veneer keeps what it downloads and derives."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """$VENEER_CACHE, else $XDG_CACHE_HOME/veneer, else the platform's own place."""
    if os.environ.get("VENEER_CACHE"):
        return Path(os.environ["VENEER_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "veneer"
    return Path(platformdirs.user_cache_dir("veneer", appauthor=False))
