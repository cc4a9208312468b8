"""Graphs that fuse, changed in their structure: refused, or still right."""

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import WeightOnly
from tests.oracle import judge
from tests.spellings import (
    F16,
    F32,
    WS,
    B,
    K,
    M,
    N,
    Spelling,
    W,
    X,
    aten,
    codes,
    deq_codes,
    deq_weight,
    floats,
    integers,
    linear_t,
    rounded,
    scales,
    to,
    with_values,
)

DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, F16, torch.bfloat16, F32, torch.float64)
SQUARE = Spelling("square", None, X, (integers(K, K), scales(K, 1)))


def layer(x, w, s, b):
    """Static int8 activation, per-channel weight, bias, ReLU, requantize."""
    y = aten.add.Tensor(linear_t(deq_codes(codes(x)), deq_weight(w, s)), b)
    return to(aten.clamp.default(aten.round.default(aten.div.Tensor(aten.relu.default(y), 0.1)), 0, 255), torch.uint8)


def float_layer(x, w, s, b):
    return aten.mul.Tensor(aten.add.Tensor(linear_t(x, deq_weight(w, s)), b), 0.5)


def outcome(build, x=X, parameters=(W, WS, B), static=True, **options):
    spelling = Spelling("", build, x, parameters, static)
    judged = judge(spelling.graph(), spelling.args, **options)
    assert judged.verdict != "dropped"
    return judged


LAYERS = {"codes": layer, "float x": float_layer}


def nodes_of(build):
    return [n.name for n in Spelling("", build, X, (W, WS, B)).graph().graph.nodes if n.op == "call_function"]


def mutated(build, change, static=True, parameters=(W, WS, B)):
    spelling = Spelling("", build, X, parameters, static)
    gm = spelling.graph()
    change(gm.graph)
    gm.graph.lint()
    return judge(with_values(gm), spelling.args)


PLACES = [(name, node) for name, build in LAYERS.items() for node in nodes_of(build)]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_extra_user(name, place):
    """Every intermediate value is wanted by somebody else as well."""

    def change(graph):
        (output,) = graph.find_nodes(op="output")
        (node,) = (n for n in graph.nodes if n.name == place)
        output.args = ((output.args[0], node),)

    judged = mutated(LAYERS[name], change)
    assert judged.verdict == "fused"


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_inserted_operators(name, place, static):
    """A cast there and back, a permute that does nothing, one that swaps, a sign, behind every node."""
    insertions = [[(aten._to_copy.default, (), {"dtype": d}), "back"] for d in DTYPES]
    insertions += [
        [(aten.permute.default, ([0, 1],), {})],
        [(aten.permute.default, ([-2, -1],), {})],
        [(aten.permute.default, ([1, 0],), {}), (aten.permute.default, ([-1, -2],), {})],
        [(aten.neg.default, (), {})],
        [(aten.add.Tensor, (1,), {})],
        [(aten.mul.Tensor, (2,), {})],
        [(aten.abs.default, (), {})],
        [(aten.flip.default, ([0],), {})],
        [(aten.flip.default, ([1],), {})],
        [(aten.round.default, (), {})],
        [(aten.floor.default, (), {})],
        [(aten.clamp.default, (-5, 5), {})],
        [(aten.relu.default, (), {})],
    ]
    verdicts = set()
    for insertion in insertions:

        def change(graph, insertion=insertion):
            (node,) = (n for n in graph.nodes if n.name == place)
            users, last, dtype = list(node.users), node, node.meta["val"].dtype
            for step in insertion:
                target, args, kwargs = (aten._to_copy.default, (), {"dtype": dtype}) if step == "back" else step
                with graph.inserting_after(last):
                    last = graph.call_function(target, (last, *args), kwargs)
            for user in users:
                user.replace_input_with(node, last)

        try:
            verdicts.add(mutated(LAYERS[name], change, static).verdict)
        except Exception as error:
            raise AssertionError(f"{insertion}: {error}") from error
    assert "fused" in verdicts, "an identity permute does no harm"


