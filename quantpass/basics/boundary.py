"""The boundary of a site: what goes wrong with one site is a verdict on that site, never the end of a compilation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject

logger = logging.getLogger("quantpass")

RAISE = "QUANTPASS_RAISE"
"""Environment variable: where it is set and not empty, unexpected exceptions are raised. For tests and debugging."""

T = TypeVar("T")


def guarded(do: Callable[[], T], refused: Callable[[Reject], T], what: str) -> T:
    """``do()``; where that raises unexpectedly, ``refused`` with the reason, and the traceback in the log.

    Args:
        do: reads, plans or judges one site.
        refused: makes of a :class:`~quantpass.basics.reject.Reject` what ``do`` would have returned.
        what: what is being done, in words.
    """
    try:
        return do()
    except Exception as error:
        if must_raise():
            raise
        logger.exception("%s failed; the site stays as it was", what)
        return refused(failed("read.failed", what, error))


def must_raise() -> bool:
    """True where unexpected exceptions are to be seen: see :data:`RAISE`."""
    return bool(os.environ.get(RAISE))


def failed(rule: str, what: str, error: BaseException) -> Reject:
    """An unexpected exception as a reason."""
    first = str(error).strip().splitlines()
    return refuse(
        rule,
        f"{what} failed: {type(error).__name__}{': ' + first[0] if first else ''}",
    )
