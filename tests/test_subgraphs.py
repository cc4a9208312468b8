"""Matmuls in the bodies of branches, loops and nested regions."""

import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import quantpass as qp
from tests.helpers import compiled, rules
from tests.test_unread_matmuls import Model, codes, floats

pytestmark = pytest.mark.filterwarnings("ignore")

K, LAYERS = 32, 3


def model(function):
    return Model(
        function, c=codes(K, K), s=floats(K, 1) * 1e-2, p=codes(K, K // 2).view(torch.uint8), f=floats(K, K),
        cs=codes(LAYERS, K, K), ss=floats(LAYERS, K, 1) * 1e-2, fs=floats(LAYERS, K, K), q=floats(1, 2, 128, 16),
        k=codes(1, 2, 128, 16),
    )  # fmt: skip


def linear(m, x):
    return F.linear(x, m.c.float() * m.s)


def packed(m, x):
    nibbles = torch.stack([m.p & 15, m.p >> 4], -1).flatten(1)
    return F.linear(x, (nibbles.float() - 8) * m.s)


def outside(m, x):
    w = m.c.float() * m.s
    return torch.cond(x.sum() > 0, lambda a: F.linear(a, w), lambda a: a + 1, (x,))


@torch.compiler.nested_compile_region
def region(x, c, s):
    return F.linear(x, c.float() * s)


def branch(body, otherwise=lambda m, x: x + 1):
    return lambda m, x: torch.cond(x.sum() > 0, lambda a: body(m, a), lambda a: otherwise(m, a), (x,))


def loop(body):
    return lambda m, x: while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, body(m, a)), (torch.tensor(0), x))[1]


def layers(m, x):
    return scan(lambda h, w: (F.linear(h, w[0].float() * w[1]), h.clone()), x, (m.cs, m.ss))[0]


def dequantized_layers(m, x):
    return scan(lambda h, w: (F.linear(h, w), h.clone()), x, m.cs.float() * m.ss)[0]


def rows(m, x):
    return scan(lambda h, a: (linear(m, h[None])[0] + a, a.clone()), x[0], x)[0]


BODIES = {
    "cond": (branch(linear), ["cond.true_graph_0"]),
    "cond, both branches": (branch(linear, packed), ["cond.true_graph_0", "cond.false_graph_0"]),
    "cond, packed codes": (branch(packed), ["cond.true_graph_0"]),
    "cond, dequantized outside": (outside, ["cond.true_graph_0"]),
    "cond in cond": (branch(branch(linear)), ["cond.true_graph_0.cond.true_graph_0"]),
    "cond, a matmul with a vector": (branch(lambda m, a: a + torch.mv(m.c.float() * m.s, a[0])), ["cond.true_graph_0"]),
    "while_loop": (loop(linear), ["while_loop.while_loop_body_graph_0"]),
    "while_loop, packed codes": (loop(packed), ["while_loop.while_loop_body_graph_0"]),
    "scan": (rows, ["scan.scan_combine_graph_0"]),
    "scan over layers": (layers, ["scan.scan_combine_graph_0"]),
    "scan over dequantized layers": (dequantized_layers, ["scan.scan_combine_graph_0"]),
    "map": (lambda m, x: map_over(lambda a: linear(m, a[None]), x), ["map_impl.body_graph_0"]),
    "nested region, twice": (
        lambda m, x: region(region(x, m.c, m.s), m.c, m.s),
        ["invoke_subgraph.repeated_subgraph0", "invoke_subgraph_1.repeated_subgraph0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_every_matmul_of_a_body_has_a_verdict(name):
    function, bodies = BODIES[name]
    m, x = model(function), floats(4, K)
    actual, report = compiled(m, x)
    assert [s.name.rpartition(".")[0] for s in report.sites] == bodies, str(report)
    assert all(s.fused or (s.rejects[0].fact and s.rejects[0].hint) for s in report.sites), str(report)
    torch.testing.assert_close(actual, m(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    again = qp.explain(m, (x,), target="cpu")
    assert [(s.name, s.fused) for s in again.sites] == [(s.name, s.fused) for s in report.sites]


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_in_exported_programs_too(name, decomposed):
    function, bodies = BODIES[name]
    m, x = model(function), floats(4, K)
    program = torch.export.export(m, (x,))
    program = program.run_decompositions({}) if decomposed else program
    report = qp.fuse(program, target="cpu")
    if "nested" not in name:  # export takes the region apart
        assert [s.name.rpartition(".")[0] for s in report.sites] == bodies, str(report)
    assert report.total == len(bodies)
    torch.testing.assert_close(program.module()(x), m(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        branch(lambda m, a: F.linear(a, m.f)),
        loop(lambda m, a: F.linear(a, m.f)),
        lambda m, x: scan(lambda h, w: (F.linear(h, w), h.clone()), x, m.fs)[0],
        lambda m, x: map_over(lambda a: a @ m.f, x),
        lambda m, x: flex_attention(m.q, m.q, m.q) + x.sum(),
    ],
)
def test_float_bodies_have_none(function):
    torch._dynamo.reset()
    assert qp.explain(model(function), (floats(4, K),), target="cpu").total == 0


def test_attention_with_a_body_is_judged_by_its_own_operands():
    torch._dynamo.reset()
    m = model(
        lambda m, x: flex_attention(m.q, m.k.float() * 0.01, m.q, score_mod=lambda s, b, h, i, j: s * 2) + x.sum()
    )
    report = qp.explain(m, (floats(4, K),), target="cpu")
    assert rules(report) == {"read.matmul"}
    assert "SDPBackend.MATH" in report.sites[0].rejects[0].hint


def test_modes_that_export_makes_bodies_of():
    def function(m, x):
        with torch.no_grad():
            y = linear(m, x)
        with torch.autocast("cpu", enabled=False):
            return y + linear(m, x)

    m, x = model(function), floats(4, K)
    program = torch.export.export(m, (x,))
    report = qp.fuse(program, target="cpu")
    assert report.total == 2
    torch.testing.assert_close(program.module()(x), m(x), rtol=1e-4, atol=1e-4)
