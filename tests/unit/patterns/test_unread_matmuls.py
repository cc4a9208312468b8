"""Operators that multiply matrices in a form that is not read: what they are, and what their user can do."""

import pytest
import torch
import torch.nn.functional as F

from quantpass.patterns.unread_matmuls import higher_order, unread_contraction
from tests.unit.graphs import Traced

aten = torch.ops.aten
IMAGE, KERNEL = torch.randn(2, 8, 16, 16), torch.randn(8, 8, 4, 4)


def unread(function, *inputs):
    """What is said of the last operator of a function, where anything is."""
    t = Traced(function, *inputs)
    return unread_contraction(t.result, False), t


@pytest.mark.parametrize(
    ("options", "kernel", "what", "patches"),
    [
        ({"stride": 4}, KERNEL, "a kernel of 4x4 is not", True),
        ({"stride": 2}, KERNEL, "a kernel of 4x4 is not", False),
        ({"stride": (4, 2)}, KERNEL, "a kernel of 4x4 is not", False),
        ({}, KERNEL, "a kernel of 4x4 is not", False),
        ({"stride": 4, "groups": 2}, KERNEL[:, :4], "in 2 groups", False),
        ({}, KERNEL[:, :, :1, :1], "a kernel of 1x1 is not", False),
    ],
)
def test_convolutions(options, kernel, what, patches):
    """Patches that do not overlap are a matmul in another shape; others are none."""
    found, t = unread(lambda x, w: F.conv2d(x, w, **options), IMAGE, kernel)
    assert what in found.reason and found.operands == (t.inputs[1],)
    assert ("cut the image into patches" in found.hint) == patches


def test_a_transposed_convolution():
    found, _ = unread(lambda x, w: F.conv_transpose2d(x, w, stride=4), IMAGE, KERNEL)
    assert "transposed" in found.reason and "groups" not in found.reason


@pytest.mark.parametrize(
    ("function", "inputs", "operands"),
    [
        (torch.mv, (torch.randn(4, 8), torch.randn(8)), (0, 1)),
        (lambda b, m, v: torch.addmv(b, m, v), (torch.randn(4), torch.randn(4, 8), torch.randn(8)), (1, 2)),
        (
            lambda b, x, y: torch.addbmm(b, x, y),
            (torch.randn(4, 4), torch.randn(2, 4, 4), torch.randn(2, 4, 4)),
            (1, 2),
        ),
        (torch.dot, (torch.randn(8), torch.randn(8)), (0, 1)),
    ],
)
def test_products_in_other_forms(function, inputs, operands):
    found, t = unread(function, *inputs)
    assert found.operands == tuple(t.inputs[i] for i in operands)
    assert found.rule == "read.matmul" and found.hint and not found.weights_only


@pytest.mark.parametrize("function", [torch.neg, lambda x: x.sum(-1), lambda x: x.t(), torch.softmax])
def test_what_multiplies_nothing(function):
    x = torch.randn(4, 4)
    found, _ = unread((lambda x: torch.softmax(x, -1)) if function is torch.softmax else function, x)
    assert found is None


@pytest.fixture
def tool():
    """Operators of a tool that quantpass does not know."""
    library = torch.library.Library("quantpass_tool", "DEF")
    for name in ("w8a8_gemm", "grouped_gemm", "smooth", "moe_experts"):
        library.define(f"{name}(Tensor x, Tensor w) -> Tensor")
        library.impl(name, lambda x, w: x @ w, "CompositeExplicitAutograd")
    yield torch.ops.quantpass_tool
    library._destroy()


@pytest.mark.parametrize(
    ("name", "rule", "weights_only"),
    [
        ("w8a8_gemm", "read.matmul", False),
        ("grouped_gemm", "read.weight.experts", False),
        ("moe_experts", "read.weight.experts", False),
        ("smooth", "read.consumer", True),
    ],
)
def test_operators_of_a_tool(tool, name, rule, weights_only):
    """By its name it multiplies; another one may do anything, which counts for stored codes only."""
    t = Traced.call(getattr(tool, name).default, torch.randn(4, 4), torch.randn(4, 4))
    found = unread_contraction(t.result, False)
    assert (found.rule, found.weights_only) == (rule, weights_only)
    assert found.operands == tuple(t.inputs)
    assert unread_contraction(t.result, True) is None  # some table knows it


@pytest.mark.parametrize(
    ("operator", "looked_into", "rule"),
    [
        (torch.ops.higher_order.cond, False, "read.consumer"),
        (torch.ops.higher_order.cond, True, None),
        (torch.ops.higher_order.flex_attention, False, "read.matmul"),
        (torch.ops.higher_order.flex_attention, True, "read.matmul"),
        (aten.mm.default, False, None),
    ],
)
def test_operators_that_call_graphs(operator, looked_into, rule):
    """Where their graphs are read, only what they multiply themselves counts: attention."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(4, 4)
    found = higher_order(graph.call_function(operator, (x, x)), looked_into)
    assert (None if found is None else found.rule) == rule
    if found is not None:
        assert found.operands == (x,) and found.weights_only == (rule == "read.consumer")
