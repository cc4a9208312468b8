"""Every id that a report can name stands in one table: the catalogue of reasons, or the rules of a chip."""

import ast
import re
from pathlib import Path

import pytest

from quantpass.basics.reasons import REASONS, refuse
from quantpass.chips import CHIPS
from quantpass.chips.tables import reasons_markdown

ROOT = Path(__file__).resolve().parents[3]
HOME = ROOT / "quantpass" / "basics" / "reasons.py"
_ID = re.compile(r"(read|plan|rewrite|qmm|qmmd|wqmm|requantize|numerics|weights|torchair|checkpoint)(\.[a-z_0-9]+)+")
FAMILIES = {"{op.family}.weight.runtime", "{op.family}.bias.saturates"}
KERNELS = ROOT / "quantpass" / "operators"


def texts(path):
    """String constants of a file, docstrings left out; of an f-string its pattern."""
    tree = ast.parse(path.read_text())
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield ast.unparse(node)[2:-1]


def named():
    """The ids that the code of reading, planning and rewriting names."""
    found = set()
    for folder in ("quantpass", "patterns"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == HOME or KERNELS in path.parents or (path.parts[-2] == "chips" and path.name != "legality.py"):
                continue
            for text in texts(path):
                if _ID.fullmatch(text):
                    found.add(text)
                elif text in FAMILIES:
                    found.update(text.replace("{op.family}", f) for f in ("qmm", "wqmm"))
    return found


def test_what_the_code_names_is_in_a_table():
    rules = {r.id for c in CHIPS.values() for r in c.rules}
    assert named() - set(REASONS) - rules == set()


def test_what_kernels_refuse_is_a_rule_of_a_chip():
    """An id, or what ``.dtype``, ``.shape`` and the like are put behind."""
    rules = {r.id for c in CHIPS.values() for r in c.rules}
    known = {r[: i if i > 0 else None] for r in rules for i in (len(r), *(m.start() for m in re.finditer(r"\.", r)))}
    asked = {t for path in KERNELS.glob("*.py") for t in texts(path) if _ID.fullmatch(t)}
    columns = {t for t in asked if t.rpartition(".")[0] in rules}
    assert asked, "no kernel names a rule"
    assert asked - columns - known == set()


def test_what_is_in_the_catalogue_is_named():
    assert set(REASONS) - named() == set()


def test_no_reason_has_the_id_of_a_rule():
    assert not set(REASONS) & {r.id for c in CHIPS.values() for r in c.rules}


def test_an_unknown_id_is_an_error():
    with pytest.raises(KeyError):
        refuse("read.weigth", "a slip of the pen")


def test_a_fact_and_what_more_is_known_go_with_the_table():
    plain, more = refuse("plan.none", "a fact"), refuse("plan.none", "a fact", want="this", hint="that")
    assert (plain.want, plain.doc) == (REASONS["plan.none"].want, REASONS["plan.none"].source)
    assert (more.want, more.hint) == ("this", "that")


def test_the_page_is_made_from_the_catalogue():
    assert (ROOT / "docs" / "reasons.md").read_text() == reasons_markdown(), "run `make pages`"
