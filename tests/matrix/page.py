"""``docs/versions.md``, from what the cells gave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.matrix.cells import CELLS, ROOT, Cell, code_version

PAGE = ROOT / "docs" / "versions.md"
RESULTS = Path(__file__).with_name("results.json")

_CUDA_BUILD = (
    "this torch_npu and a CUDA build of PyTorch claim the same keys of the allocators' configuration, which ends the "
    "process at import; it wants PyTorch's CPU build, and there was none"
)
_NO_EX_MODE = "generation C's CompilerConfig has no mode `npugraph_ex`, which the test sets; reduce-overhead it has"
_OLD_TORCHAO = "the test names an attribute of a weight as torchao 0.18 calls it"
_SINCE = "failed with the state that this cell names; passed with a later one, run alone"
KNOWN: tuple[tuple[str, str, str], ...] = (
    ("a_changed_weight_is_prepared_anew", "2.9.0/2.9.0", _SINCE),
    ("emulated_kernels_under_the_vendors_schemas", "2.9.0/2.9.0", _SINCE),
    ("the_emulated_schemas_are_the_vendors", "2.9.0/2.9.0", _SINCE),
    ("a_subclass_weight_quantized_again", "2.8.0/*", _OLD_TORCHAO),
    ("a_subclass_weight_quantized_again", "2.9.0/*", _OLD_TORCHAO),
    ("captured_modes_get_the_vendors_calls", "2.9.0/2.9.0", _NO_EX_MODE),
    ("captured_modes_get_the_vendors_calls", "2.8.0/2.8.0.post2", _NO_EX_MODE),
    ("torchair", "2.14.0/2.14.0", _CUDA_BUILD),
    ("preview_ge", "2.14.0/2.14.0", _CUDA_BUILD),
    ("npu", "2.14.0/2.14.0", _CUDA_BUILD),
    ("register", "2.14.0/2.14.0", _CUDA_BUILD),
)
"""Part of a failed test's name, a cell's name with wildcards, and the reason in one line."""

HEAD = """# Versions

`make matrix` writes this page (`make matrix CELLS=2.10.0/2.10.0.post4` runs one cell). A cell is a PyTorch beside a
torch_npu: torchair's Python is byte for byte the same in many wheels of torch_npu, whatever PyTorch they are for, so its
*generations* are what is run. Everything runs on a CPU: torch_npu's libraries are on stand-ins for CANN, PyTorch's CUDA
builds on stand-ins for CUDA. No device was there.

The compatibility modules were `{code}`. A cell that says otherwise was run with an earlier state of them; *not run*
means just that. *All* tests: what depends on PyTorch and on torchair; *torchair*: the tests that start the real one, for
a PyTorch whose other tests ran in another cell; *none*: only the doors were tried. They are a small selection of the
suite (`tests/matrix/run.py`): the compatibility modules, how weights are found, the doors that need torchair. *Doors*:
each door of the README, used once (`tests/matrix/doors.py`). The whole suite runs with 2.13.0 alone. torchao is 0.13.0
beside PyTorch 2.8, 0.14.1 beside 2.9, 0.18.0 beside newer ones; setuptools is older than 81, which generation C needs.

"""

GENERATIONS = """
## Which torchair is in which torch_npu

| generation | torch_npu | the pass can be put into a config (`register`) | `npugraph_ex_options` |
|---|---|---|---|
{rows}

B has no hook for passes; `quantpass.npu_backend` needs none, and is not tested with it. A torchair whose files are none of
these is named in the report of the doors for an NPU and of `preview_ge`, with the digest of its files.
"""


def load_results() -> dict[str, dict[str, Any]]:
    """Cell to what it gave."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # type: ignore[no-any-return]


def reason(test: str, cell: str) -> str:
    """Why a test fails in a cell, where that is known."""
    return next((why for part, where, why in KNOWN if part in test and fnmatch(cell, where)), "")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    rows = ["| PyTorch | torch_npu | torchair | Python | tests | passed | failed | doors | compatibility |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    rows += [_row(cell, results.get(cell.name)) for cell in CELLS]
    text = HEAD.format(code=code_version()) + "\n".join(rows) + "\n"
    return text + _failures(results) + _generations()


def _row(cell: Cell, found: Mapping[str, Any] | None) -> str:
    names = [cell.torch, cell.torch_npu, cell.generation]
    if found is None:
        return "| " + " | ".join([*names, cell.python, "", "not run", "", "", ""]) + " |"
    bad = [door for door, why in found["doors"].items() if why]
    good = len(found["doors"]) - len(bad)
    doors = f"all {good}" if not bad else f"{good}, not {', '.join(bad)}"
    ran = found["tests"] != "none"
    counts = [found["tests"], str(found["passed"]) if ran else "", str(len(found["failed"])) if ran else ""]
    return "| " + " | ".join([*names, found["python"], *counts, doors, f"`{found['code']}`"]) + " |"


def _failures(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for cell in CELLS:
        found = results.get(cell.name, {})
        for test, message in found.get("failed", {}).items():
            why = reason(test, cell.name) or message.replace("|", "\\|")
            lines.append(f"| {cell.name} | `{test.removeprefix('tests.')}` | {why} |")
        for door, message in found.get("doors", {}).items():
            if message:
                why = reason(door, cell.name) or message.replace("|", "\\|")
                lines.append(f"| {cell.name} | {door} | {why} |")
    if not lines:
        return ""
    return "\n## What fails, and why\n\n| cell | test | reason |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def _generations() -> str:
    from quantpass.lowering.torchair_versions import GENERATIONS as KNOWN_GENERATIONS

    rows = []
    for g in KNOWN_GENERATIONS:
        hook = "no" if g.name == "B" else "yes"
        ex = {"B": "no", "C": "through torchair"}.get(g.name, "yes")
        rows.append(f"| {g.name} | {', '.join(g.wheels)} | {hook} | {ex} |")
    return GENERATIONS.format(rows="\n".join(rows))
