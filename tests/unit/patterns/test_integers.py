"""Bounds of integers: never narrower than what the numbers do, and as narrow where codes must be recognized."""

import math

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # the quantized_decomposed operators
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.patterns.integers import Bounds, IntegerReader, fits, integer_span
from tests.unit.graphs import Traced

X = torch.randn(3, 4)


def bounds(function, *inputs, known=0):
    t = Traced(function, *(inputs or (X,)), known=known)
    return IntegerReader(t.values, t.dialects.integers).bounds(t.result)


def integer_range(function, *inputs, known=0):
    t = Traced(function, *(inputs or (X,)), known=known)
    return IntegerReader(t.values, t.dialects.integers).integer_range(t.result)


def codes(x, low=-128, high=127):
    return x.round().clamp(low, high)


def test_fits():
    assert fits((-128, 127), torch.int8)
    assert not fits((-129, 127), torch.int8)
    assert not fits((-128, 128), torch.int8)
    assert fits((0, 255), torch.uint8) and not fits((-1, 255), torch.uint8) and not fits((0, 256), torch.uint8)
    assert integer_span(torch.int16) == (-(2**15), 2**15 - 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_small_integers_are_bounded_by_their_dtype(dtype):
    assert bounds(lambda x: x + 0, torch.zeros(2, dtype=dtype)).whole
    assert integer_range(lambda x: x.view(2, 1), torch.zeros(2, dtype=dtype)) == integer_span(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bool])
def test_of_an_input_of_another_dtype_nothing_is_known(dtype):
    assert integer_range(lambda x: x.view(2, 1), torch.zeros(2, dtype=dtype)) is None


@pytest.mark.parametrize("rounding", [torch.round, torch.floor, torch.ceil, torch.trunc])
def test_rounding_makes_integers(rounding):
    assert bounds(rounding) == Bounds(-math.inf, math.inf, whole=True)
    assert bounds(lambda x: rounding(x.clamp(-1.5, 2.5))) == Bounds(-2, 3, whole=True)


def test_without_rounding_there_are_none():
    assert bounds(lambda x: x.clamp(-1, 2)) == Bounds(-1, 2, whole=False)
    assert integer_range(lambda x: x.clamp(-1, 2)) is None
    assert bounds(lambda x: x * 2) == Bounds()


def test_clamps():
    assert integer_range(lambda x: codes(x)) == (-128, 127)
    assert integer_range(lambda x: codes(x).clamp(-200, 100)) == (-128, 100)
    assert integer_range(lambda x: codes(x).clamp(-100, 200)) == (-100, 127)
    assert integer_range(lambda x: codes(x).clamp(150, 200)) == (150, 150)
    assert integer_range(lambda x: codes(x).clamp(-300, -200)) == (-200, -200)
    assert integer_range(lambda x: x.round().clamp(min=3)) == (3, math.inf)
    assert integer_range(lambda x: x.round().clamp(max=3)) == (-math.inf, 3)


def test_bounds_that_are_no_integers_make_no_integers():
    assert integer_range(lambda x: x.round().clamp(-1.5, 3)) is None
    assert integer_range(lambda x: x.round().clamp(-1, 3.5)) is None


def test_bounds_are_what_the_dtype_makes_of_them():
    """257 is no bfloat16: elements are clamped to 256."""
    assert integer_range(lambda x: x.round().clamp(0, 257), X.bfloat16()) == (0, 256)
    assert integer_range(lambda x: x.round().clamp(0, 257), X) == (0, 257)


def test_bounds_that_exclude_each_other_are_not_read():
    assert bounds(lambda x: x.round().clamp(5, 3)) == Bounds()
    assert integer_range(lambda x: x.round().clamp(3, 3)) == (3, 3)


@pytest.mark.parametrize(("pick", "held"), [(torch.minimum, (-128, 7)), (torch.maximum, (7, 127))])
def test_minimum_and_maximum_with_a_constant_on_either_side(pick, held):
    seven = torch.full((1,), 7.0)
    assert integer_range(lambda x, s: pick(codes(x), s), X, seven, known=1) == held
    assert integer_range(lambda x, s: pick(s, codes(x)), X, seven, known=1) == held


def test_tensors_as_bounds():
    low, high = torch.tensor(-8.0), torch.tensor(7.0)
    assert integer_range(lambda x, a, b: x.round().clamp(a, b), X, low, high, known=2) == (-8, 7)
    assert integer_range(lambda x, a, b: x.round().clamp(a, b), X, low, high, known=0) is None
    assert integer_range(lambda x, a: x.round().clamp(min=a), X, low, known=1) == (-8, math.inf)
    assert integer_range(lambda x, b: x.round().clamp(max=b), X, high, known=1) == (-math.inf, 7)


# -- sums --------------------------------------------------------------------------------------------------------------


