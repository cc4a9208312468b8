"""Through torch.compile: what a user compiles, runs and reads."""

import logging

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import quantpass as qp
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly, assert_close, compiled, rules

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only(dtype, shape, bias):
    model, x = WeightOnly(dtype=dtype, bias=bias, zero_point=True), torch.randn(shape).to(dtype)
    actual, report = compiled(model, x)
    assert (report.fused, report.total) == (1, 1)
    assert report.sites[0].plan.op == "npu_weight_quant_batchmatmul"
    assert_close(actual, model(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("zero_point", "unsigned"), [(0, False), (7, False), (130, True)])
def test_static_w8a8(dtype, zero_point, unsigned):
    model = StaticW8A8(dtype=dtype, zero_point=zero_point, unsigned=unsigned)
    x = torch.randn(2, 7, 64).to(dtype)
    actual, report = compiled(model, x)
    assert report.fused == 1
    assert report.sites[0].plan.op == "npu_quant_matmul"
    # In 16 bits the graph rounds every dequantized operand, the fused operator none.
    assert_close(actual, model(x), torch.bfloat16 if dtype != torch.float32 else dtype)


@pytest.mark.parametrize("dynamic", [True, False])
def test_integer_matmul_keeps_its_bits(dynamic):
    model, x = IntegerW8A8(dynamic=dynamic), torch.randn(2, 7, 64)
    actual, report = compiled(model, x, target="ascend910b")
    assert report.fused == 1
    assert report.sites[0].numerics.kind == "exact"
    assert torch.equal(actual, model(x))


@pytest.mark.parametrize("module", [WeightOnly, StaticW8A8])
@pytest.mark.parametrize("sizes", [((2, 5), (3, 9)), ((2, 5), (2, 6))])
def test_dynamic_shapes(module, sizes):
    model = module()
    torch._dynamo.reset()
    backend = qp.backend(target="cpu")
    run = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for lead in sizes:
            x = torch.randn(*lead, 64).half()
            assert_close(run(x), model(x), torch.bfloat16)
    assert backend.report.fused == backend.report.total == 1, "one symbolic graph serves both sizes"


def test_rows_that_are_not_contiguous():
    model, x = WeightOnly(), torch.randn(3, 8, 64).half()
    actual, report = compiled(model, x[:, -1:, :])
    assert report.fused == 1
    assert_close(actual, model(x[:, -1:, :]))


def test_shared_activation_and_shared_weight():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = StaticW8A8(), StaticW8A8(n=32)

        def forward(self, x):
            real = self.a.quantized(x).to(x.dtype) * 0.03  # one quantize, one dequantize, three matmuls
            w = self.a.codes.to(x.dtype) * self.a.scale
            y = nn.functional.linear(real, w)
            z = nn.functional.linear(real, self.b.codes.to(x.dtype) * self.b.scale)
            return y, z, nn.functional.linear(real * 2, w)

    model, x = Shared(), torch.randn(4, 64).half()
    actual, report = compiled(model, x)
    assert (report.fused, report.total) == (3, 3)
    for a, e in zip(actual, model(x), strict=True):
        assert_close(a, e, torch.bfloat16)


def test_tied_weight_is_used_twice_and_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-127, 128, (50, 64), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(50, 1).half() * 0.01, requires_grad=False)

        def forward(self, tokens):
            table = self.codes.half() * self.scale
            return nn.functional.linear(nn.functional.embedding(tokens, table), table)

    model, tokens = Tied(), torch.randint(0, 50, (2, 5))
    actual, report = compiled(model, tokens)
    assert report.fused == 1
    assert_close(actual, model(tokens))
    fused = report.graphs[0][1]
    assert "weight_quant_matmul" in fused
    assert fused.count("i8[50, 64]") == 1, "no second copy of the weight"


def test_requantized_chain_runs_on_integers():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = StaticW8A8(dtype=torch.float32), StaticW8A8(k=96, n=32, dtype=torch.float32)

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Chain(), torch.randn(6, 64)
    actual, report = compiled(model, x)
    assert [s.plan.call["output_dtype"] for s in report.sites] == [torch.int8, torch.float32]
    lines = report.graphs[0][1].splitlines()
    first, second = (i for i, line in enumerate(lines) if "quantpass.quant_matmul" in line)
    assert not [line for line in lines[first:second] if ": f32" in line], "no float tensor between the two"
    # FP19 scales may move a code by one: what that costs is bounded by one step of the second activation.
    assert (actual - model(x)).abs().max() <= 0.03 * (model.b.codes.float() * model.b.scale).abs().sum(1).max()


def test_in_place_update_of_a_weight_is_seen():
    model, x = WeightOnly(), torch.randn(4, 64).half()
    torch._dynamo.reset()
    run = torch.compile(model, backend=qp.backend(target="cpu"))
    with torch.no_grad():
        assert_close(run(x), model(x))
        model.codes.copy_(torch.randint(-127, 128, model.codes.shape, dtype=torch.int8))
        model.scale.mul_(0.5)
        assert_close(run(x), model(x))


def test_replaced_weight_is_seen():
    model, x = WeightOnly(), torch.randn(4, 64).half()
    torch._dynamo.reset()
    run = torch.compile(model, backend=qp.backend(target="cpu"))
    with torch.no_grad():
        run(x)
        model.scale = nn.Parameter(model.scale * 3, requires_grad=False)
        assert_close(run(x), model(x))


def test_weight_that_stops_being_quantized_is_left_alone():
    """The scale no longer varies by column only: the reading that was proved does not hold for the new values."""

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-127, 128, (96, 64), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.full((96, 64), 0.01).half(), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.codes.half() * self.scale)

    model, x = Free(), torch.randn(4, 64).half()
    torch._dynamo.reset()
    backend = qp.backend(target="cpu")
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert_close(run(x), model(x))
        assert backend.report.sites[0].fused
        model.scale.copy_(torch.rand(96, 64).half())
        assert torch.equal(run(x), model(x))
    assert not backend.report.sites[-1].fused


