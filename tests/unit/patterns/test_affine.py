"""Reading ``product(factors) * (codes - zero_point)``: what is read means what the graph computes."""

import operator
from dataclasses import replace

import pytest
import torch
import torch.ao.quantization.fx._decomposed

from quantpass.graph.schema import ReaderTable
from quantpass.patterns.affine import UNBOUNDED, Affine, AffineReader, NotAffine
from quantpass.patterns.terms import Term
from tests.unit.graphs import Traced, evaluate

aten = torch.ops.aten

CODES = torch.tensor([[-128, -3, 0, 5], [127, 64, -1, 2], [7, 7, -90, 100]], dtype=torch.int8)
UNSIGNED = (CODES.int() + 128).to(torch.uint8)
SCALE = torch.tensor([[0.5], [0.25], [2.0]])
COLUMNS = torch.tensor([0.5, 0.25, 2.0, 4.0])
ZERO = torch.tensor([[3.0], [-2.0], [0.0]])


def full(term: Term, values, shape):
    return evaluate(term.expr, values).double().reshape(term.shape).expand(shape)


def read(function, *inputs, known=0):
    """What is read of ``function``'s result, checked against what it computes."""
    t = Traced(function, *inputs, known=known)
    found = t.reader.read(t.result)
    if isinstance(found, Affine):
        values = t.run(*inputs)
        actual = values[t.result].double()
        assert found.shape == tuple(actual.shape)
        codes = evaluate(found.codes, values).double()
        assert codes.min() >= found.span[0] and codes.max() <= found.span[1]
        meant = codes - (full(found.zero_point, values, actual.shape) if found.zero_point else 0)
        for factor in found.factors:
            meant = meant * full(factor, values, actual.shape)
        torch.testing.assert_close(meant, actual, rtol=1e-3, atol=1e-3)
    return found


def kinds(found):
    return [f.kind for f in found.factors]


# -- codes -------------------------------------------------------------------------------------------------------------


def test_int8_codes_are_themselves():
    found = read(lambda c: c.float(), CODES)
    assert (found.span, found.factors, found.zero_point) == ((-128, 127), (), None)


def test_uint8_codes_are_moved_down():
    found = read(lambda c: c.float(), UNSIGNED)
    assert found.span == (-128, 127) and found.zero_point.constant == -128


def test_integers_in_floats_are_codes():
    assert read(lambda x: x.round().clamp(-8, 7), torch.randn(3, 4)).span == (-8, 7)
    assert read(lambda x: x.round().clamp(0, 255), 99 * torch.rand(3, 4)).span == (-128, 127)
    assert read(lambda x: x.round().clamp(-1, 130), torch.randn(3, 4)).reason
    assert read(lambda x: x.round().clamp(-128, 127).to(torch.int32), torch.randn(3, 4)).span == (-128, 127)


def test_floats_are_no_codes():
    found = read(lambda x: x.clamp(-8, 7), torch.randn(3, 4))
    assert isinstance(found, NotAffine) and not found.quantized
    assert isinstance(read(lambda x: x.neg(), CODES.to(torch.int64)), NotAffine)


def test_an_input_by_itself():
    t = Traced(lambda c: c.float(), CODES)
    assert t.reader.read(t.inputs[0]).span == (-128, 127)
    t = Traced(lambda x: x * 1, torch.randn(2, 2))
    assert "placeholder" in t.reader.read(t.inputs[0]).reason


def test_what_is_no_tensor():
    t = Traced(lambda x: x + x.shape[0], torch.randn(3, 4), symbolic=True)
    (size,) = t.calls(aten.sym_size.int)
    assert t.reader.read(size).reason == "it is not a tensor"


# -- factors and zero points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, 1])
def test_scales(known):
    assert kinds(read(lambda c, s: c.float() * s, CODES, SCALE, known=known)) == ["rows"]
    assert kinds(read(lambda c, s: s * c.float(), CODES, SCALE, known=known)) == ["rows"]
    assert kinds(read(lambda c, s: c.float() / s, CODES, SCALE, known=known)) == ["rows"]
    assert kinds(read(lambda c, s: c * s, CODES, SCALE, known=known)) == ["rows"]
    assert kinds(read(lambda c, s: (c.float() * 0.5) * s, CODES, COLUMNS, known=known)) == ["scalar", "columns"]


def test_a_number_is_not_divided_by_codes():
    found = read(lambda c: 2.0 / c.float(), CODES.clamp(1, 5))
    assert isinstance(found, NotAffine)
    assert isinstance(read(lambda c, s: torch.div(s, c.float()), CODES.clamp(1, 5), SCALE, known=1), NotAffine)
    assert isinstance(read(lambda c, s: torch.div(2.0 * s, c.float()), CODES.clamp(1, 5), SCALE), NotAffine)


