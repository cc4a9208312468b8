"""Previewed GE graphs: what torchair makes of a model before and after fusing, and what the graphs compute."""

import re

import pytest
import torch
from expecttest import TestCase
from torch import nn

import quantpass as qp
from quantpass.chips import NPUS
from quantpass.doors.cli import main
from quantpass.lowering.standin_cann import find_torch_npu
from quantpass.lowering.standin_process import PreviewError
from quantpass.lowering.torchair_versions import generation_of
from tests.helpers import CHIPS, IntegerW8A8, StaticW8A8, WeightOnly, assert_close

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def table(model, x, process, **options):
    """Operators before and after fusing, chip by chip."""
    lines = []
    for chip in CHIPS:
        for fuse in (False, True):
            ops = qp.preview_ge(model, (x,), target=chip, fuse=fuse, process=process, **options).ops
            lines.append(f"{chip} {'fused ' if fuse else 'before'} {' '.join(ops)}")
    return "\n".join(lines)


class TestOperators(TestCase):
    maxDiff = None

    @pytest.fixture(autouse=True)
    def _process(self, torchair):
        self.process = torchair

    def test_weight_only(self):
        self.assertExpectedInline(
            table(WeightOnly(64, 96), X.half(), self.process),
            """\
ascend310p before Cast Mul Cast Transpose MatMulV2
ascend310p fused  WeightQuantBatchMatmulV2
ascend910b before Cast Mul Cast Transpose MatMulV2
ascend910b fused  WeightQuantBatchMatmulV2
ascend910_93 before Cast Mul Cast Transpose MatMulV2
ascend910_93 fused  WeightQuantBatchMatmulV2""",
        )

    def test_weight_only_without_bias_keeps_matmul_whole(self):
        x = X.half().reshape(2, 2, 64)
        self.assertExpectedInline(
            table(WeightOnly(64, 96, bias=False), x, self.process),
            """\
ascend310p before Cast Mul Cast Transpose BatchMatMul
ascend310p fused  Reshape WeightQuantBatchMatmulV2 Reshape
ascend910b before Cast Mul Cast Transpose BatchMatMul
ascend910b fused  Reshape WeightQuantBatchMatmulV2 Reshape
ascend910_93 before Cast Mul Cast Transpose BatchMatMul
ascend910_93 fused  Reshape WeightQuantBatchMatmulV2 Reshape""",
        )

    def test_static_w8a8(self):
        self.assertExpectedInline(
            table(StaticW8A8(64, 96), X.half(), self.process),
            """\
ascend310p before RealDiv Round Add ClipByValueV2 Cast Cast Sub Muls Cast Cast Mul Cast Transpose MatMulV2
ascend310p fused  AscendQuantV2 QuantBatchMatmulV3
ascend910b before RealDiv Round Add ClipByValueV2 Cast Cast Sub Muls Cast Cast Mul Cast Transpose MatMulV2
ascend910b fused  AscendQuantV2 QuantBatchMatmulV3
ascend910_93 before RealDiv Round Add ClipByValueV2 Cast Cast Sub Muls Cast Cast Mul Cast Transpose MatMulV2
ascend910_93 fused  AscendQuantV2 QuantBatchMatmulV3""",
        )

    def test_dynamic_w8a8(self):
        self.assertExpectedInline(
            table(IntegerW8A8(64, 96), X.bfloat16(), self.process),
            """\
ascend310p before Cast Abs ReduceMax RealDiv RealDiv Round ClipByValueV2 Cast MatMulV2 Cast Mul Cast Mul Cast Cast
ascend310p fused  Cast Abs ReduceMax RealDiv RealDiv Round ClipByValueV2 Cast MatMulV2 Cast Mul Cast Mul Cast Cast
ascend910b before Cast Abs ReduceMax RealDiv RealDiv Round ClipByValueV2 Cast MatMulV2 Cast Mul Cast Mul Cast Cast
ascend910b fused  DynamicQuant QuantBatchMatmulV3
ascend910_93 before Cast Abs ReduceMax RealDiv RealDiv Round ClipByValueV2 Cast MatMulV2 Cast Mul Cast Mul Cast Cast
ascend910_93 fused  DynamicQuant QuantBatchMatmulV3""",
        )

    def test_graph_text(self):
        preview = qp.preview_ge(WeightOnly(64, 96), (X.half(),), target="ascend310p", process=self.process)
        self.assertExpectedInline(
            str(preview),
            """\
%arg0_1: i8[96, 64]:NZ = Data(index=0)
%arg1_1: f16[4, 64] = Data(index=1)
%arg3_1: f16[96] = Data(index=2)
%quantpass_scale: f16[96] = Data(index=3)
%WeightQuantBatchMatmulV2: f16[4, 96] = WeightQuantBatchMatmulV2(x=%arg1_1, weight=%arg0_1, antiquant_scale=%quantpass_scale, bias=%arg3_1, antiquant_group_size=0, dtype=-1, inner_precise=0, transpose_weight=True, transpose_x=False)
%NetOutput: NetOutput(input0=%WeightQuantBatchMatmulV2)""",
        )

    def test_diff(self):
        before, after = (
            qp.preview_ge(WeightOnly(64, 96), (X.half(),), target="ascend910b", fuse=fuse, process=self.process)
            for fuse in (False, True)
        )
        self.assertExpectedInline(
            qp.diff(before, after),
            """\
@@ -1,10 +1,6 @@
-%arg0_1: i8[96, 64] = Data
+%arg0_1: i8[96, 64]:NZ = Data
 %arg1_1: f16[4, 64] = Data
-%arg2_1: f16[96, 1] = Data
 %arg3_1: f16[96] = Data
-f16[96, 64] = Cast(x=%arg0_1, dst_type=1)
-? = Mul(x1=Cast, x2=%arg2_1)
-f16[64, 96] = Cast(x=Mul, dst_type=1)
-f16[64, 96] = Transpose(x=Cast, perm=i64[2](1, 0))
-f16[4, 96] = MatMulV2(x1=%arg1_1, x2=Transpose, bias=%arg3_1, offset_x=0, transpose_x1=False, transpose_x2=False)
-NetOutput(input0=MatMulV2)
+%quantpass_scale: f16[96] = Data
+f16[4, 96] = WeightQuantBatchMatmulV2(x=%arg1_1, weight=%arg0_1, antiquant_scale=%quantpass_scale, bias=%arg3_1, antiquant_group_size=0, dtype=-1, inner_precise=0, transpose_weight=True, transpose_x=False)
+NetOutput(input0=WeightQuantBatchMatmulV2)""",
        )

    def test_data_of_an_nz_weight_as_torchair_writes_it(self):
        preview = qp.preview_ge(WeightOnly(64, 96), (X.half(),), target="ascend310p", process=self.process)
        (data,) = [part for part in preview.pbtxt.split("\nop {") if 'name: "arg0_1"' in part]
        output = data[data.index("output_desc") :]
        self.assertExpectedInline(
            output[: output.index("attr_groups")] if "attr_groups" in output else output,
            """\
output_desc {
    name: "y"
    dtype: DT_INT8
    shape {
    }
    layout: "ND"
    attr {
      key: "_meta"
      value {
        s: "Tensor(dtype=torch.int8, shape=torch.Size([96, 64])"
      }
    }
    attr {
      key: "format_for_int"
      value {
        i: 29
      }
    }
    attr {
      key: "origin_format_for_int"
      value {
        i: 2
      }
    }
    attr {
      key: "origin_format_is_set"
      value {
        b: true
      }
    }
    attr {
      key: "origin_shape"
      value {
        list {
          i: 96
          i: 64
          val_type: VT_LIST_INT
        }
      }
    }
    attr {
      key: "origin_shape_initialized"
      value {
        b: true
      }
    }
    device_type: "NPU"
  }
}""",
        )

    def test_gelu_is_one_for_both_kinds(self):
        exact, tanh = (
            qp.preview_ge(nn.GELU(approximate=kind), (X,), target="ascend910b", process=self.process)
            for kind in ("none", "tanh")
        )
        assert exact.ops == tanh.ops == ["Gelu"]
        assert not torch.equal(exact.run()[0][0], exact.graphs[0].outputs[0])
        assert torch.equal(exact.run(exact_gelu=True)[0][0], exact.graphs[0].outputs[0])
        assert torch.equal(tanh.run()[0][0], tanh.graphs[0].outputs[0])


