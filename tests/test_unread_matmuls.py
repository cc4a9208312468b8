"""Every matmul with a dequantized operand is fused or has a verdict, whatever it is spelled with; nothing else has one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantpass as qp
from tests.helpers import compiled

pytestmark = pytest.mark.filterwarnings("ignore")

N, K, E = 32, 64, 4


class Model(nn.Module):
    def __init__(self, function, /, **buffers):
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.function(self, *args)


def codes(*shape):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=g)


def floats(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) - 0.5


def model(function):
    return Model(
        function, c=codes(N, K), s=floats(N, 1) * 1e-2, ec=codes(E, N, K), es=floats(E, N, 1) * 1e-2,
        k3=codes(8, 4, 3, 3), patches=codes(8, 4, 4, 4), grouped=codes(8, 2, 1, 1), one=codes(8, 4, 1, 1),
        back=codes(4, 8, 1, 1), ks=floats(8, 1, 1, 1) * 1e-2, f=floats(N, K), fk=floats(8, 4, 3, 3), fs=floats(E, N, K),
        bits=(floats(N, K) > 0).to(torch.uint8),
    )  # fmt: skip


def weight(m):
    return m.c.float() * m.s


def experts(m):
    return m.ec.float() * m.es


def quantized(x, scale=0.01):
    return torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8).float() * scale


x, image, ids = floats(4, K), floats(2, 4, 8, 8), torch.tensor([1, 3, 0])
qkv = [floats(1, 2, 8, 16) for _ in range(3)]
cache = codes(1, 2, 8, 16)
chosen = torch.rand(N, K) > 0.5

REFUSED = {
    # a vector instead of a matrix
    "mv": ("read.matmul", lambda m, v: torch.mv(weight(m), v), floats(K)),
    "matrix @ vector": ("read.matmul", lambda m, v: weight(m) @ v, floats(K)),
    "addmv": ("read.matmul", lambda m, v, b: torch.addmv(b, weight(m), v), floats(K), floats(N)),
    "dot": ("read.matmul", lambda m, v: torch.dot(weight(m)[0], v), floats(K)),
    "vdot": ("read.matmul", lambda m, v: torch.vdot(v, weight(m)[0]), floats(K)),
    "mv of a quantized activation": ("read.matmul", lambda m, a, v: torch.mv(quantized(a), v), x, floats(K)),
    # several matrices in one operator
    "addbmm": ("read.matmul", lambda m, b, a: torch.addbmm(b, a, experts(m).mT), floats(4, N), floats(E, 4, K)),
    "bilinear": ("read.matmul", lambda m, a, b: F.bilinear(a, b, experts(m)), floats(3, N), floats(3, K)),
    "embedding_bag": ("read.matmul", lambda m, i: F.embedding_bag(i, weight(m)), torch.zeros(3, 5, dtype=torch.int64)),
    # attention
    "attention, keys and values": (
        "read.matmul",
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k.float() * 0.01, v.float() * 0.01), qkv[0], cache, cache,
    ),
    "attention, values": (
        "read.matmul",
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v.float() * 0.01), *qkv[:2], cache,
    ),
    "attention, a cache and a new key": (
        "read.matmul",
        lambda m, q, k, n, v: F.scaled_dot_product_attention(q, torch.cat([k.float() * 0.01, n], 2), v),
        qkv[0], cache[:, :, 1:], qkv[1][:, :, :1], qkv[2],
    ),
    "attention of quantized activations": (
        "read.matmul",
        lambda m, q, k, v: F.scaled_dot_product_attention(q, quantized(k), v), *qkv,
    ),
    "keys of a cache and a new one": (
        "read.weight.runtime",
        lambda m, q, k, n: q @ torch.cat([k.float() * 0.01, n], 2).mT, qkv[0], cache[:, :, 1:], qkv[1][:, :, :1],
    ),
    # convolutions
    "3x3": ("read.matmul", lambda m, i: F.conv2d(i, m.k3.float() * m.ks, padding=1), image),
    "1x1 in groups": ("read.matmul", lambda m, i: F.conv2d(i, m.grouped.float() * m.ks, groups=2), image),
    "1x1 transposed": ("read.matmul", lambda m, i: F.conv_transpose2d(i, m.back.float() * m.ks.view(1, 8, 1, 1)), image),
    "1x1 with a stride": ("read.matmul", lambda m, i: F.conv2d(i, m.one.float() * m.ks, stride=2), image),
    "patches": ("read.matmul", lambda m, i: F.conv2d(i, m.patches.float() * m.ks, stride=4), image),
    # a weight and something known at run time only
    "sum with factors": (
        "read.weight.runtime", lambda m, a, u, d: F.linear(a, weight(m) + u @ d), x, floats(N, 4), floats(4, K),
    ),
    "less factors": (
        "read.weight.runtime", lambda m, a, u, d: a @ (weight(m) - 0.5 * (u @ d)).t(), x, floats(N, 4), floats(4, K),
    ),
    "sum with factors, weight on the left": (
        "read.weight.runtime", lambda m, a, u, d: (weight(m) + u @ d) @ a.t(), x, floats(N, 4), floats(4, K),
    ),
    "normalized sum with factors": (
        "read.weight.runtime",
        lambda m, a, u, d, g: F.linear(a, g * (weight(m) + u @ d) / (weight(m) + u @ d).norm(dim=1, keepdim=True)),
        x, floats(N, 4), floats(4, K), floats(N, 1),
    ),
    "times a mask": ("read.weight.runtime", lambda m, a, k: F.linear(a, weight(m) * k), x, chosen.float()),
    "times a boolean mask": ("read.weight.runtime", lambda m, a, k: F.linear(a, weight(m) * k), x, chosen),
    "where": ("read.weight.runtime", lambda m, a, k: F.linear(a, torch.where(k, weight(m), 0.0)), x, chosen),
    "masked_fill": ("read.weight.runtime", lambda m, a, k: F.linear(a, weight(m).masked_fill(k, 0.0)), x, chosen),
    "noise": ("read.weight.runtime", lambda m, a: F.linear(a, weight(m) + torch.randn_like(m.f)), x),
    "dropout of the weight": ("read.weight.runtime", lambda m, a: F.linear(a, F.dropout(weight(m), 0.5, True)), x),
    "a function of the weight": ("read.weight.runtime", lambda m, a, g: F.linear(a, torch.tanh(weight(m) * g)), x, floats(N, K)),
    "rows of the weight": ("read.weight.runtime", lambda m, a, i: F.linear(a, weight(m)[i]), x, ids),
    # experts as one parameter
    "all experts": ("read.weight.batched", lambda m, a: torch.bmm(a, experts(m).mT), floats(E, 4, K)),
    "gathered experts": ("read.weight.experts", lambda m, a, i: experts(m)[i] @ a, floats(3, K, 1), ids),
    "gathered codes": ("read.weight.experts", lambda m, a, i: (m.ec[i].float() * m.es[i]) @ a, floats(3, K, 1), ids),
    "gathered experts on the right": ("read.weight.experts", lambda m, a, i: a @ experts(m)[i].mT, floats(3, 1, K), ids),
    "one expert": (
        "read.weight.experts", lambda m, a, i: F.linear(a, torch.index_select(experts(m), 0, i)[0]), x, ids[:1],
    ),
    "grouped_mm": (
        "read.weight.experts", lambda m, a, o: torch._grouped_mm(a, experts(m).bfloat16().mT, offs=o),
        floats(16, K).bfloat16(), torch.tensor([4, 8, 12, 16], dtype=torch.int32),
    ),
}  # fmt: skip

FUSED = {
    "linear": (lambda m, a: F.linear(a, weight(m)), x),
    "a vector": (lambda m, v: F.linear(v, weight(m)), floats(K)),
    "einsum": (lambda m, a: torch.einsum("bmk,nk->bmn", a, weight(m)), floats(2, 4, K)),
    "inner": (lambda m, a: torch.inner(a, weight(m)), x),
    "one expert, known": (lambda m, a: F.linear(a, experts(m)[1]), x),
    "1x1": (lambda m, i: F.conv2d(i, m.one.float() * m.ks), image),
    "weight on the left": (lambda m, a: weight(m) @ a, floats(3, K, 5)),
}

FLOAT = {
    "linear": (lambda m, a: F.linear(a, m.f), x),
    "mv": (lambda m, v: torch.mv(m.f, v), floats(K)),
    "sum with factors": (lambda m, a, u, d: F.linear(a, m.f + u @ d), x, floats(N, 4), floats(4, K)),
    "masked": (lambda m, a, k: F.linear(a, m.f * k), x, chosen),
    "3x3": (lambda m, i: F.conv2d(i, m.fk, padding=1), image),
    "3x3 of bytes": (lambda m, i: F.conv2d(i.float() / 255, m.fk), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)),
    "attention": (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv),
    "gathered experts": (lambda m, a, i: m.fs[i] @ a, floats(3, K, 1), ids),
    "zeros and ones, weighted": (lambda m, a, e: (m.bits.float() * e) @ a, floats(K, 5), floats(N, K)),
    "zeros and ones, weighted as they are": (lambda m, a, e: (m.bits * e) @ a, floats(K, 5), floats(N, K)),
    "zeros and ones, mv": (lambda m, v: torch.mv(m.bits.float(), v), floats(K)),
    "zeros and ones, returned": (lambda m, a: (a + 1, m.bits.float()), x),
    "rotary": (
        lambda m, q, k, p: (q * (p.float() @ m.f[:1, :16]).cos()) @ (k * (p.float() @ m.f[:1, :16]).sin()).mT,
        *qkv[:2], torch.arange(8, dtype=torch.int32)[:, None],
    ),
    "lookup in a quantized table": (lambda m, i: F.embedding(i, weight(m)), ids),
    "lookup of codes": (lambda m, i: m.c[i].float() * m.s[i], ids),
    "lookup and a float layer": (lambda m, i: F.linear(F.embedding(i, weight(m)), m.f), ids),
    "quantized positions and a float layer": (lambda m, a: F.linear(F.gelu(a + weight(m)), m.f), floats(N, K)),
    "quantized activation, added": (lambda m, a, b: F.linear(quantized(a) + b, m.f), x, x),
    "quantized activation, pooled": (lambda m, i: F.max_pool2d(quantized(i), 2), image),
    "quantized activation, normalized": (lambda m, a: F.linear(F.layer_norm(quantized(a), (K,)), m.f), x),
    "quantized activation, 3x3": (lambda m, i: F.conv2d(quantized(i), m.fk), image),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name, dynamic):
    torch._dynamo.reset()
    rule, function, *args = REFUSED[name]
    report = qp.explain(model(function), tuple(args), target="cpu", dynamic=dynamic)
    assert report.total == 1, str(report)
    (reject,) = report.sites[0].rejects
    assert reject.rule == rule
    assert reject.fact
    assert reject.hint
    with pytest.raises(AssertionError, match=r"0 of 1"):
        report.require()


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_an_exported_program(name, decomposed):
    rule, function, *args = REFUSED[name]
    program = torch.export.export(model(function), tuple(args))
    program = program.run_decompositions({}) if decomposed else program
    report = qp.fuse(program, target="cpu")
    found = {r.rule for s in report.sites if not s.fused for r in s.rejects}
    assert report.total == 1, str(report)
    assert found == {rule}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", FUSED)
def test_is_fused(name, dynamic):
    function, *args = FUSED[name]
    m = model(function)
    actual, report = compiled(m, *args, dynamic=dynamic)
    assert (report.fused, report.total) == (1, 1), str(report)
    torch.testing.assert_close(actual, m(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOAT)
def test_has_no_verdict(name):
    torch._dynamo.reset()
    function, *args = FLOAT[name]
    report = qp.explain(model(function), tuple(args), target="cpu")
    assert report.total == 0, str(report)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (REFUSED["sum with factors"][1:], "x @ w with the dequantized weight alone"),
        (REFUSED["patches"][1:], "cut the image into patches"),
        (REFUSED["gathered experts"][1:], "experts that are Linear layers of their own"),
        (REFUSED["mv"][1:], r"F.linear(x[None], w)[0]"),
    ],
)
def test_the_hint_is_the_nearest_form_that_is_fused(function, words):
    torch._dynamo.reset()
    report = qp.explain(model(function[0]), tuple(function[1:]), target="cpu")
    assert words in report.sites[0].rejects[0].hint


def test_a_weight_that_leaves_the_graph_dequantized_has_a_verdict():
    def function(m, a):
        w = weight(m)
        torch._dynamo.graph_break()
        return F.linear(a, w)

    _, report = compiled(model(function), x)
    assert [r.rule for s in report.sites for r in s.rejects] == ["read.weight.returned"], str(report)


def test_a_float_that_leaves_the_graph_has_none():
    def function(m, a):
        w = m.f * 2
        torch._dynamo.graph_break()
        return F.linear(a, w)

    _, report = compiled(model(function), x)
    assert report.total == 0, str(report)


def test_a_tools_operator_on_a_dequantized_weight_has_a_verdict():
    with torch.library._scoped_library("unread_tool", "FRAGMENT") as library:
        for name in ("marlin_gemm", "mystery"):
            library.define(f"{name}(Tensor x, Tensor w) -> Tensor")
            library.impl(name, lambda x, w: x @ w.float().t(), "CompositeExplicitAutograd")
            torch.library.register_fake(f"unread_tool::{name}", lambda x, w: x @ w.float().t(), lib=library)
        ops = torch.ops.unread_tool
        cases = [
            (lambda m, a: ops.marlin_gemm(a, weight(m)), ["read.matmul"]),
            (lambda m, a: ops.marlin_gemm(a, m.c), ["read.matmul"]),  # codes that were never dequantized
            (lambda m, a: ops.mystery(a, weight(m)), ["read.consumer"]),
            (lambda m, a: ops.mystery(a, m.f), []),
            (lambda m, a: ops.marlin_gemm(a, m.f), []),
            (lambda m, a: ops.mystery(quantized(a), m.f), []),
        ]
        for function, rules in cases:
            torch._dynamo.reset()
            report = qp.explain(model(function), (x,), target="cpu")
            assert [r.rule for s in report.sites for r in s.rejects] == rules, str(report)


def test_a_tools_dequantization_of_unknown_values_has_a_verdict():
    """Where values are not known (a graph of its own), an operator that makes floats of codes is not passed over."""
    with torch.library._scoped_library("unread_tool", "FRAGMENT") as library:
        library.define("unpack(Tensor codes, Tensor scale) -> Tensor")
        library.impl("unpack", lambda c, s: c.float() * s, "CompositeExplicitAutograd")
        torch.library.register_fake("unread_tool::unpack", lambda c, s: c.float() * s, lib=library)

        def opaque(a, c, s):
            return torch.mm(a, torch.ops.unread_tool.unpack(c, s).t())

        def packed(a, words, s):
            nibbles = torch.stack([(words >> 4 * i) & 15 for i in range(8)], -1).flatten(1)
            return torch.mm(a, ((nibbles.float() - 8) * s).t())

        def spread(a, words, s):
            nibbles = ((words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).view(N, K)
            return torch.mm(a, ((nibbles.to(torch.int8).to(torch.int32) - s.to(torch.int32)).float() * s).t())

        def positions(a, words, s):
            return torch.mm(a, (words.float() * s).t())

        words = torch.zeros(N, K // 8, dtype=torch.int32)
        wide = torch.zeros(N, K, dtype=torch.int32)
        for function, weights, rules in [
            (opaque, codes(N, K), ["read.weight.opaque"]),
            (packed, words, ["read.weight.packed"]),
            (spread, words, ["read.weight.packed"]),
            (positions, wide, []),
        ]:
            graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(x, weights, floats(N, 1))
            report = qp.fuse(graph, target="cpu")
            assert [r.rule for s in report.sites for r in s.rejects] == rules, str(report)
