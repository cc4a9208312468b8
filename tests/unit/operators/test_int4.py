"""int4 codes, eight to an int32: element i in bits 4i to 4i + 3."""

import pytest
import torch

from quantpass.operators import int4
from quantpass.operators.int4 import pack_int4, unpack_int4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_where_each_code_lies(dtype):
    for code in range(-8, 8):
        for place in range(8):
            codes = torch.zeros(8, dtype=dtype)
            codes[place] = code
            word = (code & 15) << 4 * place
            assert pack_int4(codes).tolist() == [word - (1 << 32) if word >= 1 << 31 else word]


@pytest.mark.parametrize("shape", [(16,), (5, 24), (2, 3, 8), (0, 8), (3, 0)])
@pytest.mark.parametrize("at_once", [8, 40, 1 << 20])
def test_there_and_back(monkeypatch, shape, at_once):
    monkeypatch.setattr(int4, "_ELEMENTS", at_once)
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32 and packed.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack_int4(packed), codes)
    turned = torch.randint(-8, 8, (8, 6), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(turned.t()[:, :8])), turned.t()) and torch.equal(turned, turned.clone())


@pytest.mark.parametrize(
    ("codes", "why"), [([0] * 7, "multiple of 8"), ([0] * 7 + [8], r"int4 holds"), ([-9] * 8, r"int4 holds")]
)
def test_what_can_not_be_packed(codes, why):
    with pytest.raises(ValueError, match=why):
        pack_int4(torch.tensor(codes))
