"""What each chip accepts: one file a chip family, rule rows as data, each with its source."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from quantpass.chips.ascend310p import ASCEND310P
from quantpass.chips.ascend910_93 import ASCEND910_93
from quantpass.chips.ascend910b import ASCEND910B
from quantpass.chips.ascend950 import ASCEND950
from quantpass.chips.cpu import CPU
from quantpass.chips.rules import Chip

CHIPS = MappingProxyType({c.name: c for c in (ASCEND310P, ASCEND910B, ASCEND910_93, ASCEND950, CPU)})


def chip_named(target: str) -> Chip:
    """The chip for a target name (``"ascend310p"``) or a SoC name (``"Ascend310P3"``).

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: no chip has that name.
    """
    if not isinstance(target, str):
        raise TypeError(f"target is {target!r}; give a chip's name: {', '.join(CHIPS)}")
    found = CHIPS.get(target.lower())
    if found is not None:
        return found
    for chip in CHIPS.values():
        if any(target.lower().startswith(prefix.lower()) for prefix in chip.soc_prefixes):
            return chip
    near = difflib.get_close_matches(target.lower(), CHIPS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown target {target!r}. Accepted: {', '.join(CHIPS)}, and SoC names such as 'Ascend310P3' or "
        f"'Ascend910B2'.{meant}"
    )
