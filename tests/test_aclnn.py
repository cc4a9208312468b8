"""The aclnn lowering: the vendor's operators, called its way, give what the reference operators give, bit for bit."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from expecttest import TestCase
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import quantpass as qp
from quantpass.graph.dump import dump
from quantpass.lowering.aclnn import lower_to_aclnn
from tests.helpers import CHIPS, IntegerW8A8, StaticW8A8, WeightOnly, assert_close, compiled

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def npu_on_cpu():
    qp.emulate_npu()


class Int4(nn.Module):
    """int4 codes, per channel (``group=0``) or per group of K; stored ``(N, K)`` or, where ``turned``, ``(K, N)``."""

    def __init__(self, k=128, n=64, group=0, turned=False, zero_point=False, dtype=torch.float16):
        super().__init__()
        g = torch.Generator().manual_seed(k + n + group)
        groups = k // group if group else 1
        codes = torch.randint(-8, 8, (n, groups, k // groups), dtype=torch.int8, generator=g)
        scale = (torch.rand(n, groups, 1, generator=g) * 0.01 + 1e-3).to(dtype)
        zero = torch.randint(-3, 4, (n, groups, 1), generator=g).to(dtype)
        self.turned = turned
        if turned:
            codes, scale, zero = (t.permute(1, 2, 0).contiguous() for t in (codes, scale, zero))
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.zero = nn.Parameter(zero, requires_grad=False) if zero_point else None

    def forward(self, x):
        w = self.codes.to(x.dtype)
        w = (w if self.zero is None else w - self.zero) * self.scale
        return x @ w.flatten(0, 1) if self.turned else nn.functional.linear(x, w.flatten(1, 2))


class Chain(nn.Module):
    """Two quantized layers: the first one's result is int8, with a zero point."""

    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.a = StaticW8A8(dtype=dtype)
        self.b = StaticW8A8(k=96, n=32, dtype=dtype, zero_point=5)

    def forward(self, x):
        return self.b(self.a(x))


MODELS = {
    "weight_only": lambda: WeightOnly(),
    "weight_only_zero_point": lambda: WeightOnly(zero_point=True),
    "weight_only_no_bias": lambda: WeightOnly(bias=False),
    "weight_only_per_tensor": lambda: WeightOnly(scale_shape="tensor"),
    "weight_only_one_column": lambda: WeightOnly(n=1),
    "weight_only_one_row": lambda: WeightOnly(k=1),
    "weight_only_bf16": lambda: WeightOnly(dtype=torch.bfloat16, zero_point=True),
    "int4": lambda: Int4(),
    "int4_turned": lambda: Int4(turned=True),
    "int4_square": lambda: Int4(k=64, n=64),
    "int4_group": lambda: Int4(group=32),
    "int4_group_zero_point": lambda: Int4(group=32, zero_point=True),
    "int4_group_64": lambda: Int4(group=64, zero_point=True),
    "int4_group_turned": lambda: Int4(group=64, zero_point=True, turned=True),
    "int4_group_bf16": lambda: Int4(group=32, zero_point=True, dtype=torch.bfloat16),
    "static": lambda: StaticW8A8(),
    "static_zero_point": lambda: StaticW8A8(zero_point=7),
    "static_unsigned": lambda: StaticW8A8(zero_point=130, unsigned=True),
    "static_bf16": lambda: StaticW8A8(dtype=torch.bfloat16),
    "static_float32": lambda: StaticW8A8(dtype=torch.float32),
    "static_no_bias": lambda: StaticW8A8(bias=False),
    "chain": lambda: Chain(),
    "chain_bf16": lambda: Chain(torch.bfloat16),
    "integer_dynamic": lambda: IntegerW8A8(),
    "integer_static": lambda: IntegerW8A8(dynamic=False),
    "integer_dynamic_float16": lambda: IntegerW8A8(dtype=torch.float16),
}

# What the 310P's rules refuse, by model and number of sites; A2 and A3 take every one of them.
UNFUSED_310P = {
    "weight_only_bf16": 1, "int4_group": 1, "int4_group_zero_point": 1, "int4_group_64": 1, "int4_group_turned": 1,
    "int4_group_bf16": 1, "static_bf16": 1, "static_float32": 1, "chain_bf16": 1, "integer_dynamic": 1,
    "integer_static": 1, "integer_dynamic_float16": 1,
}  # fmt: skip


def dtype_of(model):
    return next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)


def graphs_of(into):
    def inner(gm, inputs):
        del inputs
        into.append(gm)
        return gm.forward

    return inner


