"""What stands in a rewritten graph is what the operators really return, however the graph spelled its arguments."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn import functional as F

import quantpass as qp
from quantpass.doors.compiled import copied
from quantpass.doors.preview import _written_inputs
from quantpass.graph.static_values import StaticValues
from quantpass.graph.torch_internals import fake_mode_of
from tests.coverage import here
from tests.coverage.captured import capture

aten = torch.ops.aten
K, N = 64, 32


def assert_values_are_true(gm):
    """Every node's ``meta["val"]`` has the dtype, shape and strides that its operator gives."""
    mode = fake_mode_of([n.meta.get("val") for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)])
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            found = node.target(*args, **kwargs)
        claimed = node.meta["val"]
        if isinstance(found, torch.Tensor):
            assert (found.dtype, found.shape, found.stride()) == (claimed.dtype, claimed.shape, claimed.stride()), node


class Moved(nn.Module):
    def __init__(self, move):
        super().__init__()
        self.move = move
        self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8))

    def forward(self, x):
        q = torch.clamp(torch.round(self.move(x) / 0.05), -128, 127).to(torch.int8)
        return F.linear(q.half() * 0.05, self.codes.half() * 0.01)


MOVES = {
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "transpose": lambda x: x.transpose(-1, -2),
    "permute": lambda x: x.permute(0, 2, 1),
    "movedim": lambda x: x.movedim(1, 2),
    "narrow": lambda x: x.mT[:, 1:],
    "contiguous": lambda x: x.mT.contiguous(),
    "flip": lambda x: x.mT.flip(1),
    "select": lambda x: torch.stack([x, x], dim=1)[:, 1].mT,
    "as_strided": lambda x: x.as_strided((2, 5, K), (5 * K, 1, 5)),
    "expand": lambda x: x.mT[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("on_codes", [False, True], ids=["before quantizing", "as traced"])
def test_moved_activations_of_rank_3(move, on_codes):
    model, x = Moved(MOVES[move]).eval(), torch.randn(2, K, 5).half()
    program = torch.export.export(model, (x,))
    program = program if on_codes else program.run_decompositions({})
    report = qp.fuse(program, target="ascend910b")
    assert (report.fused, report.total) == (1, 1), str(report)
    assert_values_are_true(program.graph_module)
    torch.testing.assert_close(program.module()(x), model(x), rtol=2e-3, atol=2e-2)


def by_keyword(gm, target, keep=0):
    """The same graph with the arguments of ``target`` passed by name, all but the first ``keep``."""
    for node in gm.graph.find_nodes(op="call_function", target=target):
        names = [a.name for a in target._schema.arguments]
        node.kwargs = {**dict(zip(names[keep:], node.args[keep:], strict=False)), **node.kwargs}
        node.args = node.args[:keep]
    gm.recompile()
    return gm


def _conv(x, w):
    return F.conv1d(x.permute(0, 2, 1), w.unsqueeze(-1)).permute(0, 2, 1)


def _batched(x, w):
    return torch.matmul(x.transpose(0, 1).transpose(0, 1), w.t())


def _views(x, w):
    return torch.mm(x.reshape(-1, K), w.t()).view(2, 5, N)


MOVING = (aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default, aten.expand.default)
COMPUTING = (aten.convolution.default, aten.mm.default, aten.mul.Tensor, aten.clamp.default, aten._to_copy.default)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("target", [*MOVING, *COMPUTING], ids=str)
@pytest.mark.parametrize("form", [_conv, _batched, _views])
def test_arguments_by_keyword(form, target, keep):
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)

    def graph(x):
        q = torch.clamp(torch.round(x / 0.05), -128, 127).to(torch.int8)
        return form(q.half() * 0.05, codes.half() * 0.01)

    x = torch.randn(2, 5, K).half()
    with torch.no_grad():
        gm = by_keyword(make_fx(graph, tracing_mode="fake", _allow_non_fake_inputs=True)(x), target, keep)
        wanted = gm(x)
        assert qp.fuse(gm, target="ascend910b").fused == 1
        torch.testing.assert_close(gm(x), wanted, rtol=2e-3, atol=2e-2)


def graph_of(build):
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "y")]
    graph.output(build(graph, *nodes))
    return fx.GraphModule(nn.Module(), graph), nodes


WRITES = {
    "first argument": (lambda g, x, y: g.call_function(aten.add_.Tensor, (x, y)), {"x"}),
    "out by keyword": (lambda g, x, y: g.call_function(aten.add.out, (x, y), {"out": y}), {"y"}),
    "self by keyword": (lambda g, x, y: g.call_function(aten.mul_.Tensor, (), {"self": y, "other": x}), {"y"}),
    "a list": (lambda g, x, y: g.call_function(aten._foreach_add_.Scalar, ([x, y], 1)), {"x", "y"}),
    "Python's operator": (lambda g, x, y: g.call_function(operator.iadd, (x, y)), {"x", "y"}),
    "none": (lambda g, x, y: g.call_function(aten.add.Tensor, (x, y)), set()),
}


@pytest.mark.parametrize("case", WRITES)
def test_what_a_graph_writes_to(case):
    """One answer for whoever asks: the preview, which has to keep inputs, and the reader of static values."""
    build, written = WRITES[case]
    gm, nodes = graph_of(build)
    assert {("x", "y")[i] for i in _written_inputs(gm)} == written
    values = StaticValues(gm.graph, {n: torch.ones(2) for n in nodes})
    changing = {n.name for n in nodes if n in values.mutated}
    assert changing >= written  # more where an operator may return either of its inputs
    assert bool(changing) == bool(written)


def test_codes_that_another_site_gives_are_not_made_again():
    """uint8 codes between two layers: the first site returns int8 ones as well, and the second takes those."""
    scheme = next(s for s in here.schemes() if (s.tool, s.name) == ("PT2E", "x86 quantizer, static"))
    (captured,) = capture(*scheme.build())
    qp.fuse(copied(captured.graph), target="cpu").require()


class Swapped(nn.Module):
    """The weight on the left: the fused operator computes the transposed product."""

    def __init__(self, behind):
        super().__init__()
        self.behind = behind
        self.register_buffer("codes", torch.randint(-127, 128, (N, K), dtype=torch.int8))

    def forward(self, x):
        return self.behind(torch.matmul(self.codes.float() * 0.01, x))


BEHIND = {
    "nothing": lambda y: y,
    "view": lambda y: y.view(y.shape[0] * N, y.shape[2]),
    "a sum, then view": lambda y: (y + 1).view(-1, y.shape[2]),
    "as_strided": lambda y: y.as_strided((y.shape[0], N), (N * y.shape[2], y.shape[2])),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_fused_value_has_the_strides_of_what_it_replaces(behind, dynamic):
    model, x = Swapped(BEHIND[behind]), torch.randn(3, K, 5)
    backend = qp.backend(target="cpu")
    torch._dynamo.reset()
    actual, expected = torch.compile(model, backend=backend, dynamic=dynamic)(x), model(x)
    assert backend.report.fused == 1
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_keeps_its_memory_format(memory_format):
    codes = torch.randint(-127, 128, (8, 4, 1, 1), dtype=torch.int8)
    gm = make_fx(lambda x: F.conv2d(x, codes.float() * 0.01), tracing_mode="fake", _allow_non_fake_inputs=True)(
        torch.randn(2, 4, 6, 6).to(memory_format=memory_format)
    )
    x = torch.randn(2, 4, 6, 6).to(memory_format=memory_format)
    expected = gm(x)
    assert qp.fuse(gm, target="cpu").fused == 1
    assert gm(x).stride() == expected.stride()
    assert_values_are_true(gm)
