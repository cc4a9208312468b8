"""The two calls of LinearWeightQuant.md, without a device: eager, and compiled.

The document draws int8 weights with randn, which torch refuses; randint is meant. Its graph-mode call puts a weight in
FRACTAL_NZ beside an int8 output, which its own constraints forbid (quant_scale: "only where the weight is ND"); that
call is asked about here instead of run.

    python examples/linear_weight_quant.py
"""

import torch

import quantpass as qp
from quantpass.nn import LinearWeightQuant

torch.manual_seed(0)
qp.emulate_npu()  # torch.ops.npu.* for CPU tensors


def module(dtype, **options):
    """in 320, out 256, an offset on the weight, an int8 output."""
    model = LinearWeightQuant(
        in_features=320, out_features=256, bias=False, dtype=dtype, antiquant_offset=True, quant_scale=True,
        quant_offset=True, antiquant_group_size=0, **options,
    )  # fmt: skip
    weight = torch.randint(-128, 128, (320, 256), dtype=torch.int8)
    model.weight.data = weight.transpose(-1, -2)
    model.antiquant_scale.data = (torch.randn(1, 256) * 1e-2).to(dtype).transpose(-1, -2)
    model.antiquant_offset.data = torch.randn(1, 256).to(dtype).transpose(-1, -2)
    return model


def eager():
    """x (8192, 320) float16; the output's scale and offset packed into words first."""
    x = torch.randn(8192, 320, dtype=torch.float16)
    model, quant_scale, quant_offset = module(torch.float16), torch.rand(1, 256), torch.randn(1, 256)
    model.quant_scale.data = torch.ops.npu.npu_trans_quant_param(quant_scale, quant_offset)
    model.quant_offset.data = quant_offset
    output = model(x)

    weight = (model.weight.half() + model.antiquant_offset) * model.antiquant_scale
    wide = (x.float() @ weight.float().t()) * quant_scale
    expected = (wide.round() + quant_offset.round()).clamp(-128, 127)
    off_by = (output.float() - expected).abs()
    assert output.dtype == torch.int8
    assert off_by.max() <= 1, "the word keeps 10 bits of the scale: a result near a tie may go to its neighbour"
    return output


def compiled():
    """bfloat16, compiled for an Atlas A2."""
    x = torch.randn(8192, 320, dtype=torch.bfloat16)
    model = module(torch.bfloat16)
    model.quant_scale.data = torch.ops.npu.npu_trans_quant_param(torch.rand(1, 256), torch.randn(1, 256))
    model.quant_offset.data = torch.randn(1, 256)
    report = qp.explain(model, (x,), target="ascend910b")
    print(report)
    report.require(fused=1)
    fast = torch.compile(model, backend="quantpass", options={"target": "ascend910b"}, dynamic=False)
    output = fast(x)
    assert torch.equal(output, model(x))
    return output


def nz_with_int8_output():
    """The document's graph-mode call, as it stands."""
    return qp.check_op(
        "LinearWeightQuant",
        target="ascend910b",
        x=qp.TensorSpec(torch.bfloat16, (8192, 320)),
        weight=qp.TensorSpec(torch.int8, (256, 320), format="FRACTAL_NZ"),
        antiquant_scale=qp.TensorSpec(torch.bfloat16, (256, 1)),
        antiquant_offset=qp.TensorSpec(torch.bfloat16, (256, 1)),
        quant_scale=qp.TensorSpec(torch.float32, (1, 256)),
        quant_offset=qp.TensorSpec(torch.float32, (1, 256)),
    )


if __name__ == "__main__":
    print("eager:", eager().shape, "compiled:", compiled().shape)
    verdict = nz_with_int8_output()
    print(verdict)
    assert "wqmm.nz.quant_scale" in [reject.rule for reject in verdict.rejects]
