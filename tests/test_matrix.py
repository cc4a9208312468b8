"""The versions page says what was run, and with which state of the code."""

import pytest

from quantpass.graph.torch_versions import TESTED
from quantpass.lowering.torchair_versions import GENERATIONS
from tests.matrix import page
from tests.matrix.cells import CELLS, COMPATIBILITY, ROOT, TORCHAIR, code_version


def test_the_page_is_what_the_cells_gave():
    assert page.page(page.load_results()) == page.PAGE.read_text(), "write it again: python -m tests.matrix.run --page"


def test_the_page_names_the_current_compatibility_modules():
    changed = f"{' or '.join(COMPATIBILITY)} changed: run the matrix again (make matrix)"
    assert f"The compatibility modules are `{code_version()}`" in page.PAGE.read_text(), changed
    ran = [gave["code"] for found in page.load_results().values() for gave in found["ran"].values()]
    assert code_version() in ran, changed


def test_a_cell_that_was_not_run_says_so():
    text = page.page({})
    assert text.count("| not run |") == len(CELLS)


def test_a_cell_says_what_was_run_and_what_failed():
    name = CELLS[0].name
    ran = {
        "doors": {"code": code_version(), "passed": 1, "failed": {"fuse": "TypeError: no"}},
        "core": {"code": "0123", "passed": 7, "failed": {"tests.test_doors::test_one": "it | broke"}},
    }  # fmt: skip
    text = page.page({name: {"python": "3.12.1", "ran": ran}})
    assert "| doors | core |" in text
    assert "| 3.12.1 | 1 / 1 | 7 / 1 `0123` |" in text
    assert f"| {name} | `test_doors::test_one` | it \\| broke |" in text
    assert f"| {name} | `fuse` | TypeError: no |" in text


def test_every_pytorch_has_the_core_and_every_generation_its_tests():
    assert {c.torch for c in CELLS if "core" in c.shares} == {c.torch for c in CELLS} == {f"{v}.0" for v in TESTED}
    assert {c.generation for c in CELLS if {*TORCHAIR} <= {*c.shares}} == {g.name for g in GENERATIONS if g.tested}
    assert {c.python for c in CELLS} == {"3.10", "3.11", "3.12", "3.13"}


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_cell_names_the_generation_of_its_wheel(cell):
    names = [g.name for g in GENERATIONS if cell.torch_npu in g.wheels]
    assert names == ([cell.generation] if cell.torch_npu else [])
    assert (ROOT / COMPATIBILITY[0]).is_file()
