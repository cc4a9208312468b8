"""A tensor-parallel pair of Linears in two processes: fusing keeps the collectives, their order, and the numbers."""

import pytest

from tests.ranks import outputs_of_two_ranks

WORKER = """
import re
import sys
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn
import quantpass as qp
from tests.helpers import StaticW8A8, WeightOnly, assert_close

rank, meeting_point, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
group = dist.group.WORLD


def rows(layer, dim):  # the half of a layer that this process holds
    for name in ("codes", "scale"):
        t = getattr(layer, name)
        if t.shape[dim] > 1:
            getattr(layer, name).data = t.data.chunk(2, dim)[rank].contiguous()
    if dim == 0:
        layer.bias.data = layer.bias.data.chunk(2)[rank].contiguous()
    return layer


class Pair(nn.Module):
    def __init__(self, make, parallel):
        super().__init__()
        self.up, self.down = make(64, 128), make(128, 64)
        self.last = make(64, 32)
        self.parallel = parallel
        if parallel:
            rows(self.up, 0)  # column parallel: its output is split
            rows(self.down, 1)  # row parallel: its input is split, its outputs are summed
            rows(self.last, 0)  # column parallel, gathered
            if rank:
                self.down.bias.data.zero_()

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        if self.parallel:
            y = collectives.all_reduce(y, "sum", group)
        y = self.last(y)
        return collectives.all_gather_tensor(y.t().contiguous(), 0, group).t() if self.parallel else y


make = {"weight_only": WeightOnly, "static": StaticW8A8}[kind]
make_layer = lambda k, n: make(k, n, dtype=torch.float32)
model, whole = Pair(make_layer, True), Pair(make_layer, False)
x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
backend = qp.backend(target="cpu")
with torch.no_grad():
    actual = torch.compile(model, backend=backend)(x)
    expected = whole(x)
assert (backend.report.fused, backend.report.total) == (3, 3), backend.report
((before, after),) = backend.report.graphs


def collectives_and_matmuls(text):
    found = re.findall(r" = ((?:quantpass|_c10d_functional)\\.\\w+)\\(", text)
    return [name.removeprefix("_c10d_functional.") for name in found]


op = "quantpass.weight_quant_matmul" if kind == "weight_only" else "quantpass.quant_matmul"
assert collectives_and_matmuls(before) == ["all_reduce", "wait_tensor", "all_gather_into_tensor", "wait_tensor"]
assert collectives_and_matmuls(after) == [
    op, op, "all_reduce", "wait_tensor", op, "all_gather_into_tensor", "wait_tensor",
]
assert_close(actual, expected)
print("fused and equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight_only", "static"])
def test_column_then_row_parallel(kind, tmp_path):
    for out in outputs_of_two_ranks(WORKER, tmp_path, kind, timeout=120):
        assert "fused and equal" in out