def test_sums_shift():
    assert integer_range(lambda x: codes(x) + 128) == (0, 255)
    assert integer_range(lambda x: 128 + codes(x)) == (0, 255)
    assert integer_range(lambda x: codes(x) - 2) == (-130, 125)
    assert integer_range(lambda x: torch.add(codes(x), 4, alpha=2)) == (-120, 135)
    assert integer_range(lambda x: torch.sub(codes(x), 4, alpha=2)) == (-136, 119)
    zero = torch.full((4,), 3.0)
    assert integer_range(lambda x, z: codes(x) + z, X, zero, known=1) == (-125, 130)
    assert integer_range(lambda x, z: z + codes(x), X, zero, known=1) == (-125, 130)


def test_a_constant_first_is_no_value_to_subtract_from():
    assert integer_range(lambda x, z: z - codes(x), X, torch.full((4,), 3.0), known=1) is None
    assert integer_range(lambda x, z: torch.add(z, codes(x), alpha=2), X, torch.full((4,), 3.0), known=1) is None


def test_sums_with_fractions_or_unknowns_are_none():
    assert integer_range(lambda x: codes(x) + 0.5) is None
    assert integer_range(lambda x: torch.add(codes(x), 1, alpha=0.5)) is None
    assert integer_range(lambda x, z: codes(x) + z, X, torch.ones(4)) is None
    assert integer_range(lambda x: x.clamp(-1, 1) + 1) is None


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 2**8), (torch.float16, 2**11), (torch.float32, 2**24)])
def test_beyond_the_mantissa_sums_have_no_bound(dtype, exact):
    x = X.to(dtype)
    assert integer_range(lambda x: x.round().clamp(0, 8) + (exact - 8), x) == (exact - 8, exact)
    assert integer_range(lambda x: x.round().clamp(0, 9) + (exact - 8), x) == (exact - 8, math.inf)
    assert integer_range(lambda x: x.round().clamp(-8, 0) - (exact - 8), x) == (-exact, 8 - exact)
    assert integer_range(lambda x: x.round().clamp(-9, 0) - (exact - 8), x) == (-math.inf, 8 - exact)


def test_sums_of_integers_do_not_wrap_around():
    x = torch.zeros(4, dtype=torch.int8)
    # a sum that leaves int8 is bounded by int8 only, as whatever wraps around is
    assert integer_range(lambda x: x.clamp(0, 100) + 27, x) == (27, 127)
    assert integer_range(lambda x: x.clamp(0, 100) + 28, x) == (-128, 127)
    assert integer_range(lambda x: x.clamp(-100, 0) - 28, x) == (-128, -28)
    assert integer_range(lambda x: x.clamp(-100, 0) - 29, x) == (-128, 127)
    assert integer_range(lambda x: x.to(torch.int32).clamp(min=0) + 3, torch.zeros(4, dtype=torch.int64)) is None


# -- casts -------------------------------------------------------------------------------------------------------------


def test_casts_that_hold_the_integers():
    assert integer_range(lambda x: codes(x).to(torch.int8)) == (-128, 127)
    assert integer_range(lambda x: codes(x, 0, 255).to(torch.uint8)) == (0, 255)
    assert integer_range(lambda x: codes(x, -8, 7).to(torch.int32)) == (-8, 7)
    assert integer_range(lambda x: codes(x, -8, 7).half()) == (-8, 7)


def test_casts_that_do_not():
    assert integer_range(lambda x: codes(x, 0, 255).to(torch.int8)) == (-128, 127)
    assert integer_range(lambda x: codes(x, 0, 255).to(torch.int32).to(torch.bool)) is None
    assert integer_range(lambda x: codes(x).to(torch.complex64)) is None
    assert integer_range(lambda x: x.round().to(torch.int32)) is None


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, 2**8), (torch.float16, 2**11)])
def test_a_float_holds_integers_up_to_its_mantissa(dtype, exact):
    assert integer_range(lambda x: codes(x, -exact, exact).to(dtype)) == (-exact, exact)
    assert integer_range(lambda x: codes(x, -exact - 1, exact).to(dtype)) is None
    assert integer_range(lambda x: codes(x, -exact, exact + 1).to(dtype)) is None


def test_casts_of_floats():
    assert bounds(lambda x: x.clamp(-1, 1).half()) == Bounds(-1, 1, whole=False)
    assert bounds(lambda x: x.clamp(-1, 1).to(torch.int32)) == Bounds()
    assert bounds(lambda x: x.clamp(-1, 1).to(torch.int8)) == Bounds(-128, 127, whole=True)
    # a copy that keeps the dtype keeps what is known
    assert integer_range(lambda x: torch.ops.aten._to_copy(codes(x, -8, 7))) == (-8, 7)


