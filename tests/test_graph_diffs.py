"""Graph dumps before and after, as inline snapshots. ``EXPECTTEST_ACCEPT=1 pytest tests/test_graph_diffs.py`` renews them."""

import torch
from expecttest import TestCase
from torch import nn

from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly, compiled


class TestGraphDiffs(TestCase):
    def diff(self, model, *args, **options):
        _, report = compiled(model, *args, **options)
        return report.diff()

    def test_weight_only_on_310p(self):
        """NZ weight stored (N, K), bias and scale as they are, offset = -zero_point."""
        actual = self.diff(WeightOnly(zero_point=True), torch.randn(2, 5, 64).half(), target="ascend310p")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,13 +1,10 @@
 %arg0_1: i8[96, 64] = input
 %arg1_1: f16[2, 5, 64] = input
-%arg2_1: f16[96, 1] = input
-%arg3_1: f16[96, 1] = input
 %arg4_1: f16[96] = input
-%_to_copy: f16[96, 64] = aten._to_copy(%arg0_1, dtype=float16)
-%sub: f16[96, 64] = aten.sub.Tensor(%_to_copy, %arg2_1)
-%mul: f16[96, 64] = aten.mul.Tensor(%sub, %arg3_1)
+%quantpass_scale: f16[96] = input
+%quantpass_offset: f16[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg0_1, 29)
 %view: f16[10, 64] = aten.view(%arg1_1, [10, 64])