def test_modules_of_one_structure_share_a_graph_but_not_their_constants():
    layers, x = [WeightOnly() for _ in range(3)], torch.randn(4, 64).half()
    torch._dynamo.reset()
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.scale.mul_(i + 1)
        runs = [torch.compile(layer, backend=qp.backend(target="cpu")) for layer in layers]
        for _ in range(2):
            for run, layer in zip(runs, layers, strict=True):
                assert_close(run(x), layer(x))


@pytest.mark.parametrize("inner", [None, "eager", "inductor"])
def test_inner_compilers(inner):
    model, x = nn.Sequential(WeightOnly(), nn.GELU(), WeightOnly(k=96, n=64)), torch.randn(2, 3, 64).half()
    actual, report = compiled(model, x, inner=inner)
    assert report.fused == 2
    assert_close(actual, model(x), torch.bfloat16)


def test_inner_compiler_of_ones_own():
    seen = []

    def mine(gm, inputs):
        seen.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        assert len(inputs) == len(gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    model, x = WeightOnly(), torch.randn(4, 64).half()
    actual, _ = compiled(model, x, inner=mine, lowering="reference")
    assert torch.ops.quantpass.weight_quant_matmul.default in seen[0]
    assert_close(actual, model(x))


def test_by_name_with_options():
    torch._dynamo.reset()
    reports = []
    model, x = WeightOnly(), torch.randn(4, 64).half()
    options = {"target": "ascend310p", "lowering": "reference", "on_report": reports.append}
    with torch.no_grad():
        actual = torch.compile(model, backend="quantpass", options=options)(x)
    assert_close(actual, model(x))
    assert reports[0].fused == 1


def test_float32_is_refused_on_chips_and_says_why():
    _, report = compiled(WeightOnly(dtype=torch.float32), torch.randn(4, 64), target="ascend310p")
    assert report.fused == 0
    assert "wqmm.310p.dtypes.x" in rules(report)
    assert "float16" in str(report)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "ascend310"}, ValueError, "Did you mean 'ascend310p'"),
        ({"target": 310}, TypeError, "give a chip's name"),
        ({"target": "cpu", "lowering": "refrence"}, ValueError, "Did you mean 'reference'"),
        ({"target": "cpu", "iner": "eager"}, TypeError, "Did you mean 'inner'"),
        ({"target": "cpu", "inner": "tvm"}, ValueError, "'inductor'"),
        ({"target": "cpu", "numerics": "fast"}, ValueError, "'strict', 'vendor'"),
        ({"target": "cpu", "allow": "qmm.310p.pertoken"}, TypeError, "tuple of rule ids"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        qp.backend(**options)


def test_no_target_and_no_device():
    with pytest.raises(ValueError, match="Name one: target='ascend310p'"):
        qp.backend()


def test_training_graph():
    model = WeightOnly()
    model.bias.requires_grad_(True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.no_grad\(\)"):
        torch.compile(model, backend=qp.backend(target="cpu"))(torch.randn(4, 64).half())


def test_nothing_quantized():
    _, report = compiled(nn.Linear(8, 8), torch.randn(2, 8))
    assert report.total == 0
    text = str(report)
    assert "constant folding" in text
    assert "another graph" in text
    with pytest.raises(AssertionError):
        report.require()


def test_refusals_are_logged_once_a_graph(caplog):
    with caplog.at_level(logging.WARNING, logger="quantpass"):
        compiled(WeightOnly(dtype=torch.float32), torch.randn(4, 64), target="ascend310p")
    assert len(caplog.records) == 1
    assert "1 of 1 quantized matmuls are not fused" in caplog.text


class Tripled(TorchFunctionMode):
    """As some tools quantize: what the model's matmuls give is changed on the way."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 3 if any(name in str(func) for name in ("linear", "mm", "matmul")) else out


@pytest.mark.parametrize("inner", [None, "eager"])
@pytest.mark.parametrize("where", ["around the call", "around the compiled module's own call"])
def test_a_function_mode_acts_once(inner, where):
    """Dynamo traces it into the graph; on the graph's operators it must not act again."""
    model, x = WeightOnly(), torch.randn(3, 64).half()

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with Tripled():
                return self.model(x)

    torch._dynamo.reset()
    backend = qp.backend(target="cpu", inner=inner)
    with torch.no_grad():
        if where == "around the call":
            with Tripled():
                expected, actual = model(x), torch.compile(model, backend=backend)(x)
        else:
            expected, actual = Inside()(x), torch.compile(Inside(), backend=backend)(x)
    assert backend.report.fused == 1
    assert_close(actual, expected)
    assert (expected - 3 * model(x)).abs().max() < 0.1, "the mode does act"


def test_verify_and_explain_under_a_function_mode():
    model, x = WeightOnly(), torch.randn(3, 64).half()
    with Tripled():
        found = qp.verify(model, (x,), target="ascend910b")
        assert qp.explain(model, (x,), target="ascend910b").fused == 1
    found.require()
    assert all(d.relative < 0.01 for d in found.outputs)


def test_weights_of_a_subclass_still_take_themselves_apart():
    """Turning modes off is for the graph, which holds plain tensors; the subclass has acted while tracing."""

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs)

    model = WeightOnly()
    model.scale = nn.Parameter(model.scale.data.as_subclass(Logged), requires_grad=False)
    x = torch.randn(3, 64).half()
    actual, report = compiled(model, x)
    assert report.fused == 1
    assert_close(actual.as_subclass(torch.Tensor), model(x).as_subclass(torch.Tensor))
