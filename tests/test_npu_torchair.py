"""The doors with the real torch_npu and torchair, in child processes whose CANN libraries are stand-ins."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from quantpass.lowering.standin_cann import StandinError, child_environment
from quantpass.operators import EMULATED

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # each starts a process that imports torch_npu

PREAMBLE = """
import json, types, warnings
import torch
import quantpass as qp
from quantpass.lowering.standin_device import install
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly

warnings.simplefilter("ignore")
converted = []  # what torchair made of each graph

def on_graph(graph, inputs):
    converted.append(graph)
    return graph.fx_graph(*inputs)  # quantpass's operators compute on a CPU

def start(soc):
    torchair = install(soc, on_graph)
    torch.accelerator.is_available = lambda: False  # Dynamo would ask the device for its stream
    stream = types.SimpleNamespace(stream_id=0, device_index=0, device_type=20)
    torch.npu.current_stream = lambda *_: stream
    return torchair

def generation():
    import torch_npu
    from pathlib import Path
    from quantpass.lowering.torchair_versions import generation_of
    return generation_of(Path(torch_npu.__file__).parent).name

def ge_ops():
    left_out = ("Data", "NetOutput", "Const")
    return [[op.type for op in g.graph.op if op.type not in left_out] for g in converted]

def run(model, x, **compiling):
    torch._dynamo.reset()
    converted.clear()
    with torch.no_grad():
        return torch.compile(model, dynamic=False, **compiling)(x)

def calls_of(model, x, **compiling):
    try:
        run(model, x, **compiling)
    except Exception as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        where = frame.tb_frame.f_code.co_filename
        if "/torch_npu/npu/" not in where:  # there is no device to capture the graph with
            raise
