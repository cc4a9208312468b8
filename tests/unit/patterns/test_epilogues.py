"""The steps after a matmul, and where the walk ends."""

import pytest
import torch

from quantpass.graph.static_values import StaticValues
from quantpass.patterns.contractions import Contraction, Own, read_contraction
from quantpass.patterns.epilogues import own_steps, read_epilogue
from tests.unit.graphs import Traced, evaluate

aten = torch.ops.aten

X, W = torch.randn(3, 4), torch.randn(4, 5)
COLUMNS, ROWS = torch.rand(5) + 0.5, torch.rand(3, 1) + 0.5
CODES = torch.ones(32, 32, dtype=torch.int8)


def walk(function, *more, known=0, inputs=None):
    """The epilogue of ``function(x @ w, *more)``, with the traced graph."""
    x, w = inputs or (X, W)
    t = Traced(lambda x, w, *more: function(x @ w, *more), x, w, *more, known=known)
    return walked(t), t


def walked(t):
    c = next(c for c in (read_contraction(t.dialects.contractions, n) for n in t.graph.nodes) if c is not None)
    return read_epilogue(t.reader, c)


def kinds(function, *more, **options):
    return [s.kind for s in walk(function, *more, **options)[0].steps]


def ended(function, *more, **options):
    return walk(function, *more, **options)[0].ended


def number(step):
    return step.term.constant.flatten().tolist()


def test_an_output_ends_the_walk():
    epilogue, _ = walk(lambda y: y)
    assert epilogue.steps == () and epilogue.ended == "it is an output of the graph"


def test_two_readers_end_the_walk():
    assert ended(lambda y: (y * 2, y + 1)) == "its value has 2 readers"
    assert ended(lambda y: (y, y * 2)) == "its value has 2 readers"


def test_asserts_are_no_readers():
    t = Traced(lambda x, w: (x @ w) * 2.0, X, W)
    (mm,) = t.calls(aten.mm.default)
    with t.graph.inserting_after(mm):
        t.graph.call_function(aten._assert_tensor_metadata.default, (mm,))
    assert [s.kind for s in walked(t).steps] == ["scale"]


def test_a_value_used_twice_ends_the_walk():
    assert "more than once" in ended(lambda y: y * y)
    assert "more than once" in ended(lambda y: torch.cat([y, y]))


# -- scales and sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "kind"), [(COLUMNS, "columns"), (ROWS, "rows"), (torch.tensor(2.0), "scalar")])
def test_scales(other, kind):
    for function in (lambda y, s: y * s, lambda y, s: s * y):
        ((step,), _), t = (lambda r: ((r[0].steps, r[0].ended), r[1]))(walk(function, other, known=1))
        assert (step.kind, step.term.kind, step.inverted) == ("scale", kind, False)
        torch.testing.assert_close(step.term.constant, other.double().reshape(step.term.constant.shape))
        assert step.node is t.result


def test_division_multiplies_by_the_inverse():
    (step,) = walk(lambda y, s: y / s, COLUMNS, known=1)[0].steps
    assert step.inverted
    torch.testing.assert_close(step.term.constant, 1 / COLUMNS.double())
    epilogue, t = walk(lambda y, s: y / s, COLUMNS)
    values = t.run(X, W, COLUMNS)
    torch.testing.assert_close(evaluate(epilogue.steps[0].term.expr, values), 1 / COLUMNS)


def test_a_number_divided_by_the_result_is_no_scale():
    assert kinds(lambda y, s: s / y, torch.rand(3, 5)) == []


def test_a_factor_for_each_element_is_read_and_left_to_planning():
    assert kinds(lambda y, s: y * s, torch.rand(3, 5)) == ["scale"]


def test_a_product_of_integers_is_no_scale():
    assert kinds(lambda y: y.int() * 2) == ["cast"]
    t = Traced(lambda x, w: torch._int_mm(x, w) * 2, CODES, CODES)
    assert walked(t).steps == ()
    t = Traced(lambda x, w: torch._int_mm(x, w) * 0.5, CODES, CODES)
    assert [s.kind for s in walked(t).steps] == ["scale"]