MODELS = {
    "weight only": (lambda: WeightOnly(64, 96), torch.float16),
    "weight only, zero point": (lambda: WeightOnly(64, 96, zero_point=True), torch.float16),
    "weight only, bfloat16": (lambda: WeightOnly(64, 96, dtype=torch.bfloat16), torch.bfloat16),
    "static": (lambda: StaticW8A8(64, 96), torch.float16),
    "static, unsigned": (lambda: StaticW8A8(64, 96, zero_point=120, unsigned=True), torch.float16),
    "dynamic": (lambda: IntegerW8A8(64, 96), torch.bfloat16),
    "integer, one scale": (lambda: IntegerW8A8(64, 96, dtype=torch.float16, dynamic=False), torch.float16),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", MODELS)
def test_interpreted_graph_is_the_fx_graph(name, chip, torchair):
    make, dtype = MODELS[name]
    preview = qp.preview_ge(make(), (X.to(dtype),), target=chip, process=torchair)
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])
    if preview.report.fused:
        assert {"QuantBatchMatmulV3", "WeightQuantBatchMatmulV2"} & set(preview.ops)
        assert not {"MatMul", "MatMulV2", "BatchMatMul"} & set(preview.ops)


@pytest.mark.parametrize("name", MODELS)
def test_interpreted_graph_without_fusing_is_the_model(name, torchair):
    make, dtype = MODELS[name]
    preview = qp.preview_ge(make(), (X.to(dtype),), target="ascend910b", fuse=False, process=torchair)
    ((computed,),) = preview.run()
    assert_close(computed, preview.graphs[0].outputs[0])
    assert preview.report.total == 0


