"""The ``cpu`` target: whatever the reference kernels compute, wider than any chip."""

from quantpass.basics.torch_types import BF16, F16, F32, I8, I32, I64
from quantpass.chips import quant_matmul, weight_quant_matmul
from quantpass.chips.dtype_table import DtypeTable, Row
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.requirements import (
    Broadcasts,
    EqualSizes,
    NotEmpty,
    Present,
    QmmBias,
    Rank,
    SameShape,
    Shape,
    Size,
    Value,
)
from quantpass.chips.rules import Chip, Rule, dtype_is, grouped
from quantpass.chips.weight_quant_matmul import WQMM

_FLOATS = (F16, BF16, F32)
_SOURCE = "quantpass/operators"

_QMM_ROWS = (
    Row(((I8, I32), (I8, I32), (I64, F32), (None,), (I32, None), (None,), (F16,))),
    Row(((I8, I32), (I8, I32), (I64, F32), (F32, None), (I32, None), (None,), (I8,))),
    Row(((I8, I32), (I8, I32), (F32, BF16), (None,), (I32, *_FLOATS, None), (F32, None), (F16, BF16, F32))),
    Row(((I8, I32), (I8, I32), (F32, BF16), (None,), (I32, None), (None,), (I32,))),
)
_WQMM_ROWS = tuple(
    Row(((x,), (I8, I32), (x,), (x, None), (*_FLOATS, None), (F32, I64, None), (F32, None))) for x in _FLOATS
)
_INT8 = dtype_is("x1", I8)

CPU = Chip(
    name="cpu",
    title="reference kernels on a CPU",
    soc_prefixes=(),
    rules=(
        Rule("cpu.qmm.operands", QMM, Present("scale"), _SOURCE, "code"),
        Rule("cpu.qmm.x1.rank", QMM, Rank("x1", 2, 64), _SOURCE, "code"),
        Rule("cpu.qmm.k", QMM, EqualSizes("k", "k_of_x2", "x1 and x2 with the same k"), _SOURCE, "code"),
        Rule(
            "cpu.qmm.k.range",
            QMM,
            Size("k", 0, 2**17 - 1),
            _SOURCE,
            "code",
            when=_INT8,
            hint="the int32 accumulator holds 131071 products of int8: split the matmul along k",
        ),
        Rule("cpu.qmm.batch", QMM, Broadcasts("x1", "x2"), _SOURCE, "code"),
        Rule("cpu.qmm.scale.shape", QMM, Shape("scale", (("n",), (1,))), _SOURCE, "code"),
        Rule("cpu.qmm.pertoken.shape", QMM, Shape("pertoken_scale", (("m",),)), _SOURCE, "code"),
        Rule("cpu.qmm.bias.shape", QMM, QmmBias(), _SOURCE, "code"),
        Rule("cpu.qmm.dtypes", QMM, DtypeTable(quant_matmul.COLUMNS, _QMM_ROWS, {"output_dtype": I8}), _SOURCE, "code"),
        Rule("cpu.wqmm.operands", WQMM, Present("antiquant_scale"), _SOURCE, "code"),
        Rule("cpu.wqmm.empty", WQMM, NotEmpty(("weight",)), _SOURCE, "code"),
        Rule("cpu.wqmm.k", WQMM, EqualSizes("k", "k_of_weight", "x and weight with the same k"), _SOURCE, "code"),
        Rule(
            "cpu.wqmm.scale.shape",
            WQMM,
            Shape("antiquant_scale", (("n",), (1, "n"), (1,), (1, 1))),
            _SOURCE,
            "code",
            when=grouped(False),
        ),
        Rule(
            "cpu.wqmm.scale.shape.group",
            WQMM,
            Shape("antiquant_scale", (("groups", "n"),)),
            _SOURCE,
            "code",
            when=grouped(),
        ),
        Rule("cpu.wqmm.offset.shape", WQMM, SameShape("antiquant_offset", "antiquant_scale"), _SOURCE, "code"),
        Rule(
            "cpu.wqmm.group",
            WQMM,
            Value("antiquant_group_size", lambda v, call: v >= 0, "a group size of 0 or more"),
            _SOURCE,
            "code",
        ),
        Rule("cpu.wqmm.dtypes", WQMM, DtypeTable(weight_quant_matmul.COLUMNS, _WQMM_ROWS), _SOURCE, "code"),
    ),
)
