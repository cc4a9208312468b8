"""RMSNorm in front of quantized activations, where the operators may round as they do: ``numerics="vendor"``."""

import itertools
import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import Interpreter, Node

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.graph.schema import arguments_of, bind, op_name
from quantpass.operators import rms_norm as kernels
from tests.oracle import HALF_UNIT, copied, traced
from tests.test_argument_mutation import others

B, S, K, N = 2, 5, 64, 32
G = torch.Generator().manual_seed(0)
CODES = torch.randint(-127, 128, (N, K), generator=G, dtype=torch.int8)
SCALES = torch.rand(N, generator=G) * 1e-2 + 1e-3
GAMMA = torch.rand(K, generator=G) + 0.5
EPS = 1e-3
ROWS = torch.logspace(-3, 1, B * S).reshape(B, S, 1)  # eps is felt in some and not in others
X1, X2 = torch.randn(B, S, K, generator=G) * ROWS, torch.randn(B, S, K, generator=G) * ROWS
HALVES = (torch.float16, torch.bfloat16)
OPERATORS = ("rms_norm", "add_rms_norm", "add_rms_norm_dynamic_quant")


# -- spellings ---------------------------------------------------------------------------------------------------------


def llama(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def gemma(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + (w - 1).float())).type_as(x)


def t5(x, w):
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(w.dtype)


def functional(x, w):
    """``nn.functional.rms_norm`` as AOTAutograd spells it."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean([2], True) + EPS) * w).to(x.dtype)


def without_weight(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean([2], True) + EPS)).to(x.dtype)


def divided(x, w):
    h = x.float()
    return (h / torch.sqrt(EPS + (h * h).mean(dim=(2,), keepdim=True))).to(x.dtype) * w


def inverted(x, w):
    h = x.double()
    return (h * (1 / (torch.square(h).mean(-1) + EPS).sqrt()).unsqueeze(-1) * w).to(x.dtype)


def weight_first(x, w):
    h = x.float()
    return (w.float() * h * (h.pow(2).mean(-1, True) + EPS).pow(-0.5).reshape(B, S, 1)).to(x.dtype)


SPELLINGS = (llama, gemma, t5, functional, without_weight, divided, inverted)


def quantized(y):
    """Codes of each row and what they stand for."""
    s = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127
    return (y / s).round().clamp(-128, 127).to(torch.int8), s


def linear(y):
    codes, s = (t.reshape(B * S, -1) for t in quantized(y))
    out = (torch._int_mm(codes, CODES.t()).float() * s * SCALES).to(y.dtype)
    return out.reshape(B, S, N)


def block(norm, dtype, *, residual=True, weight=None):
    """A norm and a quantized Linear; with ``residual`` of a sum that goes on."""
    w = (GAMMA if weight is None else weight).to(dtype)

    def added(a, b):
        h = a + b
        return linear(norm(h, w)), h

    return added if residual else lambda a: linear(norm(a, w))


def inputs(dtype, residual=True):
    return (X1.to(dtype), X2.to(dtype)) if residual else (X1.to(dtype),)


def fused(f, args, **options):
    gm = traced(f, *args)
    return gm, qp.fuse(gm, **{"target": "ascend910b", "numerics": "vendor", **options})


def norms_of(gm):
    names = [op_name(n).removeprefix("quantpass.") for n in gm.graph.nodes if n.op == "call_function"]
    return [name for name in names if name in OPERATORS]


# -- what becomes of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_becomes_an_operator(norm, dtype):
    gm, report = fused(block(norm, dtype), inputs(dtype))
    assert norms_of(gm) == ["add_rms_norm_dynamic_quant"], dump(gm)
    assert "npu_add_rms_norm_dynamic_quant" in str(report.sites[0].numerics)
    gm, _ = fused(block(norm, dtype, residual=False), inputs(dtype, False))
    assert norms_of(gm) == ["rms_norm"], dump(gm)


def test_the_graph_before_and_after():
    gm, _ = fused(block(llama, torch.bfloat16), inputs(torch.bfloat16))
    assert_expected_inline(
        dump(gm),
        """\
