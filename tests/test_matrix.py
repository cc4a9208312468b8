"""The versions page says what was run, and with which state of the code."""

import pytest

from tests.matrix import page
from tests.matrix.cells import CELLS, COMPATIBILITY, ROOT, code_version


def test_the_page_is_what_the_cells_gave():
    assert page.page(page.load_results()) == page.PAGE.read_text(), "write it again: python -m tests.matrix.run --page"


def test_the_page_names_the_current_compatibility_modules():
    changed = f"{' or '.join(COMPATIBILITY)} changed: run the matrix again (make matrix)"
    assert f"The compatibility modules were `{code_version()}`" in page.PAGE.read_text(), changed
    assert any(found["code"] == code_version() for found in page.load_results().values()), changed


def test_a_cell_that_was_not_run_says_so():
    text = page.page({})
    assert text.count("| not run |") == len(CELLS)


def test_a_cell_says_what_failed_and_why():
    name = CELLS[0].name
    found = {
        "code": "0123", "tests": "all", "python": "3.12.1", "passed": 7,
        "failed": {"tests.test_doors::test_one": "it | broke"}, "doors": {"explain": "", "fuse": "TypeError: no"},
    }  # fmt: skip
    text = page.page({name: found})
    assert "| all | 7 | 1 | 1, not fuse | `0123` |" in text
    assert f"| {name} | `test_doors::test_one` | it \\| broke |" in text
    assert f"| {name} | fuse | TypeError: no |" in text


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_cell_names_the_generation_of_its_wheel(cell):
    from quantpass.lowering.torchair_versions import GENERATIONS

    (generation,) = (g for g in GENERATIONS if cell.torch_npu in g.wheels)
    assert generation.name == cell.generation
    assert (ROOT / COMPATIBILITY[0]).is_file()
