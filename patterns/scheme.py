"""How the operands of a matmul are quantized, in the words that people use for it."""

from __future__ import annotations

import torch

from quantpass.graph import expr as ex
from quantpass.graph.records import Weight
from quantpass.patterns.affine import Affine, NotAffine
from quantpass.patterns.contractions import Contraction
from quantpass.patterns.epilogues import Epilogue
from quantpass.patterns.terms import Term


def scheme(
    c: Contraction, activation: Affine | NotAffine, weight: Weight | NotAffine, epilogue: Epilogue | None
) -> str:
    """``int8 per token (dynamic) x int8 per channel``, ``float16 x int4 per group of 32``, ...

    A scale belongs to its operand wherever the graph multiplies by it, before the matmul or behind it.
    """
    behind = _scales_behind(epilogue)
    return f"{_of_activation(c, activation, epilogue)} x {_of_weight(weight, behind)}"


def _scales_behind(epilogue: Epilogue | None) -> list[Term]:
    """The scales between the matmul and the first step of another kind; integers are added to an accumulator."""
    found: list[Term] = []
    for step in epilogue.steps if epilogue is not None else ():
        if step.kind == "scale" and step.term is not None:
            found.append(step.term)
        elif step.kind not in ("cast", "view") and (step.kind != "add" or found):
            break
    return found


def _of_activation(c: Contraction, read: Affine | NotAffine, epilogue: Epilogue | None) -> str:
    dtype: torch.dtype = c.lhs.meta["val"].dtype
    if isinstance(read, NotAffine):
        name = str(dtype).removeprefix("torch.")
        return f"{name} codes" if not dtype.is_floating_point and read.quantized else name
    low, high = read.span
    bits = "int4" if low >= -8 and high <= 7 else "uint8" if low >= 0 and high > 127 else "int8"
    behind = [] if c.product_dtype.is_floating_point else _scales_behind(epilogue)
    scales = [*read.factors, *(t for t in behind if t.kind != "columns")]
    zero = read.zero_point
    if zero is not None and not ex.is_all(zero.expr, 0) and not _adds_integers(c, epilogue):
        bits = f"asymmetric {bits}"
    if not scales:
        return f"{bits} codes"
    kinds = {t.kind for t in scales}
    per = "per token" if kinds & {"rows", "other"} else "per column of x" if "columns" in kinds else "per tensor"
    how = "static" if all(t.constant is not None for t in scales) else "dynamic"
    return f"{bits} {per} ({how})"


def _adds_integers(c: Contraction, epilogue: Epilogue | None) -> bool:
    """True where the accumulator gets an addend: codes shifted for an unsigned matmul are so shifted back."""
    steps = epilogue.steps if epilogue is not None and not c.product_dtype.is_floating_point else ()
    first = next((step for step in steps if step.kind not in ("cast", "view")), None)
    return first is not None and first.kind == "add"


def _of_weight(read: Weight | NotAffine, behind: list[Term]) -> str:
    if isinstance(read, NotAffine):
        return "a weight that is not read"
    kinds = {t.kind for t in behind}
    if read.group_size:
        per = f" per group of {read.group_size}"
    elif not ex.is_all(read.scale, 1.0):
        per = " per tensor" if ex.shape_of(read.scale) == (1,) else " per channel"
    else:
        per = " per channel" if "columns" in kinds else " per tensor" if "scalar" in kinds else " codes"
    zero = "asymmetric " if read.zero_point is not None else ""
    return f"{zero}{'int4' if read.low >= -8 and read.high <= 7 else 'int8'}{per}"
