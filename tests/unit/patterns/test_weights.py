"""Reading a right operand: what is read means what the graph computes, or is refused with the reason."""

from dataclasses import replace

import pytest
import torch

from quantpass.graph import expr as ex
from quantpass.graph.expr import Const, Ref
from quantpass.graph.records import Weight
from quantpass.patterns.affine import AffineReader, NotAffine
from quantpass.patterns.operands import Operand
from quantpass.patterns.weights import _is_proved, is_weight, matrix_node, read_weight
from tests.unit.graphs import Traced, evaluate

aten = torch.ops.aten

K, N = 6, 4
CODES = torch.arange(K * N).mul(11).remainder(251).sub(125).reshape(K, N).to(torch.int8)
COLUMNS = torch.tensor([0.5, 0.25, 2.0, 3.0])
ROWS = torch.tensor([[1.0], [2.0], [0.5], [4.0], [8.0], [0.25]])
ZERO = torch.tensor([1.0, -2.0, 3.0, 0.0])


def meaning(w, values):
    """``(K, N)``, or a matrix for each batch."""
    codes = evaluate(w.codes, values).double()
    codes = codes.mT if w.transposed else codes
    scale, zero = evaluate(w.scale, values).double(), 0.0 if w.zero_point is None else evaluate(w.zero_point, values)
    if w.group_size:
        scale = scale.repeat_interleave(w.group_size, dim=0)
        zero = zero.repeat_interleave(w.group_size, dim=0) if w.zero_point is not None else 0.0
    real = (codes - zero) * scale
    if w.k_scale is not None:
        real = real * w.k_scale[:, None]
    return real if w.k_order is None else real[torch.argsort(w.k_order)]


def read(function, *inputs, known=None, transposed=False, matrix=None):
    """The weight that ``function`` makes of ``inputs``, all known unless said otherwise."""
    t = Traced(function, *inputs, known=len(inputs) if known is None else known)
    w = read_weight(t.reader, t.result, transposed=transposed, matrix=matrix)
    if isinstance(w, Weight):
        values = t.run(*inputs)
        actual = values[t.result].double()
        if matrix is not None:
            actual = actual.reshape(matrix)
        actual = actual.mT if transposed else actual
        assert (w.k, w.n) == tuple(actual.shape[-2:])
        codes = evaluate(w.codes, values)
        assert codes.dtype == torch.int8 and w.low <= codes.min() and codes.max() <= w.high
        torch.testing.assert_close(meaning(w, values).expand(actual.shape), actual, rtol=2e-3, atol=1e-6)
        assert w.zero_point is None or evaluate(w.zero_point, values).shape == evaluate(w.scale, values).shape
    return w


# -- plain spellings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, None])
def test_a_scale_for_each_column(known):
    w = read(lambda c, s: c.float() * s, CODES, COLUMNS, known=known)
    assert (w.transposed, w.group_size, w.zero_point, w.proved) == (False, 0, None, known is None)
    w = read(lambda c, s: (c.float() * s).t(), CODES.t().contiguous(), COLUMNS[:, None], known=known)
    assert w.transposed
    w = read(lambda c, s: c.float() * s, CODES.t().contiguous(), COLUMNS[:, None], known=known, transposed=True)
    assert w.transposed
    w = read(lambda c, s: (c.float() * s).t(), CODES, COLUMNS, known=known, transposed=True)
    assert not w.transposed


def test_the_stored_tensor_is_kept():
    t = Traced(lambda c, s: (c.float() * s).t(), CODES.t().contiguous(), COLUMNS[:, None], known=2)
    assert read_weight(t.reader, t.result, transposed=False).codes.origin is t.inputs[0]


@pytest.mark.parametrize(
    "turn",
    [
        lambda c: c.t(),
        lambda c: c.transpose(0, 1),
        lambda c: c.permute(1, 0),
        lambda c: aten.numpy_T(c),
        lambda c: c.mT,
        lambda c: c.permute(0, 1).t(),
        lambda c: c.permute(-2, -1).t(),
        lambda c: c.t().t().t(),
    ],
)
@pytest.mark.parametrize("known", [0, None])
def test_turned_codes_are_the_stored_ones(turn, known):
    w = read(lambda c, s: turn(c).float() * s, CODES.t().contiguous(), COLUMNS, known=known)
    assert w.transposed


@pytest.mark.parametrize(
    "turn", [lambda c: c.permute(0, 1), lambda c: c.permute(-2, -1), lambda c: c.permute(1, 0), lambda c: c.t()]
)
def test_turned_squares(turn):
    """Their shape does not tell whether they were turned."""
    for known in (0, None):
        assert isinstance(read(lambda c, s: turn(c).float() * s, CODES[:N].contiguous(), COLUMNS, known=known), Weight)