@pytest.mark.parametrize(("target", "mode"), [*((chip, "eager") for chip in CHIPS), ("ascend310p", "graph")])
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_as_the_reference(name, target, mode):
    model = MODELS[name]()
    k = {"weight_only_one_row": 1, "int4_square": 64}.get(name, 128 if name.startswith("int4") else 64)
    dtype = getattr(model, "dtype", None) or dtype_of(model) or torch.float32
    x = torch.randn(2, 5, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, planned = compiled(model, x, target=target, mode=mode)
    graphs = []
    actual, report = compiled(model, x, target=target, mode=mode, lowering="aclnn", inner=graphs_of(graphs))
    assert torch.equal(actual, expected)
    assert [s.fused for s in report.sites] == [s.fused for s in planned.sites]
    assert report.total - report.fused == (UNFUSED_310P.get(name, 0) if target == "ascend310p" else 0)
    targets = [str(n.target) for n in graphs[0].graph.nodes]
    assert not [t for t in targets if t.startswith("quantpass.")]
    called = sum(t.startswith(("npu.npu_quant_matmul", "npu.npu_weight_quant_batchmatmul")) for t in targets)
    assert called == report.fused


def test_inductor_compiles_the_rest():
    model, x = nn.Sequential(WeightOnly(), nn.GELU(), WeightOnly(k=96, n=64)), torch.randn(2, 3, 64).half()
    expected, _ = compiled(model, x, target="ascend910b", mode="eager")
    actual, report = compiled(model, x, target="ascend910b", lowering="aclnn", inner="inductor")
    assert report.fused == 2
    assert_close(actual, expected)


def test_default_mode_is_the_one_the_operators_run_in():
    assert qp.backend(target="ascend910b", lowering="aclnn").report.mode == "eager"
    assert qp.backend(target="ascend910b").report.mode == "graph"


def test_cpu_is_no_target_for_it():
    with pytest.raises(ValueError, match=r"target='ascend310p', 'ascend910b' or 'ascend910_93'"):
        qp.backend(target="cpu", lowering="aclnn")


class TestConventions(TestCase):
    """How the vendor's operators are called; each line is one argument convention."""

    def calls(self, model, x, **options):
        graphs = []
        compiled(model, x, lowering="aclnn", inner=graphs_of(graphs), **options)
        lines = dump(graphs[0]).splitlines()
        return "\n".join(line.strip() for line in lines if "npu." in line or "transpose" in line or "aten.t(" in line)

    def test_weight_only(self):
        self.assertExpectedInline(
            self.calls(WeightOnly(zero_point=True), torch.randn(4, 64).half(), target="ascend910b"),
            """\
%weight_quant_matmul_transposed: i8[64, 96] = aten.transpose.int(%arg0_1, -2, -1)
%npu_weight_quant_batchmatmul: f16[4, 96] = npu.npu_weight_quant_batchmatmul(%arg1_1, %weight_quant_matmul_transposed, %quantpass_scale, antiquant_offset=%quantpass_offset, bias=%arg4_1)""",
        )

    def test_scales_of_groups_turn_with_the_weight(self):
        self.assertExpectedInline(
            self.calls(Int4(group=32, zero_point=True), torch.randn(4, 128).half(), target="ascend910b"),
            """\
%weight_quant_matmul_transposed: f16[4, 64] = aten.transpose.int(%quantpass_scale, -2, -1)
%weight_quant_matmul_transposed_1: f16[4, 64] = aten.transpose.int(%quantpass_offset, -2, -1)
%weight_quant_matmul_transposed_2: i32[16, 64] = aten.transpose.int(%quantpass_arg0_1, -2, -1)
%npu_weight_quant_batchmatmul: f16[4, 64] = npu.npu_weight_quant_batchmatmul(%arg1_1, %weight_quant_matmul_transposed_2, %weight_quant_matmul_transposed, antiquant_offset=%weight_quant_matmul_transposed_1, antiquant_group_size=32)""",
        )

    def test_scales_in_words_and_dtypes_as_numbers(self):
        self.assertExpectedInline(
            self.calls(Chain(), torch.randn(4, 64).half(), target="ascend310p"),
            """\
%quant_matmul_transposed: i8[64, 96] = aten.transpose.int(%arg1_1, -2, -1)
%npu_quant_matmul: i8[4, 96] = npu.npu_quant_matmul(%_to_copy, %quant_matmul_transposed, %quantpass_scale_word, bias=%quantpass_bias, output_dtype=1)
%quant_matmul_1_transposed: i8[96, 32] = aten.transpose.int(%arg4_1, -2, -1)
%npu_quant_matmul_1: f16[4, 32] = npu.npu_quant_matmul(%npu_quant_matmul, %quant_matmul_1_transposed, %quantpass_scale_word_1, bias=%quantpass_bias_1, output_dtype=5)""",
        )

    def test_scale_of_each_row(self):
        self.assertExpectedInline(
            self.calls(IntegerW8A8(), torch.randn(4, 64).bfloat16(), target="ascend910b"),
            """%npu_quant_matmul: bf16[4, 96] = npu.npu_quant_matmul(%_to_copy_1, %arg1_1, %quantpass_scale, pertoken_scale=%view_1, output_dtype=15)""",
        )


def traced(f, *args):
    return make_fx(f, tracing_mode="fake")(*args)


def test_float32_scale_and_offset_go_into_a_word():
    """What a graph that was written by hand may hold; with an int64 scale the kernels never read the offset tensor."""
    ops = torch.ops.quantpass
    x, w = torch.randint(-128, 128, (4, 32), dtype=torch.int8), torch.randint(-128, 128, (32, 16), dtype=torch.int8)
    s, o = torch.rand(16) * 1e-3, torch.full((16,), 3.0)

    def f(x, w, s, o):
        return ops.quant_matmul(x, w, s, offset=o)

    gm = traced(f, x, w, s, o)
    assert lower_to_aclnn(gm) == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_quant_matmul.default)
    assert call.kwargs.get("offset") is None
    assert call.args[2].target is torch.ops.npu.npu_trans_quant_param.default
    assert torch.equal(gm(x, w, s, o), f(x, w, s, o))


