"""What was meant, where a name is not among those accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """`` Did you mean 'int8'?``, to go behind a message; nothing where no accepted name is like the one given."""
    return suggestion(nearest(given, accepted))


def nearest(given: object, accepted: Iterable[str], at_most: int = 1) -> list[str]:
    """The accepted names most like the one given, best first."""
    return difflib.get_close_matches(str(given), list(accepted), n=at_most)


def suggestion(names: list[str]) -> str:
    """The first of ``names`` as a question, with a space before it; nothing where there is none."""
    return f" Did you mean {names[0]!r}?" if names else ""


def either(names: Sequence[str]) -> str:
    """``'a', 'b' or 'c'``."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