def test_views_keep_bounds():
    assert integer_range(lambda x: codes(x, -8, 7).t().reshape(2, 6)) == (-8, 7)


def test_what_the_graph_writes_to_is_not_bounded():
    def written(x):
        y = codes(x, -8, 7)
        y.add_(100)
        return y

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    rounded = graph.call_function(torch.ops.aten.round.default, (x,))
    y = graph.call_function(torch.ops.aten.clamp.default, (rounded, -8, 7))
    graph.call_function(torch.ops.aten.add_.Tensor, (y, 100))
    for n in (rounded, y):
        n.meta["val"] = X
    t = Traced(lambda x: x, X)
    from quantpass.graph.static_values import StaticValues

    reader = IntegerReader(StaticValues(graph, {}), t.dialects.integers)
    assert reader.integer_range(y) is None
    assert reader.integer_range(rounded) is not None


def test_sums_that_are_rounded_past_a_bound():
    """In bfloat16 -1 - 300 is -300, and 1 + 300 is 300."""
    for less in (-300, 300):
        found = bounds(lambda x, less=less: x.round().clamp(*sorted((0, less // 300))) + less, X.bfloat16())
        value = torch.tensor(less // 300).bfloat16() + less
        assert found.low <= float(value) <= found.high and found.whole


def test_what_is_not_negative():
    assert integer_range(lambda x: x.round().relu().clamp(max=7), X) == (0, 7)


def test_numbers_are_no_nodes():
    t = Traced(lambda x: x, X)
    reader = IntegerReader(t.values, t.dialects.integers)
    assert reader.bounds(3) == Bounds()


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 268), (torch.float16, 267), (torch.float32, 267)])
def test_a_bound_is_rounded_as_the_numbers_are(dtype, largest):
    found = bounds(lambda x: x.clamp(-267, 267).to(dtype))
    assert (found.low, found.high, found.whole) == (-largest, largest, False)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_number_leaves_its_bounds(data):
    """Random chains of roundings, clamps, sums and casts on extreme numbers."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8]))
    numbers = torch.tensor([0.0, 0.5, -0.5, 1.5, -2.5, 3.0, 100.4, -127.5, 127.5, 255.0, -129.0, 2047.0, -2049.0, 5e4])
    x = numbers.to(dtype) if dtype.is_floating_point else numbers.clamp(-128, 127).to(dtype)
    steps = data.draw(
        st.lists(
            st.one_of(
                st.just(("round",)),
                st.just(("floor",)),
                st.tuples(st.just("clamp"), st.integers(-300, 300), st.integers(0, 400)),
                st.tuples(st.just("add"), st.sampled_from([-300, -128, -1, 0.5, 3, 128, 200, 2000])),
                st.tuples(st.just("to"), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int32])),
            ),
            max_size=5,
        )
    )

    def chain(x):
        for name, *args in steps:
            if name in ("round", "floor") and x.dtype.is_floating_point:
                x = getattr(x, name)()
            elif name == "clamp":
                x = x.clamp(args[0], args[0] + args[1])
            elif name == "add" and (x.dtype.is_floating_point or isinstance(args[0], int)):
                x = x + args[0]
            elif name == "to":
                x = x.to(args[0])
        return x

    if x.dtype in (torch.int8, torch.uint8):
        steps = [s for s in steps if s[0] != "clamp" or -128 <= s[1] <= s[1] + s[2] <= 127]
        steps = [s for s in steps if s[0] != "clamp" or x.dtype == torch.int8 or s[1] >= 0]
    found = bounds(chain, x)
    result = chain(x).double()
    result = result[result.isfinite()]
    assert bool((result >= found.low).all()) and bool((result <= found.high).all())
    if found.whole:
        assert torch.equal(result, result.round())


@pytest.mark.parametrize("name", ["choose_qparams", "choose_qparams_symmetric"])
@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, torch.uint8), (0, 15, torch.uint8), (-128, 127, torch.int8), (-8, 7, torch.int8)],
)
def test_a_zero_point_that_an_operator_chooses_is_one_of_the_codes(name, low, high, dtype):
    """Whatever the activation holds, so that its share in an int32 sum is known."""
    choose = getattr(torch.ops.quantized_decomposed, name).tensor
    held = integer_range(lambda x: choose(x, low, high, 1e-5, dtype)[1])
    assert held is not None
    inf, nan = math.inf, math.nan
    for values in ([nan, 1.0], [inf, -1.0], [-inf, inf], [0.0, 0.0], [1e38, -1e-30], [-5.0, -4.0], [4.0, 5.0]):
        _, zero_point = choose(torch.tensor(values), low, high, 1e-5, dtype)
        assert held[0] <= int(zero_point) <= held[1]
    assert held[1] - held[0] < 2**9
    assert integer_range(lambda x: choose(x, low, high, 1e-5, dtype)[0]) is None  # the scale