def test_a_changed_weight_changes_the_result(torchair):
    model = WeightOnly(64, 96)
    preview = qp.preview_ge(model, (X.half(),), target="ascend910b", process=torchair)
    ((before,),) = preview.run()
    with torch.no_grad():
        model.codes[0, 0] += 50
    ((after,),) = preview.run()
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_several_graphs(torchair):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = WeightOnly(64, 64), WeightOnly(64, 96)

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    preview = qp.preview_ge(Broken(), (X.half(),), target="ascend910b", process=torchair)
    assert preview.ops == ["WeightQuantBatchMatmulV2"] * 2
    assert len(preview.graphs) == 2
    assert preview.report.fused == 2
    for graph, computed in zip(preview.graphs, preview.run(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(computed, graph.outputs, strict=True))


def test_a_written_buffer_is_kept_as_it_was(torchair):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = WeightOnly(64, 96)
            self.register_buffer("calls", torch.zeros(96, dtype=torch.float16))

        def forward(self, x):
            self.calls.add_(1)
            return self.inner(x) + self.calls

    preview = qp.preview_ge(Counting(), (X.half(),), target="ascend910b", process=torchair)
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])


def test_leftover_quantization_is_spelled_out(torchair):
    import torch.ao.quantization.fx._decomposed  # defines the operators

    ops = torch.ops.quantized_decomposed

    class Lonely(nn.Module):
        def forward(self, x):
            q = ops.quantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8)
            return ops.dequantize_per_tensor(q, 0.05, 3, -128, 127, torch.int8) * 2

    preview = qp.preview_ge(Lonely(), (X,), target="ascend910b", process=torchair)
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])
    assert "Round" in preview.ops


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_operator_that_torchair_lacks_is_named(torchair):
    with pytest.raises(PreviewError, match=r"aten\.cdist|_cdist_forward"):
        qp.preview_ge(lambda x: torch.cdist(x, x), (X,), target="ascend910b", process=torchair)
    assert qp.preview_ge(nn.ReLU(), (X,), target="ascend910b", process=torchair).ops == ["Relu"]  # it goes on


def test_an_operator_that_the_interpreter_lacks_is_named(torchair):
    preview = qp.preview_ge(lambda x: torch.topk(x, 3)[0], (X,), target="ascend910b", process=torchair)
    with pytest.raises(NotImplementedError, match="TopK"):
        preview.run()


def test_targets_without_ge():
    with pytest.raises(ValueError, match=", ".join(NPUS)):
        qp.preview_ge(nn.ReLU(), (X,), target="cpu")


def test_args_must_be_a_tuple():
    with pytest.raises(TypeError, match=r"args=\(x,\)"):
        qp.preview_ge(nn.ReLU(), X, target="ascend310p")


def test_without_torch_npu(tmp_path):
    here = re.escape(torch.__version__.partition("+")[0])
    with pytest.raises(RuntimeError, match=rf"pip install --no-deps --target DIR torch_npu=={here}"):
        qp.preview_ge(nn.ReLU(), (X,), target="ascend310p", torch_npu=tmp_path)