@pytest.mark.parametrize("dims", [[0, 1], [-2, -1], [1, 0], [-1, 0], [0, -1]])
def test_permute_of_a_square_weight(dims):
    """Only a permute that swaps is a transpose."""

    def build(x, w, s):
        return aten.mm.default(x, aten.permute.default(deq_weight(w, s), dims))

    judged = outcome(build, parameters=SQUARE.parameters)
    along_n = dims in ([1, 0], [-1, 0])
    assert judged.verdict == "fused"
    notes = judged.report.sites[0].plan.fixups
    assert any("along K" in n for n in notes) != along_n


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("op", ["sub", "div"])
def test_operand_order(op, swap):
    """``z - w`` is not ``w - z``, ``s / w`` not ``w / s``."""
    other = floats(N, 1) if op == "sub" else scales(N, 1) + 1

    def on_weight(x, w, s, z):
        real = aten.add.Tensor(to(w, F32), 200)
        pair = (z, real) if swap else (real, z)
        return linear_t(x, aten.mul.Tensor(getattr(aten, op).Tensor(*pair), s))

    def on_result(x, w, s, z):
        y = linear_t(deq_codes(codes(x)), deq_weight(w, s))
        pair = (aten.t.default(z), y) if swap else (y, aten.t.default(z))
        return getattr(aten, op).Tensor(*pair)

    for static in (True, False):
        outcome(on_weight, parameters=(W, WS, other), static=static)
        outcome(on_result, parameters=(W, WS, other), static=static)


@pytest.mark.parametrize("low_high", [(-127, 127), (-64, 63), (0, 127), (-128, 126), (-200, 300), (-1, 255)])
def test_narrower_clamp(low_high):
    """The operator saturates at the ends of int8 and nowhere else."""

    def build(x, w, s, b):
        y = aten.add.Tensor(linear_t(deq_codes(codes(x, *low_high)), deq_weight(w, s)), b)
        return aten.clamp.default(aten.round.default(aten.div.Tensor(y, 0.1)), *low_high)

    judged = outcome(build)
    for site in judged.report.sites:
        assert not site.fused or site.plan.call.get("output_dtype") != torch.int8


@pytest.mark.parametrize("how", ["floor", "ceil", "trunc"])
def test_other_roundings(how):
    def build(x, w, s, b):
        y = aten.add.Tensor(linear_t(deq_codes(codes(x)), deq_weight(w, s)), b)
        r = getattr(aten, how).default(aten.div.Tensor(y, 0.1))
        return to(aten.clamp.default(r, -128, 127), torch.int8)

    judged = outcome(build)
    assert all(s.plan.call["output_dtype"] != torch.int8 for s in judged.report.sites if s.fused)


def test_casts_without_a_clamp_wrap_around():
    """``round().to(int8)`` wraps: as codes of x that is what the graph says, as a result it is no saturation."""

    def of_x(x, w, s, b):
        return aten.add.Tensor(linear_t(deq_codes(to(rounded(x, 0.005), torch.int8)), deq_weight(w, s)), b)

    def of_y(x, w, s, b):
        y = aten.add.Tensor(linear_t(deq_codes(codes(x)), deq_weight(w, s)), b)
        return to(aten.round.default(aten.div.Tensor(y, 0.01)), torch.int8)

    assert outcome(of_x).verdict == "fused"
    judged = outcome(of_y)
    assert all(s.plan.call["output_dtype"] != torch.int8 for s in judged.report.sites if s.fused)


