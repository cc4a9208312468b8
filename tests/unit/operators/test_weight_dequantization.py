"""A weight dequantized in blocks is the one dequantized whole, to the bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from quantpass.operators import weight_dequantization
from quantpass.operators.weight_dequantization import dequantized_to


@given(
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    group=st.sampled_from([0, 1, 3, 8, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    wide=st.booleans(),
    turned=st.booleans(),
    offset=st.booleans(),
    scalar=st.booleans(),
    block=st.sampled_from([1, 7, 64, 1 << 17]),
    seed=st.integers(0, 1000),
)
def test_blocks_change_nothing(k, n, group, dtype, wide, turned, offset, scalar, block, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k) if turned else (k, n), generator=generator).to(torch.int8)
    codes = codes.t() if turned else codes
    shape = (-(-k // group), n) if group else (1, 1 if scalar else n)
    scale, added = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    work = torch.float16 if dtype == torch.float16 else torch.float32
    rows = torch.arange(k) // group if group else torch.zeros(k, dtype=torch.int64)
    whole = codes.to(work) + (added[rows].to(work) if offset else 0)
    whole = (whole * scale[rows].to(work)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_dequantization, "_BLOCK", block)
        held = torch.float32 if wide else dtype
        found = dequantized_to(held, codes, scale, added if offset else None, group, dtype)
    assert found.dtype == held
    assert torch.equal(found, whole.to(held))


def test_an_empty_weight_has_an_empty_result():
    for shape in ((0, 4), (4, 0)):
        scale = torch.ones(1, shape[1])
        found = dequantized_to(torch.float32, torch.zeros(shape, dtype=torch.int8), scale, None, 0, torch.float32)
        assert found.shape == shape
