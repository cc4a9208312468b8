"""Where quantpass keeps what it need not make twice."""

import os
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/quantpass``, by default ``~/.cache/quantpass``. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantpass"