def test_zero_point_on_the_weight_of_an_integer_matmul():
    def build(x, w, s, z):
        return linear_t(deq_codes(codes(x)), aten.mul.Tensor(aten.sub.Tensor(to(w, F32), z), s))

    judged = outcome(build, parameters=(W, WS, integers(N, 1, low=1, high=9).float()))
    assert judged.report.sites[0].plan.op == "npu_weight_quant_batchmatmul", "x stays as the graph dequantizes it"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integer_subtraction_that_wraps(dtype):
    low = -128 if dtype == torch.int8 else 0
    w, z = integers(N, K, low=low, high=low + 256, dtype=dtype), integers(N, 1, low=low, high=low + 256, dtype=dtype)

    def build(x, w, s, z):
        return linear_t(x, aten.mul.Tensor(to(aten.sub.Tensor(w, z), F32), s))

    for static in (True, False):
        outcome(build, parameters=(w, WS, z), static=static)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_products_in_narrow_integers_wrap(dtype):
    def build(x, w, s):
        q = to(aten.clamp.default(rounded(x), 0, 100), dtype)
        return aten.mul.Tensor(to(aten.mm.default(q, to(aten.t.default(w), dtype)), F32), aten.t.default(s))

    judged = outcome(build, parameters=(W, WS))
    assert judged.verdict == "refused"
    assert judged.rules == {"read.matmul"}
    wide = outcome(
        lambda x, w, s: aten.mul.Tensor(
            to(aten.mm.default(to(codes(x), torch.int32), to(aten.t.default(w), torch.int32)), F32), aten.t.default(s)
        ),
        parameters=(W, WS),
    )
    assert wide.verdict == "fused"


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 3, 1), (2, 3, 1), (3, 1), (1, 1, 1), (2, 1, N), (3, N), (1, N)])
@pytest.mark.parametrize("op", ["mul", "add"])
def test_terms_of_every_alignment(shape, op):
    """Scales and addends after a batched product; where they vary along rows, every row needs its own."""
    x = floats(2, 3, K)

    def after_linear(x, w, s, t):
        return getattr(aten, op).Tensor(aten.linear.default(deq_codes(codes(x)), deq_weight(w, s)), t)

    def after_bmm(x, w, s, t):
        right = deq_codes(codes(aten.view.default(aten.mul.Tensor(aten.view.default(x, [2, 3, K]), 2.0), [2, 3, K])))
        y = aten.bmm.default(deq_codes(codes(x)), aten.transpose.int(right, 1, 2))
        return getattr(aten, op).Tensor(y, aten.slice.Tensor(t, -1, 0, 3))

    for build in (after_linear, after_bmm):
        for static in (True, False):
            outcome(build, x, (W, WS, floats(*shape)), static)


@pytest.mark.parametrize("zero", [-129, -128, 0, 127, 128, 200, 300, -300])
def test_zero_point_of_the_result(zero):
    """The operator clips to 9 bits before it adds the zero point."""

    def build(x, w, s, b):
        y = aten.add.Tensor(linear_t(deq_codes(codes(x)), deq_weight(w, s)), b)
        r = aten.add.Tensor(aten.round.default(aten.div.Tensor(y, 0.02)), zero)
        return to(aten.clamp.default(r, -128, 127), torch.int8)

    judged = outcome(build)
    into_int8 = any(s.fused and s.plan.call["output_dtype"] == torch.int8 for s in judged.report.sites)
    assert into_int8 == (-128 <= zero <= 127)


@pytest.mark.parametrize("zero", [-(10**7), 10**7, 2**31, 1000, 9.25, -0.5])
def test_zero_points_of_any_size(zero):
    """What goes into the int32 bias has to fit it."""

    def build(x, w, s, b):
        real = aten.mul.Tensor(aten.sub.Tensor(to(codes(x), F32), float(zero)), 1e-3)
        return aten.add.Tensor(linear_t(real, deq_weight(w, s)), b)

    outcome(build)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("alpha", [1, 2, -1])