-%t: f16[64, 96] = aten.t(%mul)
-%addmm: f16[10, 96] = aten.addmm(%arg4_1, %view, %t)
-%view_1: f16[2, 5, 96] = aten.view(%addmm, [2, 5, 96])
-return [%view_1]
+%weight_quant_matmul: f16[10, 96] = quantpass.weight_quant_matmul(%view, %format_cast, %quantpass_scale, antiquant_offset=%quantpass_offset, bias=%arg4_1, transpose_weight=True, saturate=True)
+%view_2: f16[2, 5, 96] = aten.view(%weight_quant_matmul, [2, 5, 96])
+return [%view_2]""",
        )

    def test_scale_after_the_matmul(self):
        """A scale that follows the matmul goes into the weight's scale, the bias after it into the operator."""

        class After(WeightOnly):
            def forward(self, x):
                return nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale.view(-1) + self.bias

        actual = self.diff(After(), torch.randn(5, 64).half(), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,11 +1,7 @@
 %arg0_1: i8[96, 64] = input
 %arg1_1: f16[5, 64] = input
-%arg2_1: f16[96, 1] = input
 %arg3_1: f16[96] = input
-%_to_copy: f16[96, 64] = aten._to_copy(%arg0_1, dtype=float16)
-%t: f16[64, 96] = aten.t(%_to_copy)
-%mm: f16[5, 96] = aten.mm(%arg1_1, %t)
-%view: f16[96] = aten.view(%arg2_1, [-1])
-%mul: f16[5, 96] = aten.mul.Tensor(%mm, %view)
-%add: f16[5, 96] = aten.add.Tensor(%mul, %arg3_1)
-return [%add]
+%quantpass_scale: f16[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg0_1, 29)
+%weight_quant_matmul: f16[5, 96] = quantpass.weight_quant_matmul(%arg1_1, %format_cast, %quantpass_scale, bias=%arg3_1, transpose_weight=True)
+return [%weight_quant_matmul]""",
        )

    def test_static_w8a8_float16(self):
        """Zero point and bias become an int32 bias, both scales one int64 word."""
        actual = self.diff(StaticW8A8(zero_point=3), torch.randn(5, 64).half(), target="ascend310p")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,6 +1,7 @@
 %arg0_1: f16[5, 64] = input
 %arg1_1: i8[96, 64] = input
-%arg2_1: f16[96, 1] = input
-%arg3_1: f16[96] = input
+%quantpass_scale_word: i64[96] = input
+%quantpass_bias: i32[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg1_1, 29)
 %div: f16[5, 64] = aten.div.Tensor(%arg0_1, 0.03)
 %round_1: f16[5, 64] = aten.round(%div)
@@ -8,10 +9,4 @@
 %clamp: f16[5, 64] = aten.clamp(%add, -128, 127)
 %_to_copy: i8[5, 64] = aten._to_copy(%clamp, dtype=int8)
-%_to_copy_1: f16[5, 64] = aten._to_copy(%_to_copy, dtype=float16)
-%sub: f16[5, 64] = aten.sub.Tensor(%_to_copy_1, 3)
-%mul: f16[5, 64] = aten.mul.Tensor(%sub, 0.03)
-%_to_copy_2: f16[96, 64] = aten._to_copy(%arg1_1, dtype=float16)
-%mul_1: f16[96, 64] = aten.mul.Tensor(%_to_copy_2, %arg2_1)
-%t: f16[64, 96] = aten.t(%mul_1)
-%addmm: f16[5, 96] = aten.addmm(%arg3_1, %mul, %t)
-return [%addmm]
+%quant_matmul: f16[5, 96] = quantpass.quant_matmul(%_to_copy, %format_cast, %quantpass_scale_word, bias=%quantpass_bias, output_dtype=float16, transpose_x2=True, saturate=True)
+return [%quant_matmul]""",
        )

    def test_static_w8a8_float32_on_a2(self):
        """No chip returns float32: int32 results, scaled in the graph."""
        actual = self.diff(StaticW8A8(dtype=torch.float32), torch.randn(5, 64), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,6 +1,8 @@
 %arg0_1: f32[5, 64] = input
 %arg1_1: i8[96, 64] = input
-%arg2_1: f32[96, 1] = input
 %arg3_1: f32[96] = input
+%quantpass_unit_scale: f32[1] = input
+%quantpass_scale: f32[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg1_1, 29)
 %div: f32[5, 64] = aten.div.Tensor(%arg0_1, 0.03)
 %round_1: f32[5, 64] = aten.round(%div)
@@ -8,10 +10,7 @@
 %clamp: f32[5, 64] = aten.clamp(%add, -128, 127)
 %_to_copy: i8[5, 64] = aten._to_copy(%clamp, dtype=int8)
-%_to_copy_1: f32[5, 64] = aten._to_copy(%_to_copy, dtype=float32)
-%sub: f32[5, 64] = aten.sub.Tensor(%_to_copy_1, 0)
-%mul: f32[5, 64] = aten.mul.Tensor(%sub, 0.03)
-%_to_copy_2: f32[96, 64] = aten._to_copy(%arg1_1, dtype=float32)
-%mul_1: f32[96, 64] = aten.mul.Tensor(%_to_copy_2, %arg2_1)
-%t: f32[64, 96] = aten.t(%mul_1)
-%addmm: f32[5, 96] = aten.addmm(%arg3_1, %mul, %t)
-return [%addmm]
+%quant_matmul: i32[5, 96] = quantpass.quant_matmul(%_to_copy, %format_cast, %quantpass_unit_scale, output_dtype=int32, transpose_x2=True)
+%to_copy: f32[5, 96] = aten._to_copy(%quant_matmul, dtype=float32)
+%mul_2: f32[5, 96] = aten.mul.Tensor(%to_copy, %quantpass_scale)
+%add_1: f32[5, 96] = aten.add.Tensor(%mul_2, %arg3_1)
+return [%add_1]""",
        )

    def test_dynamic_per_token(self):
        """Both scales go in; the graph rounded nowhere between them."""
        actual = self.diff(IntegerW8A8(), torch.randn(5, 64), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,17 +1,14 @@
 %arg0_1: f32[5, 64] = input
 %arg1_1: i8[64, 96] = input
-%arg2_1: f32[96] = input
+%quantpass_scale: f32[96] = input
+%format_cast: i8[64, 96] = quantpass.format_cast(%arg1_1, 29)
 %abs_1: f32[5, 64] = aten.abs(%arg0_1)
 %amax: f32[5, 1] = aten.amax(%abs_1, [-1], True)
 %div: f32[5, 1] = aten.div.Tensor(%amax, 127)
+%view_1: f32[5] = aten.view(%div, [-1])
 %div_1: f32[5, 64] = aten.div.Tensor(%arg0_1, %div)
 %round_1: f32[5, 64] = aten.round(%div_1)
 %clamp: f32[5, 64] = aten.clamp(%round_1, -128, 127)
 %_to_copy: i8[5, 64] = aten._to_copy(%clamp, dtype=int8)
-%_int_mm: i32[5, 96] = aten._int_mm(%_to_copy, %arg1_1)
-%_to_copy_1: f32[5, 96] = aten._to_copy(%_int_mm, dtype=float32)
-%mul: f32[5, 96] = aten.mul.Tensor(%_to_copy_1, %arg2_1)
-%mul_1: f32[5, 96] = aten.mul.Tensor(%mul, %div)
-%_to_copy_2: bf16[5, 96] = aten._to_copy(%mul_1, dtype=bfloat16)
-%view: bf16[5, 96] = aten.view(%_to_copy_2, [5, 96])
-return [%view]
+%quant_matmul: bf16[5, 96] = quantpass.quant_matmul(%_to_copy, %format_cast, %quantpass_scale, pertoken_scale=%view_1, output_dtype=bfloat16)
+return [%quant_matmul]""",
        )

    def test_requantized_chain(self):
        """int8 to int8: the first matmul returns the second one's codes."""
        chain = nn.Sequential(StaticW8A8(dtype=torch.float32), StaticW8A8(k=96, n=32, dtype=torch.float32))
        actual = self.diff(chain, torch.randn(5, 64), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,9 +1,12 @@
 %arg0_1: f32[5, 64] = input
 %arg1_1: i8[96, 64] = input
-%arg2_1: f32[96, 1] = input
-%arg3_1: f32[96] = input
 %arg4_1: i8[32, 96] = input
-%arg5_1: f32[32, 1] = input
 %arg6_1: f32[32] = input
+%quantpass_scale_word: i64[96] = input
+%quantpass_bias: i32[96] = input
+%quantpass_unit_scale: f32[1] = input
+%quantpass_scale: f32[32] = input
+%format_cast_1: i8[32, 96] = quantpass.format_cast(%arg4_1, 29)
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg1_1, 29)
 %div: f32[5, 64] = aten.div.Tensor(%arg0_1, 0.03)
 %round_1: f32[5, 64] = aten.round(%div)