@pytest.mark.parametrize("known", [0, 1])
def test_zero_points(known):
    found = read(lambda c, z: c.float() - z, CODES, ZERO, known=known)
    assert found.zero_point.kind == "rows" and not found.factors
    assert read(lambda c, z: c.float() + z, CODES, ZERO, known=known).zero_point.kind == "rows"
    assert read(lambda c, z: z + c.float(), CODES, ZERO, known=known).zero_point.kind == "rows"


def test_sums_with_a_multiple():
    found = read(lambda c, z: torch.sub(c.float(), z, alpha=2), CODES, ZERO, known=1)
    assert found.zero_point.constant.flatten().tolist() == [6, -4, 0]
    found = read(lambda c, z: torch.add(c.float(), z, alpha=2), CODES, ZERO, known=1)
    assert found.zero_point.constant.flatten().tolist() == [-6, 4, 0]


def test_two_zero_points_are_one():
    found = read(lambda c, z: (c.float() - 3) - z, CODES, COLUMNS, known=1)
    assert found.zero_point.kind == "columns"
    assert read(lambda c: (c.float() - 3) + 3, CODES).zero_point is None
    found = read(lambda c, z: (c.float() - z) - 2.0, CODES, ZERO, known=0)
    assert found.zero_point.kind == "rows"


def test_an_offset_after_a_known_scale_is_a_zero_point():
    found = read(lambda c, s: c.float() * s + 1.0, CODES, SCALE, known=1)
    assert found.zero_point.constant.flatten().tolist() == [-2.0, -4.0, -0.5]
    found = read(lambda c, s: (c.float() * 0.5) * s - 1.0, CODES, SCALE, known=1)
    assert found.zero_point.constant.flatten().tolist() == [4.0, 8.0, 1.0]


def test_an_offset_after_an_unknown_scale_is_not():
    for function in (lambda c, s: c.float() * s + 1.0, lambda c, s: (c.float() * 2.0) + s):
        found = read(function, CODES, SCALE)
        assert isinstance(found, NotAffine) and found.quantized
        assert "not known when compiling" in found.reason


def test_nothing_is_added_by_zero():
    found = read(lambda c, s: c.float() * s + 0.0, CODES, SCALE)
    assert found.zero_point is None and kinds(found) == ["rows"]


@pytest.mark.parametrize(
    "function",
    [
        lambda c, z: z - c.float(),
        lambda c, z: torch.sub(z, c.float(), alpha=2),
        lambda c, z: torch.add(z, c.float(), alpha=2),
        lambda c, z: torch.rsub(c.float(), z),
    ],
)
def test_codes_are_not_subtracted_from_something(function):
    assert isinstance(read(function, CODES, ZERO, known=1), NotAffine)


def test_products_and_sums_of_two_full_tensors():
    x = torch.randn(3, 4)
    assert isinstance(read(lambda c, x: c.float() * x, CODES, x), NotAffine)
    assert isinstance(read(lambda c, x: c.float() + x, CODES, x), NotAffine)
    assert isinstance(read(lambda c, x: c.float() - x, CODES, x), NotAffine)
    # but a known one is a scale for each element
    assert kinds(read(lambda c, x: c.float() * x, CODES, x, known=1)) == ["other"]


def test_why_a_quantized_operand_could_not_be_read_is_kept():
    found = read(lambda c, s: ((c.float() * s + 1.0) * 2.0).reshape(12), CODES, SCALE)
    assert found.quantized and "not known when compiling" in found.reason
    mixed = read(lambda c, s: (c.float() * s).reshape(2, 6), CODES, SCALE)
    assert mixed.quantized and "mixes" in mixed.reason
    found = read(lambda c, s, x: torch.reshape(c.float() * s, (4, 3)) * x, CODES, SCALE, torch.rand(1))
    assert found.quantized and "mixes" in found.reason


# -- casts -------------------------------------------------------------------------------------------------------------


def test_integers_without_bounds_stay_known_as_such():
    """Scaled, they are still told from floats."""
    assert read(lambda x: x.round().clamp(-1000, 1000) * 0.5, SCALE).rule == UNBOUNDED
    assert "no operand of aten.mul.Tensor is a dequantized value" in read(lambda x: x * 0.5, SCALE).reason


def test_casts_between_floats_pass():
    assert kinds(read(lambda c, s: (c.half() * s.half()).float(), CODES, SCALE, known=1)) == ["rows"]
    assert kinds(read(lambda c, s: (c.half() * s.half()).double(), CODES, SCALE, known=0)) == ["rows"]