def test_zero_points_in_narrow_integers(dtype, alpha):
    """Known only at run time, at the ends of their type: negating or doubling them must not wrap."""
    info = torch.iinfo(dtype)
    z = torch.tensor([max(info.min, -128), min(info.max, 255)] * (N // 2), dtype=dtype)[:, None]

    def build(x, w, s, z):
        return linear_t(x, aten.mul.Tensor(aten.sub.Tensor(to(w, F32), z, alpha=alpha), s))

    assert outcome(build, parameters=(W, WS, z), static=False).verdict == "fused"


def test_addend_of_a_swapped_matmul_keeps_its_direction():
    """``addmm(b, W, x^T)``: with a square result, a vector along the rows of x is no bias."""
    x = floats(N, K)
    for b, folded in ((floats(N), False), (floats(N, 1), True)):
        judged = outcome(lambda x, w, s, b: aten.addmm.default(b, deq_weight(w, s), aten.t.default(x)), x, (W, WS, b))
        assert judged.verdict == "fused"
        assert (judged.report.sites[0].plan.call["bias"] is not None) == folded


@pytest.mark.parametrize("lead", [(4,), (1,)])
def test_a_weight_repeated_over_more_batches_than_x(lead):
    def build(x, w, s):
        return aten.matmul.default(x, aten.expand.default(aten.t.default(deq_weight(w, s)), [*lead, K, N]))

    for x in (X, floats(1, M, K)):
        outcome(build, x, (W, WS))


@pytest.mark.parametrize("sizes", [(0, N, M), (K, 0, M), (K, N, 0), (1, 1, 1)])
def test_empty_and_single(sizes):
    k, n, m = sizes

    def build(x, w, s):
        return linear_t(deq_codes(codes(x)), deq_weight(w, s))

    outcome(build, floats(m, k), (integers(n, k), scales(n, 1)))
    outcome(lambda x, w, s: linear_t(x, deq_weight(w, s)), floats(m, k), (integers(n, k), scales(n, 1)))


def test_float64_is_refused():
    judged = outcome(
        lambda x, w, s: linear_t(x, aten.mul.Tensor(to(w, torch.float64), s)), X.double(), (W, WS.double())
    )
    assert "wqmm.x.dtype" in judged.rules


def test_a_bias_that_float16_can_not_hold():
    def build(x, w, s, b):
        return to(aten.add.Tensor(linear_t(x, aten.mul.Tensor(to(w, F16), s)), b), F16)

    judged = outcome(build, X.half(), (W, WS.half(), B * 1e5))
    assert "inf" not in str(judged.report.sites[0].numerics)
    assert judged.report.sites[0].plan.call["bias"] is None


# -- writes --------------------------------------------------------------------------------------------------------


def test_operands_written_to_in_place():
    """The fused operator runs earlier than what it replaces; a write in between must not be seen by it."""

    def bias(x, w, s, b):
        y, v = linear_t(x, deq_weight(w, s)), aten.view.default(b, [N])
        written = aten.mul_.Tensor(b, 2)
        return aten.add.Tensor(y, v), written

    def rows(x, w, s, b):
        v = aten.view.default(x, [M, K])
        written = aten.mul_.Tensor(x, 2)
        return linear_t(v, deq_weight(w, s)), written

    def weight(x, w, s, b):
        written = aten.mul_.Tensor(s, 2)
        return linear_t(x, aten.mul.Tensor(to(w, F32), s)), written

    for build in (bias, rows, weight):
        for static in (True, False):
            outcome(build, static=static)


def test_one_tensor_under_two_names():
    """A write through one attribute is a write to every attribute that shares the memory."""

    def build(x, w, s, t):
        aten.mul_.Tensor(t, 2)
        return linear_t(x, deq_weight(w, s))

    gm = Spelling("", build, X, (W, WS, WS)).graph()
    scale, alias = [n.target for n in gm.graph.nodes if n.op == "get_attr"][-2:]
    setattr(gm, alias, getattr(gm, scale))
    expected = [gm(X) for _ in range(2)]
    getattr(gm, scale).copy_(WS)
    qp.fuse(gm, target="cpu")
    for y in expected:
        torch.testing.assert_close(gm(X), y)


class Counting(nn.Module):
    """Its scale is another one at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", W)
        self.register_buffer("scale", torch.full((N, 1), 0.01))

    def forward(self, x):
        y = nn.functional.linear(x, self.codes.float() * self.scale)
        self.scale.mul_(2)
        return y


def test_a_buffer_that_the_graph_updates_is_no_constant():
    expected = Counting()
    wanted = [expected(X) for _ in range(3)]
    program = torch.export.export(Counting(), (X,)).run_decompositions({})
    qp.fuse(program, target="cpu")
    module = program.module()
    torch._dynamo.reset()
    compiled = torch.compile(Counting(), backend=qp.backend(target="cpu"))
    with torch.no_grad():
        for y in wanted:
            torch.testing.assert_close(module(X), y)
            torch.testing.assert_close(compiled(X), y)


@pytest.mark.parametrize("how", ["copy_", "mul_", "index", "new data", "load_state_dict", "new parameter", "view"])
def test_weight_changed_after_compiling(how):
    model, other = WeightOnly(dtype=F32), WeightOnly(dtype=F32)
    x = torch.randn(4, 64)
    other.scale.data.mul_(3)
    torch._dynamo.reset()
    run = torch.compile(model, backend=qp.backend(target="cpu"))
    with torch.no_grad():
        before = run(x)
        if how == "copy_":
            model.scale.copy_(other.scale)
        elif how == "mul_":
            model.scale.mul_(3)
        elif how == "index":
            model.codes[0] = 1
        elif how == "new data":
            model.scale.data = other.scale.data
        elif how == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif how == "new parameter":
            model.scale = other.scale
        elif how == "view":
            model.scale.view(-1)[3:5].zero_()
        after = run(x)
        torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(before, after)


def test_views_of_copied_codes():
    """A copy makes a strided value contiguous; the codes without the copy can't be viewed that way."""
    x = floats(3, 2, 4, K).transpose(0, 1)

    def build(x, w, s):
        real = aten.clone.default(deq_codes(codes(x)), memory_format=torch.contiguous_format)
        return linear_t(aten.view.default(real, [24, K]), deq_weight(w, s))

    assert outcome(build, x, (W, WS)).verdict == "fused"


@pytest.mark.parametrize("shapes", [((N, 1), (1,)), ((1,), (N, 1)), ((N, 1), (N, 1)), ((1,), (1,))])
def test_scale_and_shift_of_different_sizes(shapes):
    def build(x, w, s, z):
        return linear_t(x, aten.sub.Tensor(aten.mul.Tensor(to(w, F32), s), aten.mul.Tensor(s, z)))

    assert outcome(build, parameters=(W, scales(*shapes[0]), floats(*shapes[1]))).verdict == "fused"


def test_a_rounded_zero_point_counts_against_x():
    """Weights near the zero point are small, what rounding the zero point changes is not."""
    w = integers(N, K, low=100, high=103, dtype=torch.uint8)
    zero = torch.full((N, 1), 101.03)

    def build(x, w, s, z):
        return aten.mm.default(x, aten.t.default(to(aten.mul.Tensor(aten.sub.Tensor(to(w, F32), z), s), F16)))

    judged = outcome(build, X.half(), (w, WS, zero))
    assert judged.verdict == "fused"
    assert judged.report.sites[0].numerics.of_x > 0


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("beta", [1, 0.5])
@pytest.mark.parametrize("target", ["cpu", "ascend310p", "ascend910b"])
def test_a_factor_of_the_matmul_itself_is_not_taken_out_of_it(target, beta, static):
    """``addmm(b, x, w, alpha=0.01)``: the product alone overflows float16, what the graph returns does not."""
    x, w = torch.full((M, K), 30.0).half(), torch.full((N, K), 100, dtype=torch.int8)

    def build(x, w, s, b):
        weight = aten.mul.Tensor(to(w, F16), s)
        return aten.addmm.default(b, x, aten.t.default(weight), alpha=0.01, beta=beta)

    judged = outcome(build, x, (w, torch.ones(N, 1).half(), B.half()), static, target=target)
    assert static or judged.rules >= {"read.matmul.alpha"}