@@ -11,22 +14,8 @@
 %clamp: f32[5, 64] = aten.clamp(%add, -128, 127)
 %_to_copy: i8[5, 64] = aten._to_copy(%clamp, dtype=int8)
-%_to_copy_1: f32[5, 64] = aten._to_copy(%_to_copy, dtype=float32)
-%sub: f32[5, 64] = aten.sub.Tensor(%_to_copy_1, 0)
-%mul: f32[5, 64] = aten.mul.Tensor(%sub, 0.03)
-%_to_copy_2: f32[96, 64] = aten._to_copy(%arg1_1, dtype=float32)
-%mul_1: f32[96, 64] = aten.mul.Tensor(%_to_copy_2, %arg2_1)
-%t: f32[64, 96] = aten.t(%mul_1)
-%addmm: f32[5, 96] = aten.addmm(%arg3_1, %mul, %t)
-%div_1: f32[5, 96] = aten.div.Tensor(%addmm, 0.03)
-%round_2: f32[5, 96] = aten.round(%div_1)
-%add_1: f32[5, 96] = aten.add.Tensor(%round_2, 0)
-%clamp_1: f32[5, 96] = aten.clamp(%add_1, -128, 127)
-%_to_copy_3: i8[5, 96] = aten._to_copy(%clamp_1, dtype=int8)
-%_to_copy_4: f32[5, 96] = aten._to_copy(%_to_copy_3, dtype=float32)
-%sub_1: f32[5, 96] = aten.sub.Tensor(%_to_copy_4, 0)
-%mul_2: f32[5, 96] = aten.mul.Tensor(%sub_1, 0.03)
-%_to_copy_5: f32[32, 96] = aten._to_copy(%arg4_1, dtype=float32)
-%mul_3: f32[32, 96] = aten.mul.Tensor(%_to_copy_5, %arg5_1)
-%t_1: f32[96, 32] = aten.t(%mul_3)
-%addmm_1: f32[5, 32] = aten.addmm(%arg6_1, %mul_2, %t_1)
-return [%addmm_1]
+%quant_matmul: i8[5, 96] = quantpass.quant_matmul(%_to_copy, %format_cast, %quantpass_scale_word, bias=%quantpass_bias, output_dtype=int8, transpose_x2=True)
+%quant_matmul_1: i32[5, 32] = quantpass.quant_matmul(%quant_matmul, %format_cast_1, %quantpass_unit_scale, output_dtype=int32, transpose_x2=True)
+%to_copy: f32[5, 32] = aten._to_copy(%quant_matmul_1, dtype=float32)
+%mul_4: f32[5, 32] = aten.mul.Tensor(%to_copy, %quantpass_scale)
+%add_2: f32[5, 32] = aten.add.Tensor(%mul_4, %arg6_1)
+return [%add_2]""",
        )

    def test_per_group_int4(self):
        """Codes within [-8, 7] are packed eight to an int32; groups along K keep their own scales."""

        class Grouped(nn.Module):
            def __init__(self):
                super().__init__()
                g = torch.Generator().manual_seed(0)
                self.codes = nn.Parameter(torch.randint(-8, 8, (64, 128), dtype=torch.int8, generator=g), False)
                self.scale = nn.Parameter((torch.rand(64, 4, 1, generator=g) * 0.1 + 0.01).half(), False)

            def forward(self, x):
                w = self.codes.half().view(64, 4, 32) * self.scale
                return x @ w.view(64, 128).t()

        actual = self.diff(Grouped(), torch.randn(5, 128).half(), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,10 +1,5 @@
-%arg0_1: i8[64, 128] = input
-%arg1_1: f16[64, 4, 1] = input
 %arg2_1: f16[5, 128] = input
-%_to_copy: f16[64, 128] = aten._to_copy(%arg0_1, dtype=float16)
-%view: f16[64, 4, 32] = aten.view(%_to_copy, [64, 4, 32])
-%mul: f16[64, 4, 32] = aten.mul.Tensor(%view, %arg1_1)
-%view_1: f16[64, 128] = aten.view(%mul, [64, 128])
-%t: f16[128, 64] = aten.t(%view_1)
-%mm: f16[5, 64] = aten.mm(%arg2_1, %t)
-return [%mm]
+%quantpass_arg0_1: i32[64, 16] = input
+%quantpass_scale: f16[4, 64] = input
+%weight_quant_matmul: f16[5, 64] = quantpass.weight_quant_matmul(%arg2_1, %quantpass_arg0_1, %quantpass_scale, antiquant_group_size=32, transpose_weight=True)
+return [%weight_quant_matmul]""",
        )

    def test_stride_0_batched_weight(self):
        """A weight repeated along a batch is one weight."""
        x = torch.randn(3, 8, 64).half()[:, -1:, :]
        actual = self.diff(WeightOnly(), x, target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,15 +1,11 @@
 %arg0_1: i8[96, 64] = input
 %arg1_1: f16[3, 1, 64] = input
-%arg2_1: f16[96, 1] = input
 %arg3_1: f16[96] = input
-%_to_copy: f16[96, 64] = aten._to_copy(%arg0_1, dtype=float16)
-%mul: f16[96, 64] = aten.mul.Tensor(%_to_copy, %arg2_1)
-%t: f16[64, 96] = aten.t(%mul)
+%quantpass_scale: f16[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg0_1, 29)
 %expand: f16[3, 1, 64] = aten.expand(%arg1_1, [3, 1, 64])
 %view: f16[3, 1, 64] = aten.view(%expand, [3, 1, 64])
-%expand_1: f16[3, 64, 96] = aten.expand(%t, [3, 64, 96])
-%view_1: f16[3, 64, 96] = aten.view(%expand_1, [3, 64, 96])
-%bmm: f16[3, 1, 96] = aten.bmm(%view, %view_1)
-%view_2: f16[3, 1, 96] = aten.view(%bmm, [3, 1, 96])
-%add: f16[3, 1, 96] = aten.add.Tensor(%view_2, %arg3_1)
-return [%add]
+%reshape: f16[3, 64] = aten.reshape(%view, [-1, 64])
+%weight_quant_matmul: f16[3, 96] = quantpass.weight_quant_matmul(%reshape, %format_cast, %quantpass_scale, bias=%arg3_1, transpose_weight=True)
+%view_3: f16[3, 1, 96] = aten.view(%weight_quant_matmul, [3, 1, 96])
+return [%view_3]""",
        )

    def test_symbolic_shapes(self):
        actual = self.diff(WeightOnly(), torch.randn(2, 5, 64).half(), target="ascend910b", dynamic=True)
        self.assertExpectedInline(
            actual,
            """\
@@ -3,12 +3,10 @@
 %arg2_1: SymInt = input
 %arg3_1: f16[s77, s27, 64] = input
-%arg4_1: f16[96, 1] = input
 %arg5_1: f16[96] = input
-%_to_copy: f16[96, 64] = aten._to_copy(%arg0_1, dtype=float16)
-%mul: f16[96, 64] = aten.mul.Tensor(%_to_copy, %arg4_1)
+%quantpass_scale: f16[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg0_1, 29)
 %mul_7: SymInt = mul(%arg1_1, %arg2_1)
 %view: f16[s27*s77, 64] = aten.view(%arg3_1, [%mul_7, 64])
-%t: f16[64, 96] = aten.t(%mul)
-%addmm: f16[s27*s77, 96] = aten.addmm(%arg5_1, %view, %t)
-%view_1: f16[s77, s27, 96] = aten.view(%addmm, [%arg1_1, %arg2_1, 96])
-return [%view_1]
+%weight_quant_matmul: f16[s27*s77, 96] = quantpass.weight_quant_matmul(%view, %format_cast, %quantpass_scale, bias=%arg5_1, transpose_weight=True)
+%view_2: f16[s77, s27, 96] = aten.view(%weight_quant_matmul, [%arg1_1, %arg2_1, 96])
+return [%view_2]""",
        )

    def test_matrix_addend_stays_outside(self):
        """addmm with a residual matrix: the operator's bias is a vector, so the addition stays in the graph."""

        class Residual(WeightOnly):
            def forward(self, x, r):
                return torch.addmm(r, x, (self.codes.to(x.dtype) * self.scale).t(), beta=0.5, alpha=2)

        actual = self.diff(Residual(), torch.randn(5, 64).half(), torch.randn(5, 96).half(), target="ascend910b")
        self.assertExpectedInline(
            actual,
            """\
@@ -1,9 +1,9 @@
 %arg0_1: i8[96, 64] = input
 %arg1_1: f16[5, 64] = input
-%arg2_1: f16[96, 1] = input
 %arg3_1: f16[5, 96] = input
-%_to_copy: f16[96, 64] = aten._to_copy(%arg0_1, dtype=float16)
-%mul: f16[96, 64] = aten.mul.Tensor(%_to_copy, %arg2_1)
-%t: f16[64, 96] = aten.t(%mul)
-%addmm: f16[5, 96] = aten.addmm(%arg3_1, %arg1_1, %t, beta=0.5, alpha=2)
-return [%addmm]
+%quantpass_scale: f16[96] = input
+%format_cast: i8[96, 64] = quantpass.format_cast(%arg0_1, 29)
+%weight_quant_matmul: f16[5, 96] = quantpass.weight_quant_matmul(%arg1_1, %format_cast, %quantpass_scale, transpose_weight=True)
+%mul_1: f16[5, 96] = aten.mul.Tensor(%arg3_1, 0.5)
+%add: f16[5, 96] = aten.add.Tensor(%mul_1, %weight_quant_matmul)
+return [%add]""",
        )
