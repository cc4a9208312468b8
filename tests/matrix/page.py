"""``docs/versions.md``, from what the cells gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.matrix import tools
from tests.matrix.cells import CELLS, FEW, LEFT_OUT, ROOT, code_version

PAGE = ROOT / "docs" / "versions.md"
RESULTS = Path(__file__).with_name("results.json")

_SNAPSHOT = (
    "the snapshot is 2.13's; 2.15 traces a Linear's last view as `_unsafe_view`, in the graph before fusing, which is numbered "
    "otherwise; what is fused is the same"
)
_DYNAMO = (
    "Dynamo of 2.11 and 2.12 fails on a weight of torchao 0.18, without quantpass too: `layer.compile(backend='eager')` on the "
    "quantized Linear ends alike. With torchao 0.17 this test passes, and others are refused: Dynamo makes the sizes of "
    "such weights symbolic where layers are compiled one by one"
)
_BATCH = (
    "the snapshot is generation F's: C, D and D' make BatchMatMul of a matmul that is not fused, where later ones make MatMul; what is "
    "fused is the same"
)
_NO_CANN = (
    "C's converter of the vendor's own npu_weight_quant_batchmatmul reads version.info of an installed CANN, which the stand-ins "
    "have not"
)
_SHARED_FRAME = (
    "torchao 0.13 and 0.14.1 multiply in one function that all layers share: compiled one by one, layers of different sizes make the sizes of "
    "its weights symbolic, which are refused. In one `torch.compile`, and with layers of one size, they are fused"
)
_PARTITIONS = (
    "torchao's x86 quantizer finds no Linear here and quantizes nothing: PyTorch's `get_source_partitions`, before it looked at "
    "`nn_module_stack` too, knew only what `torch.export` records with `strict=True`; so exported, both are fused with 2.8"
)
_NO_GRANULARITY = "torchao 0.13 and 0.14.1 have no `granularity` of int8 weights, which the test asks for"
_NO_STATIC = "torchao 0.13 and 0.14.1 have no Int8StaticActivationInt8WeightConfig, which the test asks for"
_NAN = (
    "The choose_qparams of PyTorch 2.8 and 2.9 refuses an activation that holds NaN, with which the test calls it too"
)
_GUARD = (
    "PyTorch 2.8 traces no batched matmul of rows that only the run counts: `torch.export` ends alike, before quantpass"
)
_SCAN = "The scan of 2.8 and 2.9 permutes what it slices, so that this node's name is another; what is read of it is the same"
_WITH_X86 = ("x86_quantizer]", "test_pt2e_graph_module_in_place", "test_pt2e_on_310p_says_what_the_chip_returns")
_WITH_GRANULARITY = ("test_torchao_weight_only_on_310p", "test_torchao_dynamic_w8a8_keeps_its_bits")
_DRAWN = (
    "mended since, with every PyTorch: the test drew a result above float16's largest number, where a 310P saturates, and held it to a "
    "bound around the exact one"
)
_ARCHIVE = (
    "mended since: PyTorch 2.14 logs a traceback of its own about a file that is no archive, which is now asked first"
)
_COARSE = (
    "PyTorch 2.8 and 2.9 draw 256 different numbers for a fresh bfloat16 Linear, so that its weights do lie on a grid; newer ones "
    "draw more"
)
_LOADED = "PyTorch 2.9 can't load the program that it saved: `torch.export.load` ends on parameters of integers"
_ZEROS = "mended since, with every PyTorch: weights whose first rows are zeros"
_NO_WHEEL = (
    "there is no torch_npu for 2.15, which the test wants to be told to install; what is said is the newest there is, and beside which "
    "PyTorch"
)
_SAY_WHAT_TO_INSTALL = (
    "test_without_the_vendors_operators_the_error_says_what_to_install",
    "test_without_torch_npu_the_error_says_what_to_install",
    "test_preview::test_without_torch_npu",
)
_NO_GE = "without a torch_npu the selftest's GE route is not run, and said not to be"
_WORDED = "2.15 words its own error about sizes otherwise, and logs it with a traceback of its own first"
_LOGGED = (
    "PyTorch 2.14 logs a traceback of its own when a model fails while it is traced; what quantpass prints behind it "
    "has the user's frames alone, as with 2.13"
)

KNOWN: tuple[tuple[str, str, str], ...] = (
    ("test_symbolic_shapes", "2.15.0/cpu", _SNAPSHOT),
    ("test_weight_only_on_310p", "2.15.0/cpu", _SNAPSHOT),
    ("test_weight_only_without_bias_keeps_matmul_whole", "2.10.0/2.10.0", _BATCH),
    ("test_weight_only_without_bias_keeps_matmul_whole", "2.10.0/2.10.0.post2", _BATCH),
    ("test_weight_only_without_bias_keeps_matmul_whole", "2.9.0/2.9.0", _BATCH),
    ("test_weight_only_without_bias_keeps_matmul_whole", "2.8.0/2.8.0.post2", _BATCH),
    ("test_vendor_modules", "2.8.0/2.8.0.post2", _NO_CANN),
    ("test_vendor_modules", "2.9.0/2.9.0", _NO_CANN),
    ("test_the_fused_ge_graph_computes_what_the_fused_graph_does", "2.[89].0/*", _NO_STATIC),
    ("test_a_subclass_weight_quantized_again", "2.11.0/*", _DYNAMO),
    ("test_a_subclass_weight_quantized_again", "2.12.0/*", _DYNAMO),
    ("test_linears_of_a_tensor_subclass_in_frames_of_their_own", "2.1[12].0/*", _DYNAMO),
    ("test_subclass_linears_one_by_one_under_inductor", "2.1[12].0/*", _DYNAMO),
    ("test_weights_of_torchao_in_and_out_of_sight", "2.1[12].0/*", _DYNAMO),
    ("test_nothing_is_read_where_nothing_is_quantized", "2.[89].0/*", _COARSE),
    ("test_fuse_saves_a_program_that_the_other_commands_take", "2.9.0/*", _LOADED),
    ("test_a_weight_is_refused_early_only_where", "2.8.0/*", _ZEROS),
    *((test, "2.15.0/cpu", _NO_WHEEL) for test in _SAY_WHAT_TO_INSTALL),
    ("test_the_command_says_first_that_nothing_ran_on_a_device", "2.15.0/cpu", _NO_GE),
    ("test_the_users_own_error_is_shown_with_the_users_frames", "2.15.0/cpu", _WORDED),
    ("test_results_are_within_the_stated_bound", "2.1[12].0/*", _DRAWN),
    ("test_bad_input_is_one_line_with_status_2", "2.14.0/*", _ARCHIVE),
    ("test_the_users_own_error_is_shown_with_the_users_frames", "2.14.0/*", _LOGGED),
    ("test_symbolic_shapes", "2.8.0/*", "the snapshot is 2.13's; 2.8 numbers the products of symbolic sizes otherwise"),
    ("test_linears_of_a_tensor_subclass_in_frames_of_their_own", "2.[89].0/*", _SHARED_FRAME),
    ("test_subclass_linears_one_by_one_under_inductor", "2.[89].0/*", _SHARED_FRAME),
    *((test, cells, _PARTITIONS) for cells in ("2.[89].0/*", "2.1[01].0/*") for test in _WITH_X86),
    *((test, "2.[89].0/*", _NO_GRANULARITY) for test in _WITH_GRANULARITY),
    ("test_torchao_static_w8a8", "2.[89].0/*", _NO_STATIC),
    ("test_codes_that_another_site_gives_are_not_made_again", "2.[89].0/*", _NO_STATIC),
    ("test_a_zero_point_that_an_operator_chooses_is_one_of_the_codes", "2.[89].0/*", _NAN),
    ("batched attention]", "2.8.0/*", _GUARD),
    ("test_what_the_inputs_of_a_body_are", "2.[89].0/*", _SCAN),
)
"""Part of a failed test's name, a cell's name with wildcards, and the reason in one line."""

COLUMNS = {name: name for name in ("core", "torchair", "preview", "calls", "fast")}

HEAD = """# Versions

