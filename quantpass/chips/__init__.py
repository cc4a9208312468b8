"""What each chip accepts: one file a chip family, rule rows as data, each with its source."""

from __future__ import annotations

import re
from types import MappingProxyType

from quantpass.basics.suggestions import nearest, suggestion
from quantpass.chips.ascend310p import ASCEND310P
from quantpass.chips.ascend910_93 import ASCEND910_93
from quantpass.chips.ascend910b import ASCEND910B
from quantpass.chips.ascend950 import ASCEND950
from quantpass.chips.cpu import CPU
from quantpass.chips.dtype_table import DtypeTable
from quantpass.chips.rules import Chip

CHIPS = MappingProxyType({c.name: c for c in (ASCEND310P, ASCEND910B, ASCEND910_93, ASCEND950, CPU)})

NPUS = tuple(c.name for c in CHIPS.values() if c.soc_names)
"""The targets that are Ascend chips."""

DOCUMENTED = tuple(c.name for c in CHIPS.values() if c.documented)
"""The targets that the two module documents speak of."""


def chip_named(target: str) -> Chip:
    """The chip for a target name (``"ascend310p"``) or a SoC name (``"Ascend310P3"``), spelled as the vendor does.

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: no chip has that name; the message names the nearest one.
    """
    if not isinstance(target, str):
        raise TypeError(f"target is {target!r}; give a chip's name: {', '.join(CHIPS)}")
    for chip in CHIPS.values():
        if target in (chip.name, *chip.soc_prefixes, *chip.soc_names):
            return chip
    if len(re.split(r"[,;\s]+", target.strip(",; "))) > 1:
        raise ValueError(
            f"target {target!r} names several chips in one text. Give one name each: a list where a function takes "
            "several targets, -t repeated on the command line."
        )
    meant = suggestion(_nearest(target))
    raise ValueError(
        f"unknown target {target!r}. Accepted: {', '.join(CHIPS)}, and SoC names such as 'Ascend310P3' or "
        f"'Ascend910B2'.{meant}"
    )


def chip_of_device(soc_name: str) -> Chip:
    """The chip for the name that a driver gives; one newer than the names known here goes by its family.

    Raises:
        ValueError: no family has such names.
    """
    for chip in CHIPS.values():
        if soc_name.startswith(chip.soc_prefixes):
            return chip
    return chip_named(soc_name)


def _nearest(target: str) -> list[str]:
    """The accepted names most like ``target``, whatever its case."""
    names = {n.lower(): n for c in CHIPS.values() for n in (*c.soc_names, c.name)}
    given = target.strip().lower()
    near = nearest(given, names, at_most=8)
    # A family's name is meant where digits are missing, not one chip of the family.
    family = [n for n in near if n in CHIPS and len(n) >= len(given)]
    return [names[n] for n in (family if near[:1] != [given] and family else near)]


def liftable_rules() -> dict[str, tuple[str, ...]]:
    """The rules that ``allow`` can lift because documents and code disagree about them, and the chips that have them."""
    found: dict[str, list[str]] = {}
    for chip in CHIPS.values():
        for rule in chip.rules:
            rows = rule.need.rows if isinstance(rule.need, DtypeTable) else ()
            ids = [rule.id] if rule.contradicted else [r.contradicted for r in rows if r.contradicted]
            for name in ids:
                found.setdefault(name, [])
                if chip.name not in found[name]:
                    found[name].append(chip.name)
    return {name: tuple(chips) for name, chips in found.items()}