@pytest.mark.parametrize(
    ("function", "added"),
    [
        (lambda y, b: y + b, 1),
        (lambda y, b: b + y, 1),
        (lambda y, b: y - b, -1),
        (lambda y, b: torch.add(y, b, alpha=3), 3),
        (lambda y, b: torch.sub(y, b, alpha=3), -3),
    ],
)
def test_sums(function, added):
    (step,) = walk(function, COLUMNS, known=1)[0].steps
    assert step.kind == "add"
    torch.testing.assert_close(step.term.constant.double(), added * COLUMNS.double())


@pytest.mark.parametrize("function", [lambda y, b: b - y, lambda y, b: torch.add(b, y, alpha=2)])
def test_sums_that_change_the_sign_or_size_of_the_result(function):
    assert kinds(function, COLUMNS) == []


def test_sums_of_what_is_no_number():
    assert kinds(lambda y, mask: y + mask, torch.ones(5).bool()) == []
    assert kinds(lambda y, mask: y * mask, torch.ones(5).bool()) == []
    t = Traced(lambda x, w, b: x @ w + b, X, W, COLUMNS, known=1)
    t.result.kwargs = {"alpha": t.inputs[0]}
    assert walked(t).steps == ()


def test_sums_of_numbers():
    assert number(walk(lambda y: y + 2)[0].steps[0]) == [2]
    assert number(walk(lambda y: y - 2)[0].steps[0]) == [-2]


def test_a_bias_is_kept_as_it_is_stored():
    epilogue, t = walk(lambda y, b: y + b, COLUMNS, known=1)
    assert epilogue.steps[0].term.expr.origin is t.inputs[2]


# -- casts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float64])
def test_casts(dtype):
    (step,) = walk(lambda y: y.to(dtype))[0].steps
    assert (step.kind, step.dtype) == ("cast", dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_casts_to_what_is_no_real_number(dtype):
    assert kinds(lambda y: y.to(dtype)) == []


@pytest.mark.parametrize(("dtype", "reads"), [(torch.float32, 1), (torch.int64, 0), (torch.int8, 0)])
def test_casts_of_the_accumulator(dtype, reads):
    t = Traced(lambda x, w: torch._int_mm(x, w).to(dtype), CODES, CODES)
    assert len(walked(t).steps) == reads


def test_a_cast_to_another_device_or_layout_is_no_step():
    t = Traced(lambda x, w: (x @ w).half(), X, W)
    t.result.meta["val"] = torch.empty(3, 5, dtype=torch.half, device="meta")
    assert walked(t).steps == ()
    for layout, reads in ((torch.sparse_coo, 0), (torch.strided, 1)):
        t = Traced(lambda x, w: (x @ w).half(), X, W)
        t.result.kwargs = {**t.result.kwargs, "layout": layout}
        assert len(walked(t).steps) == reads


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda y: y.reshape(1, 3, 5), lambda y: y.clone(), lambda y: y.unsqueeze(0)])
def test_views_that_keep_the_columns(move):
    assert kinds(move) == ["view"]


def test_views_of_batches():
    x, w = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert set(kinds(lambda y: y.reshape(6, 5), inputs=(x, w))) == {"view"}
    assert "rearranges" in ended(lambda y: y.reshape(10, 3), inputs=(x, w))


@pytest.mark.parametrize("move", [
    lambda y: y.t(), lambda y: y.reshape(15), lambda y: y.reshape(5, 3), lambda y: y.expand(2, 3, 5),
    lambda y: y.unsqueeze(2),
])  # fmt: skip
def test_views_that_do_not(move):
    assert "rearranges" in ended(move)


def test_a_view_without_dimensions():
    assert "rearranges" in ended(lambda y: y.reshape(()), inputs=(torch.randn(1, 4), torch.randn(4, 1)))