`make matrix` writes this page (`make matrix CELLS=2.10.0/2.10.0.post4` runs one cell). A cell is a PyTorch beside a
torch_npu: torchair's Python is byte for byte the same in many wheels of torch_npu, whatever PyTorch they are for, so its
*generations* are what is run. Everything runs on a CPU: torch_npu's libraries are on stand-ins for CANN, PyTorch's CUDA
builds on stand-ins for CUDA. No device was there.

What was run in a cell is in its columns: tests passed / failed, and nothing where a share was not run there. They are
shares of the suite (`tests/matrix/cells.py` names their tests); **the whole suite runs with PyTorch 2.13.0 alone, in CI**.

* *doors*: each door of the README, used once (`tests/matrix/doors.py`);
* *core*: what depends on PyTorch: once for each PyTorch;
* *torchair*, *preview*, *calls*: tests that start the real torchair: with its doors, with `preview_ge` and the vendor's modules,
  and those of single operators; for one cell of each generation, where the column has numbers. Generation F's run with PyTorch
  2.13.0 in CI, and with it alone those that need transformers or compare counts of operators;
* *fast*: {few} cases of each test that is not marked as slow. PyTorch's versions differ in their API and in how they spell
  graphs, which a few cases meet as well as hundreds. Left out: tests that draw graphs to compare their numbers, and those
  of what does not depend on PyTorch ({left_out}).