def test_integers_that_fit_pass_a_cast_to_integers():
    found = read(lambda c: (c.int() - 3).to(torch.int16), CODES)
    assert found.zero_point.constant == 3
    assert read(lambda c: c.to(torch.int32).to(torch.int8), CODES).span == (-128, 127)


@pytest.mark.parametrize("offset", [-1, 1])
def test_integers_that_do_not_fit_are_not_read_through(offset):
    """What wraps around are codes of their own."""
    found = read(lambda c: (c.int() + offset).to(torch.int8).float(), CODES)
    assert found.zero_point is None and found.factors == ()


def test_int8_arithmetic_that_could_wrap_gives_codes_of_its_own():
    assert read(lambda c: c - 3, CODES).zero_point is None
    assert read(lambda c: c * 2, CODES).factors == ()
    assert read(lambda c: c.int() - 3, CODES).zero_point.constant == 3
    t = Traced(lambda c, z: c.int() - z, CODES, ZERO.int())
    assert isinstance(t.reader.read(t.result), NotAffine)


def test_zero_points_at_the_edge_of_the_container():
    low = torch.tensor([[0], [2], [-1]], dtype=torch.int16)
    held = read(lambda c, z: (c.short() - z.short() * 1).float(), CODES, low, known=1)
    assert held.zero_point is not None
    assert read(lambda c: (c.short() + (2**15 - 128)).float(), CODES).zero_point is not None
    assert isinstance(read(lambda c: (c.short() + (2**15 - 127)).float(), CODES), NotAffine)


def test_rounding_makes_new_codes():
    found = read(lambda c, s: (c.float() * s).round().clamp(-8, 7).to(torch.int8).float() * 2.0, CODES, SCALE)
    assert found.span[1] - found.span[0] <= 255 and kinds(found) == ["scalar"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_no_casts_to_or_from_what_is_no_real_number(dtype):
    for function in (lambda c: c.float().to(dtype), lambda c: (c.to(dtype) * 1).to(dtype).to(torch.float32)):
        t = Traced(function, CODES)
        assert isinstance(t.reader.read(t.result), NotAffine)
        assert "boolean or complex" in t.reader.read(t.result).reason


def test_only_tensors_are_cast():
    for given in (3.0, None):
        t = Traced(lambda c: c.float(), CODES)
        if given is None:
            t.inputs[0].meta["val"] = 3
        else:
            t.result.args = (given,)
        assert "not a tensor" in t.reader.read(t.result).reason


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"layout": torch.sparse_coo}, "is not a dequantization"),
        ({"device": torch.device("meta")}, "another device"),
        ({"device": torch.device("cpu"), "layout": torch.strided}, None),
    ],
)
def test_a_cast_to_another_layout_or_device_is_not_read(changed, refusal):
    t = Traced(lambda c, s: (c.float() * s).half(), CODES, SCALE)
    t.result.kwargs = {**t.result.kwargs, **changed}
    if "device" in changed:
        t.result.meta["val"] = torch.empty(3, 4, dtype=torch.half, device=changed["device"])
    found = t.reader.read(t.result)
    assert isinstance(found, Affine) if refusal is None else refusal in found.reason


# -- movement ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda v: v.t(),
        lambda v: v.reshape(1, 3, 4),
        lambda v: v.unsqueeze(0).expand(2, 3, 4),
        lambda v: v.t().contiguous().view(2, 2, 3).transpose(-1, -2),
        lambda v: v.clone(),
    ],
)
@pytest.mark.parametrize("codes", [CODES, UNSIGNED])
def test_values_are_read_through_movement(move, codes):
    found = read(lambda c, s: move((c.float() - 2) * s), codes, SCALE, known=1)
    assert isinstance(found, Affine) and found.zero_point.kind == "scalar"


def test_every_part_follows():
    """Several factors and a zero point: each its own way."""
    for move in (lambda v: v.t(), lambda v: v.reshape(1, 3, 4)):
        found = read(
            lambda c, s, r, z, move=move: move((c.float() - z) * r * s * 0.5), CODES, COLUMNS, SCALE, ZERO, known=3
        )
        assert len(found.factors) == 3 and found.zero_point.kind == ("columns" if found.shape == (4, 3) else "rows")
    t = Traced(lambda c, s, r, z: (c.float() - z) * r * s * 0.5, CODES, COLUMNS, SCALE, ZERO, known=3)
    found = t.reader.read(t.result).permuted((1, 0))
    assert kinds(found) == ["columns", "rows", "scalar"] and found.zero_point.constant.flatten().tolist() == [3, -2, 0]


def test_rows_become_columns():
    found = read(lambda c, s, z: ((c.float() - z) * s).t(), CODES, SCALE, ZERO, known=2)
    assert kinds(found) == ["columns"] and found.zero_point.kind == "columns"


