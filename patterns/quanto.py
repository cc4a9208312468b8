"""The operators of optimum-quanto.

Semantics: ``optimum/quanto/library/qbytes_mm.py``: ``qbytes_mm(A, B, scales) = A @ (scales * B)^T`` with ``B``
``(N, K)`` and ``scales`` of N elements; for int8 ``A`` the product is an int32 one and ``scales`` holds the
activation's scale too.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from quantpass.graph.schema import op_name
from quantpass.patterns.contractions import Contraction, NoContraction, Own
from quantpass.patterns.dialect import Dialect


def dialect() -> Dialect:
    return Dialect("optimum-quanto", contractions={"quanto::qbytes_mm": _qbytes_mm})


def _qbytes_mm(node: Node, *, A: Node, B: Node, scales: Node) -> Contraction | NoContraction:
    if B.meta["val"].dtype != torch.int8:
        return NoContraction(f"{op_name(node)} of a {B.meta['val'].dtype} weight", (A,), "use qint8 weights", True)
    integer = A.meta["val"].dtype == torch.int8
    own = (Own("scale", scales, along="columns"), *([Own("cast")] if integer else []))
    return Contraction(node, op_name(node), A, B, rhs_transposed=True, own=own, whole=True, integer=integer)