"""


@pytest.fixture(scope="module")
def environment():
    try:
        return child_environment()
    except StandinError as error:
        pytest.skip(str(error))


@pytest.fixture
def child(environment):
    def run(code, *arguments):
        command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


BEFORE_F = {
    "npu_add_rms_norm_dynamic_quant": "(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, float epsilon=1e-06, bool[2] output_mask=[], ScalarType? y_dtype=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
BEFORE_D = {
    "npu_quant_matmul": "(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? bias=None, ScalarType? output_dtype=None, SymInt[]? group_sizes=None) -> Tensor",
    "npu_weight_quant_batchmatmul": "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, int inner_precise=0) -> Tensor",
    "npu_dynamic_quant": "(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, ScalarType? dst_type=None) -> (Tensor, Tensor)",
    "npu_quantize": "(Tensor input, Tensor scales, Tensor? zero_points, ScalarType dtype, int axis=1, bool div_mode=True) -> Tensor",
    "npu_add_rms_norm_dynamic_quant": "(Tensor x1, Tensor x2, Tensor gamma, *, Tensor? smooth_scale1=None, Tensor? smooth_scale2=None, Tensor? beta=None, float epsilon=1e-06, bool[2] output_mask=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "npu_format_cast": "(Tensor input, int acl_format, int? customize_dtype=None) -> Tensor",
    "npu_anti_quant": "(Tensor x, Tensor scale, *, Tensor? offset=None, ScalarType? dst_dtype=None, ScalarType? src_dtype=None) -> Tensor",
}
OLDER_SCHEMAS = {"C": BEFORE_D, "D": BEFORE_F, "D'": BEFORE_F, "E": BEFORE_F, "F": {}}
"""What a generation's operators take where that is not what generation F's do, which the emulation has."""


def test_the_emulated_schemas_are_the_vendors(child):
    """The newest generation's, to the letter; each older one's where it differs."""
    generation, theirs = child("""
        start("Ascend910B2")
        from quantpass.operators import EMULATED
        names = [torch._C.parse_schema("npu::" + op.vendor.schema).name for op in EMULATED]
        schemas = [str(getattr(torch.ops.npu, n.removeprefix("npu::")).default._schema) for n in names]
        print(json.dumps([generation(), schemas]))
    """)
    mine = [torch._C.parse_schema("npu::" + op.vendor.schema) for op in EMULATED]
    older = OLDER_SCHEMAS[generation]
    names = {m.name.removeprefix("npu::") for m in mine}
    assert set(older) <= names
    expected = [older.get(m.name.removeprefix("npu::")) for m in mine]
    written = [m.name + e if e else str(m) for m, e in zip(mine, expected, strict=True)]
    assert theirs == [str(torch._C.parse_schema(w)) for w in written]


def test_the_vendors_own_shape_functions_agree_with_the_lowered_graph(child):
    """The graph for aclnn, traced again with torch_npu's fake kernels: shapes, dtypes and arguments as it wants them."""
    checked = child("""
        start("Ascend910B2")
        from quantpass.graph.torch_internals import compile_with_aot
        from torch.fx.experimental.proxy_tensor import make_fx
        from tests.test_aclnn import Chain, Int4
        checked = []

        def inner(gm, inputs):
            for node in gm.graph.nodes:
                if node.op == "call_function" and str(node.target).startswith("npu."):
                    value = lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
                    theirs = node.target(*args, **kwargs)
                    mine = node.meta["val"]
                    assert (theirs.dtype, theirs.shape) == (mine.dtype, mine.shape), (node, theirs, mine)
                    checked.append(str(node.target))
            raise RuntimeError("seen")

        half, bf = torch.float16, torch.bfloat16
        for target in ("ascend310p", "ascend910b"):
            for model, k, dtype in [
                (WeightOnly(zero_point=True), 64, half), (Int4(group=32, zero_point=True), 128, half),
                (Int4(turned=True), 128, half), (Chain(), 64, half), (StaticW8A8(zero_point=7), 64, half),
                (StaticW8A8(dtype=bf), 64, bf), (IntegerW8A8(), 64, bf),
            ]:
                try:
                    backend = qp.backend(target=target, lowering="aclnn", inner=inner)
                    run(model, torch.randn(5, k).to(dtype), backend=backend)
                except RuntimeError as error:
                    assert "seen" in str(error), error
        print(json.dumps(sorted(set(checked)) + [len(checked)]))
    """)  # fmt: skip
    assert checked == ["npu.npu_quant_matmul.default", "npu.npu_weight_quant_batchmatmul.default", 13]


QUANTIZE = ["AscendQuantV2"]


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B2", "Ascend910_9392"])
def test_npu_backend_compiles_to_the_fused_operators_alone(child, soc):
    found = child(
        """
        import sys
        torchair = start(sys.argv[1])
        x, found = torch.randn(4, 64).half(), {}
        for name, model in {"weight_only": WeightOnly(zero_point=True), "static": StaticW8A8(zero_point=7)}.items():
            config = torchair.CompilerConfig()
            backend = qp.npu_backend(config, target=sys.argv[1])
            y = run(model, x, backend=backend)
            backend.report.require()
            off = config.experimental_config.enable_view_optimize.value == "0"
            error = float((y.double() - model(x).double()).abs().max())
            formats = [(f.format, f.how) for f in backend.report.formats]
            found[name] = [ge_ops()[0], off, error < 0.1, formats, list(backend.report.notes)]
        print(json.dumps(found))
        """,
        soc,
    )
    planned = [["NZ", "planned"]]
    assert found["weight_only"] == [["WeightQuantBatchMatmulV2"], True, True, planned, []]
    assert found["static"] == [[*QUANTIZE, "QuantBatchMatmulV3"], False, True, planned, []]


