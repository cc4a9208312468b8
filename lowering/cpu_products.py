"""The ways in which PyTorch's CPU kernels can multiply activations by a weight that is known when compiling.

Which of them is fast depends on the shape, the dtype and the processor: :mod:`quantpass.lowering.cpu_contest` measures.
What is slow wherever it was tried is not here: oneDNN's kernels for signed activations (a thousand times slower than
for unsigned ones), and the packed weight-only kernels for anything but bfloat16 (their fallback is scalar).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantpass.operators.int4 import unpack_int4
from quantpass.operators.weight_quant_matmul import dequantized_weight, weight_codes

aten = torch.ops.aten
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class StaticWeight:
    """What a fused operator says of its weight; the tensors are real.

    Attributes:
        codes: ``(K, N)`` int8, or int4 packed in int32; stored ``(N, K)`` where ``transposed``.
        transposed: so stored.
        scale: of a weight-only operator; else None.
        offset: added to the codes, or None.
        group_size: rows of K that share a scale, 0 for all.
        bias: ``(N,)`` floating, where the product adds it; else None.
    """

    codes: torch.Tensor
    transposed: bool
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    group_size: int = 0
    bias: torch.Tensor | None = None

    @property
    def by_column(self) -> torch.Tensor:
        """The codes as int8 ``(N, K)``, contiguous."""
        return weight_codes(self.codes, self.transposed).t().contiguous()


@dataclass(frozen=True, slots=True)
class Product:
    """One way to multiply.

    Attributes:
        name: what the contest and the log call it.
        takes: whether it can multiply by this weight, the dtype of x given.
        prepare: the tensors that it reads at each call, made once.
        run: ``(x, *prepared)``: x is ``(M, K)``; an integer product returns ``(M, N)`` int32, or float32 (the sums
            rounded once); a floating one returns x's dtype or float32.
        opaque: what it prepares has a layout of oneDNN's own, a tensor that can't be saved, copied or viewed, or one
            that another processor's kernel reads as something else.
        adds_bias: ``run`` adds ``StaticWeight.bias``.
        rounds_sums: an integer product that returns float32.
        dense: what it prepares is the dequantized weight, of two or four bytes an element.
    """

    name: str
    takes: Callable[[StaticWeight, torch.dtype], bool]
    prepare: Callable[[StaticWeight, torch.dtype], Tensors]
    run: Callable[..., torch.Tensor]
    opaque: bool = False
    adds_bias: bool = False
    rounds_sums: bool = False
    dense: bool = False


def _rows(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    del dtype
    return (weight.by_column.t().contiguous(),)


def _columns(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    del dtype
    return (weight.by_column,)


def _more_than_one_row(weight: StaticWeight, dtype: torch.dtype) -> bool:
    """PyTorch 2.13's _int_mm leaves its result unwritten where K is 1."""
    del dtype
    return weight_codes(weight.codes, weight.transposed).shape[0] > 1


def _int_mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``_int_mm`` reads one row by whatever its row stride says, 0 and 1 too, and returns other numbers.

    Inductor gives a view of one row a row stride of 0; what an operator computes is laid out plainly.
    """
    one = isinstance(x.shape[0], int) and x.shape[0] == 1
    rows = aten.bitwise_xor.Scalar(x, 0) if one else x
    return aten._int_mm.default(rows, w)  # type: ignore[no-any-return]


def _packed_for_unsigned(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    del dtype
    columns = weight.by_column
    n = columns.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(columns, None)
    return packed, torch.ones(n), torch.zeros(n, dtype=torch.int64)


def _onednn(x: torch.Tensor, packed: torch.Tensor, ones: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The codes moved up by 128, which is their zero point then: unsigned integers are what the kernel is made for."""
    unsigned = aten.bitwise_xor.Scalar(aten.view.dtype(x, torch.uint8), 128)
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


def _has_onednn(weight: StaticWeight, dtype: torch.dtype) -> bool:
    del weight, dtype
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


