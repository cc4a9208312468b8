"""Sums of integers in blocks are PyTorch's, what wraps around too."""

import pytest
import torch

from quantpass.graph.sums import large_sum, summed

aten = torch.ops.aten


@pytest.mark.parametrize("shape", [(3, 90000), (90000, 3), (700, 600), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
@pytest.mark.parametrize("dim", [0, 1])
def test_as_pytorch_sums(shape, dtype, dim):
    info = torch.iinfo(dtype)
    matrix = torch.randint(info.min, info.max, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for into in (torch.int32, torch.int64):
        for way in (matrix, matrix.t().contiguous().t()):
            expected = way.sum(dim, dtype=into)
            assert summed(way, dim, into).dtype == into
            assert torch.equal(summed(way, dim, into), expected)


@pytest.mark.parametrize("dims", [[0], [-1], [0, 1], None])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float32, torch.int64])
def test_only_such_sums(dims, keepdim, dtype):
    matrix = (torch.arange(400000).reshape(800, 500) % 5).to(dtype)
    for into in (None, torch.int32, torch.float64):
        found = large_sum({"self": matrix, "dim": dims, "keepdim": keepdim, "dtype": into})
        taken = dtype == torch.int8 and dims is not None and len(dims) == 1 and into != torch.float64
        assert (found is not None) == taken
        if found is not None:
            expected = aten.sum.dim_IntList(matrix, dims, keepdim, dtype=into)
            assert found.dtype == expected.dtype and torch.equal(found, expected)