def test_a_view_that_mixes_scales_is_refused():
    assert "mixes" in read(lambda c, s: (c.float() * s).view(4, 3), CODES, SCALE, known=1).reason
    assert "mixes" in read(lambda c, z: (c.float() - z).view(4, 3), CODES, ZERO, known=1).reason


def test_permuted():
    t = Traced(lambda c, s, z: (c.float() - z) * s, CODES, SCALE, ZERO, known=2)
    found = t.reader.read(t.result).permuted((1, 0))
    assert found.shape == (4, 3) and kinds(found) == ["columns"] and found.zero_point.kind == "columns"
    values = t.run(CODES, SCALE, ZERO)
    assert torch.equal(evaluate(found.codes, values), CODES.t())


def test_symbolic_terms_that_can_not_be_permuted():
    t = Traced(lambda c, s: c.float() * s, CODES, torch.rand(3, 4), symbolic=True)
    value = t.reader.read(t.result)
    assert isinstance(value, NotAffine)


# -- named operators ---------------------------------------------------------------------------------------------------


def test_parameters_along_an_axis():
    t = Traced(lambda c, s, z: c.float() + 0 * s[0] + 0 * z, CODES, COLUMNS, torch.tensor(3.0))
    _, s, z = t.inputs
    reader = t.reader
    assert reader.along(s, (3, 4), -1).shape == (1, 4)
    assert reader.along(s, (3, 4), 1).shape == (1, 4)
    assert reader.along(s, (3, 4), 0) is None
    assert reader.along(z, (3, 4), None).kind == "scalar"
    assert reader.along(s, (3, 4), None) is None
    assert reader.along(2.0, (3, 4), None).constant == 2.0
    assert reader.along(2.0, (3, 4), 0) is None
    same = Traced(lambda c, s: c.float() * s, CODES, torch.full((4,), 0.5), known=1)
    assert same.reader.along(same.inputs[1], (3, 4), 1).kind == "scalar"


def test_vectors_of_rows_and_columns_whatever_their_shape():
    t = Traced(lambda a, b: a + b, torch.rand(3, 1), torch.rand(1, 4))
    of_rows, of_columns = t.inputs
    assert t.reader.vector(of_rows, (3, 4), rows=True).shape == (3, 1)
    assert t.reader.vector(of_rows, (3, 4), rows=False) is None
    assert t.reader.vector(of_columns, (3, 4), rows=False).shape == (1, 4)
    assert t.reader.vector(of_columns, (3, 4), rows=True) is None
    assert t.reader.vector(of_columns, (2, 2, 4), rows=True).shape == (2, 2, 1)
    assert t.reader.vector(2.0, (3, 4), rows=True).kind == "scalar"


def test_dequantized():
    t = Traced(lambda c, s, z: c.float() * s - z, CODES, COLUMNS, torch.arange(4.0), known=2)
    c, s, z = t.inputs
    found = t.reader.dequantized(t.result, c, s, z, 1)
    assert kinds(found) == ["columns"] and found.zero_point.kind == "columns"
    assert t.reader.dequantized(t.result, c, s, None, 1).zero_point is None
    for arguments in ((3, s, z, 1), (c, s, z, 0), (c, s, z, None), (c, s, 2.0, 1)):
        refused = t.reader.dequantized(t.result, *arguments)
        assert isinstance(refused, NotAffine) and refused.quantized


def test_the_first_of_several_results():
    """An operator that dequantizes may return more than the value."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = CODES
    several = graph.call_function(aten.split.Tensor, (x, 2))
    results = [graph.call_function(operator.getitem, (several, i)) for i in (0, 1)]
    number = graph.call_function(operator.getitem, ((x, x), 0))
    for n in (*results, number):
        n.meta["val"] = CODES.float()
    t = Traced(lambda x: x * 1, torch.rand(1))

    def split(reader, node, *, self, split_size, dim):
        return reader.read(self)

    table = ReaderTable({aten.split.Tensor: split}, leading=2)
    reader = AffineReader(t.values, replace(t.dialects, dequantizers=table))
    found = [reader.read(n) for n in (*results, number)]
    assert isinstance(found[0], Affine)
    assert isinstance(found[1], NotAffine) and isinstance(found[2], NotAffine)
    assert isinstance(t.reader.read(results[0]), NotAffine)


def test_a_named_quantize_gives_int8_codes_instead():
    t = Traced(
        lambda x: torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 128, 0, 255, torch.uint8).float(),
        torch.randn(3, 4),
    )
    found = t.reader.read(t.result)
    assert found.codes.otherwise.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    assert found.zero_point.constant == -128
    plain = Traced(lambda c: c.float(), UNSIGNED)
    assert plain.reader.read(plain.result).codes.otherwise.target is aten._to_copy.default