def test_int8_result_of_a_weight_quant_matmul():
    ops = torch.ops.quantpass
    x, w = torch.randn(4, 32).half(), torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    s, q, o = (torch.rand(16) * 0.01).half(), torch.rand(16) + 1, torch.full((16,), -2.0)

    def f(x, w, s, q, o):
        return ops.weight_quant_matmul(x, w, s, None, q, o, transpose_weight=True)

    gm = traced(f, x, w, s, q, o)
    lower_to_aclnn(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_weight_quant_batchmatmul.default)
    assert call.kwargs["quant_scale"].target is torch.ops.npu.npu_trans_quant_param.default
    assert torch.equal(gm(x, w, s, q, o), f(x, w, s, q, o))


def test_transposed_activation_and_group_scales_that_are_inputs():
    ops = torch.ops.quantpass
    x, codes = torch.randn(64, 4).half(), torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    w, s = ops.pack_int4(codes), (torch.rand(2, 16) * 0.01).half()

    def f(x, w, s):
        return ops.weight_quant_matmul(x, w, s, antiquant_group_size=32, transpose_x=True, transpose_weight=True)

    gm = traced(f, x, w, s)
    lower_to_aclnn(gm)
    assert torch.equal(gm(x, w, s), f(x, w, s))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.ops.quantpass.format_cast(x + 1, 29), "aborts the capture"),
        (lambda x: torch.ops.quantpass.pack_int4(x + 1), "Pack the weight before"),
        (
            lambda x: torch.ops.quantpass.quant_matmul(x, x, x[0].float(), output_dtype=torch.float32),
            "not torch.float32",
        ),
    ],
)
def test_what_can_not_run_there_is_refused(call, message):
    gm = traced(call, torch.ones(8, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match=message):
        lower_to_aclnn(gm)


@pytest.fixture
def older_dynamic_quant(monkeypatch):
    """torch_npu 2.9.0's operator, which has no ``quant_mode``."""
    library = torch.library.Library("quantpass_older_npu", "DEF")
    schema = "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, ScalarType? dst_type=None)"
    library.define(f"npu_dynamic_quant{schema} -> (Tensor, Tensor)")
    newest = torch.ops.npu.npu_dynamic_quant
    library.impl("npu_dynamic_quant", lambda x, **_: newest(x), "CompositeExplicitAutograd")
    older = torch.ops.quantpass_older_npu.npu_dynamic_quant.default
    monkeypatch.setattr("quantpass.lowering.aclnn.npu_operator", lambda name: older)
    yield older
    library._destroy()


def test_an_argument_that_an_older_torch_npu_lacks_is_left_out_at_its_default(older_dynamic_quant):
    x = torch.randn(4, 32).half()
    gm = traced(torch.ops.quantpass.dynamic_quant, x)
    lower_to_aclnn(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=older_dynamic_quant)
    assert call.kwargs == {}
    assert all(map(torch.equal, gm(x), torch.ops.quantpass.dynamic_quant(x)))


@pytest.mark.usefixtures("older_dynamic_quant")
def test_an_argument_that_an_older_torch_npu_lacks_is_named():
    gm = traced(lambda x: torch.ops.quantpass.dynamic_quant(x, quant_mode="pertensor"), torch.randn(4, 32).half())
    with pytest.raises(RuntimeError, match=r"npu_dynamic_quant with quant_mode, which this torch_npu's does not have"):
        lower_to_aclnn(gm)


@pytest.fixture
def older_matmul(monkeypatch):
    """``npu_weight_quant_batchmatmul`` with an edit of its schema, as an older torch_npu might have it."""
    library, newest = torch.library.Library("quantpass_older_npu", "DEF"), torch.ops.npu.npu_weight_quant_batchmatmul
    schema = str(newest.default._schema).removeprefix("npu::")

    def make(before, after):
        library.define(schema.replace(before, after))
        library.impl(newest.__name__, lambda *args, **_: newest(*args), "CompositeExplicitAutograd")
        older = torch.ops.quantpass_older_npu.npu_weight_quant_batchmatmul.default
        assert str(older._schema) != str(newest.default._schema)
        monkeypatch.setattr("quantpass.lowering.aclnn.npu_operator", lambda name: older)
        return older

    yield make
    library._destroy()


def with_offset(offset=2.0):
    ops = torch.ops.quantpass
    x, w = torch.randn(4, 32).half(), torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    s, o = (torch.rand(16) * 0.01).half(), offset and torch.full((16,), offset).half()
    return traced(lambda x, w, s, o: ops.weight_quant_matmul(x, w, s, o, transpose_weight=True), x, w, s, o)


def test_an_argument_that_an_older_torch_npu_calls_otherwise_is_given_by_that_name(older_matmul):
    older = older_matmul("Tensor? antiquant_offset", "Tensor? offset")
    gm = with_offset()
    lower_to_aclnn(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=older)
    assert [*call.kwargs] == ["offset"]


def test_an_argument_that_has_no_default_there_is_given(older_matmul):
    older = older_matmul("Tensor? antiquant_offset=None", "Tensor? antiquant_offset")
    gm = with_offset(None)
    lower_to_aclnn(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=older)
    assert call.kwargs == {"antiquant_offset": None}


@pytest.mark.parametrize("behind", ["Tensor? quant_scale=None", "Tensor? q_scale=None"])
def test_an_argument_behind_one_that_is_not_there_is_not_taken_for_it(older_matmul, behind):
    older_matmul("Tensor? antiquant_offset=None, Tensor? quant_scale=None", behind)
    with pytest.raises(RuntimeError, match=r"npu_weight_quant_batchmatmul with antiquant_offset, which this torch_npu"):
        lower_to_aclnn(with_offset())


def test_without_the_vendors_operators_the_error_says_what_to_install():
    code = """
        import torch, quantpass as qp
        from tests.helpers import WeightOnly
        with torch.no_grad():
            torch.compile(WeightOnly(), backend=qp.backend(target="ascend910b", lowering="aclnn"))(torch.randn(4, 64).half())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert f"pip install torch_npu=={torch.__version__[:4]}" in done.stderr
    assert "quantpass.emulate_npu()" in done.stderr


def test_fuse_in_place():
    model, x = WeightOnly(), torch.randn(4, 64).half()
    for graph in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).module()):
        report = qp.fuse(graph, target="ascend310p", lowering="aclnn")
        report.require()
        gm = graph.module() if isinstance(graph, torch.export.ExportedProgram) else graph
        assert any("npu_weight_quant_batchmatmul" in str(n.target) for n in gm.graph.nodes)
        assert_close(gm(x), model(x))


@pytest.mark.parametrize("target", ["ascend310p", "ascend910b"])
def test_an_activation_that_lies_transposed_is_made_dense(target):
    """The vendor's operators look at strides; the call was judged with x as it is meant."""
    model, x = WeightOnly(), torch.randn(64, 4).half()
    gm = torch.export.export(Turned(model), (x,)).module()
    qp.fuse(gm, target=target, lowering="aclnn").require()
    (call,) = [n for n in gm.graph.nodes if "npu_weight_quant_batchmatmul" in str(n.target)]
    assert call.args[0].target is torch.ops.aten.clone.default
    assert_close(gm(x), model(x.t()))


class Turned(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.t())