def test_register_leaves_everything_else_to_torchair(child):
    found = child("""
        torch.manual_seed(0)
        x, found = torch.randn(4, 64).half(), {}
        for soc in ("Ascend310P3", "Ascend910B2"):
            torchair = start(soc)
            for name, model in {"weight_only": WeightOnly(zero_point=True), "static": StaticW8A8()}.items():
                config = torchair.CompilerConfig()
                registration = qp.register(config, target=soc)
                y = run(model, x, backend=torchair.get_npu_backend(compiler_config=config))
                registration.report.require()
                off = config.experimental_config.enable_view_optimize.value == "0"
                assert float((y.double() - model(x).double()).abs().max()) < 0.1
                found[soc + name] = [ge_ops()[0], off, len(registration.report.notes)]
        print(json.dumps(found))
    """)
    offset = ["Cast", "Neg", "Reshape", "Cast", "Reshape"]
    word = ["Reshape", "Cast", "Mul", "Cast", "TransQuantParamV2"]
    rows = ["Fill", "Reshape", "Cast", "Mul", "Cast"]
    assert found == {  # a bias of unknown value: behind the matmul on a chip that saturates, floating on the other
        "Ascend310P3weight_only": [[*offset, "TransData", "WeightQuantBatchMatmulV2", "Add"], True, 2],
        "Ascend310P3static": [["Fill", *word, "TransData", *QUANTIZE, "QuantBatchMatmulV3", "Add"], False, 3],
        "Ascend910B2weight_only": [[*offset, "WeightQuantBatchMatmulV2"], True, 2],
        "Ascend910B2static": [["Fill", *rows, *QUANTIZE, "QuantBatchMatmulV3"], False, 2],
    }


def test_captured_modes_get_the_vendors_calls_and_no_format_cast(child):
    """Generation C's config has no mode ``npugraph_ex``: there it is reached by the name of its backend alone."""
    made_by, found = child("""
        torchair = start("Ascend910B2")
        model, x, seen, found = WeightOnly(), torch.randn(4, 64).half(), [], {}

        def after(gm, inputs, config):  # torchair calls it last
            seen[:] = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]

        for mode in ("reduce-overhead",) if generation() == "C" else ("reduce-overhead", "npugraph_ex"):
            config = torchair.CompilerConfig()
            config.mode, config.post_grad_custom_post_pass = mode, after
            backend = qp.npu_backend(config, target="ascend910b")
            calls_of(model, x, backend=backend)
            found["npu_backend " + mode] = [list(seen), backend.report.fused, backend.report.mode]

            config = torchair.CompilerConfig()
            config.mode, config.post_grad_custom_post_pass = mode, after
            registration = qp.register(config, target="ascend910b")
            calls_of(model, x, backend=torchair.get_npu_backend(compiler_config=config))
            found["register " + mode] = [list(seen), registration.report.fused, registration.report.mode]

        options = qp.npugraph_ex_options("ascend910b", npugraph_ex={"post_grad_custom_post_pass": after})
        calls_of(model, x, backend="npugraph_ex", options=options)
        found["options"] = [list(seen), options.report.fused, options.report.mode]
        print(json.dumps([generation(), found]))
    """)
    modes = ["reduce-overhead"] if made_by == "C" else ["reduce-overhead", "npugraph_ex"]
    assert list(found) == [f"{door} {mode}" for mode in modes for door in ("npu_backend", "register")] + ["options"]
    fused = ["aten.transpose.int", "npu.npu_weight_quant_batchmatmul.default"]
    for door, (calls, sites, mode) in found.items():
        assert (sites, mode) == (1, "eager"), door
        assert calls == fused if door.startswith("npu_backend") else calls == ["aten.reshape.default", *fused], door


