"""Epilogues as one formula: whatever is folded computes what the steps computed, and where not, the walk stops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpass.graph.expr import Const, Ref
from quantpass.patterns.epilogues import Step
from quantpass.patterns.terms import Term
from quantpass.planning.composition import Requantize, compositions
from tests.unit.graphs import evaluate

M, N = 3, 4
ACC = torch.tensor([[3, -70, 800, 5], [-1, 2, 4, 1000], [120, -64, 33, 0]], dtype=torch.int32)
SCALES = {
    "number": torch.tensor([0.5]),
    "negative": torch.tensor([-0.5]),
    "columns": torch.tensor([0.5, 2.0, 0.25, 1.5]),
    "rows": torch.tensor([[2.0], [0.5], [4.0]]),
    "elements": torch.arange(12.0).reshape(M, N),
}


class Steps:
    """Steps on an accumulator of ``dtype``, with what each of them computes."""

    def __init__(self, dtype=torch.int32, shape=(M, N)):
        self.graph = torch.fx.Graph()
        self.product = self.node(dtype, shape)
        self.dtype, self.shape, self.steps, self.values = dtype, shape, [], {}
        self.computed = [ACC.to(dtype).reshape(shape)]

    def node(self, dtype, shape):
        node = self.graph.placeholder("x")
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def term(self, tensor, known=True):
        aligned = (1,) * (2 - tensor.dim()) + tuple(tensor.shape)
        if known:
            return Term(Const(tensor), aligned)
        node = self.node(tensor.dtype, tensor.shape)
        self.values[node] = tensor
        return Term(Ref(node), aligned)

    def then(self, kind, computed, **arguments):
        self.computed.append(computed)
        self.steps.append(Step(kind, self.node(computed.dtype, tuple(computed.shape)), **arguments))
        return self

    @property
    def last(self):
        return self.computed[-1]

    def scale(self, tensor, known=True, inverted=False):
        return self.then("scale", self.last * tensor, term=self.term(tensor, known), inverted=inverted)

    def add(self, tensor, known=True):
        return self.then("add", self.last + tensor, term=self.term(tensor, known))

    def cast(self, dtype):
        return self.then("cast", self.last.to(dtype))

    def relu(self):
        return self.then("relu", self.last.relu())

    def round(self):
        return self.then("round", self.last.round())

    def clamp(self, low, high):
        return self.then("clamp", self.last.clamp(low, high), bounds=(low, high))

    def quantize(self, scale, zero_point, low, high, dtype=torch.int8):
        codes = (self.last / scale).round().add(zero_point).clamp(low, high).to(dtype)
        term = self.term(scale)
        return self.then("quantize", codes, term=term, zero_point=zero_point, bounds=(low, high))

    def view(self, shape):
        return self.then("view", self.last.reshape(shape))

    def compositions(self):
        return compositions(self.product, self.dtype, self.steps)

    def formula(self, c):
        """What the formula ``c`` computes in float64."""
        acc = ACC.double()
        if c.acc_addend is not None:
            acc = acc + evaluate(c.acc_addend, self.values)
        y = acc * evaluate(c.columns, self.values)
        for rows in c.rows:
            y = y * evaluate(rows, self.values).reshape(-1, 1)
        if c.addend is not None:
            y = y + evaluate(c.addend, self.values)
        if c.relu:
            y = y.relu()
        if c.requantize is not None:
            q = c.requantize
            y = (y.round() + q.zero_point).clamp(q.low, q.high)
        return y

    def check(self):
        """Every composition computes what its steps compute; returns the last."""
        found = self.compositions()
        for length, c in enumerate(found):
            assert c.length == length
            assert c.output is (self.steps[length - 1].node if length else self.product)
            assert c.dtype == self.computed[length].dtype
            torch.testing.assert_close(
                self.formula(c), self.computed[length].double().reshape(M, N), rtol=1e-6, atol=1e-6
            )
        return found[-1]


def test_the_product_by_itself():
    c = Steps().check()
    assert c.unscaled and c.complete and c.faithful and not c.rounded
    assert not Steps(torch.float32).check().faithful


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["number", "columns", "rows"])
@pytest.mark.parametrize("second", ["number", "negative", "columns", "rows"])
@pytest.mark.parametrize("known", [True, False])
def test_scales_multiply(first, second, known):
    c = Steps().scale(SCALES[first]).scale(SCALES[second], known).check()
    assert c.length == 2
    assert len(c.rows) == (first == "rows") + (second == "rows" or (second in ("number", "negative") and not known))
    assert not c.unscaled


def test_a_scale_for_each_element_is_none_for_a_formula():
    assert Steps().scale(SCALES["elements"]).check().length == 0


def test_a_scale_after_a_sum_scales_both():
    c = Steps().scale(SCALES["columns"]).add(SCALES["columns"]).scale(SCALES["number"]).check()
    assert c.length == 3 and not c.rows


@pytest.mark.parametrize(("name", "known"), [("rows", True), ("rows", False), ("number", False)])
def test_a_scale_of_rows_after_a_sum_stops_the_walk(name, known):
    """The operator adds last."""
    assert (
        Steps()
        .add(torch.tensor([1]))
        .cast(torch.float32)
        .add(SCALES["columns"])
        .scale(SCALES[name], known)
        .check()
        .length
        == 3
    )


@pytest.mark.parametrize(("scale", "known", "folds"), [
    ("number", True, True), ("negative", True, False), ("columns", True, False), ("rows", True, False),
    ("number", False, False),
])  # fmt: skip
def test_only_a_positive_number_passes_a_relu(scale, known, folds):
    steps = Steps(torch.float32).relu().scale(SCALES[scale], known)
    assert steps.check().length == 1 + folds


def test_zero_does_not_pass_a_relu():
    assert Steps(torch.float32).relu().scale(torch.tensor([0.0])).check().length == 1


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["number", "columns"])
@pytest.mark.parametrize("known", [True, False])
def test_sums(name, known):
    c = Steps().scale(SCALES["columns"]).add(SCALES[name], known).add(SCALES["columns"], known).check()
    assert c.length == 3 and c.acc_addend is None


@pytest.mark.parametrize("name", ["rows", "elements"])
def test_only_a_vector_along_n_is_added(name):
    assert Steps().cast(torch.float32).add(SCALES[name]).check().length == 1


def test_integers_are_added_to_the_accumulator():
    c = Steps().add(torch.tensor([3], dtype=torch.int32)).add(torch.tensor([1, 2, 3, 4], dtype=torch.int32)).check()
    assert c.length == 2 and c.addend is None
    assert evaluate(c.acc_addend).tolist() == [4, 5, 6, 7]


def test_integers_known_at_run_time_too():
    c = Steps().add(torch.tensor([1, 2, 3, 4], dtype=torch.int32), known=False).check()
    assert c.length == 1 and c.addend is None


def test_whole_floats_are_integers():
    s = Steps()
    s.then("add", s.last + 3, term=s.term(torch.tensor([3.0])))
    assert s.check().length == 1


@pytest.mark.parametrize(("number", "known"), [(2.5, True), (3.0, False)])
def test_what_may_be_a_fraction_is_not_added_to_integers(number, known):
    s = Steps()
    s.then("add", s.last + 3, term=s.term(torch.tensor([number]), known))
    assert s.check().length == 0


@pytest.mark.parametrize(("known", "folds"), [(True, True), (False, False)])
def test_a_sum_that_widens_to_int64(known, folds):
    """Of a vector that only the run knows, nobody can say whether it fits the accumulator."""
    assert Steps().add(torch.tensor([5], dtype=torch.int64), known).check().length == folds


def test_no_sum_of_integers_that_are_no_accumulator():
    assert Steps(torch.int64).add(torch.tensor([5], dtype=torch.int64)).check().length == 0


def test_no_sum_after_a_relu():
    assert Steps(torch.float32).relu().add(SCALES["number"]).check().length == 1


def test_a_stored_bias_stays_the_tensor_it_is():
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0]).half()
    s = Steps(torch.float16).add(bias)
    c = s.check()
    assert c.addend.tensor is bias
    # arithmetic on it widens
    assert s.add(bias).check().addend.tensor.dtype == torch.float64
    assert Steps(torch.float16).add(torch.tensor([2.0]).half()).check().addend.tensor.dtype == torch.float64


# -- casts and views ---------------------------------------------------------------------------------------------------


def test_views_are_remembered():
    s = Steps().view((3, 2, 2))
    c = s.check()
    assert c.last_view is s.steps[0].node
    assert Steps().check().last_view is None


def test_a_cast_to_integers_ends_what_is_no_quantize():
    assert Steps(torch.float32).cast(torch.int8).compositions()[-1].length == 0


@pytest.mark.parametrize(
    ("steps", "faithful"),
    [
        (lambda s: s.cast(torch.float32), True),
        (lambda s: s.cast(torch.float32).cast(torch.float16), True),
        (lambda s: s.cast(torch.float16), False),  # rounded once in the graph, twice through float32
        (lambda s: s.cast(torch.float32).cast(torch.float16).cast(torch.float32), False),  # the rounding would be lost
        (lambda s: s.cast(torch.float32).cast(torch.float16).cast(torch.bfloat16), True),
        (lambda s: s.cast(torch.float32).scale(SCALES["columns"]), True),
        (lambda s: s.cast(torch.float32).scale(SCALES["columns"]).scale(SCALES["rows"]), True),
        (lambda s: s.cast(torch.float32).scale(SCALES["rows"]).scale(SCALES["columns"]), False),
        (lambda s: s.cast(torch.float32).scale(SCALES["rows"]).scale(SCALES["rows"]), False),
        (lambda s: s.cast(torch.float32).scale(SCALES["columns"]).scale(SCALES["columns"]), False),
        (lambda s: s.cast(torch.float32).scale(SCALES["columns"], inverted=True), False),
        (lambda s: s.cast(torch.float32).scale(SCALES["number"]).add(SCALES["columns"]), True),
        (lambda s: s.cast(torch.float32).add(SCALES["columns"]).scale(SCALES["number"]), False),
        (lambda s: s.cast(torch.float32).add(SCALES["columns"]).add(SCALES["columns"]), False),
        (lambda s: s.add(torch.tensor([3], dtype=torch.int32)).cast(torch.float32), True),
        (lambda s: s.add(torch.tensor([3], dtype=torch.int32)).cast(torch.float32).add(SCALES["columns"]), False),
        (lambda s: s.cast(torch.float32).cast(torch.float16).scale(SCALES["number"].half()), False),
        (lambda s: s.cast(torch.float32).cast(torch.float16).add(SCALES["columns"].half()), False),
    ],
)
def test_faithful_means_the_operator_rounds_where_the_graph_rounds(steps, faithful):
    """The operator multiplies by columns, then rows, then adds, each once and in float32."""
    s = steps(Steps())
    c = s.compositions()[-1]
    assert c.length == len(s.steps)
    assert c.faithful == faithful


@pytest.mark.parametrize("inverted", [False, True])
def test_float_products_are_never_faithful(inverted):
    assert not Steps(torch.float32).scale(SCALES["columns"], inverted=inverted).check().faithful
    assert not Steps(torch.float32).add(SCALES["columns"]).check().faithful


@pytest.mark.parametrize(("dtypes", "rounded"), [
    ([torch.float32], False), ([torch.float16], True), ([torch.float32, torch.bfloat16], True),
    ([torch.float16, torch.float32], True),
])  # fmt: skip
def test_rounded(dtypes, rounded):
    s = Steps()
    for dtype in dtypes:
        s.cast(dtype)
    assert s.compositions()[-1].rounded == rounded


# -- quantizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int8, -8, 7)]
)
@pytest.mark.parametrize("zero", [0.0, 5.0])
def test_a_quantize_spelled_out(dtype, low, high, zero):
    s = Steps().scale(SCALES["columns"]).round().add(torch.tensor([zero])).clamp(low, high).cast(dtype)
    c = s.check()
    assert c.length == 5 and c.complete
    assert c.requantize == Requantize(zero, low, high)
    # no stop between the rounding and the bounds
    assert [p.complete for p in s.compositions()] == [True, True, False, False, True, True]


def test_a_zero_point_after_the_bounds_moves_them():
    c = Steps(torch.float32).round().clamp(-128, 127).add(torch.tensor([128.0])).cast(torch.uint8).check()
    assert c.requantize == Requantize(128, 0, 255)


def test_bounds_meet():
    c = Steps(torch.float32).round().clamp(-200, 100).clamp(-128, 300).check()
    assert (c.requantize.low, c.requantize.high) == (-128, 100)
    assert c.complete


def test_one_bound_is_no_place_to_stop():
    c = Steps(torch.float32).round().clamp(0, math.inf).check()
    assert c.length == 2 and not c.complete
    assert Steps(torch.float32).round().clamp(0, math.inf).clamp(-math.inf, 255).check().complete


def test_bounds_that_exclude_each_other_stop_the_walk():
    s = Steps(torch.float32).round().clamp(0, 10)
    s.then("clamp", s.last, bounds=(20, 30))
    assert s.check().length == 2


def test_bounds_that_meet_in_one_number_do_not():
    assert Steps(torch.float32).round().clamp(0, 10).clamp(10, 30).check().length == 3


@pytest.mark.parametrize(("low", "high", "dtype", "folds"), [
    (-128, 127, torch.int8, True), (-129, 127, torch.int8, False), (-128, 128, torch.int8, False),
    (0, 255, torch.uint8, True), (-1, 255, torch.uint8, False), (0, 256, torch.uint8, False),
])  # fmt: skip
def test_a_cast_saturates_nothing(low, high, dtype, folds):
    s = Steps(torch.float32).round().clamp(low, high).cast(dtype)
    assert s.compositions()[-1].length == 2 + folds


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_codes_in_wide_integers_are_not_read(dtype):
    assert Steps(torch.float32).round().clamp(-8, 7).cast(dtype).compositions()[-1].length == 2


@pytest.mark.parametrize("more", [
    lambda s: s.round(), lambda s: s.relu(), lambda s: s.scale(SCALES["number"]), lambda s: s.view((4, 3)),
    lambda s: s.cast(torch.float16), lambda s: s.add(torch.tensor([0.5])), lambda s: s.add(SCALES["columns"].round()),
    lambda s: s.add(torch.tensor([1.0]), known=False),
])  # fmt: skip
def test_what_does_not_go_on_after_rounding(more):
    s = more(Steps(torch.float32).round())
    assert s.compositions()[-1].length == 1


def test_nothing_follows_the_codes():
    s = Steps(torch.float32).round().clamp(-128, 127).cast(torch.int8).cast(torch.float32)
    assert s.compositions()[-1].length == 3
    s = Steps(torch.float32).round().clamp(-128, 127).cast(torch.int8).cast(torch.uint8)
    assert s.compositions()[-1].length == 3


def test_integers_are_not_rounded_nor_clamped():
    assert Steps().round().compositions()[-1].length == 0
    assert Steps().clamp(-3, 3).compositions()[-1].length == 0
    assert Steps(torch.float32).clamp(-3.0, 3.0).compositions()[-1].length == 0


@pytest.mark.parametrize("bounds", [(-1.5, 3), (0, 2.5)])
def test_bounds_that_are_no_integers(bounds):
    assert Steps(torch.float32).round().clamp(*bounds).compositions()[-1].length == 1


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.tensor([0.5, 0.25, 1.0, 2.0])])
def test_a_quantize_as_one_operator(scale):
    c = Steps(torch.float32).scale(SCALES["columns"]).quantize(scale, 3, -128, 127).check()
    assert c.length == 2 and c.complete
    assert c.requantize == Requantize(3, -128, 127)


def test_what_a_named_quantize_can_not_follow():
    assert Steps().quantize(torch.tensor([0.5]), 0, -128, 127).compositions()[-1].length == 0
    assert Steps(torch.float32).round().quantize(torch.tensor([0.5]), 0, -128, 127).compositions()[-1].length == 1
    assert (
        Steps(torch.float32).add(SCALES["columns"]).quantize(SCALES["rows"], 0, -128, 127).compositions()[-1].length
        == 1
    )
    s = Steps(torch.float32)
    s.then("quantize", s.last.to(torch.int8), term=s.term(torch.tensor([0.5])))
    assert s.compositions()[-1].length == 0
    s = Steps(torch.float32)
    s.then("quantize", s.last.to(torch.int8), bounds=(-128, 127))
    assert s.compositions()[-1].length == 0


@pytest.mark.parametrize("kind", ["scale", "add"])
def test_a_step_with_an_unread_operand_stops_the_walk(kind):
    s = Steps(torch.float32)
    s.then(kind, s.last)
    assert s.check().length == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_chain_of_steps(data):
    """Whatever prefix of a random epilogue is folded, the formula computes it."""
    s = Steps(data.draw(st.sampled_from([torch.int32, torch.float32])))
    for _ in range(data.draw(st.integers(0, 6))):
        name = data.draw(st.sampled_from(["number", "negative", "columns", "rows"]))
        known = data.draw(st.booleans())
        whole = not s.last.dtype.is_floating_point
        kind = data.draw(st.sampled_from(["scale", "add", "relu", "cast", "quantize"]))
        if kind == "scale":
            s.scale(SCALES[name], known)
        elif kind == "add" and whole:
            s.add((4 * SCALES[name]).to(torch.int32), known)
        elif kind == "add":
            s.add(SCALES[name], known)
        elif kind == "relu":
            s.relu()
        elif kind == "cast" and whole:
            s.cast(torch.float32)
        elif kind == "quantize" and not whole:
            s.round().add(torch.tensor([3.0])).clamp(-128, 127).cast(torch.int8)
            break
    s.check()
