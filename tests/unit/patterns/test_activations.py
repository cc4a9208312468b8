"""Reading how activations are quantized: what is read means what the graph computes."""

import math

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph import expr as ex
from quantpass.graph.expr import Ref
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.activations import ActivationReader, NotRead, Quantization
from quantpass.patterns.affine import AffineReader
from quantpass.patterns.magnitudes import MagnitudeReader
from tests.unit.graphs import Traced

decomposed = torch.ops.quantized_decomposed

M, K = 6, 40
X = torch.randn(M, K, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, M).unsqueeze(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def to_int8(x, s, z=0, low=-128, high=127):
    return (torch.round(x / s) + z).clamp(low, high).to(torch.int8)


def largest(x, dim=-1):
    return x.abs().amax(dim, keepdim=True)


def read(function, x=X, dtype=torch.float32, known=()):
    """What is read of the codes that ``function`` makes of ``x``, checked against what it computes."""
    x = x.to(dtype)
    t = Traced(function, x, *known, known=len(known))
    reader = ActivationReader(t.reader)
    affine = t.reader.read(t.result)
    found = reader.read(affine.codes if hasattr(affine, "codes") else Ref(t.result))
    if isinstance(found, Quantization):
        values = t.run(x, *known)
        check(found, values[found.x].double(), int8_codes(values[t.result]).reshape(values[found.x].shape))
    return found


def read_only(function, x, *known):
    """What is read of codes, whether or not it could be run."""
    t = Traced(function, x, *known, known=len(known))
    return ActivationReader(t.reader).read(Ref(t.result))


def int8_codes(codes):
    return codes.double() - (128 if codes.dtype == torch.uint8 else 0)


def check(q, x, codes):
    """The codes are those of the reading, but for half a code and what rounding may change."""
    if q.kind == "static":
        meant = x * q.rate.tensor.double()
    else:
        top = x.abs().max() if q.kind == "tensor" else x.abs().amax(-1, keepdim=True)
        m = q.magnitude
        top = top.clamp(min=m.floor) + m.added
        meant = x * q.divisor / top
        meant = torch.where(top > m.steady_from, meant, int8_codes(codes) - q.zero_point)
    meant = (meant + q.zero_point).clamp(q.low, q.high)
    assert float((codes - meant).abs().max()) <= 0.5 + q.error * 1.01 + 1e-6


def test_magnitudes_in_integers_are_none():
    for function in (
        lambda x: largest(x).to(torch.int32),
        lambda x: largest(x) > 1,
        lambda x: x.to(torch.int32).abs().amax(-1),
    ):
        t = Traced(function, X)
        assert MagnitudeReader(t.reader).read(t.result) is None


def test_magnitudes_of_complex_numbers_are_none():
    """Whatever is divided by one: no operator quantizes a complex tensor, although its magnitudes are floats."""
    t = Traced(lambda x: largest(torch.complex(x, x)), X)
    assert MagnitudeReader(t.reader).read(t.result) is None


def facts(q):
    assert isinstance(q, Quantization), q
    return (q.kind, round(q.divisor, 6) or round(float(q.rate.tensor[0]), 3), q.low, q.high, q.zero_point)


# -- dynamic -----------------------------------------------------------------------------------------------------------


def eager_127(x):
    return to_int8(x, largest(x) / 127)


def clamped_first(x):
    return to_int8(x, largest(x).clamp(min=1e-5) / 127)


def clamped_scale(x):
    return to_int8(x, (largest(x) / 127.5).clamp(min=1e-7))


def larger_of_both_ends(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low = torch.minimum(low, torch.zeros_like(low))
    high = torch.maximum(high, torch.zeros_like(high))
    return to_int8(x, torch.maximum(-low, high) / 127.5)


def magnitudes_of_both_ends(x):
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return to_int8(x, torch.max(low.abs(), high.abs()) / 127)


def by_max_dim(x):
    return to_int8(x, x.abs().max(dim=-1, keepdim=True)[0] / 127)


def inverse_scale(x):
    return (x * (127 / largest(x).clamp(min=1e-4))).round().clamp(-127, 127).to(torch.int8)


def reciprocal(x):
    s = largest(x.float()) / 127
    return (x * s.reciprocal()).round().clamp(-128, 127).to(torch.int8)


def number_before_the_division(x):
    return (x.float() * 127 / largest(x.float())).round().clamp(-127, 127).to(torch.int8)


def zero_instead(x):
    s = largest(x) / 127
    return to_int8(x, torch.where(s == 0, torch.ones_like(s), s))


def a_little_added(x):
    return to_int8(x.float(), largest(x.float()) / 127 + 1e-8)


def small_ones_replaced(x):
    s = largest(x) / 127
    return to_int8(x, torch.where(s < 1e-6, 1e-6, s))


def in_float32(x):
    y = x.float()
    return to_int8(y, largest(y) / 127)


def without_keepdim(x):
    s = x.abs().amax(-1) / 127
    return to_int8(x, s.unsqueeze(-1))


def unsigned(x):
    s = largest(x) / 127
    return (torch.round(x / s) + 128).clamp(0, 255).to(torch.uint8)


def in_a_float_tensor(x):
    return torch.round(x / (largest(x) / 127)).clamp(-128, 127)


def limited_before_rounding(x):
    return (x / (largest(x) / 127)).clamp(-128, 127).round().to(torch.int8)


def of_another_shape(x):
    y = x.reshape(2, 3, K)
    return to_int8(y, largest(y) / 127).reshape(6, K)


TOKEN_127 = (
    eager_127, clamped_first, magnitudes_of_both_ends, by_max_dim, reciprocal, number_before_the_division, zero_instead,
    small_ones_replaced, in_float32, without_keepdim, unsigned, in_a_float_tensor, limited_before_rounding,
    inverse_scale, of_another_shape, a_little_added,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", TOKEN_127, ids=lambda f: f.__name__)
def test_a_scale_for_each_row(function, dtype):
    q = read(function, X, dtype)
    assert (q.kind, round(q.divisor, 6), q.zero_point) == ("token", 127, 0)
    assert q.low <= -127 and q.high == 127


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [clamped_scale, larger_of_both_ends], ids=lambda f: f.__name__)
def test_half_a_code_more(function, dtype):
    assert facts(read(function, X, dtype)) == ("token", 127.5, -128, 127, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_for_the_whole_tensor(dtype):
    assert facts(read(lambda x: to_int8(x, x.abs().max() / 127), X, dtype)) == ("tensor", 127, -128, 127, 0)
    assert facts(read(lambda x: to_int8(x, x.abs().amax() / 127), X, dtype)) == ("tensor", 127, -128, 127, 0)
    assert facts(read(lambda x: to_int8(x, x.flatten().abs().max() / 127), X, dtype))[0] == "tensor"


@pytest.mark.parametrize("written", [False, True])
def test_a_comparison_that_is_written_to_is_none(written):
    """What the scale is chosen by is what stands in the tensor when it is asked, not how it was made."""
    t = Traced(zero_instead, X)
    (where,) = [n for n in t.graph.nodes if n.target is torch.ops.aten.where.self]
    condition = where.args[0]
    if written:
        with t.graph.inserting_before(where):
            t.graph.call_function(torch.ops.aten.logical_not_.default, (condition,)).meta["val"] = condition.meta["val"]
    reader = ActivationReader(AffineReader(StaticValues(t.graph, {}), t.dialects))
    assert isinstance(reader.read(Ref(t.result)), NotRead if written else Quantization)


def test_the_tensor_is_the_one_before_views_and_wider_casts():
    t = Traced(lambda x: to_int8(x.float().reshape(2, 3, K), largest(x.reshape(2, 3, K)).float() / 127), X.bfloat16())
    reader = ActivationReader(t.reader)
    assert reader.read(Ref(t.result)).x is t.inputs[0]


def test_floors_are_in_units_of_the_tensor():
    assert read(clamped_first).magnitude.floor == pytest.approx(1e-5)
    assert read(clamped_scale).magnitude.floor == pytest.approx(127.5e-7)
    assert read(inverse_scale).magnitude.floor == pytest.approx(1e-4)
    assert read(small_ones_replaced).magnitude.floor == pytest.approx(127e-6)
    assert read(zero_instead).magnitude.floor == 0.0
    assert read(a_little_added).magnitude.added == pytest.approx(127e-8)


def test_rounding_is_counted_in_codes():
    """In bfloat16 the scale and the quotient are each off by up to half of a code; in float32 by next to nothing."""
    assert 0.9 < read(eager_127, dtype=torch.bfloat16).error < 1.0
    assert 0.1 < read(eager_127, dtype=torch.float16).error < 0.13
    assert read(eager_127).error < 1e-4


def test_named_operators():
    x = X

    def per_token(x):
        s, z = decomposed.choose_qparams_per_token(x, torch.int8)
        return decomposed.quantize_per_token(x, s, z, -128, 127, torch.int8)

    def per_tensor(x):
        s, z = decomposed.choose_qparams_symmetric.tensor(x, -127, 127, 1e-6, torch.int8)
        return decomposed.quantize_per_tensor.tensor(x, s, z, -127, 127, torch.int8)

    def static(x):
        return decomposed.quantize_per_tensor.default(x, 0.05, 3, -128, 127, torch.int8)

    assert facts(read(per_token, x)) == ("token", 127, -128, 127, 0)
    assert facts(read(per_tensor, x)) == ("tensor", 127, -127, 127, 0)
    assert facts(read(static, x)) == ("static", 20, -128, 127, 3)


@pytest.mark.parametrize("block", [(1, K), (M, K)], ids=["token", "tensor"])
@pytest.mark.parametrize("low", [None, -127])
def test_torchaos_operators(block, low):
    pytest.importorskip("torchao")
    ao = torch.ops.torchao
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    chosen = graph.call_function(ao.choose_qparams_affine.default, (x, "SYMMETRIC", block, torch.int8, low))
    chosen.meta["val"] = chosen.target(X, *chosen.args[1:])
    scale, zero = (graph.call_function(torch.ops.aten.alias.default, ()) for _ in range(2))
    graph.erase_node(zero), graph.erase_node(scale)
    parts = []
    for i in (0, 1):
        parts.append(graph.call_function(__import__("operator").getitem, (chosen, i)))
        parts[-1].meta["val"] = chosen.meta["val"][i]
    codes = graph.call_function(ao.quantize_affine.default, (x, block, *parts, torch.int8, low))
    codes.meta["val"] = codes.target(X, block, *chosen.meta["val"], torch.int8, low)
    graph.output(codes)
    t = Traced.__new__(Traced)
    t._read(torch.fx.GraphModule({}, graph), [X], 0)
    q = ActivationReader(t.reader).read(Ref(t.result))
    divisor = 127.5 if low is None else 127
    assert facts(q) == ("token" if block[0] == 1 else "tensor", divisor, low or -128, 127, 0)
    for x in (X, X * 1e-9):  # the least scale differs between torchao's versions
        codes = ao.quantize_affine.default(x, block, *chosen.target(x, *chosen.args[1:]), torch.int8, low)
        check(q, x.double(), codes.double())


# -- static ------------------------------------------------------------------------------------------------------------

S = 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_known_when_compiling(dtype):
    for function, z in (
        (lambda x: to_int8(x, S), 0),
        (lambda x: to_int8(x, S, 3), 3),
        (lambda x: (x * 50 - 2).round().clamp(-128, 127).to(torch.int8), -2),
        (lambda x: torch.floor(x / S + 0.5).clamp(-128, 127).to(torch.int8), 0),
        (lambda x: (torch.round(x / S) + 131).clamp(0, 255).to(torch.uint8), 3),
    ):
        q = read(function, X, dtype)
        assert (q.kind, q.low, q.high, q.zero_point) == ("static", -128, 127, z)
        assert float(q.rate.tensor) == pytest.approx(50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_in_tensors(dtype):
    s, z, low = torch.tensor(0.02), torch.tensor(-7), torch.tensor(-128.0)
    for own in (s, s.to(dtype)):
        q = read(
            lambda x, s, z, low: torch.maximum(torch.round(x / s) + z, low).clamp(max=127).to(torch.int8),
            X,
            dtype,
            (own, z, low),
        )
        assert facts(q)[2:] == (-128, 127, -7)
        assert float(q.rate.tensor) == 1 / own.double()


def test_a_number_that_the_dtype_can_not_hold_may_be_rounded_once_more():
    s = torch.tensor(0.02)
    wide, own = (read(lambda x, s: to_int8(x, s), X, torch.bfloat16, (t,)).error for t in (s, s.bfloat16()))
    assert wide == pytest.approx(2 * own)


@pytest.mark.parametrize("scale", [0.0, math.nan])
def test_scales_that_are_no_scales(scale):
    s = torch.tensor(scale)
    assert isinstance(read_only(lambda x, s: to_int8(x, s), X, s), NotRead)
    row = torch.full((K,), 0.1)
    row[3] = scale
    assert isinstance(read_only(lambda x, s: to_int8(x, s), X, row), NotRead)


def test_integers_are_no_tensor_to_quantize():
    """Codes of codes: what is scaled was never floating."""
    x = torch.randint(-1000, 1000, (M, K), dtype=torch.int32)
    assert isinstance(read_only(lambda x: to_int8(x, 7.0), x), NotRead)
    assert isinstance(read_only(lambda x: to_int8(x.float(), largest(x) / 127), x), NotRead)


@pytest.mark.parametrize(("divisor", "fits"), [(128.4, True), (128.5, False), (128.6, False)])
def test_codes_that_are_limited_at_one_end_only(divisor, fits):
    """Below, the largest magnitude must not become the code -129, which int8 does not hold."""
    found = read_only(lambda x: torch.round(x / (largest(x) / divisor)).clamp(max=127).to(torch.int8), X)
    assert isinstance(found, Quantization) == fits


def test_codes_that_are_written_to():
    """A quantizer's codes that change afterwards are not those that it made."""

    def function(x, written):
        codes = decomposed.quantize_per_tensor.default(x, S, 0, -128, 127, torch.int8)
        return codes.add_(1) if written else codes

    assert isinstance(read_only(lambda x: function(x, False), X), Quantization)
    assert isinstance(read_only(lambda x: function(x, True), X), NotRead)


@pytest.mark.parametrize("written", [False, True])
def test_the_result_of_a_quantizer_that_is_written_to(written):
    """Read itself, not what the write returns."""
    t = Traced(lambda x: decomposed.quantize_per_tensor.default(x, S, 0, -128, 127, torch.int8), X)
    if written:
        with t.graph.inserting_after(t.result):
            t.graph.call_function(torch.ops.aten.add_.Tensor, (t.result, 1)).meta["val"] = t.result.meta["val"]
    reader = ActivationReader(AffineReader(StaticValues(t.graph, {}), t.dialects))
    assert isinstance(reader.read(Ref(t.result)), NotRead if written else Quantization)


def test_a_scale_for_each_channel():
    q = read(lambda x, s: to_int8(x, s), known=(torch.linspace(0.01, 0.1, K),))
    assert q.kind == "static" and ex.shape_of(q.rate) == (K,)


def test_a_factor_of_the_tensor_is_left_with_it():
    """Of two factors that vary along the last dimension, the first belongs to the tensor."""
    gamma, s = torch.linspace(0.5, 2, K), torch.linspace(0.01, 0.1, K)
    q = read(lambda x, gamma, s: to_int8(x * gamma, s), known=(gamma, s))
    torch.testing.assert_close(q.rate.tensor.float(), 1 / s)


@pytest.mark.parametrize(
    "made", [lambda x: x + 3, lambda x: x.relu(), lambda x: x.clamp(-1, 1), lambda x: x.bfloat16()]
)
def test_what_comes_before_the_scale_belongs_to_the_tensor(made):
    static, dynamic = (
        read(lambda x: to_int8(made(x), S)),
        read(lambda x: (lambda y: to_int8(y, largest(y) / 127))(made(x))),
    )
    assert facts(static) == ("static", 50, -128, 127, 0) and facts(dynamic) == ("token", 127, -128, 127, 0)
    assert static.x.op == dynamic.x.op == "call_function"


# -- what is none ------------------------------------------------------------------------------------------------------


def asymmetric(x):
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s = (high - low) / 255
    return to_int8(x, s, torch.round(-128 - low / s))


REFUSED = {
    "its codes are not clamped": (
        lambda x: torch.round(x / S).to(torch.int8),
        lambda x: torch.round(x / (largest(x) / 127.5)).to(torch.int8),
        lambda x: (lambda y: torch.round(y / (largest(y) / 127)).to(torch.int8))(x.bfloat16()),
        lambda x: torch.round(x / (largest(x) / 200)).to(torch.int8),
        lambda x: torch.round(x / S).clamp(-128, 128).to(torch.int8),
    ),
    "its zero point": (asymmetric,),
    "is neither known nor a largest magnitude": (
        lambda x: to_int8(x, largest(x, dim=0) / 127),
        lambda x: to_int8(x, x.amax(-1, keepdim=True) / 127),
        lambda x: to_int8(x, -x.amin(-1, keepdim=True) / 127),
        lambda x: to_int8(x, x.abs().mean(-1, keepdim=True) / 127),
        lambda x: to_int8(x, x.abs().amin(-1, keepdim=True) / 127),
        lambda x: to_int8(x, torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)) / 127),
        lambda x: to_int8(x, torch.maximum(x.amax(-1, keepdim=True), -2 * x.amin(-1, keepdim=True)) / 127),
        lambda x: to_int8(x, torch.maximum(x.amax(-1, keepdim=True), -x.relu().amin(-1, keepdim=True)) / 127),
        lambda x: to_int8(x, (largest(x) / 127).clamp(max=0.5)),
        lambda x: to_int8(x, largest(x) / -127),
        lambda x: to_int8(x.reshape(M, 2, 20), largest(x.reshape(M, 2, 20)) / largest(x).unsqueeze(-1)),
        lambda x: (x * (127 / largest(x)).clamp(min=1.0)).round().clamp(-127, 127).to(torch.int8),
        lambda x: to_int8(x, torch.where(largest(x) < 1e-3, 1e-5, largest(x) / 127)),
    ),
    "its scale is found from": (
        lambda x: to_int8(x, largest(x.sigmoid()) / 127),
        lambda x: to_int8(x, largest(x.bfloat16()) / 127),
        lambda x: to_int8(x * x, largest(x) / 127),
        lambda x: to_int8(x.reshape(M, 2, 20), largest(x).reshape(M, 1, 1) / 127),
    ),
    "is added before rounding": (lambda x: (x / S + 0.25).round().clamp(-128, 127).to(torch.int8),),
    "rounded down": (lambda x: torch.floor(x / S).clamp(-128, 127).to(torch.int8),),
    "truncates": (lambda x: (x / S).clamp(-128, 127).to(torch.int8),),
    "no step of a quantization": (lambda x: torch.round(x / S, decimals=1).clamp(-128, 127),),
    "nothing scales": (lambda x: x.round().clamp(-128, 127).to(torch.int8),),
}


@pytest.mark.parametrize(("reason", "function"), [(r, f) for r, fs in REFUSED.items() for f in fs])
def test_what_computes_something_else_is_refused(reason, function):
    found = read(function)
    assert isinstance(found, NotRead) and reason in found.reason, found


def test_codes_of_another_range_are_read_with_it():
    assert facts(read(lambda x: to_int8(x, largest(x) / 7, 0, -8, 7))) == ("token", 7, -8, 7, 0)
    assert facts(read(lambda x: to_int8(x, S, 0, -64, 63))) == ("static", 50, -64, 63, 0)


def test_a_scale_that_the_graph_writes_to_is_not_read():
    def function(x):
        s = largest(x) / 127
        s.mul_(2)
        return to_int8(x, s)

    assert isinstance(read(function), NotRead)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    divisor=st.sampled_from([127, 127.5, 120, 7.5]),
    floor=st.sampled_from([0.0, 1e-5, 1e-2]),
    added=st.sampled_from([0.0, 1e-6]),
    inverse=st.booleans(),
    zero=st.sampled_from([0, 5]),
    wide=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-4, 1),
)
def test_any_spelling_means_what_it_computes(divisor, floor, added, inverse, zero, wide, dtype, exponent):
    def function(x):
        y = x.float() if wide else x
        top = largest(y)
        top = top.clamp(min=floor) if floor else top
        top = top + added if added else top
        if inverse:
            return (torch.round(y * (divisor / top)) + zero).clamp(-128, 127).to(torch.int8)
        return to_int8(y, top / divisor, zero)

    q = read(function, X * 10.0**exponent, dtype)
    assert isinstance(q, Quantization)
    assert math.isclose(q.divisor, divisor, rel_tol=1e-6) and q.zero_point == zero