def test_torchair_joins_a_norm_and_the_quantization_behind_it(child):
    """Its own pass, which runs after quantpass's: switched off, and on. What quantpass joins itself it leaves alone."""
    made_by, found = child("""
        torchair = start("Ascend910B2")
        qp.emulate_npu()
        codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8)

        class Block(torch.nn.Module):
            def __init__(self, vendors_norm, factor):
                super().__init__()
                self.vendors_norm = vendors_norm
                self.gamma = torch.nn.Buffer(torch.rand(64).bfloat16() + 0.5)
                self.factor = torch.nn.Buffer(torch.rand(64).bfloat16() + 0.5) if factor else None
                self.codes, self.scale = torch.nn.Buffer(codes), torch.nn.Buffer(torch.rand(32) * 0.01)

            def norm(self, a, b):
                if self.vendors_norm:
                    y, _, h = torch.ops.npu.npu_add_rms_norm(a, b, self.gamma, 1e-5)
                    return y, h
                h = a + b
                w = h.float()
                return (w * torch.rsqrt(w.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype) * self.gamma, h

            def forward(self, x):
                y, h = self.norm(x, x.relu())
                y = y if self.factor is None else y * self.factor
                s = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127
                q = (y / s).round().clamp(-128, 127).to(torch.int8)
                out = torch._int_mm(q.reshape(-1, 64), self.codes.t()).float() * s.reshape(-1, 1) * self.scale
                return out.to(y.dtype), h

        def calls(door, x, joined, *block):
            seen = []
            config = torchair.CompilerConfig()
            config.mode, config.experimental_config.pattern_fusion_pass = "reduce-overhead", joined
            names = lambda gm: [str(n.target).split(".")[1] for n in gm.graph.nodes if "npu." in str(n.target)]
            config.post_grad_custom_post_pass = lambda gm, inputs, config: seen.append(names(gm))
            if door == "npu_backend":
                found = backend = qp.npu_backend(config, target="ascend910b")
            else:
                found = qp.register(config, target="ascend910b")
                backend = torchair.get_npu_backend(compiler_config=config)
            calls_of(Block(*block), x, backend=backend)
            found.report.require()
            return seen[-1]

        matrix, batch = torch.randn(10, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()
        cases = {
            "no factor": ("npu_backend", matrix, False, False),
            "factor": ("npu_backend", matrix, False, True),
            "factor, the vendor's norm": ("npu_backend", matrix, True, True),
            "no weights, the vendor's norm": ("register", matrix, True, False),
            "no factor, a view": ("npu_backend", batch, False, False),
            "factor, a view": ("npu_backend", batch, False, True),
        }
        known = generation() == "F"
        found = {n: [calls(d, x, on, *b) for on in (False, True)] for n, (d, x, *b) in cases.items()} if known else {}
        print(json.dumps([generation(), found]))
    """)
    if made_by != "F":
        pytest.skip(f"torchair's own patterns were looked at in generation F; this is {made_by}")
    apart = ["npu_add_rms_norm", "npu_dynamic_quant", "npu_quant_matmul"]
    joined = ["npu_add_rms_norm_dynamic_quant", "npu_quant_matmul"]
    assert found == {
        "no factor": [joined, joined],
        "factor": [apart, joined],
        "factor, the vendor's norm": [apart, joined],
        "no weights, the vendor's norm": [apart, joined],
        "no factor, a view": [joined, joined],
        "factor, a view": [apart, apart],
    }


def test_prepared_constants_are_static_inputs_of_a_captured_graph(child):
    """As parameters are: torchair copies every other input at each replay."""
    marks = child("""
        torchair = start("Ascend910B2")
        marks = []
        from torchair import npu_fx_compiler
        compile_graph = npu_fx_compiler._NpuFxCompiler._get_compiled_gm

        def spy(self, gm, inputs):
            marks.append([bool(getattr(t, "_torchair_is_parameter", False)) for t in inputs])
            return compile_graph(self, gm, inputs)

        npu_fx_compiler._NpuFxCompiler._get_compiled_gm = spy
        config = torchair.CompilerConfig()
        config.mode = "reduce-overhead"
        calls_of(StaticW8A8(), torch.randn(4, 64).half(), backend=qp.npu_backend(config, target="ascend910b"))
        print(json.dumps(marks))
    """)
    (one,) = marks
    assert one.count(False) == 1, "x alone"
    assert one[-2:] == [True, True], "the bias and the scale word"


