"""What tools' dequantizers compute, some rows at a time by their formula, is what the operators themselves compute."""

from unittest import mock

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph import row_blocks
from quantpass.graph.carried_codes import CarriedCodes
from quantpass.graph.row_blocks import RowBlocks
from quantpass.patterns.operands import Operand, OperandBlocks
from quantpass.patterns.weights_by_structure import read_by_structure
from quantpass.patterns.weights_in_blocks import read_in_blocks
from tests.unit.graphs import Traced
from tests.unit.patterns.test_weights_in_blocks import same as same_weight

qd = torch.ops.quantized_decomposed
BOUNDS = 0, 127  # not used in the arithmetic


def per_tensor(codes, scale, zero):
    return qd.dequantize_per_tensor.default, codes, float(scale[0, 0]), int(zero[0, 0]), *BOUNDS, codes.dtype


def per_tensor_of_tensors(codes, scale, zero):
    return qd.dequantize_per_tensor.tensor, codes, scale[0, 0], zero[0, 0], *BOUNDS, codes.dtype


def per_channel(codes, scale, zero, axis=0):
    scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
    return qd.dequantize_per_channel.default, codes, scale, zero, axis, *BOUNDS, codes.dtype


def per_channel_without_zero(codes, scale, zero):
    del zero
    return per_channel(codes, scale, None)


def per_column(codes, scale, zero):
    return per_channel(codes[:, :1].expand(-1, codes.shape[0]).contiguous(), scale, zero, axis=1)


def per_token(codes, scale, zero):
    scale = scale[:, :1].double()
    return qd.dequantize_per_token.default, codes, scale, zero[:, :1], *BOUNDS, codes.dtype, torch.float32


def per_group(codes, scale, zero):
    size = codes.shape[1] // scale.shape[1]
    return qd.dequantize_per_channel_group.default, codes, scale, zero, *BOUNDS, codes.dtype, size, torch.float32


def affine(codes, scale, zero):
    block = [1, codes.shape[1] // scale.shape[1]]
    return torch.ops.torchao.dequantize_affine.default, codes, block, scale, zero, codes.dtype


def affine_of_columns(codes, scale, zero):
    scale, zero = (t[:1, :1].expand(1, codes.shape[1]).contiguous() for t in (scale, zero))
    return torch.ops.torchao.dequantize_affine.default, codes, [codes.shape[0], 1], scale, zero, codes.dtype


def affine_without_zero(codes, scale, zero):
    del zero
    return affine(codes, scale, None)


OF_TORCHAO = (affine, affine_of_columns, affine_without_zero)
ALL = (
    per_tensor,
    per_tensor_of_tensors,
    per_channel,
    per_column,
    per_channel_without_zero,
    per_token,
    per_group,
    *OF_TORCHAO,
)


def traced(call):
    return Traced.call(*call, known=sum(isinstance(a, torch.Tensor) for a in call))


@st.composite
def weights(draw):
    rows, groups, size = draw(st.integers(2, 9)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    dtype = draw(st.sampled_from([torch.int8, torch.uint8]))
    zeros = draw(st.sampled_from([torch.int8, torch.int32, torch.int64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    info = torch.iinfo(dtype)
    codes = torch.randint(info.min, info.max + 1, (rows, groups * size), generator=generator).to(dtype)
    scale = torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3
    zero = torch.randint(-128, 128, (rows, groups), generator=generator).to(zeros)
    return codes, scale, zero


@pytest.mark.parametrize("spelling", ALL)
@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_by_rows_as_the_operator(spelling, weight):
    if spelling in OF_TORCHAO:
        pytest.importorskip("torchao.quantization.quant_primitives")
    t = traced(spelling(*weight))
    expected = t.values.value(t.result)
    dim = 1 if spelling is affine_of_columns else 0
    with mock.patch.multiple(row_blocks, ELEMENTS=24, _SIDE_BY_SIDE=1):
        blocks = RowBlocks(t.values, t.result, dim, t.dialects.rows)
        found = torch.cat([blocks.value(rows) for rows in blocks], dim)
        again = RowBlocks(t.values, t.result, dim, t.dialects.rows, wide=False)
        same = torch.cat([again.value(rows) for rows in again], dim)
    assert found.dtype == torch.float64
    assert expected.dtype == torch.float32
    # Integers are small: the one rounding of float32 is that of the product.
    assert torch.equal(found.float(), expected)
    assert torch.equal(same, expected)


@pytest.mark.parametrize("spelling", [per_channel, per_group, affine])
def test_parameters_stay_small(spelling):
    codes = torch.arange(64 * 32).remainder(255).reshape(64, 32).to(torch.uint8)
    if spelling is affine:
        pytest.importorskip("torchao.quantization.quant_primitives")
    scale, zero = torch.rand(64, 4) + 0.1, torch.randint(0, 99, (64, 4))
    t = traced(spelling(codes, scale, zero))
    cut = t.inputs[0]
    blocks = RowBlocks(t.values, t.result, 0, t.dialects.rows, cuts=[cut])
    of_ones = blocks.with_codes(slice(0, 64), 1)
    assert of_ones.shape == (64, 32)
    assert of_ones.tensor.numel() == (64 if spelling is per_channel else 256)
    ones = t.values.widened(t.result, {cut: torch.ones_like(codes)})
    assert torch.equal(of_ones.dense().float(), ones.float())


@pytest.mark.parametrize("spelling", ALL)
@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_formulas_are_lines_over_their_codes(spelling, weight):
    """As they say: what they give for a code is between what they give for two others, and codes keep their places."""
    if spelling in OF_TORCHAO:
        pytest.importorskip("torchao.quantization.quant_primitives")
    codes, scale, zero = weight
    t = traced(spelling(codes, scale, zero.int() if zero.dtype == torch.int8 else zero))  # in int8 it wraps around
    dim = 1 if spelling is affine_of_columns else 0
    blocks = RowBlocks(t.values, t.result, dim, t.dialects.rows, cuts=t.inputs[:1])
    rows, info = slice(0, blocks.rows), torch.iinfo(codes.dtype)
    assert torch.equal(CarriedCodes(blocks).value(rows), t.values.value(t.inputs[0]))
    first, last = (blocks.with_codes(rows, code).dense() for code in (info.min, info.max))
    for code in range(info.min, info.max, 17):
        between = first + (last - first) * (code - info.min) / 255
        assert torch.allclose(blocks.with_codes(rows, code).dense(), between, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spelling", ALL)
@settings(max_examples=40, deadline=None)
@given(weight=weights(), same=st.sampled_from([1e-9, 1e-6]))
def test_weights_that_wrap_around_are_read_as_every_element_tells(spelling, weight, same):
    if spelling in OF_TORCHAO:
        pytest.importorskip("torchao.quantization.quant_primitives")
    t = traced(spelling(*weight))
    operand, cuts = Operand(t.result, spelling is not affine_of_columns), t.inputs[:1]
    blocks = OperandBlocks(t.values, operand, t.dialects.rows, cuts)
    shape = (blocks.rows_of_k, blocks.all.stop)
    structure = read_by_structure(t.values, blocks, cuts, shape, same)
    elements = read_in_blocks(t.values, blocks, cuts, shape, same)
    assert structure is None or same_weight(structure, elements)
