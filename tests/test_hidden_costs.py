"""What a legal call makes the vendor's library do beside the operator, each time that it runs."""

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass import TensorSpec as T

X = T("int8", (16, 64))
GIVEN = {"x1": X, "scale": T("int64", (128,)), "output_dtype": torch.float16}
WEIGHT = "TransData of the whole weight"
TURN = "Transpose of the whole weight"


@pytest.mark.parametrize(
    ("x2", "costs"),
    [
        (T("int8", (64, 128)), (WEIGHT, TURN)),
        (T("int8", (64, 128), transposed=True), (WEIGHT,)),
        (T("int8", (64, 128), "NZ", True), ()),
    ],
)
def test_a_weight_that_the_310p_converts_itself(x2, costs):
    verdict = qp.check_op("npu_quant_matmul", target="ascend310p", mode="eager", x2=x2, **GIVEN)
    assert verdict.legal and len(verdict.costs) == len(costs)
    assert all(
        what in cost and "aclnn_quant_matmul_v5.cpp" in cost for what, cost in zip(costs, verdict.costs, strict=True)
    )
    assert str(verdict).startswith("legal") and str(verdict).count("at every call") == len(costs)


def test_no_other_chip_converts():
    for chip in ("ascend910b", "ascend950"):
        x2 = T("int8", (64, 128))
        assert qp.check_op("npu_quant_matmul", target=chip, mode="eager", x2=x2, **GIVEN).costs == ()


def test_rows_quantized_by_the_matmul():
    def costs_at(k):
        given = {
            "x": T("float16", (16, k)),
            "quantized_weight": T("int8", (128, k)),
            "weight_scale": T("float32", (128,)),
        }
        return qp.check_op("npu_quant_matmul_dequant", target="ascend310p", mode="eager", **given).costs

    assert len(costs_at(64)) == 1 and "Transpose of the whole weight" in costs_at(64)[0]
    assert len(costs_at(48)) == 2 and "PadV3 of the whole weight" in costs_at(48)[1]


def test_a_scale_for_each_token_on_the_310p():
    given = {
        "x1": X,
        "x2": T("int8", (64, 128), "NZ", True),
        "scale": T("float32", (128,)),
        "output_dtype": torch.float16,
    }
    verdict = qp.check_op(
        "npu_quant_matmul",
        target="ascend310p",
        mode="eager",
        allow=("qmm.310p.pertoken",),
        pertoken_scale=T("float32", (16,)),
        **given,
    )
    assert verdict.legal, verdict
    assert [cost.split(" (")[0] for cost in verdict.costs] == ["at every call: TransData of x1 and of the result"]


class Static(nn.Module):
    """A matmul of codes whose scale is known."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Buffer(torch.randint(-127, 128, (128, 64), dtype=torch.int8))

    def forward(self, x):
        q = (x / 0.02).round().clamp(-128, 127) * 0.02
        return q.half() @ (self.codes.half() * 0.01).t()


@pytest.mark.parametrize(("nz", "told"), [("auto", False), ("never", True)])
def test_reports_say_it_and_plans_avoid_it(nz, told):
    report = qp.explain(Static(), (torch.randn(16, 64).half(),), target="ascend310p", mode="eager", nz=nz)
    (site,) = report.sites
    assert site.fused and (site.plan.weight_format == "ND") is told
    assert any(WEIGHT in note for note in site.plan.notes) is told
    assert (WEIGHT in str(report)) is told
