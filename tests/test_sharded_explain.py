"""``explain`` of a model that PyTorch shards: one rank can ask alone, as long as the model is one graph."""

import pytest

from tests.ranks import outputs_of_two_ranks

WORKER = """
import logging
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import quantpass as qp

rank, meeting_point = int(sys.argv[1]), sys.argv[2]
# Whoever waits for a rank that does not come fails after a while.
dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=2, timeout=timedelta(seconds=90))
mesh = init_device_mesh("cpu", (2,))
store = dist.distributed_c10d._get_default_store()


class Int8(nn.Linear):  # PyTorch shards no other class
    def __init__(self, k, n):
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(k)
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.rand(n, 1, generator=generator).half() * 0.01 + 1e-3, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


class Mlp(nn.Module):
    def __init__(self, pieces=False):
        super().__init__()
        self.up, self.down, self.pieces = Int8(64, 96), Int8(96, 64), pieces

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        if self.pieces:
            torch._dynamo.graph_break()
        return self.down(torch.relu(self.up(y)))


def shard(placement):
    def partition(self, name, module, mesh):
        for name, tensor in list(module.named_parameters()):
            where = placement if tensor.shape[placement.dim] > 1 else Shard(0)
            placed = distribute_tensor(tensor, mesh, [where], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=False))

    return partition


class Columns(ColwiseParallel):
    _partition_linear_fn = shard(Shard(0))


class Rows(RowwiseParallel):  # the scale has rows to shard only: in the graph it is gathered from all ranks
    _partition_linear_fn = shard(Shard(1))


def sharded(**options):
    return parallelize_module(Mlp(**options), mesh, {"up": Columns(), "down": Rows()})


def explained(model):
    return qp.explain(model, (torch.randn(4, 64).half(),), target=["ascend910b", "ascend310p"])


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


heard = Heard()
logging.getLogger("quantpass").addHandler(heard)

if rank == 0:  # the other one neither captures nor answers
    report = explained(sharded())
    assert report.fused == report.total == 8, report
    sizes = [(s.weight.k, s.weight.n) for s in report.sites if s.target == "ascend910b"]
    assert sizes == [(64, 48), (48, 64)] * 2, sizes
    assert not report.hidden, report.hidden
    assert not heard.said, heard.said
    store.set("explained", "alone")
assert store.get("explained") == b"alone"

report = explained(sharded(pieces=True))  # now both of them: what is more than one graph is run
assert report.fused == report.total == 4, report  # two of its matmuls, in two compilations, for two chips
(warning,) = heard.said
assert "one of 2 ranks" in warning and "call explain on each of them" in warning, warning
dist.barrier()
dist.destroy_process_group()
print("explained")
"""


@pytest.mark.slow
def test_one_rank_explains_alone_and_what_is_more_than_one_graph_says_that_it_needs_the_others(tmp_path):
    for out in outputs_of_two_ranks(WORKER, tmp_path, timeout=300):
        assert out.endswith("explained\n")
