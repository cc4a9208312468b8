"""Reports as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_text(data: Any, path: str | Path | None = None) -> str:
    """Plain data as JSON; also written to ``path`` where one is given."""
    text = json.dumps(data, indent=2)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text
