"""Biases, masks, scales, zero points and weights that only the run knows: what a constant may not be, they may."""

import math

import pytest
import torch
from torch.fx import Graph
from torch.nn.functional import linear

import quantpass as qp
from quantpass.doors.compiled import copied
from quantpass.graph import expr as ex
from quantpass.planning.guards import magnitude, relative_change
from tests.helpers import CHIPS
from tests.oracle import judge, traced

aten = torch.ops.aten
N, K, M = 32, 64, 4
INF, NAN = math.inf, math.nan
G = torch.Generator().manual_seed(5)
CODES = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=G)
SCALE = torch.rand(N, 1, generator=G) * 1e-3 + 2e-4
X = torch.randn(M, K, generator=G)
TARGETS = ("cpu", *CHIPS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def codes(x, scale=0.02, zero=0):
    return torch.clamp(torch.round(x / scale) + zero, -128, 127).to(torch.int8)


def compare(f, *args, target, fused=None, **options):
    """Fuse ``f`` with all of ``args`` unknown, run both, and compare: the same infinities and NaN, and the same numbers.

    Returns the site.
    """
    gm = traced(f, *args)
    with torch.no_grad():
        wanted = gm(*args)
    report = qp.fuse(gm, target=target, **options)
    (site,) = report.sites
    if fused is not None:
        assert site.fused == fused, report
    if site.fused:
        assert math.isfinite(site.numerics.relative + site.numerics.absolute + site.numerics.of_x)
    with torch.no_grad():
        actual = gm(*args)
    assert_same(actual, wanted)
    return site


def assert_same(actual, wanted):
    assert actual.dtype == wanted.dtype
    a, w = actual.double(), wanted.double()
    if not wanted.dtype.is_floating_point:
        assert int((a - w).abs().max()) <= 1
        return
    assert torch.equal(a.isnan(), w.isnan())
    for infinity in (INF, -INF):
        assert torch.equal(a == infinity, w == infinity)
    finite = w.isfinite()
    if bool(finite.any()):
        close = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[wanted.dtype]
        small = w[finite][w[finite].abs() < 1e3]
        largest = float(small.abs().max()) if small.numel() else 0.0
        assert bool(((a - w).abs()[finite] <= close * w.abs()[finite] + close * largest).all())


def awkward(dtype):
    """Addends that no int32 in units of a scale holds."""
    return {
        "mask": torch.where(torch.arange(N) % 3 == 0, -INF, 0.0).to(dtype),
        "least": torch.where(torch.arange(N) % 3 == 0, torch.finfo(dtype).min, 0.0).to(dtype),
        "nan": torch.where(torch.arange(N) % 5 == 0, NAN, 0.5).to(dtype),
        "huge": (torch.arange(N) * 1000.0).to(dtype),
        "plain": torch.linspace(-1, 1, N).to(dtype),
    }


KINDS = ("mask", "least", "nan", "huge", "plain")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_added_to_an_integer_matmul(kind, dtype, target):
    """The matmul is fused whatever the mask; what can't be folded is added behind it."""

    def head(x, mask):
        return linear(codes(x).to(dtype) * 0.02, CODES.to(dtype) * SCALE.to(dtype)) + mask

    chip_takes_it = target == "cpu" or dtype == torch.float16 or (target != "ascend310p" and dtype == torch.bfloat16)
    compare(head, X.to(dtype), awkward(dtype)[kind], target=target, fused=True if chip_takes_it else None)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [True, False])
def test_a_mask_added_to_a_weight_only_matmul(static, kind, target):
    mask = awkward(torch.float16)[kind]

    def head(x, given):
        return linear(x, CODES.half() * SCALE.half()) + (mask if static else given)

    site = compare(head, X.half(), mask, target=target, fused=True)
    if target == "ascend310p" and (not static or kind in ("mask", "nan")):
        assert site.plan.call["bias"] is None
        assert "wqmm.bias.saturates" in " ".join(site.plan.notes)
    else:
        assert site.plan.call["bias"] is not None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["linear", "addmm", "scaled addmm", "baddbmm", "conv"])
