"""The versions page says what was run, and with which state of the code."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantpass import patterns
from quantpass.adoption import tools as adopted
from quantpass.graph.torch_versions import TESTED
from quantpass.lowering.torchair_versions import GENERATIONS
from tests.matrix import page, tools
from tests.matrix.cells import (
    CELLS,
    COMPATIBILITY,
    FEW,
    LEFT_OUT,
    NOT_PREVIEWED,
    ROOT,
    SHARES,
    TORCHAIR,
    code_version,
)
from tests.matrix.few import spread


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
        "core": {"code": "0123", "passed": 7, "failed": {"tests.test_doors::test_one": "it\n| broke"}},
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


def test_every_test_of_a_previewed_graph_is_run_with_every_generation():
    """A file that is not named as a whole has each of its tests named, but for those that say why not."""
    with_torchair = re.compile(r"^def (test_\w+)\([^)]*\btorchair\b[^)]*\):\n(?:(?:    .*)?\n)+", re.M)
    shares = {node for share in TORCHAIR for node in SHARES[share]}
    left_out = {f"tests/test_{name}.py" for name in NOT_PREVIEWED}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        for test in with_torchair.finditer(path.read_text()):
            if "preview_ge(" in test[0]:
                assert {name, f"{name}::{test[1]}"} & shares or name in left_out, f"{name}::{test[1]}"


def test_the_page_for_an_ascend_machine_names_the_cells():
    text = (ROOT / "docs" / "npu.md").read_text()
    for torch, group in itertools.groupby(CELLS, key=lambda c: c.torch):
        cells = list(group)
        beside = [f"{c.torch_npu} ({c.generation})" for c in cells if c.torch_npu]
        beside = beside or ["none: there is no torch_npu for it; on the CPU"]
        assert f"| {torch} | {cells[0].python} | {', '.join(beside)} |" in text


def test_two_versions_of_a_tool_are_compared():
    counts = {"sites": 2, "cpu": 2, "ascend310p": 0, "ascend910b": 2}
    versions = {
        "2.0": {"torch": "2.13.0", "schemes": {"acme, int8": counts, "acme, int4": counts}},
        "1.0": {"torch": "2.13.0", "schemes": {"acme, int8": counts, "acme, int4": "ImportError: no int4"}},
    }
    text = tools.section({"acme": versions})
    assert "| acme | 2.0 | 2.13.0 | 2 of 2 | 4 | 4 | 0 | 4 |" in text
    assert "| acme | 1.0 | 2.13.0 | 1 of 2 | 2 | 2 | 0 | 2 |" in text
    assert "* acme, int4: sites 2" in text and "with 2.0; ImportError: no int4 with 1.0" in text
    assert "Every scheme is read alike." in tools.section({"acme": {"2.0": versions["2.0"], "1.0": versions["2.0"]}})


READERS = {
    "torchao_affine": "torchao",
    "quanto": "optimum-quanto",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "gptq": "GPTQModel",
    "awq": "autoawq",
    "modelopt": "nvidia-modelopt",
}
"""A file that knows a tool by name, and the tool's package."""


def test_every_tool_that_is_read_by_name_is_tried_in_two_versions_or_says_why_not():
    files = {Path(sys.modules[dialect.__module__].__file__).stem for dialect in patterns.KNOWN}
    files |= {path.stem for path in Path(adopted.__file__).parent.glob("*.py")} - {"__init__"}
    said = " ".join(what + why for what, why in tools.NOT_TRIED)
    assert {f for f in files if f not in READERS and f not in said} == set()
    assert {READERS[f] for f in files if f in READERS} == set(tools.TOOLS) == set(tools.load_results())
    for package, versions in tools.load_results().items():
        assert tuple(versions) == tools.TOOLS[package], f"run python -m tests.matrix.tools {package}"


@pytest.mark.parametrize(
    ("cases", "few", "kept"),
    [(10, 3, [0, 4, 9]), (10, 2, [0, 9]), (10, 1, [0]), (3, 3, [0, 1, 2]), (2, 3, [0, 1]), (10, 0, [*range(10)])],
)
def test_a_few_of_many_cases(cases, few, kept):
    assert spread(range(cases), few) == kept


def test_the_fast_share_takes_every_test_a_few_times_and_leaves_out_files_that_are_there(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_many(n): pass\ndef test_once(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.matrix.few", "--few", str(FEW), "-p", "no:xdist"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"{FEW + 1} passed, {9 - FEW} deselected" in done.stdout
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in LEFT_OUT)
    assert [a for a in SHARES["fast"] if a.startswith("--ignore=tests/test_")] == [
        f"--ignore=tests/test_{name}.py" for name in LEFT_OUT
    ]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_a_cell_names_the_generation_of_its_wheel(cell):
    names = [g.name for g in GENERATIONS if cell.torch_npu in g.wheels]
    assert names == ([cell.generation] if cell.torch_npu else [])
    assert (ROOT / COMPATIBILITY[0]).is_file()