The compatibility modules are `{code}`; a number with another name behind it was run with an earlier state of them.
torchao is 0.13.0 beside PyTorch 2.8, 0.14.1 beside 2.9, 0.18.0 beside newer ones; setuptools is older than 82, which
generation C needs. For PyTorch 2.15 there is no torch_npu: what needs none was run.

"""

GENERATIONS = """
## Which torchair is in which torch_npu

| generation | torch_npu | the pass can be put into a config (`register`) | `npugraph_ex_options` |
|---|---|---|---|
{rows}

B has no hook for passes; `quantpass.npu_backend` needs none, and is not tested with it. C can make no `QuantBatchMatmulV4`, which
matmuls on the 950 become, and no `DynamicQuantV2` with one scale for the whole tensor: compiling a graph that needs one ends in an
error that names it and what works instead. A torchair whose files are none of
these is named in the report of the doors for an NPU and of `preview_ge`, with the digest of its files.
"""


def load_results() -> dict[str, dict[str, Any]]:
    """Cell to what it gave."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # type: ignore[no-any-return]


def reason(test: str, cell: str) -> str:
    """Why a test fails in a cell, where that is known."""
    return next((why for part, where, why in KNOWN if part in test and fnmatch(cell, where)), "")


def failures(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """What failed in a cell, doors and tests, and how."""
    for gave in (found or {"ran": {}})["ran"].values():
        yield from gave["failed"].items()


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    columns = [title for share, title in COLUMNS.items() if any(share in r["ran"] for r in results.values())]
    headers = ["PyTorch", "torch_npu", "torchair", "Python", "doors", *columns]
    rows = [_row(headers), _row(["---"] * len(headers))]
    for cell in CELLS:
        found = results.get(cell.name, {"ran": {}})
        shares = ["doors", *(s for s, title in COLUMNS.items() if title in columns)]
        python = found.get("python", cell.python)
        names = [cell.torch, cell.torch_npu or "none", cell.generation, python]
        counts = [_counts(found["ran"].get(s)) for s in shares] if found["ran"] else ["not run", *[""] * len(columns)]
        rows.append(_row([*names, *counts]))
    text = (
        HEAD.format(code=code_version(), few=FEW, left_out=", ".join(f"`{n}`" for n in (*LEFT_OUT, "unit/basics")))
        + "\n".join(rows)
        + "\n"
    )
    return text + _failures(results) + tools.section(tools.load_results()) + _generations()


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _counts(gave: Mapping[str, Any] | None) -> str:
    if gave is None:
        return ""
    code = "" if gave["code"] == code_version() else f" `{gave['code']}`"
    return f"{gave['passed']} / {len(gave['failed'])}{code}"


def _failures(results: Mapping[str, Mapping[str, Any]]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for cell in CELLS:
        for what, message in failures(results.get(cell.name)):
            why = reason(what, cell.name) or " ".join(message.replace("|", "\\|").split())
            found.setdefault((cell.name, why), []).append(what.removeprefix("tests."))
    lines = [
        _row([cell, f"`{first}`" + (f" and {len(more)} more" if more else ""), why])
        for (cell, why), (first, *more) in found.items()
    ]
    if not lines:
        return "\nNothing failed.\n"
    return "\n## What fails, and why\n\n| cell | door or test | reason |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def _generations() -> str:
    from quantpass.lowering.torchair_versions import GENERATIONS as KNOWN_GENERATIONS

    rows = []
    for g in KNOWN_GENERATIONS:
        hook = "no" if g.name == "B" else "yes"
        ex = {"B": "no", "C": "through torchair"}.get(g.name, "yes")
        rows.append(f"| {g.name} | {', '.join(g.wheels)} | {hook} | {ex} |")
    return GENERATIONS.format(rows="\n".join(rows))
