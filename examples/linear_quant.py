"""The three calls of LinearQuant.md, without a device: int8, int4 carried by int32, and compiled.

On an Ascend device, `from torch_npu.contrib.module import LinearQuant` and `.npu()` take the place of the first lines;
the rest is the same.

    python examples/linear_quant.py
"""

import torch

import quantpass as qp
from quantpass.nn import LinearQuant

torch.manual_seed(0)
qp.emulate_npu()  # torch.ops.npu.* for CPU tensors


def int8_input():
    """int8 x int8 to int8: the module packs scale and offset into the word that the hardware reads."""
    x1 = torch.randint(-1, 1, (1, 512), dtype=torch.int8)
    model = LinearQuant(512, 128, bias=True, offset=True, output_dtype=torch.int8)
    model.weight.data = torch.randint(-1, 1, (128, 512), dtype=torch.int8)
    model.scale.data = torch.randn(1, dtype=torch.float32)
    model.offset.data = torch.randn(128, dtype=torch.float32)
    model.bias.data = torch.randint(-1, 1, (128,), dtype=torch.int32)
    output = model(x1)

    scale = model.scale.expand(128)
    word = torch.ops.npu.npu_trans_quant_param(scale, model.offset)
    direct = torch.ops.npu.npu_quant_matmul(x1, model.weight.t(), word, bias=model.bias)
    assert torch.equal(output, direct), "the module and the operator agree"
    return model, x1, output


def int4_input():
    """int4 x int4 to float16, eight int4 in an int32."""
    codes = [torch.randint(-8, 8, shape, dtype=torch.int32) for shape in ((1, 512), (128, 512))]
    x1, x2 = (torch.ops.npu.npu_convert_weight_to_int4pack(c) for c in codes)
    model = LinearQuant(512, 128, bias=True, offset=False, output_dtype=torch.float16)
    model.weight.data = x2
    model.scale.data = torch.rand(1, dtype=torch.float32) * 1e-2
    model.bias.data = torch.randint(-1, 1, (128,), dtype=torch.int32)
    output = model(x1)

    exact = (codes[0] @ codes[1].t() + model.bias) * model.scale
    torch.testing.assert_close(output.float(), exact, rtol=2e-3, atol=1e-3)  # the scale keeps 10 bits, the output too

    call = {"scale": qp.TensorSpec(torch.int64, (128,)), "bias": model.bias, "output_dtype": torch.float16}
    for chip, legal in (("ascend310p", False), ("ascend910b", True), ("ascend910_93", True)):  # as the document says
        verdict = qp.check_op("npu_quant_matmul", target=chip, mode="eager", x1=x1, x2=model.weight.t(), **call)
        assert verdict.legal == legal, f"{chip}: {verdict}"
    return output


def compiled():
    """The same int8 module through a graph compiler."""
    model, x1, output = int8_input()
    report = qp.explain(model, (x1,), target="ascend310p")
    print(report)
    report.require(fused=1)
    fast = torch.compile(model, backend="quantpass", options={"target": "ascend310p"}, dynamic=False)
    assert torch.equal(fast(x1), output)


if __name__ == "__main__":
    print("int8:", int8_input()[2].shape, "int4:", int4_input().shape)
    compiled()
