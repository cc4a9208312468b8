"""The vendor's own LinearQuant and LinearWeightQuant against plain quantized Linears that quantpass fuses.

The same integers and scales in both. The vendor's modules run in a process of their own, with stand-ins for CANN.
"""

import subprocess
import sys

import pytest
import torch
from expecttest import TestCase

import quantpass as qp
from quantpass.lowering.standin_cann import child_environment
from tests.schemes import all_schemes

SCHEMES = {scheme.name: scheme for scheme in all_schemes()}


@pytest.fixture(scope="module")
def vendor(torchair, tmp_path_factory):
    """What ``tests.vendor_modules`` found."""
    path = tmp_path_factory.mktemp("vendor") / "found.pt"
    command = [sys.executable, "-m", "tests.vendor_modules", str(path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def fused(torchair):
    """Scheme and chip to the preview of the plain module."""
    return {
        (name, chip): qp.preview_ge(
            scheme.plain() if scheme.plain else scheme.filled(qp.nn), (scheme.x,), target=chip, process=torchair
        )
        for name, scheme in SCHEMES.items()
        for chip in scheme.chips
    }


class TestOperatorLists(TestCase):
    maxDiff = None

    @pytest.fixture(autouse=True)
    def _found(self, vendor, fused):
        self.vendor, self.fused = vendor, fused

    def table(self, chip):
        lines = []
        for name, scheme in SCHEMES.items():
            if chip in scheme.chips:
                theirs, ours = self.vendor[name]["chips"][chip]["ops"], self.fused[name, chip].ops
                label = "fused  " if scheme.plain else "qp.nn  "
                lines += [name, f"  by hand  {' '.join(theirs)}", f"  {label}  {' '.join(ours)}"]
        return "\n".join(lines)

    def test_310p(self):
        self.assertExpectedInline(
            self.table("ascend310p"),
            """\
float16 x int8 per channel
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per channel, offset, bias
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per channel, 2-D scale
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
int8 to float16
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to float16, bias
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to int8, offset
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3""",
        )

    def test_910b(self):
        self.assertExpectedInline(
            self.table("ascend910b"),
            """\
float16 x int8 per channel
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per channel, offset, bias
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per channel, 2-D scale
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per tensor
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int8 per group
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    Transpose WeightQuantBatchMatmulV2
float16 x int4 per channel
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
float16 x int4 per group
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    Transpose WeightQuantBatchMatmulV2
bfloat16 x int8 per channel
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
bfloat16 x int8 per channel, offset, bias
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
bfloat16 x int8 per channel, 2-D scale
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
bfloat16 x int8 per tensor
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
bfloat16 x int8 per group
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    Transpose WeightQuantBatchMatmulV2
bfloat16 x int4 per channel
  by hand  Transpose WeightQuantBatchMatmulV2
  fused    WeightQuantBatchMatmulV2
bfloat16 x int4 per group
  by hand  Transpose Transpose WeightQuantBatchMatmulV2
  fused    Transpose WeightQuantBatchMatmulV2
int8 to float16
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to float16, bias
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to int8, offset
  by hand  TransQuantParamV2 Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to bfloat16
  by hand  Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to bfloat16, float bias
  by hand  Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to bfloat16, scale per token
  by hand  Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to float16, scale per token
  by hand  Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
int8 to int32
  by hand  Transpose QuantBatchMatmulV3
  fused    QuantBatchMatmulV3
float16 x int8 to int8
  by hand  Transpose Cast WeightQuantBatchMatmulV2
  qp.nn    Cast WeightQuantBatchMatmulV2
int4 x int4 to float16
  by hand  TransQuantParamV2 Transpose Shape Mul Bitcast Reshape Transpose Shape Mul Bitcast Reshape Transpose QuantBatchMatmulV3
  qp.nn    TransQuantParamV2 Bitcast Reshape Bitcast Reshape QuantBatchMatmulV3
int4 x int4 to float16, bias
  by hand  TransQuantParamV2 Transpose Shape Mul Bitcast Reshape Transpose Shape Mul Bitcast Reshape Transpose QuantBatchMatmulV3
  qp.nn    TransQuantParamV2 Bitcast Reshape Bitcast Reshape QuantBatchMatmulV3""",
        )

    def test_910_93_as_910b(self):
        assert self.table("ascend910_93") == self.table("ascend910b")


CASES = [(name, chip) for name, scheme in SCHEMES.items() for chip in scheme.chips]


@pytest.mark.parametrize(("name", "chip"), CASES)
def test_fused_graph_against_the_module(name, chip, vendor, fused):
    theirs, ours = vendor[name]["chips"][chip], fused[name, chip]
    (site,) = ours.report.sites
    assert site.fused
    assert site.reading.startswith("a call of") != SCHEMES[name].plain  # a scheme without a plain spelling is a module
    assert len(ours.ops) <= len(theirs["ops"])
    assert ours.ops[-1] == theirs["ops"][-1]
    ((computed,),) = ours.run()
    assert torch.equal(computed, theirs["result"])


@pytest.mark.parametrize("name", SCHEMES)
def test_module_runs_on_cpu_tensors(name, vendor):
    """Eagerly with ``qp.emulate_npu()``: the vendor's module, quantpass.nn's, and each with the other's state dict."""
    found = vendor[name]
    assert torch.equal(found["eager"], found["ours"])
    assert torch.equal(found["to ours"], found["eager"])
    assert torch.equal(found["to theirs"], found["eager"])
    for of_chip in found["chips"].values():
        assert torch.equal(of_chip["result"], found["eager"])
