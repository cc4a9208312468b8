"""A checkpoint that is mapped into memory is read through the map, one weight after the other."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is asked of Linux")

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch import nn
import quantpass as qp
from tests.helpers import WeightOnly

LAYERS, SIZE = 12, 2048
path = Path(sys.argv[1]) / "model.safetensors"


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def layers(size):
    return [WeightOnly(k=size, n=size) for _ in range(LAYERS)]


if sys.argv[2] == "write":
    save_file(nn.Sequential(*layers(SIZE)).state_dict(), path)
    sys.exit()
with torch.device("meta"):
    model = nn.Sequential(*layers(SIZE)).eval()
model.load_state_dict(load_file(path), assign=True)
x = torch.randn(2, SIZE).half()
program = torch.export.export(model, (x,))
qp.explain(nn.Sequential(*layers(64)).eval(), (torch.randn(2, 64).half(),), target="ascend910b")  # imports
Path("/proc/self/clear_refs").write_text("5")
before, mapped = memory("RssAnon"), memory("RssFile")
report = qp.explain(program, target="ascend910b")
peak = memory("VmHWM") - mapped - before - (memory("RssFile") - mapped)
assert report.fused == report.total == LAYERS and all(s.proved for s in report.sites), report
print(f"{(memory('RssFile') - mapped) >> 20} MiB of the file were read, {peak >> 20} MiB of memory were used beside")
whole = LAYERS * SIZE * SIZE
assert memory("RssFile") - mapped > whole // 2, "nothing was mapped: this shows nothing"
assert peak < whole // 2, (peak, whole)
"""


def worker(folder, what):
    command = [sys.executable, "-c", WORKER, str(folder), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_explaining_copies_no_mapped_weight(tmp_path):
    worker(tmp_path, "write")
    assert "of the file were read" in worker(tmp_path, "read")