def test_without_a_compiler(torchair, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install gcc binutils"):
        qp.preview_ge(nn.ReLU(), (X,), target="ascend310p")


def test_a_cache_that_cant_be_written_is_named(torchair, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(qp.StandinError, match="file/quantpass/standin-cann, which can't be written"):
        qp.preview_ge(nn.ReLU(), (X,), target="ascend310p")


def test_an_exported_program_is_previewed_as_its_module(torchair):
    model, x = WeightOnly(64, 96), X.half()
    made = [
        qp.preview_ge(m, (x,), target="ascend310p", process=torchair) for m in (model, torch.export.export(model, (x,)))
    ]
    assert made[0].ops == made[1].ops == ["WeightQuantBatchMatmulV2"]
    assert repr(made[1]) == "<quantpass.GePreview for Ascend310P3: 1 graphs, 1 operators>"


# -- the command line --------------------------------------------------------------------------------------------------


def test_command(torchair, tmp_path, monkeypatch):
    from click.testing import CliRunner

    (tmp_path / "demo_model.py").write_text(
        "import torch\nfrom tests.helpers import WeightOnly\n"
        "def small():\n    return WeightOnly(64, 96), (torch.ones(4, 64).half(),)\n"
        "def gelu():\n    return torch.nn.Sequential(small()[0], torch.nn.GELU()), small()[1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    output = tmp_path / "graph.pbtxt"
    arguments = ["preview", "demo_model:small", "--target", "ascend310p", "-o", str(output), "--diff", "--run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 1 quantized matmuls fused" in result.output
    assert "GE interpreted against FX: equal" in result.output
    assert 'type: "WeightQuantBatchMatmulV2"' in output.read_text()
    result = CliRunner().invoke(main, ["preview", "demo_model:gelu", "--target", "ascend310p", "--run"])
    assert result.exit_code == 0, result.output
    assert "differs by GE's tanh form of Gelu alone" in result.output


# -- operators on computed operands ------------------------------------------------------------------------------------

OPS = torch.ops.quantpass
CODES = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
COMPUTED = {
    "format cast": (lambda x: -OPS.format_cast(x + 1, 29), (X,), ["Add", "TransData", "Neg"]),
    "packing": (lambda x: OPS.pack_int4(x + 0), (CODES,), ["Add", "Cast", "Reshape", "Bitcast"]),
    "scale word": (lambda s, o: OPS.trans_quant_param(s.abs(), o), (X[0], X[1]), ["Abs", "TransQuantParamV2"]),
    "int4 matmul": (
        lambda a, b, s: OPS.quant_matmul(a, b, s, output_dtype=torch.bfloat16, transpose_x2=True),
        (OPS.pack_int4(CODES), OPS.pack_int4(CODES), torch.full((16,), 0.1)),
        ["Bitcast", "Reshape", "Bitcast", "Reshape", "QuantBatchMatmulV3"],
    ),
    "grouped weight, stored (N, K)": (
        lambda x, w, s: OPS.weight_quant_matmul(x, w, s, antiquant_group_size=32, transpose_weight=True),
        (X.half(), CODES, torch.rand(2, 16).half()),
        ["Transpose", "WeightQuantBatchMatmulV2"],
    ),
    "grouped weight, stored (K, N)": (
        lambda x, w, s: OPS.weight_quant_matmul(x, w, s, antiquant_group_size=32),
        (X.half(), CODES.t().contiguous(), torch.rand(2, 16).half()),
        ["WeightQuantBatchMatmulV2"],
    ),
    "batches": (
        lambda a, b, s: OPS.quant_matmul(a, b, s, output_dtype=torch.int32),
        (CODES.reshape(2, 8, 64), CODES.t().reshape(1, 64, 16).contiguous(), torch.ones(1)),
        ["QuantBatchMatmulV3"],
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_fused_operators_called_by_hand(name, torchair):
    function, args, ops = COMPUTED[name]
    preview = qp.preview_ge(function, args, target="ascend910b", fuse=False, process=torchair)
    assert preview.ops == ops
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_ascend950_gets_v4(name, torchair):
    make, dtype = MODELS[name]
    known = generation_of(find_torch_npu() / "torch_npu")
    if known is not None and known.name == "C":
        message = r"QuantBatchMatmulV4 here, which this torchair \(generation C, torch_npu 2.*\) does not have.*reduce-overhead"
        with pytest.raises(PreviewError, match=message):
            qp.preview_ge(make(), (X.to(dtype),), target="ascend950", process=torchair)
        return
    preview = qp.preview_ge(make(), (X.to(dtype),), target="ascend950", process=torchair)
    assert preview.ops[-1] == "QuantBatchMatmulV4"
    ((computed,),) = preview.run()
    assert torch.equal(computed, preview.graphs[0].outputs[0])
    before = qp.preview_ge(make(), (X.to(dtype),), target="ascend910b", process=torchair)
    assert before.ops[-1] == "QuantBatchMatmulV3"


def test_float32_output_has_no_ge_operator(torchair):
    args = (CODES, CODES, torch.ones(1))
    with pytest.raises(PreviewError, match="compile with the chip's name as target"):
        qp.preview_ge(
            lambda a, b, s: OPS.quant_matmul(a, b, s, output_dtype=torch.float32, transpose_x2=True),
            args,
            target="ascend910b",
            fuse=False,
            process=torchair,
        )
