"""How graphs spell a matmul: what is read computes what the operator computes."""

import pytest
import torch
import torch.nn.functional as F

from quantpass.patterns.contractions import Contraction, NoContraction, read_contraction
from tests.unit.graphs import Traced

aten = torch.ops.aten

X, W = torch.randn(3, 4), torch.randn(4, 5)
BIAS = torch.randn(5)


def computed(c, values):
    """What a contraction means: the product, then what the operator does to it by itself, then its own order."""
    x, w = values[c.lhs], values[c.rhs]
    if c.product_dtype == torch.int32:
        x, w = x.int(), w.int()
    if c.lhs_order is not None:
        x = x.permute(c.lhs_order)
    if c.matrix is not None:
        w = w.reshape(c.matrix)
    y = x @ (w.mT if c.rhs_transposed else w)
    for own in c.own:
        operand = values[own.operand] if isinstance(own.operand, torch.fx.Node) else own.operand
        y = y * operand if own.kind == "scale" else y + operand * own.times
    return y if c.out_order is None else y.permute(c.out_order)


def read(function, *inputs):
    return checked(Traced(function, *inputs), *inputs)


def read_call(target, *args, **kwargs):
    return checked(Traced.call(target, *args, **kwargs), *(a for a in args if isinstance(a, torch.Tensor)))


def checked(t, *inputs):
    """The contraction that the result of ``t`` is, which has to mean what the operator computes."""
    found = read_contraction(t.dialects.contractions, t.result)
    if isinstance(found, Contraction):
        values = t.run(*inputs)
        torch.testing.assert_close(computed(found, values), values[t.result], rtol=1e-4, atol=1e-4)
        product = computed(Contraction(**{**_fields(found), "out_order": None}), values)
        assert found.product_shape == tuple(product.shape)
    return found


def _fields(c):
    return {name: getattr(c, name) for name in c.__dataclass_fields__}


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        (aten.mm.default, (X, W)),
        (aten.linear.default, (X, W.t().contiguous())),
        (aten.matmul.default, (torch.randn(2, 3, 4), W)),
        (aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
        (aten._int_mm.default, (torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8))),
    ],
)
def test_plain_products(target, inputs):
    found = read_call(target, *inputs)
    assert isinstance(found, Contraction) and found.own == () and not found.whole
    assert found.rhs_transposed == (target is aten.linear.default)


@pytest.mark.parametrize(
    ("alpha", "beta", "own"),
    [
        (1, 1, ["add"]),
        (2, 1, ["scale", "add"]),
        (1, 3, ["add"]),
        (0.5, 2.5, ["scale", "add"]),
        (2, 0, ["scale"]),
        (1, 0, []),
    ],
)
def test_alpha_and_beta(alpha, beta, own):
    found = read(lambda b, x, w: torch.addmm(b, x, w, alpha=alpha, beta=beta), BIAS, X, W)
    assert [o.kind for o in found.own] == own
    b, x, w = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    found = read(lambda b, x, w: torch.baddbmm(b, x, w, alpha=alpha, beta=beta), b, x, w)
    assert [o.kind for o in found.own] == own


def test_linear_with_a_bias():
    found = read_call(aten.linear.default, X, W.t().contiguous(), BIAS)
    assert [o.kind for o in found.own] == ["add"] and found.rhs_transposed


def test_what_is_no_matmul():
    t = Traced(lambda x: x + 1, X)
    assert read_contraction(t.dialects.contractions, t.result) is None
    assert read_contraction(t.dialects.contractions, t.inputs[0]) is None


# -- the weight on the left --------------------------------------------------------------------------------------------


def test_swapped():
    found = read(lambda x, w: x @ w, X, W)
    swapped = found.swapped()
    assert (swapped.lhs, swapped.rhs) == (found.rhs, found.lhs)
    t = Traced(lambda x, w: x @ w, X, W)
    c = read_contraction(t.dialects.contractions, t.result).swapped()
    values = t.run(X, W)
    torch.testing.assert_close(computed(c, values), values[t.result])
    assert c.product_shape == (5, 3)


def test_swapped_with_a_batch_on_the_right():
    x, w = torch.randn(3, 4), torch.randn(2, 4, 5)
    t = Traced.call(aten.matmul.default, x, w)
    swapped = read_contraction(t.dialects.contractions, t.result).swapped()
    values = t.run(x, w)
    torch.testing.assert_close(computed(swapped, values), values[t.result], rtol=1e-4, atol=1e-4)


def test_a_vector_is_no_matrix():
    found = read_call(aten.matmul.default, X, torch.randn(4))
    assert isinstance(found, NoContraction) and "a vector has no rows" in found.reason
    assert isinstance(read_call(aten.matmul.default, torch.randn(4), W), NoContraction)


def test_what_is_not_swapped():
    assert read_call(aten.linear.default, X, W.t().contiguous()).swapped() is None
    assert conv().swapped() is None
    assert read_call(aten.mm.default, X, W).swapped().swapped() is None


# -- convolutions ------------------------------------------------------------------------------------------------------


def conv(shape=(2, 4, 3, 3), weight=(5, 4, 1, 1), bias=True, **options):
    b = torch.randn(weight[0] if not options.get("transposed") else weight[1]) if bias else None
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    inputs = [torch.randn(shape), torch.randn(weight), *([b] if bias else [])]
    return read(lambda *given: function(*given, **options), *inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        ((2, 4, 7), (5, 4, 1)),
        ((2, 4, 3, 3), (5, 4, 1, 1)),
        ((1, 4, 2, 3, 2), (5, 4, 1, 1, 1)),
        ((2, 4, 3, 3), (4, 4, 1, 1)),
    ],
)
def test_a_convolution_with_one_tap_is_a_matmul(shape, weight, bias):
    found = conv(shape, weight, bias)
    assert found.whole and found.matrix == weight[:2] and len(found.own) == bias
    assert found.product_shape == (shape[0], *shape[2:], weight[0])