@pytest.mark.parametrize("known", [0, None])
def test_zero_points(known):
    w = read(lambda c, s, z: (c.float() - z) * s, CODES, COLUMNS, ZERO, known=known)
    assert w.zero_point is not None
    assert read(lambda c, s: (c.float() - 3) * s, CODES, COLUMNS, known=known).zero_point is not None
    assert read(lambda c, s: (c.float() - 0) * s, CODES, COLUMNS, known=known).zero_point is None
    # one scale and a zero point for each column
    assert read(lambda c, z: (c.float() - z) * 0.5, CODES, ZERO, known=known).zero_point is not None


def test_a_product_of_scales():
    w = read(lambda c, s: c.float() * s * 0.5, CODES, COLUMNS)
    assert w.scale.tensor.tolist() == (COLUMNS.double() * 0.5).tolist()
    w = read(lambda c: c.float() * 1.0, CODES)
    assert w.scale.tensor.tolist() == [1.0]


def test_what_the_codes_span_is_looked_at():
    narrow = CODES.clamp(-7, 7)
    w = read(lambda c, s: c.float() * s, narrow, COLUMNS)
    assert (w.low, w.high) == (-7, 7)
    w = read(lambda c, s: c.float() * s, narrow, COLUMNS, known=0)
    assert (w.low, w.high) == (-128, 127)


def test_unsigned_codes():
    unsigned = (CODES.int() + 128).to(torch.uint8)
    for known in (0, None):
        w = read(lambda c, s: (c.float() - 128) * s, unsigned, COLUMNS, known=known)
        assert w.zero_point is None


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(function, *inputs, **options):
    found = read(function, *inputs, **options)
    assert isinstance(found, NotAffine)
    return found


def test_a_scale_along_k_known_at_run_time():
    assert refused(lambda c, s: c.float() * s, CODES, ROWS, known=0).rule == "read.weight.along_k"
    assert refused(lambda c, z: c.float() - z, CODES, ROWS, known=0).rule == "read.weight.along_k"
    # where it is known it can be split off
    assert read(lambda c, s: c.float() * s, CODES, ROWS).k_scale is not None


def test_no_elements():
    assert "no elements" in refused(lambda c: c.float() * 0.5, CODES[:0]).reason


def test_a_float_weight_is_none():
    found = refused(lambda w: w * 2.0, torch.randn(K, N))
    assert not found.quantized


def test_sizes_that_only_the_run_knows():
    t = Traced(lambda c, s: c.float() * s, CODES, COLUMNS, symbolic=True)
    found = read_weight(t.reader, t.result, transposed=False)
    assert isinstance(found, NotAffine) and "symbolic" in found.reason and found.quantized


def test_a_vector_is_no_weight():
    assert "rank 1" in refused(lambda c: c.float() * 0.5, CODES[0], known=0).reason


def test_a_value_that_is_no_line():
    found = refused(lambda c, s: (c.float() * s) ** 2, CODES, COLUMNS)
    assert found.quantized


# -- batches -----------------------------------------------------------------------------------------------------------

BATCH = torch.stack([CODES, CODES.flip(0)])


def test_a_matrix_for_each_batch_known_at_run_time():
    w = read(lambda c: c.float() * 0.5, BATCH, known=0)
    assert not w.proved and w.scale.tensor.tolist() == [0.5]
    w = read(lambda c: c.float() * 0.5, BATCH.mT.contiguous(), known=0, transposed=True)
    assert w.transposed
    w = read(lambda c, s: c.float() * s * 2.0, BATCH, torch.tensor(0.5), known=0)
    assert not isinstance(w.scale, Const)


def test_batches_with_a_zero_point_or_several_scales():
    assert refused(lambda c: (c.float() - 3) * 0.5, BATCH, known=0).rule == "read.batched.zero_point"
    assert refused(lambda c, s: c.float() * s, BATCH, COLUMNS, known=0).rule == "read.batched.scale"


def test_equal_matrices_are_one():
    for repeat in (
        lambda w: w.unsqueeze(0),
        lambda w: w.expand(3, K, N),
        lambda w: w.unsqueeze(0).expand(3, K, N),
        lambda w: w.unsqueeze(0).unsqueeze(0).expand(2, 3, K, N).reshape(6, K, N),
        lambda w: w.view(1, K, N).expand(3, K, N),
    ):
        w = read(lambda c, s, repeat=repeat: repeat(c.float() * s), CODES, COLUMNS)
        assert isinstance(w, Weight) and not w.transposed


def test_a_repeated_matrix_known_at_run_time_is_one():
    for repeat in (
        lambda w: w.unsqueeze(0).expand(3, K, N),
        lambda w: w.view(1, 1, K, N).expand(2, 3, K, N).reshape(6, K, N),
        lambda w: w.unsqueeze(0).unsqueeze(0).expand(2, 3, K, N),
    ):
        w = read(lambda c, s, z, repeat=repeat: repeat((c.float() - z) * s), CODES, COLUMNS, ZERO, known=0)
        assert w.zero_point is not None and evaluate_shape(w) == 2
    # more matrices than one, or cut otherwise
    for repeat in (
        lambda w: w.unsqueeze(0).expand(2, 2, K, N),
        lambda w: w.reshape(2, N, K),
        lambda w: w.reshape(4, 3, N),
    ):
        w = read(lambda c, s, repeat=repeat: repeat(c.float() * s), BATCH, torch.tensor(0.5), known=0)
        assert evaluate_shape(w) > 2