def test_what_changes_the_shape():
    assert "changes the shape" in ended(lambda y: y.sum(-1))
    assert "changes the shape" in ended(lambda y, b: y + b, torch.rand(2, 3, 5))


# -- quantizing --------------------------------------------------------------------------------------------------------


def test_relu_is_a_clamp_at_zero():
    assert kinds(torch.relu) == kinds(lambda y: y.clamp(min=0)) == kinds(lambda y: y.clamp_min(0)) == ["relu"]
    assert kinds(lambda y: y.clamp(0, 6)) == ["clamp"]
    assert kinds(lambda y: y.clamp(min=1)) == ["clamp"]


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (lambda y: y.clamp(-3, 4), (-3, 4)),
        (lambda y: y.clamp(min=-3), (-3, float("inf"))),
        (lambda y: y.clamp(max=4), (-float("inf"), 4)),
        (lambda y: torch.clamp_max(y, 4), (-float("inf"), 4)),
        (lambda y: torch.clamp_min(y, -3), (-3, float("inf"))),
    ],
)
def test_clamps(function, bounds):
    (step,) = walk(function)[0].steps
    assert (step.kind, step.bounds) == ("clamp", bounds)


@pytest.mark.parametrize("bound", [torch.maximum, aten.clamp_min.Tensor, lambda y, b: torch.maximum(b, y)])
def test_bounds_that_are_tensors(bound):
    assert kinds(bound, torch.tensor(0.0), known=1) == ["relu"]
    assert kinds(bound, torch.tensor(-3.0), known=1) == ["clamp"]
    assert kinds(bound, torch.tensor(-3.0)) == []


@pytest.mark.parametrize("rounding", [torch.floor, torch.ceil, torch.trunc])
def test_other_roundings_are_no_steps(rounding):
    assert "not part of an epilogue" in ended(rounding)


def test_a_result_that_bounds_something_known():
    """Also where it is one number itself."""
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    for bounds in (lambda y: (y, None), lambda y: (None, y)):
        t = Traced(
            lambda x, w, bounds=bounds: aten.clamp.Tensor(torch.zeros_like(x @ w), *bounds(x @ w)), x, w, known=2
        )
        (clamp,) = t.calls(aten.clamp.Tensor)
        y = next(a for a in clamp.args if isinstance(a, torch.fx.Node) and a.target is aten.mm.default)
        c = read_contraction(t.dialects.contractions, y)
        assert read_epilogue(t.reader, c).steps == ()


def test_clamps_by_tensors():
    low, high = torch.tensor(-3.0), torch.tensor(4.0)
    assert kinds(lambda y, a, b: y.clamp(a, b), low, high, known=2) == ["clamp"]
    assert kinds(lambda y, a, b: y.clamp(a, b), low, high) == []
    assert kinds(lambda y, a, b: y.clamp(a, b), low, high, known=1) == []


@pytest.mark.parametrize(
    "as_bound", [lambda y: (torch.zeros_like(y), y, None), lambda y: (torch.zeros_like(y), None, y)]
)
def test_a_result_that_is_a_bound(as_bound):
    t = Traced(lambda x, w: aten.clamp.Tensor(*as_bound(x @ w)), X, W)
    steps = walked(t).steps
    assert all(s.kind != "clamp" for s in steps)


def test_a_result_taken_apart():
    assert "not an operator on tensors" in ended(lambda y: torch.split(y, 2, -1)[0])
    assert "not an operator on tensors" in ended(lambda y: torch.max(y, -1))


def test_a_whole_epilogue():
    steps = kinds(
        lambda y, s, b: ((y * s + b).relu() / 0.5).round().add(3).clamp(0, 255).to(torch.uint8), COLUMNS, COLUMNS
    )
    assert steps == ["scale", "add", "relu", "scale", "round", "add", "clamp", "cast"]


