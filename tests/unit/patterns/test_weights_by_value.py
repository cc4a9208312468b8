"""Reading weights by value: any spelling, as groups, orders and factors that the operators know."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.records import Weight
from quantpass.patterns import code_lines, weights_by_value
from quantpass.patterns.affine import NotAffine
from quantpass.patterns.operands import Operand
from quantpass.patterns.weights_by_value import looks_dequantized, shifted_by_group, weight_by_value
from tests.unit.graphs import Traced
from tests.unit.patterns.test_weights import meaning

K, N = 8, 4
CODES = torch.arange(K * N).mul(11).remainder(15).sub(7).reshape(K, N).to(torch.int8)
COLUMNS = torch.tensor([0.5, 0.25, 2.0, 3.0])
GROUPS = torch.tensor([[0.5, 0.25, 2.0, 3.0], [1.5, 0.75, 1.0, 7.0]])


def read(function, *inputs, transposed=False, matrix=None):
    t = Traced(function, *inputs, known=len(inputs))
    w = weight_by_value(t.values, Operand(t.result, transposed, matrix))
    if isinstance(w, Weight):
        actual = t.run(*inputs)[t.result].double()
        actual = actual.reshape(matrix) if matrix else actual.reshape(-1, *actual.shape[-2:])[0]
        torch.testing.assert_close(meaning(w, {}), actual.t() if transposed else actual, rtol=2e-3, atol=1e-6)
        assert w.codes.tensor.dtype == torch.int8
        assert (w.low, w.high) == (int(w.codes.tensor.min()), int(w.codes.tensor.max()))
    return w


def grouped(c, s, size=4):
    return (c.float().reshape(-1, size, N) * s[:, None]).reshape(-1, N)


def packed(c):
    """4-bit codes, two of K in a byte."""
    c = c.int() + 8
    return (c[::2] | (c[1::2] << 4)).to(torch.uint8)


def unpacked(p):
    return torch.stack([p & 15, p >> 4], dim=1).reshape(-1, p.shape[1]).to(torch.int8) - 8


# -- the parts of a weight ---------------------------------------------------------------------------------------------


def test_per_channel_and_per_tensor():
    w = read(lambda c, s: c.float() * s, CODES, COLUMNS)
    assert w.group_size == 0 and w.scale.tensor.shape == (N,) and w.zero_point is None
    assert read(lambda c: c.float() * 0.5, CODES).scale.tensor.shape == (1,)
    # scales that differ in the last digits of float32 stay apart
    close = torch.tensor([0.5, 0.5, 0.5, 0.5 + 1e-7])
    assert read(lambda c, s: c.float() * s, CODES, close).scale.tensor.shape == (N,)


def test_groups():
    w = read(grouped, CODES, GROUPS)
    assert w.group_size == 4 and torch.equal(w.scale.tensor, GROUPS.double())
    w = read(
        lambda c, s, z: ((c.float().reshape(2, 4, N) - z[:, None]) * s[:, None]).reshape(K, N),
        CODES,
        GROUPS,
        GROUPS * 4,
    )
    assert w.group_size == 4 and w.zero_point.tensor.shape == (2, N)
    # where only the zero point varies, and where it is the same for a whole column
    w = read(lambda c, z: ((c.float().reshape(2, 4, N) - z[:, None]) * 0.5).reshape(K, N), CODES, GROUPS * 4)
    assert w.group_size == 4 and w.scale.tensor.shape == (2, N)


def test_where_a_group_ends():
    """Neighbours are one where they differ by no more than the tolerance, of their size and that of their offsets."""
    group_size = code_lines.group_size

    def column(*numbers):
        return torch.tensor(numbers).double()[:, None]

    ones, zeros = column(1, 1), column(0, 0)
    assert group_size(ones, column(0, 1), 0.5) == 2 and group_size(ones, column(0, 1.01), 0.5) is None
    assert group_size(column(1, 2), zeros, 0.5) == 2 and group_size(column(1, 2.01), zeros, 0.5) is None
    assert group_size(column(1, 3), column(1, 1), 0.5) == 2
    assert group_size(column(1, 1, 2, 2, 3, 3), torch.zeros(6, 1).double(), 1e-9) == 2
    assert group_size(column(1), column(0), 1e-9) == 1
    assert group_size(column(1, 2), zeros, 1e-9) is None


def test_groups_of_one_size_only():
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0])[:, None]
    assert read(lambda c, s: c.float() * s, CODES, scale).group_size == 2
    one = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])[:, None] * COLUMNS
    one[3, 1] = 9.0  # no group, no order, no factor
    assert read(lambda c, s: c.float() * s, CODES, one).rule == "read.weight.along_k"


def test_an_order_of_rows():
    which = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    w = read(lambda c, s, g: c.float() * s[g], CODES, GROUPS, which)
    assert w.group_size == 4 and w.k_order.tolist() == [0, 3, 4, 6, 1, 2, 5, 7]


def test_a_factor_for_each_row():
    rows = torch.tensor([1.0, 2.0, 0.5, 4.0, -8.0, 0.25, 3.0, 5.0])[:, None]
    w = read(lambda c, s, r: c.float() * s * r, CODES, COLUMNS, rows)
    assert w.group_size == 0 and w.k_scale.abs().max() == 1 and w.k_scale.tolist() == (rows.flatten() / -8).tolist()
    zero = rows.clone()
    zero[2] = 0.0
    found = read(lambda c, s, r: c.float() * s * r, CODES, COLUMNS, zero)
    assert isinstance(found, NotAffine) and found.quantized


def test_factors_that_are_no_product():
    full = torch.arange(1.0, 1 + K * N).reshape(K, N) ** 1.5
    assert read(lambda c, s: c.float() * s, CODES, full).rule == "read.weight.along_k"


def test_a_single_row():
    w = read(lambda c, s: c.float() * s, CODES[:1], COLUMNS)
    assert (w.k, w.group_size) == (1, 0)


# -- codes -------------------------------------------------------------------------------------------------------------


def test_codes_are_moved_into_int8():
    unsigned = torch.arange(K * N, dtype=torch.uint8).mul(8).reshape(K, N)
    w = read(lambda c, s: (c.float() - 100) * s, unsigned, COLUMNS)
    assert w.zero_point.tensor.tolist() == [-28.0] * N
    assert read(lambda c, s: c.float() * s, CODES, COLUMNS).zero_point is None


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(-128, 127, None), (0, 255, -128), (-129, 126, -1), (1, 256, 129 - 0)]
)
def test_where_wide_codes_lie(low, high, zero):
    codes = torch.randint(low, high + 1, (K, N), dtype=torch.int16)
    codes[0], codes[1] = low, high
    w = read(lambda c, s: c.float() * s, codes, COLUMNS)
    if zero is None:
        assert w.zero_point is None
    else:
        assert len(set(w.zero_point.tensor.tolist())) == 1
        assert (w.low, w.high) == (-128, 127)


def test_codes_of_more_than_eight_bits():
    codes = torch.zeros(K, N, dtype=torch.int16)
    codes[0, 0] = 256
    assert read(lambda c, s: c.float() * s, codes, COLUMNS).rule == "read.weight.bits"
    # as long as each column spans no more
    codes[:, 0] = 256
    codes[3, 1] = 7
    w = read(lambda c, s: c.float() * s, codes, COLUMNS)
    assert w.zero_point.tensor[0] != w.zero_point.tensor[1]


def test_the_graphs_own_codes_are_kept():
    for function, codes, transposed in (
        (lambda c, s: c.float() * s, CODES, False),
        (lambda c, s: (c.float() * s[:, None]).t(), CODES.t().contiguous(), True),
    ):
        t = Traced(function, codes, COLUMNS, known=2)
        w = weight_by_value(t.values, Operand(t.result, False))
        assert w.codes.origin is t.inputs[0] and w.transposed == transposed
    for view in (torch.clone, lambda c: c.t().contiguous().t(), lambda c: c.reshape(-1).reshape(K, N)):
        t = Traced(lambda c, s, view=view: view(c).float() * s, CODES, COLUMNS, known=2)
        assert weight_by_value(t.values, Operand(t.result, False)).codes.origin is t.inputs[0]
    square = CODES[:N]
    t = Traced(lambda c, s: c.float() * s, square, COLUMNS, known=2)
    w = weight_by_value(t.values, Operand(t.result, False))
    assert w.codes.origin is t.inputs[0] and not w.transposed
    # not where they were changed on the way
    t = Traced(lambda c, s: (c + 1).float() * s, CODES, COLUMNS, known=2)
    assert torch.equal(weight_by_value(t.values, Operand(t.result, False)).codes.tensor.t(), CODES + 1)
    t = Traced(lambda c, s: c.float() * s, (CODES.int() + 8).to(torch.uint8), COLUMNS, known=2)
    assert weight_by_value(t.values, Operand(t.result, False)).codes.origin is None


def test_packed_codes():
    w = read(lambda p, s: unpacked(p).float() * s, packed(CODES), COLUMNS)
    assert torch.equal(w.codes.tensor.t(), CODES)
    w = read(lambda p, s: grouped(unpacked(p), s), packed(CODES), GROUPS)
    assert w.group_size == 4


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda c, s: c.float() * s, (CODES, COLUMNS)),
        (lambda c, s: (c + 1).float() * s, (CODES, COLUMNS)),
        (lambda p, s: unpacked(p).float() * s, (packed(CODES), COLUMNS)),
        (lambda a, b, s: torch.cat([a.float(), b.float()]) * s, (CODES[:4], CODES[4:], COLUMNS)),
        (lambda c, s: torch.where(c > 0, s, -s), (CODES, COLUMNS)),
        (lambda x, s: x.round() * s, (CODES.float(), COLUMNS)),
        (lambda x, s: x * s, (CODES.float(), COLUMNS)),
    ],
)
def test_no_integers_are_probed_twice_or_in_vain(function, inputs):
    t = Traced(function, *inputs, known=len(inputs))
    cuts = [tuple(cut) for cut in weights_by_value.integer_cuts(t.values, t.result, K * N)]
    assert all(cuts) and len(set(cuts)) == len(cuts)


def test_codes_put_together_from_pieces():
    upper, lower = CODES[:4], CODES[4:]
    w = read(lambda a, b, s: torch.cat([a.float(), b.float()]) * s, upper, lower, COLUMNS)
    assert torch.equal(w.codes.tensor.t() if w.transposed else w.codes.tensor, CODES)
    w = read(lambda a, b, s: torch.cat([a.float() * 2, b.float()]) * s, upper, lower, COLUMNS)
    assert w.group_size == 4


def test_codes_that_the_graph_rounds_itself():
    x = torch.linspace(-3, 3, K * N).reshape(K, N)
    w = read(lambda x, s: (x * 2).round().clamp(-8, 7) * s, x, COLUMNS)
    assert (w.low, w.high) == (-6, 6)
    w = read(lambda x, s: x.floor() * s, x, COLUMNS)
    assert isinstance(w, Weight)


def test_integers_by_themselves():
    w = read(lambda c: c.t().to(torch.int32), CODES, transposed=True)
    assert w.scale.tensor.tolist() == [1.0] and w.zero_point is None
    w = read(lambda c: c.reshape(N, K, 1).clone(), CODES.t().contiguous(), transposed=True, matrix=(N, K))
    assert w.transposed


def test_equal_batches_are_one_and_others_none():
    assert isinstance(read(lambda c, s: (c.float() * s).expand(3, K, N).clone(), CODES, COLUMNS), Weight)
    batch = torch.stack([CODES, CODES + 1])
    assert read(lambda c, s: c.float() * s, batch, COLUMNS).rule == "read.weight.batched"


def test_binary_weights_are_plus_and_minus_one():
    bits = CODES > 0
    w = read(lambda b, s: torch.where(b, s, -s), bits, COLUMNS.expand(K, N).contiguous())
    assert w.zero_point is None and set(w.codes.tensor.unique().tolist()) == {-1, 1}
    assert w.scale.tensor.flatten()[:N].tolist() == COLUMNS.tolist()
    # not where there are more than two values, nor where they are not opposite
    w = read(lambda c, s: c.float() * s - s / 2, CODES.abs().clamp(max=3), COLUMNS)
    assert w.zero_point.tensor.tolist() == [0.5] * N
    w = read(lambda c, s: c.float() * s, CODES.clamp(0, 1), COLUMNS)
    assert w.zero_point is None and set(w.codes.tensor.unique().tolist()) == {0, 1}
    mixed = torch.tensor([0.5, 0.5, 0.5, 0.0])
    w = read(lambda c, s, m: (c.float() - m) * s, CODES.clamp(0, 1), COLUMNS, mixed)
    assert w.zero_point.tensor.tolist() == mixed.tolist()
    rows = torch.tensor([0.5] * 4 + [0.0] * 4)[:, None]
    w = read(lambda c, s, m: (c.float() - m) * s, CODES.clamp(0, 1), COLUMNS, rows)
    assert w.group_size == 4 and w.zero_point.tensor.shape == (2, N)


# -- what is no weight -------------------------------------------------------------------------------------------------


def test_a_float_weight():
    found = read(lambda w: w * 2, torch.randn(K, N))
    assert not found.quantized
    # small integers beside it (an index, a counter) are no codes
    found = read(lambda w, i: w * 2 + i, torch.randn(K, N), torch.ones(1, dtype=torch.int64))
    assert not found.quantized


def test_how_many_integers_are_codes():
    """At 2 bits each, sixteen codes in an int32."""
    two, one = torch.ones(2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    assert read(lambda w, i: w * i.sum(), torch.randn(K, N), two).quantized
    assert not read(lambda w, i: w * i.sum(), torch.randn(K, N), one).quantized


def test_values_that_are_not_finite():
    for number in (math.inf, math.nan):
        scale = COLUMNS.clone()
        scale[1] = number
        found = read(lambda c, s: c.float() * s, CODES, scale)
        assert "not finite" in found.reason and found.quantized


def test_no_line():
    assert read(lambda c, s: (c.float() ** 2) * s, CODES, COLUMNS).rule == "read.weight.nonlinear"
    # a table that starts as a line
    table = torch.tensor([0.0, 1.0, 2.0, 3.5, 5.0, 7.0, 8.0, 9.0])
    assert read(lambda c, t: t[c], CODES.abs().long(), table).rule == "read.weight.nonlinear"
    # and one that is no line at its start, but for the codes that there are
    table = torch.tensor([0.0, 1.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0])
    codes = CODES.abs().long()
    codes[codes == 2] = 3
    for scale in (1.0, 1e-6, 1e6):
        assert read(lambda c, t: t[c], codes, table * scale).rule == "read.weight.nonlinear"


def test_what_bends_elsewhere_is_the_line_of_what_it_gives():
    w = read(lambda c, s: c.float().abs() * s, CODES, COLUMNS)
    assert torch.equal(w.codes.tensor.t(), CODES.abs())


def test_an_index_out_of_range_is_no_line():
    found = read(lambda c, t: t[c], CODES.long().clamp(0, 1), torch.tensor([0.0, 1.0]))
    assert found.rule == "read.weight.nonlinear"


def test_nothing_depends_on_the_codes():
    assert read(lambda c, w: c.float() * 0 + w, CODES, torch.randn(K, N)).quantized


def test_a_column_with_the_scale_zero():
    scale = COLUMNS.clone()
    scale[1] = 0.0
    assert isinstance(read(lambda c, s: c.float() * s, CODES, scale), Weight)
    found = read(lambda c, s: c.float() * s + 1.0, CODES, scale)
    assert "scale 0 but not the value 0" in found.reason


# -- moved codes -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_moved_by_group_mean_the_same(data):
    bits, group = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([2, 4, 8, 3]))
    codes = (
        torch.tensor(data.draw(st.lists(st.integers(-300, 300), min_size=K * N, max_size=K * N))).double().reshape(K, N)
    )
    codes = codes.remainder(data.draw(st.sampled_from([5, 2**bits, 2**bits + 1, 600])))
    groups = max(K // group, 1)
    zero = torch.arange(float(groups * N)).reshape(groups, N) if groups > 1 else torch.arange(float(N))
    found = shifted_by_group(codes, zero, group, bits=bits)
    if K % group:
        assert found is None
        return
    blocks = codes.reshape(-1, group, N)
    spans = blocks.amax(1) - blocks.amin(1)
    assert (found is not None) == bool((spans < 2**bits).all())
    if found is not None:
        moved, offsets = found
        assert moved.dtype == torch.int8 and offsets.shape == zero.shape
        assert int(moved.min()) >= -(2 ** (bits - 1)) and int(moved.max()) < 2 ** (bits - 1)
        before = codes - zero.reshape(-1, N).repeat_interleave(group, dim=0)
        after = moved.double() - offsets.reshape(-1, N).repeat_interleave(group, dim=0)
        assert torch.equal(before, after)


# -- weights that were dequantized too early ---------------------------------------------------------------------------


def dequantized(k=256, n=8, levels=15, dtype=torch.float32, group=None):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(-(levels // 2), levels - levels // 2, (k, n), generator=g)
    scale = torch.rand(k // (group or k), n, generator=g) * 0.1 + 0.01
    return (codes * scale.repeat_interleave(group or k, dim=0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_on_a_grid(dtype):
    assert looks_dequantized(dequantized(dtype=dtype))
    assert not looks_dequantized(torch.randn(256, 8).to(dtype))
    assert looks_dequantized(dequantized(k=512, group=32, dtype=dtype))


def test_what_is_too_little_to_tell():
    assert looks_dequantized(dequantized(k=32))
    assert not looks_dequantized(dequantized(k=31))
    assert not looks_dequantized(dequantized()[:, :0])
    assert not looks_dequantized((dequantized() * 100).round().to(torch.int32))
    assert not looks_dequantized(torch.randn(256, 8).sign())