@pytest.mark.parametrize("kind", ["mask", "nan", "plain"])
def test_what_a_matmul_operator_adds_by_itself(kind, form, target):
    """Left to an operator of its own where the fused one can't take it."""

    def f(x, bias):
        a, w = codes(x).half() * 0.02, CODES.half() * SCALE.half()
        if form == "linear":
            return linear(a, w, bias)
        if form == "baddbmm":
            return torch.baddbmm(bias, a[None], w.t()[None])
        if form == "conv":
            return torch.nn.functional.conv2d(a.reshape(M, K, 1, 1), w.reshape(N, K, 1, 1), bias)
        return torch.addmm(bias, a, w.t(), **({} if form == "addmm" else {"beta": 0.5, "alpha": 2.0}))

    compare(f, X.half(), awkward(torch.float16)[kind], target=target, fused=None if form == "conv" else True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [0.0, 1e-7, NAN])
@pytest.mark.parametrize("quantized", [True, False])
def test_weights_as_inputs(quantized, value, target):
    """functional_call: codes, scales and bias are inputs, and a channel may be dead."""

    def f(x, c, s, b):
        return linear(codes(x).half() * 0.02 if quantized else x, c.half() * s, b)

    s = SCALE.half()
    s[3] = value
    compare(f, X.half(), CODES, s, torch.ones(N).half(), target=target, fused=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_result(bias, target):
    """A run-time bias stays in front of the quantize, and the quantize behind the matmul."""

    def f(x, b):
        y = linear(codes(x, 1e-3).half() * 1e-3, CODES.half() * 6e-8)
        return torch.clamp(torch.round((y + b if bias else y) / 0.05), -128, 127).to(torch.int8)

    site = compare(f, X.half() * 1e-2, torch.linspace(-6, 6, N).half(), target=target)
    if bias and site.fused:
        assert site.plan.call["bias"] is None or site.plan.call["bias"].dtype != torch.int32
        assert any("qmm.bias.runtime" in n for n in site.plan.notes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("zero", [7, 10**7])
def test_zero_points_of_the_activation(zero, dtype, target):
    """Folded into the int32 bias only where its dtype or a clamp bounds it."""
    if dtype == torch.int8 and zero > 127:
        zero = -128

    def f(x, z):
        return linear((codes(x).to(torch.float32) - z) * 0.02, CODES.float() * SCALE).bfloat16()

    site = compare(f, X, torch.tensor(zero, dtype=dtype), target=target)
    integer = site.fused and site.plan.op == "npu_quant_matmul"
    assert not integer or dtype == torch.int8


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
def test_a_zero_point_that_the_graph_clamps(target):
    def f(x, offset):
        z = torch.clamp(torch.round(offset), -128, 127)
        q = torch.clamp(torch.round(x / 0.02) + z, -128, 127).to(torch.int8)
        return linear((q.to(torch.int32) - z.to(torch.int32)).bfloat16() * 0.02, CODES.bfloat16() * SCALE.bfloat16())

    for offset in (3.0, 1e9):
        compare(f, X, torch.tensor(offset), target=target)


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
def test_integers_wrap_where_the_graph_wraps(target):
    """An int32 addend of the graph's own int32 sum: both go around alike."""
    addend = torch.randint(-(2**31), 2**31 - 1, (N,), dtype=torch.int32, generator=G)

    def f(x, b):
        return (torch._int_mm(codes(x), CODES.t()) + b).float() * SCALE.flatten()

    x = torch.randn(20, K, generator=G)
    site = compare(f, x, addend, target=target)
    assert site.fused


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [0.0, NAN, 1e-30])
def test_scales_of_each_row(value, target):
    def f(x, t, b):
        return linear(codes(x).half() * t, CODES.half() * SCALE.half(), b)

    t = torch.full((M, 1), 0.02)
    t[1] = value
    compare(f, X.half(), t.half(), torch.ones(N).half(), target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [600.0, 1e-6, 0.01])
def test_a_scale_behind_a_weight_only_matmul(scale, target):
    """Not moved in front of the sum: ``codes * scale`` may overflow float16 where the graph forms no such product."""

    def f(x, s):
        return (x @ CODES.half().t()) * s

    site = compare(f, X.half() * 1e-3, torch.full((N,), scale).half(), target=target, fused=True)
    assert "wqmm.scale.runtime" in " ".join(site.plan.notes)


@pytest.mark.parametrize("target", ["cpu", *CHIPS])
def test_float32_parameters_of_a_float16_matmul(target):
    """float16 does not hold them: refused, not rounded to nothing."""

    def f(x, s, b):
        return (x @ (CODES.float() * s).half().t()) + b

    compare(f, X.half(), torch.full((N, 1), 2e-8).t().reshape(N, 1), torch.ones(N).half(), target=target, fused=False)

    def g(x, b):
        return ((x @ (CODES.half() * SCALE.half()).t()).float() + b).half()

    site = compare(g, X.half(), torch.full((N,), 1e5), target=target, fused=True)
    assert site.plan.call["bias"] is None


def test_a_beta_that_is_no_number():
    def f(x, b):
        return torch.addmm(b, codes(x).half() * 0.02, (CODES.half() * SCALE.half()).t(), beta=INF, alpha=1)

    for target in TARGETS:
        compare(f, X.half(), torch.ones(N).half(), target=target)


# -- what the decisions rest on ------------------------------------------------------------------------------------


def placeholder(dtype, *shape):
    node = Graph().placeholder("x")
    node.meta["val"] = torch.empty(shape, dtype=dtype)
    return ex.Ref(node)


def test_magnitudes():
    small, wide = placeholder(torch.int8, K, N), placeholder(torch.int32, 1)
    assert magnitude(small, {}) == 128
    assert magnitude(wide, {}) == 2**31
    assert magnitude(wide, {wide.node: (-3, 5)}) == 5
    assert magnitude(placeholder(torch.float32, 1), {}) == INF
    assert magnitude(ex.Const(torch.tensor([1.0, NAN])), {}) == INF
    assert magnitude(ex.Const(torch.empty(0)), {}) == 0
    sums = ex.Call(aten.sum.dim_IntList, (small, [0]), {"dtype": torch.int32}, torch.int32, (N,))
    assert magnitude(sums, {}) == 128 * K
    assert magnitude(ex.neg(ex.mul(ex.cast(small, torch.int32), ex.cast(small, torch.int32))), {}) == 128**2
    assert magnitude(ex.add(ex.cast(small, torch.int32), ex.Const(torch.tensor(-7))), {}) == 135
    assert magnitude(ex.cast(placeholder(torch.int64, 1), torch.int32), {}) == INF


@pytest.mark.parametrize(
    ("wide", "narrow", "change"),
    [([1.0, 0.0], [1.0, 0.0], 0), ([1.0], [1.5], 0.5), ([1e-45], [0.0], 1), ([NAN], [NAN], INF), ([INF], [INF], INF)],
)
def test_relative_change(wide, narrow, change):
    wide, narrow = (torch.tensor(t, dtype=torch.float64) for t in (wide, narrow))
    assert relative_change(wide, narrow) == change


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("addend", [0.0, 3.0, -7.0])
def test_an_infinite_scale_of_the_run_behind_a_sum(addend, target):
    """``(acc + addend) * inf`` is infinite; taken apart it would be NaN wherever the two parts differ in sign."""
    codes = torch.randint(-127, 128, (32, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    scale = torch.full((16,), 0.01)
    scale[::4] = torch.inf

    def graph(x, scale):
        q = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8)
        return (((q.float() @ codes.float()) + addend) * 0.03 * scale).to(torch.bfloat16)

    gm = traced(graph, x, scale)
    assert judge(gm, (x, scale), target=target).verdict == "fused"
    fused = copied(gm)
    qp.fuse(fused, target=target)
    assert torch.equal(fused(x, scale).isnan(), gm(x, scale).isnan())
