"""What PyTorch's own tools show of quantpass: its logs, its structured trace, its counters."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantpass as qp

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import torch, quantpass as qp
from torch import nn
from tests.helpers import WeightOnly

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = WeightOnly(64, 96), WeightOnly(96, 64, dtype=torch.bfloat16)

    def forward(self, x):
        return self.down(self.up(x).bfloat16())

with torch.no_grad():
    torch.compile(Model(), backend=qp.backend(target='ascend310p'))(torch.randn(2, 64).half())
from torch._dynamo.utils import counters
print(dict(counters["quantpass"]))
"""


def run(**variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "", **variables}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_logs_trace_and_counters(tmp_path):
    """The folder of a checkout is on quantpass's own path, so this once walked through its modules for ever."""
    done = run(TORCH_LOGS="+quantpass", TORCH_TRACE=str(tmp_path))
    assert done.stdout.strip() == "{'fused': 1, 'not_fused': 1}"
    for words in (
        "1 of 2 quantized matmuls are not fused for ascend310p",
        "up: npu_weight_quant_batchmatmul(",
        "down: wqmm.310p.dtypes.x: x is bfloat16",
    ):
        assert words in done.stderr
    trace = "".join(p.read_text() for p in tmp_path.iterdir())  # what tlparse reads: a payload follows its line
    assert '"name": "quantpass_report"' in trace
    assert "ascend310p: 1 of 2 quantized matmuls fused" in trace
    assert '"name": "quantpass_diff"' in trace
    assert "quantpass.weight_quant_matmul" in trace


def test_walking_through_the_modules_ends():
    names = [m.name for m in pkgutil.walk_packages(qp.__path__, "quantpass.", onerror=lambda name: None)]
    assert len(set(names)) == len(names)
    assert {"quantpass.patterns.sites", "quantpass.doors.backend", "quantpass.lowering.aclnn"} <= set(names)
    assert not [n for n in names if n.startswith("quantpass.quantpass.")]