@pytest.mark.parametrize(
    "options",
    [
        {"weight": (5, 4, 2, 1)},
        {"weight": (5, 4, 1, 2)},
        {"stride": 2},
        {"stride": (1, 2)},
        {"padding": 1},
        {"padding": (0, 1)},
        {"weight": (4, 2, 1, 1), "groups": 2},
    ],
)
def test_other_convolutions_are_none(options):
    assert conv(**options) is None


def test_a_kernel_of_symbolic_sizes():
    x, w = torch.randn(2, 4, 3, 3), torch.randn(5, 4, 1, 1)
    for d in (0, 1):
        t = Traced(lambda x, w: F.conv2d(x, w), x, w)
        sizes = Traced(lambda a: a + 1, torch.ones(5, 7), symbolic=True).result.meta["val"].shape
        shape = [sizes[0] if i == d else s for i, s in enumerate(w.shape)]
        t.inputs[1].meta["val"] = torch.empty(shape, device="meta") if d > 3 else _Shaped(shape)
        found = read_contraction(t.dialects.contractions, t.result)
        assert isinstance(found, NoContraction) and "symbolic" in found.reason


class _Shaped:
    """What a reader asks a tensor of symbolic sizes."""

    def __init__(self, shape):
        self.shape = shape


def test_transposed_convolutions_are_none():
    inputs = torch.randn(2, 4, 3, 3), torch.randn(4, 5, 1, 1)
    assert read(lambda x, w: F.conv_transpose2d(x, w), *inputs) is None
    assert read(
        lambda x, w: aten.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        torch.randn(2, 4, 3, 3),
        torch.randn(5, 4, 1, 1),
    )
    t = Traced(lambda x, w: F.conv2d(x, w), torch.randn(2, 4, 3, 3), torch.randn(5, 4, 1, 1))
    t.result.args = (*t.result.args[:7], [1, 0], 1)
    assert read_contraction(t.dialects.contractions, t.result) is None


def test_an_image_without_a_batch_is_none():
    t = Traced(lambda x, w: aten.conv2d(x, w), torch.randn(4, 3, 3), torch.randn(5, 4, 1, 1))
    nodes = [n for n in t.graph.nodes if n.target in (aten.conv2d.default, aten.convolution.default)]
    for n in nodes:
        n.args = (t.inputs[0], *n.args[1:])
        assert read_contraction(t.dialects.contractions, n) is None


# -- what wraps around -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "reads"), [
    (torch.int8, False), (torch.uint8, False), (torch.int16, False), (torch.int32, True), (torch.int64, True),
])  # fmt: skip
def test_integer_products_that_wrap_around_are_refused(dtype, reads):
    found = read(lambda x, w: x @ w, X.to(dtype), W.to(dtype))
    assert isinstance(found, Contraction if reads else NoContraction)
    if not reads:
        assert "wraps around" in found.reason and len(found.operands) == 2


def out_dtype(op, dtype, x, w):
    return lambda x, w: torch.ops.higher_order.out_dtype(op, dtype, x, w)


@pytest.mark.parametrize(
    ("op", "operands", "dtype", "reads"),
    [
        (aten.mm.default, torch.int8, torch.int32, True),
        (aten.mm.default, torch.int16, torch.int32, True),
        (aten.mm.default, torch.int8, torch.int64, False),
        (aten.mm.default, torch.uint8, torch.int32, False),
        (aten.addmm.default, torch.int8, torch.int32, False),
        (aten.linear.default, torch.int8, torch.int32, True),
    ],
)
def test_products_with_a_result_dtype_of_their_own(op, operands, dtype, reads):
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(n) for n in ("x", "w", "b")[: 3 if op is aten.addmm.default else 2]]
    for n in nodes:
        n.meta["val"] = torch.zeros(4, 4, dtype=operands)
    node = graph.call_function(torch.ops.higher_order.out_dtype, (op, dtype, *nodes))
    node.meta["val"] = torch.zeros(4, 4, dtype=dtype)
    table = Traced(lambda x: x + 1, X).dialects.contractions
    found = read_contraction(table, node)
    assert isinstance(found, Contraction if reads else NoContraction)
    if reads:
        assert found.rhs_transposed == (op is aten.linear.default)
    node.kwargs = {"alpha": 2}
    assert isinstance(read_contraction(table, node), NoContraction)


def test_other_higher_order_operators_are_none():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.higher_order.cond, (x,))
    table = Traced(lambda x: x + 1, X).dialects.contractions
    assert not isinstance(read_contraction(table, node), Contraction)
    relu = graph.call_function(torch.ops.higher_order.out_dtype, (aten.relu.default, torch.int32, x))
    assert read_contraction(table, relu) is None


@pytest.mark.parametrize(("dtype", "out", "reads"), [
    (torch.float16, torch.float16, True), (torch.int8, torch.int32, True), (torch.float16, torch.float32, False),
    (torch.int8, torch.int64, False),
])  # fmt: skip
def test_mm_with_a_dtype(dtype, out, reads):
    graph = torch.fx.Graph()
    x, w = (graph.placeholder(n) for n in "xw")
    for n in (x, w):
        n.meta["val"] = torch.zeros(4, 4, dtype=dtype)
    node = graph.call_function(aten.mm.dtype, (x, w, out))
    node.meta["val"] = torch.zeros(4, 4, dtype=out)
    found = read_contraction(Traced(lambda x: x + 1, X).dialects.contractions, node)
    assert isinstance(found, Contraction if reads else NoContraction)
