"""The vendor's sign and scale conventions. They differ from operator to operator and live here only.

Everywhere else in quantpass ``real = (codes - zero_point) * scale``.
"""

from __future__ import annotations

import torch

from quantpass.graph import expr as ex
from quantpass.graph.expr import Expr


def antiquant_offset(zero_point: Expr) -> Expr:
    """``npu_weight_quant_batchmatmul`` and ``npu_anti_quant`` add: ``(codes + offset) * scale``."""
    if ex.dtype_of(zero_point) in (torch.int32, torch.int64):
        zero_point = ex.cast(zero_point, torch.float64 if ex.known(zero_point) else torch.float32)
    return ex.neg(zero_point)  # as a float: the least integer has no negative


def requantize_offset(zero_point: float) -> float:
    """The int8 output of ``npu_quant_matmul`` adds after scaling: ``round(acc * scale) + offset``."""
    return zero_point


def activation_correction(zero_point: Expr, column_sums: Expr) -> Expr:
    """What to add to ``codes_x @ codes_w`` so that it equals ``(codes_x - zero_point) @ codes_w``."""
    return ex.neg(ex.mul(zero_point, column_sums))