def evaluate_shape(w):
    return len(ex.shape_of(w.codes))


def test_matrices_that_differ():
    assert refused(lambda c, s: c.float() * s, BATCH, COLUMNS).rule == "read.weight.batched"
    # expanding several does not make them one
    assert refused(lambda c, s: (c.float() * s).unsqueeze(0).expand(3, 2, K, N), BATCH, COLUMNS).quantized
    assert refused(lambda c, s: (c.float() * s).view(2, 3, N), CODES, COLUMNS).quantized


def test_a_matrix_stored_in_more_dimensions():
    kernel = CODES.t().reshape(N, K, 1, 1).contiguous()
    w = read(lambda c, s: c.float() * s, kernel, COLUMNS.reshape(N, 1, 1, 1), transposed=True, matrix=(N, K))
    assert w.transposed


def test_an_operand_is_read_once():
    t = Traced(lambda c, s: c.float() * s, CODES, COLUMNS, known=2)
    first = read_weight(t.reader, t.result, transposed=False)
    assert read_weight(t.reader, t.result, transposed=False) is first
    assert read_weight(t.reader, t.result, transposed=True) is not first


# -- proof -------------------------------------------------------------------------------------------------------------


def test_a_reading_that_the_value_contradicts_is_no_weight():
    """Rounding between the factors changes numbers that the formula does not."""
    w = read(lambda c, s: (c.half() * s.half()).half() * 3.0, CODES, COLUMNS)
    assert w.proved
    infinite = COLUMNS.clone()
    infinite[0] = float("inf")
    t = Traced(lambda c, s: c.float() * s, CODES, infinite, known=2)
    assert isinstance(read_weight(t.reader, t.result, transposed=False), NotAffine)
    nan = COLUMNS * float("nan")
    t = Traced(lambda c, s: c.float() * s, CODES, nan, known=2)
    assert isinstance(read_weight(t.reader, t.result, transposed=False), NotAffine)


def test_a_named_operator_says_more_than_floats_do():
    """Why a weight can't be read: by its operator's name, unless its integers say so themselves."""
    named = NotAffine("a tool's own operator", quantized=True, rule="read.weight.opaque")

    def reason(function, *inputs):
        t = Traced(function, *inputs, known=len(inputs))
        reader = AffineReader(t.values, t.dialects, {t.result: named})
        return read_weight(reader, t.result, transposed=False).rule

    grid = torch.arange(4096).mul(7).remainder(15).sub(7).reshape(64, 64) * torch.linspace(0.01, 0.02, 64)
    assert reason(lambda w: w * 1.0, torch.randn(64, 64)) == named.rule
    assert reason(lambda w: w * 1.0, grid) == named.rule
    assert reason(lambda c: c.float() ** 3, CODES) == "read.weight.nonlinear"


def test_a_reading_is_proved_by_what_is_known_only():
    """Of a zero point that can't be evaluated nothing is proved; without one there is none to evaluate."""
    plain = Traced(lambda z, c, s: c.float() * s + 0 * z, ZERO, CODES, COLUMNS, known=2)
    (product,) = plain.calls(aten.mul.Tensor)[:1]
    w = read_weight(plain.reader, product, transposed=False)
    operand = Operand(product, False, None)
    assert w.proved and _is_proved(plain.values, operand, w)
    assert not _is_proved(plain.values, operand, replace(w, zero_point=Ref(plain.inputs[0])))
    shifted = Traced(lambda c, s, z: (c.float() - z) * s, CODES, COLUMNS, ZERO, known=3)
    w = read_weight(shifted.reader, shifted.result, transposed=False)
    assert w.zero_point is not None and _is_proved(shifted.values, Operand(shifted.result, False, None), w)


def test_a_matrix_is_its_own():
    """Only leading dimensions are looked behind."""
    t = Traced(lambda c: c.unsqueeze(0).view(K, N), CODES)
    assert matrix_node(t.result) is t.result
    t = Traced(lambda c: c.expand(3, K, N), CODES)
    assert matrix_node(t.result) is t.inputs[0]


def test_only_a_matrix_is_surely_a_weight():
    vector = Traced(lambda c, s: c.float()[:, 0] * s, CODES, ROWS[:, 0], known=2)
    matrix = Traced(lambda c, s: c.float() * s, CODES, COLUMNS, known=2)
    assert not is_weight(vector.reader, vector.result)
    assert is_weight(matrix.reader, matrix.result)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_words_are_surely_a_weight_where_they_read_as_scaled_codes(dtype):
    """By themselves they may be counts or positions."""
    scaled = Traced(lambda c, s: c.float() * s, CODES.to(dtype), COLUMNS, known=2)
    plain = Traced(lambda c: c.float(), CODES.to(dtype), known=1)
    assert is_weight(scaled.reader, scaled.result)
    assert not is_weight(plain.reader, plain.result)