%a_1: bf16[2, 5, 64] = input
%b_1: bf16[2, 5, 64] = input
%quantpass_scale: f32[32] = constant quantpass_scale
%_tensor_constant0_1: bf16[64] = constant _tensor_constant0_1
%add_rms_norm_dynamic_quant: (i8[2, 5, 64], i8[0], bf16[2, 5, 64], f32[2, 5], f32[0]) = quantpass.add_rms_norm_dynamic_quant(%a_1, %b_1, %_tensor_constant0_1, 0.001)
%result_4: bf16[2, 5, 64] = getitem(%add_rms_norm_dynamic_quant, 2)
%result_3: f32[2, 5] = getitem(%add_rms_norm_dynamic_quant, 3)
%view_6: f32[10] = aten.view(%result_3, [-1])
%result_2: i8[2, 5, 64] = getitem(%add_rms_norm_dynamic_quant, 0)
%view_5: i8[10, 64] = aten.view(%result_2, [-1, 64])
%_tensor_constant1_1: i8[32, 64] = constant _tensor_constant1_1
%format_cast: i8[32, 64] = quantpass.format_cast(%_tensor_constant1_1, 29)
%quant_matmul: bf16[10, 32] = quantpass.quant_matmul(%view_5, %format_cast, %quantpass_scale, pertoken_scale=%view_6, output_dtype=bfloat16, transpose_x2=True)
%view_4: bf16[2, 5, 32] = aten.view(%quant_matmul, [2, 5, 32])
return [%view_4, %result_4]""",
    )


def test_two_readers_of_a_norm_share_one_operator():
    def f(a, b):
        h = a + b
        y = llama(h, GAMMA.bfloat16())
        return linear(y), linear(y) * 2, h

    gm, report = fused(f, inputs(torch.bfloat16))
    assert len(report.sites) == 2 and norms_of(gm) == ["add_rms_norm_dynamic_quant"]


def test_a_static_quantization_is_left_behind_the_norm():
    def f(a, b):
        y = llama(a + b, GAMMA.bfloat16())
        q = (y.float() / 0.03).round().clamp(-128, 127)
        return ((q * 0.03).bfloat16().reshape(-1, K)) @ (CODES.float() * SCALES[:, None]).bfloat16().t()

    gm, report = fused(f, inputs(torch.bfloat16))
    assert norms_of(gm) == ["add_rms_norm"] and report.fused == 1


def test_on_the_310p_the_norm_is_an_operator_of_its_own():
    def f(a, b):
        q = (llama(a + b, GAMMA.half()).float() / 0.03).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q.reshape(-1, K), CODES.t()).float() * SCALES * 0.03).half()

    gm, report = fused(f, inputs(torch.float16), target="ascend310p")
    assert report.fused == 1 and norms_of(gm) == ["add_rms_norm"], report


def test_strict_numerics_leaves_norms_alone():
    gm, _ = fused(block(llama, torch.bfloat16), inputs(torch.bfloat16), numerics="strict")
    assert norms_of(gm) == []


def test_explain_says_what_fuse_does():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(K, EPS)

        def forward(self, a, b):
            return linear(self.norm(a + b))

    args, model = inputs(torch.bfloat16), Block().bfloat16().eval()
    told = qp.explain(model, args, target="ascend910b", numerics="vendor").sites[0]
    backend = qp.backend(target="ascend910b", numerics="vendor")
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args)
    (done,) = backend.report.sites
    assert told.numerics == done.numerics and told.plan.notes == done.plan.notes
    assert "the RMSNorm in front becomes npu_add_rms_norm_dynamic_quant" in done.plan.notes


# -- numbers -----------------------------------------------------------------------------------------------------------


class _Noting(Interpreter):
    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)


def normalised_in(gm, args):
    """What a graph of :func:`linear` quantizes, as the graph computes it."""
    (magnitude,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.abs.default)
    noting = _Noting(gm)
    noting.run(*args)
    return noting.env[magnitude.args[0]]


def assert_within_the_bound(y, n, found, dtype):
    """``found`` beside the graph's formula in exact arithmetic on the graph's own codes of ``y``."""
    codes, s = (t.reshape(B * S, -1).double() for t in quantized(y))
    w = CODES.double() * SCALES.double()[:, None]
    want, magnitude = (codes * s) @ w.t(), (codes * s).abs() @ w.abs().t()
    plain = n.relative * magnitude + n.absolute + HALF_UNIT[dtype] * (want.abs() + torch.finfo(dtype).tiny)
    bound = plain + (n.of_step * s + n.of_w) * w.abs().sum(1)
    apart = (found.reshape(B * S, N).double() - want).abs()
    assert bool((apart <= bound).all()), float((apart / bound).max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_results_are_within_the_stated_bound(norm, residual, dtype):
    args = inputs(dtype, residual)
    f = block(norm, dtype, residual=residual)
    plain = traced(f, *args)
    gm, report = fused(f, args)
    found = gm(*args)
    if residual:
        assert torch.equal(found[1], args[0] + args[1]), "the sum is the graph's own, bit for bit"
    n = report.sites[0].numerics
    assert n.relative > torch.finfo(dtype).eps
    assert_within_the_bound(normalised_in(plain, args), n, found[0] if residual else found, dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 16, 250])
def test_kernels_follow_the_formula(k, dtype):
    g = torch.Generator().manual_seed(k)
    x1, x2 = (torch.randn(3, 7, k, generator=g).to(dtype) for _ in range(2))
    gamma, eps = (torch.rand(k, generator=g) + 0.5).to(dtype), 1e-5
    for rows, found in (
        (x1, kernels.rms_norm(x1, gamma, eps)),
        (x1 + x2, kernels.add_rms_norm(x1, x2, gamma, eps)),
    ):
        wide = rows.double()
        inverse = 1 / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        want = wide * inverse * gamma.double()
        assert bool(
            (
                (found[0].double() - want).abs() <= want.abs() * (1.02 * torch.finfo(dtype).eps + k * 2.0**-24) + 1e-7
            ).all()
        )
        torch.testing.assert_close(found[1].double(), inverse, rtol=1e-5, atol=0)
    if dtype != torch.float32:
        codes, _, total, scale, _ = kernels.add_rms_norm_dynamic_quant(x1, x2, gamma, eps)
        wide = x1.double() + x2.double()
        want = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * gamma.double()
        assert torch.equal(total, x1 + x2)
        assert bool(((codes * scale[..., None].double() - want).abs() <= 0.502 * scale[..., None]).all())


def test_rows_that_are_not_numbers():
    x = torch.ones(4, 16)
    x[0], x[1, 3], x[2, 3] = 0, math.nan, math.inf
    ones = torch.ones(16)
    y, inverse = kernels.rms_norm(x, ones, 1e-6)
    assert bool((y[0] == 0).all()), "a row of zeros stays zeros where epsilon is there"
    assert bool(y[1].isnan().all()), "a NaN makes its row NaN"
    assert bool((y[2, :3] == 0).all()) and bool(y[2, 3].isnan()) and inverse[2] == 0, "as inf * 0 is"
    assert bool(y[3].isfinite().all())
    assert bool(kernels.rms_norm(x, ones, 0.0)[0][0].isnan().all()), "0 / 0"


@pytest.mark.parametrize("x", [0.0, math.nan, math.inf])
def test_a_row_that_is_no_number_leaves_the_others_alone(x):
    f, (a, b) = block(llama, torch.bfloat16), inputs(torch.bfloat16)
    gm, _ = fused(f, (a, b))
    want = gm(a, b)[0]
    a = a.clone()
    a[1, 2] = x
    b = torch.where(a.isfinite() & (a != 0), b, 0) if x == 0 else b
    found = gm(a, b)[0]
    others_ = [(i, j) for i, j in itertools.product(range(B), range(S)) if (i, j) != (1, 2)]
    assert all(torch.equal(found[i, j], want[i, j]) for i, j in others_)
    if x == 0:
        assert bool((found[1, 2] == 0).all())


# -- what is none ------------------------------------------------------------------------------------------------------


def edited(body):
    """A norm like ``llama``, but for one thing."""
    return lambda x, w: body(x, x.float(), w)


def rooted(h, mean):
    return h * torch.rsqrt(mean + EPS)


NOT_NORMS = {
    "fourth powers": lambda x, h, w: w * rooted(h, h.pow(4).mean(-1, True)).to(x.dtype),
    "over another dimension": lambda x, h, w: w * rooted(h, h.pow(2).mean(1, True)).to(x.dtype),
    "over two dimensions": lambda x, h, w: w * rooted(h, h.pow(2).mean((1, 2), True)).to(x.dtype),
    "eps behind the root": lambda x, h, w: w * (h * (torch.rsqrt(h.pow(2).mean(-1, True)) + EPS)).to(x.dtype),
    "eps as a floor": lambda x, h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, True).clamp(min=EPS))).to(x.dtype),
    "eps subtracted": lambda x, h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, True) - 1e-9)).to(x.dtype),
    "eps in a sum that cancels": lambda x, h, w: w * rooted(h, h.pow(2).mean(-1, True) + 2.0**24 - 2.0**24).to(x.dtype),
    "no eps": lambda x, h, w: w * (h * torch.rsqrt(h.pow(2).mean(-1, True))).to(x.dtype),
    "an eps for each row": lambda x, h, w: w * rooted(h, h.pow(2).mean(-1, True) + h[..., :1].pow(2)).to(x.dtype),
    "a sum": lambda x, h, w: w * rooted(h, h.pow(2).sum(-1, True)).to(x.dtype),
    "squared in 16 bits": lambda x, h, w: w * rooted(h, x.pow(2).mean(-1, True, dtype=torch.float32)).to(x.dtype),
    "averaged in 16 bits": lambda x, h, w: w * rooted(h, x.pow(2).mean(-1, True)).to(x.dtype),
    "rooted in 16 bits": lambda x, h, w: w * (h * torch.rsqrt((h.pow(2).mean(-1, True) + EPS).to(x.dtype))).to(x.dtype),
    "another root": lambda x, h, w: w * (h * (h.pow(2).mean(-1, True) + EPS).pow(-0.25)).to(x.dtype),
    "multiplied by the root": lambda x, h, w: w * (h * (h.pow(2).mean(-1, True) + EPS).sqrt()).to(x.dtype),
    "of something else": lambda x, h, w: w * rooted(h, (h + 1).pow(2).mean(-1, True)).to(x.dtype),
    "of other rows": lambda x, h, w: w * rooted(h, h.roll(1, 1).pow(2).mean(-1, True)).to(x.dtype),
    "a mean taken away": lambda x, h, w: w * rooted(h - h.mean(-1, True), h.pow(2).mean(-1, True)).to(x.dtype),
    "a weight for each row": lambda x, h, w: rooted(h, h.pow(2).mean(-1, True)).to(x.dtype) * w[:S].reshape(S, 1),
    "a weight of the run": lambda x, h, w: rooted(h, h.pow(2).mean(-1, True)).to(x.dtype) * x[0, 0],
    "divided by the weight": lambda x, h, w: (rooted(h, h.pow(2).mean(-1, True)) / w).to(x.dtype),
    "a bias": lambda x, h, w: rooted(h, h.pow(2).mean(-1, True)).to(x.dtype) * w + w,
    "halves": lambda x, h, w: w * rooted(h.reshape(B, S, 2, K // 2), h.reshape(B, S, 2, K // 2).pow(2).mean(-1, True)).reshape(B, S, K).to(x.dtype),
    "integers": lambda x, h, w: w * rooted(h, h.pow(2).mean(-1, True)).to(torch.int8).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_NORMS)
def test_one_edit_and_it_is_no_norm(what):
    f, args = block(edited(NOT_NORMS[what]), torch.bfloat16), inputs(torch.bfloat16)
    gm, report = fused(f, args)
    assert report.fused == 1 and norms_of(gm) == []
    plain = traced(f, *args)
    assert_within_the_bound(normalised_in(plain, args), report.sites[0].numerics, gm(*args)[0], torch.bfloat16)


def test_sums_that_are_no_residual():
    def of(total, *args):
        gm, _ = fused(lambda a, b: linear(llama(total(a, b), GAMMA.bfloat16())), args)
        return norms_of(gm)

    a, b = inputs(torch.bfloat16)
    assert of(torch.add, a, b) == ["add_rms_norm_dynamic_quant"]
    assert of(lambda a, b: torch.add(a, b, alpha=2), a, b) == ["rms_norm"]
    assert of(torch.sub, a, b) == ["rms_norm"]
    assert of(torch.add, a, b[:, :1]) == ["rms_norm"], "it broadcasts"
    assert of(lambda a, b: a + 1, a, b) == ["rms_norm"]
    assert of(lambda a, b: (a.float() + b.float()).bfloat16(), a, b) == ["rms_norm"]


def test_a_norm_that_something_else_reads_stays():
    def f(a, b):
        y = llama(a + b, GAMMA.bfloat16())
        return linear(y), y

    gm, report = fused(f, inputs(torch.bfloat16))
    assert report.fused == 1 and norms_of(gm) == []


def test_parts_of_a_norm_that_something_else_reads_stay_the_graphs():
    def f(a, b):
        h = (a + b).float()
        inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return linear(GAMMA.bfloat16() * (h * inverse).bfloat16()), inverse

    args = inputs(torch.bfloat16)
    gm, _ = fused(f, args)
    assert norms_of(gm) == ["add_rms_norm_dynamic_quant"]
    assert torch.equal(gm(*args)[1], f(*args)[1])


def test_a_norm_between_writes_stays():
    def f(a, b, buffer):
        buffer.copy_(a)
        h = buffer + b
        y = llama(h, GAMMA.bfloat16())
        buffer.mul_(0)
        return linear(y), h

    args = (*inputs(torch.bfloat16), torch.zeros(B, S, K, dtype=torch.bfloat16))
    gm = traced(f, *args)
    report = qp.fuse(gm, target="ascend910b", numerics="vendor")
    fresh = (*args[:2], torch.zeros_like(args[2]))
    found, h = gm(*fresh), args[0] + args[1]
    assert torch.equal(found[1], h)
    numerics = report.sites[0].numerics
    assert_within_the_bound(llama(h, GAMMA.bfloat16()), numerics, found[0], torch.bfloat16)


def test_a_weight_that_only_the_run_knows_stays():
    f = lambda a, b, w: linear(llama(a + b, w))  # noqa: E731
    gm, report = fused(f, (*inputs(torch.bfloat16), GAMMA.bfloat16()))
    assert report.fused == 1 and norms_of(gm) == []


def test_a_weight_that_a_16_bit_number_can_not_hold_stays():
    weight = GAMMA.clone()
    weight[3] = 1e-7  # Gemma's 1 + w in float32, given to an operator in float16
    norm = lambda x, w: functional(x.float(), weight).to(x.dtype)  # noqa: E731
    assert norms_of(fused(block(norm, torch.float16), inputs(torch.float16))[0]) == []
    assert norms_of(fused(block(norm, torch.bfloat16), inputs(torch.bfloat16))[0]) == ["add_rms_norm_dynamic_quant"]


# -- every argument ----------------------------------------------------------------------------------------------------


def mutants(gm):
    """``(place, change)`` for every argument of every operator of the norm."""
    (magnitude,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.abs.default)
    chain = [n for n in gm.graph.nodes if n.op == "call_function" and n < magnitude]
    for node in chain:
        values = bind(node)
        for argument in node.target._schema.arguments:
            value = values[argument.name]
            kind = str(argument.real_type)
            if "Device" in kind or argument.name == "pin_memory":
                continue  # nowhere else to be
            changes = others(value, kind.replace("Optional[", "").rstrip("]"), "Optional" in kind)
            if isinstance(value, Node):
                changes = [n for n in gm.graph.nodes if n < node and n is not value and "val" in n.meta][-3:]
            for change in changes:
                yield f"{node.name}.{argument.name} = {change}", (node.name, argument.name, change)


def mutated(gm, name, argument, change):
    gm = copied(gm)
    nodes = {n.name: n for n in gm.graph.nodes}
    node = nodes[name]
    bound = bind(node) | {argument: nodes[change.name] if isinstance(change, Node) else change}
    known = dict(arguments_of(node.target))
    schema = node.target._schema.arguments
    node.args = tuple(bound[a.name] for a in schema if not a.kwarg_only)
    node.kwargs = {a.name: bound[a.name] for a in schema if a.kwarg_only and a.name in known}
    gm.recompile()
    return gm


@pytest.mark.parametrize("norm", [llama, divided], ids=lambda f: f.__name__)
def test_every_argument_is_read(norm):
    """Each argument of each operator of a norm changed: what is fused is still right."""
    args = inputs(torch.bfloat16)
    plain = traced(block(norm, torch.bfloat16), *args)
    kept, ran = 0, 0
    for place, change in mutants(plain):
        gm = mutated(plain, *change)
        try:
            with torch.no_grad():
                y = normalised_in(gm, args)
                again = traced(gm, *args)
        except Exception:
            continue  # it does not run
        ran += 1
        report = qp.fuse(again, target="ascend910b", numerics="vendor")
        if not norms_of(again) or not report.fused:
            continue
        kept += 1
        if not bool(y.isfinite().all()):
            continue
        try:
            assert_within_the_bound(y, report.sites[0].numerics, again(*args)[0], torch.bfloat16)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}\n{dump(again)}") from None
    assert ran > 40 and 5 < kept < ran


# -- lowerings ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Two norms with quantized Linears behind them, the second of a residual sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RMSNorm(K, EPS), nn.RMSNorm(K, EPS)
        self.out = nn.Linear(N, K, bias=False)

    def forward(self, x):
        h = x + self.out(linear(self.first(x)))
        return linear(self.second(h)), h


def test_the_vendors_operators_compute_the_same():
    qp.emulate_npu()
    model, x = Layer().bfloat16().eval(), X1.bfloat16()
    here = torch.compile(model, backend=qp.backend(target="ascend910b", numerics="vendor"))
    with torch.no_grad():
        want = here(x)
        torch._dynamo.reset()
        there = torch.compile(model, backend=qp.backend(target="ascend910b", numerics="vendor", lowering="aclnn"))
        assert all(map(torch.equal, there(x), want))


@pytest.mark.slow
def test_ge_operators(torchair):
    """On the real torchair: the fused GE graph computes what the fused FX graph does."""
    preview = qp.preview_ge(Layer().bfloat16().eval(), (X1.bfloat16(),), target="ascend910b", process=torchair)
    assert [op for op in preview.ops if "Norm" in op or "Quant" in op] == [
        *("RmsNorm", "DynamicQuant", "QuantBatchMatmulV3"),
        *("AddRmsNormDynamicQuant", "QuantBatchMatmulV3"),
    ]
    (outputs,) = preview.run()
    assert all(map(torch.equal, outputs, preview.graphs[0].outputs))


@pytest.mark.slow
def test_a_norm_that_is_written_with_the_vendors_operator_is_joined_too(torchair):
    qp.emulate_npu()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(GAMMA.clone())

        def forward(self, a, b):
            y, _, h = torch.ops.npu.npu_add_rms_norm(a, b, self.gamma, EPS)
            return linear(y), h

    args, model = inputs(torch.bfloat16), Block().bfloat16().eval()
    preview = qp.preview_ge(model, args, target="ascend910b", process=torchair)
    assert [op for op in preview.ops if "Norm" in op or "Quant" in op] == [
        "AddRmsNormDynamicQuant",
        "QuantBatchMatmulV3",
    ]
    (outputs,) = preview.run()
    assert all(map(torch.equal, outputs, preview.graphs[0].outputs))
