"""What each chip supports, as tables: for the command line and for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tabulate import tabulate

from quantpass.basics.reasons import CHECKPOINTS, PLANNING, READING, REWRITING, Reason
from quantpass.chips import CHIPS
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.requirements import Dtype, name_of
from quantpass.chips.rules import Chip, Rule


def chip_overview(style: str = "simple") -> str:
    """One line a chip."""
    rows = [[c.name, c.title, _device_names(c), len(c.rules)] for c in CHIPS.values()]
    return tabulate(rows, headers=["target", "product", "device names", "rules"], tablefmt=style)


def _device_names(chip: Chip) -> str:
    """A family's SoC names, shortened to what follows the common part."""
    if not chip.soc_names:
        return "-"
    first, last = chip.soc_names[0], chip.soc_names[-1]
    return f"{first} ... {last}" if len(chip.soc_names) > 6 else ", ".join(chip.soc_names)


def chip_tables(chip: Chip, style: str = "simple") -> Iterator[tuple[str, str]]:
    """``(title, table)`` pairs: dtype tables as in the module documents, then every other rule."""
    for rule in chip.rules:
        if isinstance(rule.need, DtypeTable):
            yield f"{rule.op}: dtypes ({rule.id})", _dtype_table(rule.need, style)
    operators = dict.fromkeys(r.op for r in chip.rules)
    for op in operators:
        rows = [_rule_row(r) for r in chip.rules if r.op == op and not isinstance(r.need, DtypeTable)]
        if rows:
            headers = ["rule", "applies", "demands", "evidence", "source"]
            yield f"{op}: rules", tabulate(rows, headers=headers, tablefmt=style)


def _dtype_table(table: DtypeTable, style: str) -> str:
    rows = [[*(_cell(c) for c in row.cells), _marks(row)] for row in table.rows]
    return tabulate(rows, headers=[*table.columns, ""], tablefmt=style)


def _cell(cell: tuple[Dtype, ...]) -> str:
    return "/".join(name_of(d) for d in cell)


def _marks(row: Row) -> str:
    if row.contradicted:
        return f"contradicted: {row.contradicted}"
    return "" if len(row.modes) == 2 else f"{row.modes[0]} only"


def _rule_row(rule: Rule) -> list[str]:
    applies = [rule.when.words] if rule.when else []
    if len(rule.modes) == 1:
        applies.append(f"{rule.modes[0]} mode")
    evidence = rule.evidence + (", contradicted" if rule.contradicted else "")
    return [rule.id, " and ".join(applies) or "always", rule.need.want, evidence, rule.source]


def chip_data(chip: Chip) -> dict[str, Any]:
    """A chip and its rules as plain data; a dtype table's lines as lists of what each column accepts."""
    return {
        "name": chip.name,
        "title": chip.title,
        "soc_names": list(chip.soc_names),
        "rules": [_rule_data(r) for r in chip.rules],
    }


def _rule_data(rule: Rule) -> dict[str, Any]:
    data = {
        "id": rule.id,
        "operator": rule.op.name,
        "applies": rule.when.words if rule.when else "always",
        "modes": list(rule.modes),
        "demands": rule.need.want,
        "evidence": rule.evidence.split(", "),
        "contradicted": rule.contradicted,
        "source": rule.source,
        "hint": rule.hint,
    }
    if isinstance(rule.need, DtypeTable):
        lines = [
            {"modes": list(r.modes), "contradicted": r.contradicted}
            | {c: list(cell) for c, cell in zip(rule.need.columns, r.cells, strict=True)}
            for r in rule.need.rows
        ]
        data["lines"] = lines
    return data


def reason_table(reasons: Iterable[Reason], style: str = "simple") -> str:
    """Reasons as a table: id, when, what is wanted, what to do, why it is so."""
    rows = [[r.rule, r.means, r.want, r.hint, r.source] for r in reasons]
    return tabulate(
        rows, headers=["reason", "when", "wanted", "what to do", "source"], tablefmt=style, disable_numparse=True
    )


def reasons_markdown() -> str:
    """The page ``docs/reasons.md``."""
    parts = [
        "# Why a site is not fused",
        "",
        "Made by `make pages` from `quantpass/basics/reasons.py`; a test keeps it so. A report names these ids, or a rule",
        "of the chip ([chips.md](chips.md)), and adds what was found.",
    ]
    sections = (("Reading", READING), ("Planning", PLANNING), ("Rewriting", REWRITING), ("Checkpoints", CHECKPOINTS))
    for title, reasons in sections:
        parts += ["", f"## {title}", "", reason_table(reasons, "github")]
    return "\n".join(parts) + "\n"


def markdown() -> str:
    """The page ``docs/chips.md``."""
    parts = [
        "# What each chip supports",
        "",
        "Made by `make pages` from the rule rows in `quantpass/chips/`; a test keeps it so. *Evidence*: **documented**",
        "by the vendor, read in the vendor's **code**, **probed** on the vendor's wheel, **inferred**. A",
        "**contradicted** rule is one about which documents and code disagree: it forbids unless named in",
        "`allow=(...)`.",
        "",
        chip_overview("github"),
    ]
    for chip in CHIPS.values():
        parts += ["", f"## {chip.title}: `{chip.name}`"]
        for title, table in chip_tables(chip, "github"):
            parts += ["", f"### {title}", "", table]
    return "\n".join(parts) + "\n"