def test_other_operators_end_the_walk():
    assert "not part of an epilogue" in ended(torch.sigmoid)
    t = Traced(lambda x, w: (x @ w) * 2.0, X, W)
    t.graph.erase_node(t.graph.output_node())
    (mm,) = t.calls(aten.mm.default)
    (mul,) = mm.users
    mul.replace_all_uses_with(mm)
    t.graph.erase_node(mul)
    t.graph.output(t.graph.call_method("relu", (mm,)))
    (method,) = mm.users
    assert "not an operator on tensors" in walked(t).ended
    method.meta["val"] = mm.meta["val"]
    assert "not an operator on tensors" in walked(t).ended


def test_a_step_that_is_written_to():
    t = Traced(lambda x, w: (x @ w) * 2.0, X, W)
    (mul,) = t.calls(aten.mul.Tensor)
    with t.graph.inserting_after(mul):
        t.graph.call_function(aten.add_.Tensor, (mul, 1.0))
    t.reader.values = StaticValues(t.graph, {})
    assert walked(t).steps == ()


# -- what the matmul does by itself ------------------------------------------------------------------------------------


def own(target, *args, known=0, **kwargs):
    t = Traced.call(target, *args, known=known, **kwargs)
    c = read_contraction(t.dialects.contractions, t.result)
    return own_steps(t.reader, c), c, t


def test_own_steps_of_addmm():
    steps, c, _ = own(aten.addmm.default, COLUMNS, X, W, alpha=2, beta=3)
    assert [s.kind for s in steps] == ["scale", "add"] and all(s.node is c.node for s in steps)
    values = {c.own[1].operand: COLUMNS}
    torch.testing.assert_close(evaluate(steps[1].term.expr, values), 3 * COLUMNS)
    assert steps[0].dtype == torch.float32


def test_own_bias_is_kept_as_it_is_stored():
    steps, _, t = own(aten.addmm.default, COLUMNS, X, W, known=3)
    assert steps[0].term.expr.origin is t.inputs[0]


@pytest.mark.parametrize(
    ("kinds_of_own", "dtypes"),
    [
        (["scale"], [torch.float32]),
        (["add", "scale", "add"], [torch.int32, torch.float32, torch.float32]),
        (["add", "cast"], [torch.int32, torch.float16]),
        (["scale", "cast"], [torch.float32, torch.float16]),
    ],
)
def test_dtypes_between_own_steps_of_an_integer_product(kinds_of_own, dtypes):
    """Integers are added as such; a scale makes float32, a cast what the operator returns."""
    t = Traced(lambda x, w: (x @ w).half(), X.half(), W.half())
    (mm,) = t.calls(aten.mm.default)
    c = Contraction(
        mm, "fused", *mm.args, integer=True, own=tuple(Own(k, None if k == "cast" else 2) for k in kinds_of_own)
    )
    assert [s.dtype for s in own_steps(t.reader, c)] == dtypes


def test_a_floating_product_keeps_its_dtype():
    t = Traced(lambda x, w: x @ w, X.half(), W.half())
    c = Contraction(t.result, "fused", *t.result.args, own=(Own("scale", 2), Own("add", 1)))
    assert [s.dtype for s in own_steps(t.reader, c)] == [torch.float16, torch.float16]


def test_own_bias_of_a_convolution_lies_along_the_columns():
    x, w, b = torch.randn(2, 4, 3, 3), torch.randn(5, 4, 1, 1), COLUMNS
    (step,), c, t = own(aten.conv2d.default, x, w, b)
    assert step.term.shape == (1, 1, 1, 5) and step.term.expr.node is t.inputs[2]
    assert read_epilogue(t.reader, c).ended.startswith("its dimensions are in another order")


def test_own_bias_of_a_swapped_matmul_is_turned_with_it():
    t = Traced.call(aten.addmm.default, COLUMNS, X, W)
    c = read_contraction(t.dialects.contractions, t.result).swapped()
    (step,) = own_steps(t.reader, c)
    assert step.term.shape == (5, 1)