def test_torchairs_cache_key_tells_settings_apart(child):
    keys = child("""
        torchair = start("Ascend910B2")
        from torchair.inference._cache_compiler import _get_str_options

        def key(user=None, **settings):
            config = torchair.CompilerConfig()
            if user is not None:
                config.post_grad_custom_pre_pass = user
            qp.register(config, **settings)
            return _get_str_options(config)

        def user(gm, inputs, config):
            pass

        print(json.dumps([
            key(target="ascend910b"), key(target="ascend910b"), key(target="ascend310p"),
            key(target="ascend910b", numerics="strict"), key(user, target="ascend910b"),
        ]))
    """)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_a_changed_weight_is_prepared_anew(child):
    errors = child("""
        torchair = start("Ascend310P3")
        model, x = StaticW8A8(zero_point=7), torch.randn(4, 64).half()
        backend = qp.npu_backend(target="ascend310p")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, dynamic=False)
        errors = []
        with torch.no_grad():
            for _ in range(2):
                errors.append(float((compiled(x).double() - model(x).double()).abs().max()))
                model.codes.copy_(torch.randint(-127, 128, model.codes.shape, dtype=torch.int8))
                model.scale.mul_(0.5)
        print(json.dumps(errors))
    """)
    assert max(errors) < 0.1


def test_emulated_kernels_under_the_vendors_schemas_give_the_reference_bits(child):
    """torch_npu is loaded, so the emulation only adds CPU kernels to its operators."""
    unequal = child("""
        start("Ascend910B2")
        qp.emulate_npu()
        from tests.helpers import compiled
        from tests.test_aclnn import MODELS, dtype_of
        unequal = []
        for name in ("weight_only_zero_point", "int4_turned", "int4_group_zero_point", "chain", "integer_dynamic"):
            model = MODELS[name]()
            dtype = getattr(model, "dtype", None) or dtype_of(model)
            x = torch.randn(2, 5, 128 if name.startswith("int4") else 64).to(dtype)
            expected, _ = compiled(model, x, target="ascend910b", mode="eager")
            actual, report = compiled(model, x, target="ascend910b", lowering="aclnn")
            report.require()
            unequal += [] if torch.equal(actual, expected) else [name]
        model, x, seen = MODELS["integer_dynamic"](), torch.randn(5, 64).bfloat16(), []
        def inner(gm, inputs):
            seen.extend(str(n.target) for n in gm.graph.nodes)
            return gm
        expected, _ = compiled(model, x, target="ascend910b", numerics="vendor")
        options = {"lowering": "aclnn", "numerics": "vendor", "inner": inner}
        actual, report = compiled(model, x, target="ascend910b", **options)
        assert "npu.npu_dynamic_quant.default" in seen, seen
        unequal += [] if torch.equal(actual, expected) else ["the vendor's dynamic quantization"]
        print(json.dumps(unequal))
    """)
    assert unequal == []


def test_dynamic_shapes(child):
    errors = child("""
        torchair = start("Ascend910B2")
        errors = []
        for door in ("npu_backend", "register"):
            config, model = torchair.CompilerConfig(), WeightOnly(zero_point=True)
            if door == "register":
                found, backend = qp.register(config, target="ascend910b"), torchair.get_npu_backend(compiler_config=config)
            else:
                found = backend = qp.npu_backend(config, target="ascend910b")
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=backend, dynamic=True)
            for rows in (5, 7):
                x = torch.randn(2, rows, 64).half()
                with torch.no_grad():
                    errors.append(float((compiled(x).double() - model(x).double()).abs().max()))
            assert found.report.fused == found.report.total == 1, "one symbolic graph serves both sizes"
        print(json.dumps(errors))
    """)
    assert len(errors) == 4
    assert max(errors) < 0.01