INTEGER_PRODUCTS = (
    Product("int_mm", _more_than_one_row, _rows, _int_mm),
    Product("int_mm of columns", _more_than_one_row, _columns, lambda x, w: _int_mm(x, aten.t.default(w))),
    Product("oneDNN u8s8", _has_onednn, _packed_for_unsigned, _onednn, opaque=True, rounds_sums=True),
)
"""int8 by int8, exact."""


def _dense(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    assert weight.scale is not None
    w = dequantized_weight(
        weight.codes,
        weight.scale,
        weight.offset,
        dtype,
        group_size=weight.group_size,
        transpose_weight=weight.transposed,
    )
    return (w.t().contiguous(),)


def _dense_with_bias(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    dense = _dense(weight, dtype)
    return dense if weight.bias is None else (*dense, weight.bias.reshape(-1).to(dtype))


def _dense_float32(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    return (_dense(weight, dtype)[0].to(torch.float32),)


def _linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    columns = w.t()
    return torch.mm(x, columns) if bias is None else torch.addmm(bias, x, columns)


def _linear_float32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.to(torch.float32), w.t())


def _has_one_dtype(weight: StaticWeight, dtype: torch.dtype) -> bool:
    """The bias, if there is one, has the dtype of x or values that it holds."""
    b = weight.bias
    return b is None or torch.equal(b.to(dtype).to(torch.float64), b.to(torch.float64))


def _is_narrow(weight: StaticWeight, dtype: torch.dtype) -> bool:
    del weight
    return dtype != torch.float32


def _per_channel_int8(weight: StaticWeight, dtype: torch.dtype) -> bool:
    """The kernel reads K in steps of 16, beyond the end where K is no multiple."""
    if dtype != torch.bfloat16 or not _is_plain(weight) or weight.codes.dtype != torch.int8 or weight.group_size:
        return False
    return weight_codes(weight.codes, weight.transposed).shape[0] % 16 == 0


def _is_plain(weight: StaticWeight) -> bool:
    return weight.offset is None and weight.scale is not None and weight.scale.dtype == torch.bfloat16


def _int8_packed(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    assert weight.scale is not None
    columns = weight.by_column
    return columns, weight.scale.reshape(-1).expand(columns.shape[0]).to(dtype).contiguous()


def _grouped_int4(weight: StaticWeight, dtype: torch.dtype) -> bool:
    if dtype != torch.bfloat16 or not _is_plain(weight) or weight.codes.dtype != torch.int32:
        return False
    k, n = weight_codes(weight.codes, weight.transposed).shape
    return weight.group_size in (32, 64, 128, 256) and k % weight.group_size == 0 and n % 16 == 0


def _int4_packed(weight: StaticWeight, dtype: torch.dtype) -> Tensors:
    assert weight.scale is not None
    codes = unpack_int4(weight.codes)
    columns = (codes if weight.transposed else codes.t()).to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns.contiguous(), 1)
    scale = weight.scale.to(dtype)  # (groups, N)
    return packed, torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()


WEIGHT_ONLY_PRODUCTS = (
    Product("dense", _has_one_dtype, _dense_with_bias, _linear, adds_bias=True, dense=True),
    Product("dense float32", _is_narrow, _dense_float32, _linear_float32, dense=True),
    Product("packed int8", _per_channel_int8, _int8_packed, lambda x, w, s: aten._weight_int8pack_mm.default(x, w, s)),
)
"""x by a dequantized weight. Sums are in float32, in another order than the reference's; a product in x's own dtype is
rounded to it before anything is added behind."""


def int4_product(group_size: int) -> Product:
    """The packed int4 kernel for groups of ``group_size``."""
    return Product(
        f"packed int4, groups of {group_size}",
        _grouped_int4,
        _int4_packed,
        lambda x, w, s: aten._weight_int4pack_mm_for_cpu.default(x, w, group_size, s),
        opaque=True,  # blocks of 64 columns with AVX512, of 32 with AVX2
    )
