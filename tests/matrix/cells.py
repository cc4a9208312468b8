"""The cells: a PyTorch, a torch_npu whose torchair is of one generation, a Python. In the order of use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMPATIBILITY = ("quantpass/graph/torch_versions.py", "lowering/torchair_versions.py")
"""The modules that hold what differs between versions: their contents are what a cell was run with."""


FEW = 3
"""How many cases of each parametrized test the share *fast* takes."""

LEFT_OUT = (
    *("benchmarks", "coverage", "docs", "docs_recipes", "layers", "matrix", "measured_pages", "packaging", "page"),
    *(
        "recipes",
        "skips",
        "checkpoint_files",
        "checkpoints",
        "explain_error",
        "legality",
        "fuzz",
        "fuzz_models",
        "numerics",
    ),
)
"""Files of tests that *fast* leaves out: of documentation, benchmarks, the package and this matrix; of what imports no
PyTorch; and what draws many graphs to compare their numbers."""

SHARES = {
    "core": (
        "tests/test_versions.py",
        "tests/test_graph_diffs.py",
        "tests/test_static_inputs.py::test_weights_are_known_with_freezing",
        "tests/test_static_inputs.py::test_explain_and_verify_say_the_same_with_freezing",
        "tests/test_static_inputs.py::test_an_input_is_never_taken_for_a_weight",
        "tests/test_static_inputs.py::test_a_subclass_weight_quantized_again",
    ),
    "torchair": ("tests/test_npu_torchair.py",),
    "preview": ("tests/test_preview.py", "tests/test_vendor_modules.py"),
    "calls": (
        "tests/test_completed_calls.py::test_torchair_gets_what_an_expert_writes",
        "tests/test_norms.py::test_a_norm_that_is_written_with_the_vendors_operator_is_joined_too",
        "tests/test_norms.py::test_ge_operators",
        "tests/test_quant_matmul_dequant.py::test_ge",
        "tests/test_requantized.py::test_the_fused_ge_graph_computes_what_the_fused_graph_does",
        "tests/test_rows_quantized_by_the_matmul.py::test_ge",
    ),
    "fast": (
        *("tests", "-m", "not slow", "-p", "tests.matrix.few", "--few", str(FEW), "--ignore=tests/unit/basics"),
        *(f"--ignore=tests/test_{name}.py" for name in LEFT_OUT),
    ),
}
"""Parts of the suite, each a column of the page. *core*: what depends on PyTorch; *torchair*, *preview* and *calls*: what
starts the real torchair, but for some of :data:`NOT_PREVIEWED`; *fast*: the tests that are not marked as slow,
:data:`FEW` cases of each, without :data:`LEFT_OUT`. Besides, every door is tried."""

NOT_PREVIEWED = ("preview_models", "requantized")
"""Files with tests of ``preview_ge`` that are not run in cells: they need models that are not installed there, or compare
counts that are documented for the newest torchair."""

CORE, TORCHAIR = ("core",), ("torchair", "preview", "calls")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination.

    Attributes:
        torch: PyTorch's version.
        torch_npu: torch_npu's version; empty where there is none for this PyTorch.
        generation: of its torchair.
        python: the Python that it is run with.
        shares: names of :data:`SHARES` that are run: of PyTorch in its first cell, of torchair in its generation's.
    """

    torch: str
    torch_npu: str
    generation: str
    python: str
    shares: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As ``CELLS=`` takes it."""
        return f"{self.torch}/{self.torch_npu or 'cpu'}"


CELLS = (
    Cell("2.8.0", "2.8.0.post2", "C", "3.10", CORE),
    Cell("2.8.0", "2.8.0.post5", "D", "3.10"),
    Cell("2.9.0", "2.9.0", "C", "3.11", CORE + TORCHAIR),
    Cell("2.9.0", "2.9.0.post2", "D", "3.11"),
    Cell("2.9.0", "2.9.0.post4", "D'", "3.11"),
    Cell("2.9.0", "2.9.0.post6", "E", "3.11"),
    Cell("2.9.0", "2.9.0.post9", "F", "3.11"),
    Cell("2.10.0", "2.10.0.post4", "E", "3.12", CORE + TORCHAIR),
    Cell("2.10.0", "2.10.0", "D", "3.12", TORCHAIR),
    Cell("2.10.0", "2.10.0.post2", "D'", "3.12", TORCHAIR),
    Cell("2.10.0", "2.10.0.post7", "F", "3.12"),
    Cell("2.11.0", "2.11.0", "E", "3.12", CORE),
    Cell("2.11.0", "2.11.0.post3", "F", "3.12"),
    Cell("2.12.0", "2.12.0", "E", "3.10", CORE),
    Cell("2.12.0", "2.12.0.post3", "F", "3.10"),
    Cell("2.13.0", "2.13.0", "F", "3.11", CORE + TORCHAIR),
    Cell("2.14.0", "2.14.0", "F", "3.13", CORE),
    Cell("2.15.0", "", "", "3.13", CORE),
)


def code_version() -> str:
    """A name for the state of the compatibility modules."""
    digest = hashlib.sha256()
    for name in COMPATIBILITY:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:12]