def test_a_ge_operator_that_torchair_lacks_is_named_and_what_works_instead(child):
    """Every operator of quantpass's, each with a torchair that can make nothing at all."""
    said = child("""
        start("Ascend910B2")
        from unittest.mock import MagicMock
        from quantpass.doors.selftest.cases import cases_of
        from quantpass.doors.selftest.reference import BY_VENDOR, kernel_arguments
        from quantpass.lowering.ge import MISSING_CONVERTERS, _converter, _saying_what_lacks
        from quantpass.operators import OPERATORS
        from quantpass.operators.ge import Ge, GeFunctions, LackingGeOperatorError
        Ge.api = GeFunctions(types.SimpleNamespace())
        calls, tensor = {}, MagicMock(rank=2)
        for case in [c for chip in ("ascend310p", "ascend910b") for c in cases_of(chip, "ge")]:
            arguments = kernel_arguments(case)
            if arguments is not None:
                given = {k: tensor if isinstance(v, str) and case.call.tensor(v) else v for k, v in arguments.items()}
                calls.setdefault(BY_VENDOR[case.call.op].name, given)
        calls["format_cast"], calls["pack_int4"] = {"x": tensor, "acl_format": 29}, {"codes": tensor}

        def message(convert, *args, **kwargs):
            try:
                convert(*args, **kwargs)
            except LackingGeOperatorError as error:
                return str(error)

        said = {op.name: message(_converter(op, Ge()), **calls[op.name]) for op in OPERATORS}
        for target, convert in MISSING_CONVERTERS.items():
            said[str(target)] = message(_saying_what_lacks(str(target), convert), tensor, [0])
        print(json.dumps(said))
    """)
    for name, message in said.items():
        assert re.search("becomes GE's [A-Z][A-Za-z0-9]+( with [a-z_]+)? here, which this torchair", message), (
            name,
            message,
        )
        assert "pip install torch_npu==2" in message
    assert said["quant_matmul"].startswith("quantpass.quant_matmul becomes GE's QuantBatchMatmulV3 here")
    assert "reduce-overhead mode, which calls torch.ops.npu.npu_quant_matmul in its place" in said["quant_matmul"]
    assert "reduce-overhead" not in said["format_cast"], "where it runs before the graph, never in it"


def test_what_an_older_torchair_lacks_through_a_door(child):
    """QuantBatchMatmulV4 is not in generation C, the dtype of AddRmsNormDynamicQuant's result in none before F."""
    types, why = child("""
        torchair = start("Ascend910B2")
        from torchair._ge_concrete_graph import ge_apis
        from tests.test_norms import X1, Layer
        newest = ge_apis.AddRmsNormDynamicQuant

        def older(x1, x2, gamma, smooth_scale1, smooth_scale2, beta, *, epsilon, output_mask):
            more = {"dst_type": 2} if "dst_type" in newest.__wrapped__.__annotations__ else {}
            optional = (smooth_scale1, smooth_scale2, beta)
            return newest(x1, x2, gamma, *optional, epsilon=epsilon, output_mask=output_mask, **more)

        ge_apis.AddRmsNormDynamicQuant = older
        vars(ge_apis).pop("QuantBatchMatmulV4", None)
        x = X1.bfloat16()
        run(Layer().bfloat16().eval(), x, backend=qp.npu_backend(torchair.CompilerConfig(), target="ascend910b", numerics="vendor"))
        found, why = ge_ops(), ""
        try:
            run(IntegerW8A8(), x, backend=qp.npu_backend(torchair.CompilerConfig(), target="ascend950"))
        except Exception as error:
            why = str(error)
        print(json.dumps([found, why]))
    """)
    assert [t for t in types[0] if "Norm" in t] == ["RmsNorm", "AddRmsNormDynamicQuant"]
    assert "quantpass.quant_matmul becomes GE's QuantBatchMatmulV4 here, which this torchair (generation" in why
