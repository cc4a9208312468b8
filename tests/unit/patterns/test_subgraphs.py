"""Bodies of higher-order operators: what each of their inputs is in the outer graph."""

import pytest
import torch
from functorch.experimental.control_flow import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from quantpass.patterns.affine import NotAffine
from quantpass.patterns.sites import find_sites
from quantpass.patterns.subgraphs import bodies_of
from tests.unit.graphs import Traced

CODES = torch.arange(-32, 32, dtype=torch.int8).reshape(8, 8)
SCALE = torch.linspace(0.1, 0.8, 8)
X = torch.randn(3, 8)


def dequantized(c, s):
    return c.float() * s


def branches(x, c, s):
    w = dequantized(c, s)
    return torch.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x @ w.t(), (x, w))


def repeated(x, c, s):
    w = dequantized(c, s)
    count = torch.tensor(0)
    return while_loop(lambda i, y, w: i < 3, lambda i, y, w: (i + 1, y @ w, w.clone()), (count, x, w))[1]


def mapped(x, c, s):
    w = dequantized(c, s)
    return torch_map(lambda x, w: x @ w, x.expand(5, 3, 8), w)


def sliced(x, c, s):
    w = dequantized(c, s).expand(5, 8, 8)
    return scan(lambda carry, w: (carry @ w, carry.sum()), x, w)[0]


def bodies(function):
    t = Traced(function, X, CODES, SCALE, known=2)
    return [b for n in t.graph.nodes for b in bodies_of(n)], t


@pytest.mark.parametrize(
    ("function", "operator", "same", "parts"),
    [
        (branches, "cond", [["arg0_1", "mul"], ["arg0_1", "mul"]], [[None, None]] * 2),
        (mapped, "map_impl", [[None, "mul"]], [["expand", None]]),
        (sliced, "scan", [[None, None]], [[None, "expand"]]),
        (repeated, "while_loop", [[None, None, None]] * 2, [[None] * 3] * 2),
    ],
)
def test_what_the_inputs_of_a_body_are(function, operator, same, parts):
    found, _ = bodies(function)
    names = [[getattr(n, "name", n) for n in b.operands] for b in found]
    pieces = [[getattr(n, "name", n) for n in b.parts] for b in found]
    assert {b.operator for b in found} == {operator}
    assert (names, pieces) == (same, parts)
    assert all(len(n) == len(b.graph.find_nodes(op="placeholder")) for n, b in zip(names, found, strict=True))


@pytest.mark.parametrize("function", [branches, mapped, sliced])
def test_a_dequantized_value_that_is_handed_in(function):
    """It stays a quantized weight in the body, which says where it came from and what to do."""
    found, t = bodies(function)
    for body in found:
        given = body.given(t.reader)
        assert [n.name for n in given] and all(isinstance(v, NotAffine) and v.quantized for v in given.values())
        assert all(v.rule == "read.subgraph" and v.hint for v in given.values())
    readings = list(find_sites(t.graph, t.values, t.dialects))
    assert len(readings) == len(found) and all(r.body for r in readings)
    assert all("read.subgraph" in {x.rule for x in r.rejects} for r in readings)


def test_values_that_are_known_are_known_inside():
    def function(x, c, s):
        return torch.cond(x.sum() > 0, lambda x, c, s: x @ (c.float() * s), lambda x, c, s: x * s, (x, c, s))

    found, t = bodies(function)
    for body in found:
        known = list(body.leaves(t.reader).values())
        assert any(torch.equal(v, SCALE) for v in known) and all(v is not None for v in known)


def test_a_layout_that_nobody_knows_gives_nothing_away():
    """An operator with other arguments than its body has inputs: what they are is not guessed."""
    _, t = bodies(branches)
    (cond,) = [n for n in t.graph.nodes if n.name.startswith("cond")]
    cond.args = (*cond.args[:3], (*cond.args[3], cond.args[3][0]))
    for body in bodies_of(cond):
        assert body.operands == body.parts == (None, None)


def test_what_calls_no_graph_has_no_bodies():
    t = Traced(lambda x: x * 2.0, X)
    assert [b for n in t.graph.nodes for b in bodies_of(n)] == []
