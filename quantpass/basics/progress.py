"""Counting aloud what takes more than a few seconds, for who watches a terminal."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 3.0
"""Seconds before anything is shown."""


def counted(items: Iterable[T], what: str, unit: str = "matmuls") -> Iterator[T]:
    """``items``; shown on stderr as they come, if that is a terminal and tqdm is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield from items
        return
    bar = importlib.import_module("tqdm").tqdm
    yield from bar(items, desc=what, unit=f" {unit}", delay=_PATIENCE, leave=False, file=sys.stderr)
