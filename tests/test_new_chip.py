"""A new chip is one file in ``quantpass/chips`` and its name in the list there: done in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASCEND310B = """
from dataclasses import replace

from quantpass.chips.ascend310p import ASCEND310P

ASCEND310B = replace(
    ASCEND310P,
    name="ascend310b",
    title="Ascend 310B",
    soc_prefixes=("Ascend310B",),
    soc_names=tuple(f"Ascend310B{i}" for i in range(1, 5)),
    typical_soc="Ascend310B4",
    documented=False,
)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("quantpass", "patterns", "lowering"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    chips = folder / "quantpass" / "chips"
    (chips / "ascend310b.py").write_text(ASCEND310B)
    text = (chips / "__init__.py").read_text()
    assert text.count("(ASCEND310P, ") == 1
    text = text.replace("(ASCEND310P, ", "(ASCEND310P, ASCEND310B, ")
    line = "from quantpass.chips.ascend310p import ASCEND310P\n"
    (chips / "__init__.py").write_text(text.replace(line, f"from quantpass.chips.ascend310b import ASCEND310B\n{line}"))
    return folder


def run(copy, code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["chips"], "Ascend310B1, Ascend310B2, Ascend310B3, Ascend310B4"),
        (["chips", "--markdown"], "## Ascend 310B: `ascend310b`"),
        (["check-op", "npu_trans_quant_param", "-t", "Ascend310B1", "scale=float32[64]"], "legal"),
    ],
)
def test_the_command_line_knows_it(copy, arguments, shown):
    assert shown in run(copy, "from quantpass.doors.cli import main; main()", *arguments)


@pytest.mark.slow
def test_the_doors_know_it(copy):
    run(
        copy,
        """
import torch, quantpass as qp
from quantpass.chips import DOCUMENTED, chip_of_device

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.ones(96, 64, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * 0.5).t()

x = torch.ones(4, 64, dtype=torch.float16)
assert chip_of_device("Ascend310B9").name == "ascend310b"
assert qp.explain(Model(), (x,)).targets == DOCUMENTED
assert qp.explain(Model(), (x,), target="Ascend310B4")["ascend310b"].fused == 1
assert qp.verify(Model(), (x,), target="ascend310b").sites[0].relative < 0.01
""",
    )
