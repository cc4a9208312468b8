"""Operators outside the tables of matmuls that multiply matrices all the same, or that nobody knows.

They are never fused. But where one of them takes a dequantized operand, its user believes to have quantized a matmul:
it gets a verdict. What counts as an operand of which operator is said here; whether it is quantized, in
:mod:`quantpass.patterns.sites`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from quantpass.graph.schema import bind, op_name
from quantpass.patterns.contractions import NoContraction

_AS_A_ROW = "multiply a row instead: F.linear(x[None], w)[0]"
_KEEP_FLOAT = (
    "the operators multiply matrices; leave this layer out of the quantization, or accept that it runs in floats"
)
_ATTENTION = (
    "spell attention as matmul, softmax, matmul (torch.nn.attention.sdpa_kernel(SDPBackend.MATH) does): each of its "
    "matmuls is then read by itself"
)

EXPERTS = "read.weight.experts"
"""The rule of a weight that is one of several matrices."""

_MATRIX_AND_VECTOR = ("self", "mat", "vec", "vec1", "vec2", "tensor", "other")
_QKV = ("query", "key", "value")
_CONVOLUTIONS = frozenset(
    f"aten::{name}"
    for name in (
        *("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "convolution_overrideable"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "mkldnn_convolution", "_slow_conv2d_forward"),
        *("slow_conv3d", "slow_conv_transpose2d", "slow_conv_transpose3d", "_conv_depthwise2d", "conv_depthwise3d"),
        *("slow_conv_dilated2d", "slow_conv_dilated3d", "thnn_conv2d"),
    )
)
_ATEN = {
    "mv": (_MATRIX_AND_VECTOR, "a matrix times a vector", _AS_A_ROW),
    "addmv": (("mat", "vec"), "a matrix times a vector", _AS_A_ROW),
    "dot": (_MATRIX_AND_VECTOR, "a product of two vectors", _AS_A_ROW),
    "vdot": (_MATRIX_AND_VECTOR, "a product of two vectors", _AS_A_ROW),
    "inner": (_MATRIX_AND_VECTOR, "an inner product", "write it as F.linear(x, w)"),
    "linalg_vecdot": (("x", "y"), "products of vectors", "write it as F.linear(x, w)"),
    "addbmm": (
        ("batch1", "batch2"),
        "a sum of the products of several pairs of matrices",
        "put the batches side by side along K and multiply once: x.transpose(0, 1).flatten(1) @ w.flatten(0, 1)",
    ),
    "bilinear": (("weight",), "a bilinear form, a matrix for each output", _KEEP_FLOAT),
    "_trilinear": (("i1", "i2", "i3"), "a product of three tensors", "write it as F.linear(x, w)"),
    "einsum": (("tensors",), "an einsum that is still whole", "decompose it, or write it as F.linear(x, w)"),
    "tensordot": (("self", "other"), "a tensordot that is still whole", "write it as F.linear(x, w)"),
    "chain_matmul": (("matrices",), "a chain of matmuls in one operator", "write it as F.linear(x, w)"),
    "linalg_multi_dot": (("tensors",), "a chain of matmuls in one operator", "write it as F.linear(x, w)"),
    "linalg_matmul": (("self", "other"), "a matmul that is still whole", "write it as F.linear(x, w)"),
    "embedding_bag": (("weight",), "weighted sums of the rows of a table", _KEEP_FLOAT),
    "_embedding_bag": (("weight",), "weighted sums of the rows of a table", _KEEP_FLOAT),
    "_embedding_bag_forward_only": (("weight",), "weighted sums of the rows of a table", _KEEP_FLOAT),
    "scaled_dot_product_attention": (_QKV, "attention in one operator", _ATTENTION),
    "_grouped_mm": (("self", "mat2"), "a grouped matmul, a matrix for each group of rows", ""),
    "_scaled_mm": (("self", "mat2"), "a scaled matmul of floats", "use torch._int_mm for int8 codes"),
    "_scaled_mm_v2": (("self", "mat2"), "a scaled matmul of floats", "use torch._int_mm for int8 codes"),
    "_scaled_grouped_mm": (("self", "mat2"), "a grouped matmul, a matrix for each group of rows", ""),
    "_scaled_grouped_mm_v2": (("self", "mat2"), "a grouped matmul, a matrix for each group of rows", ""),
    "mkldnn_linear": (("weight",), "a linear layer in a layout of another library", "quantize before that conversion"),
    "_sparse_mm": (("sparse", "dense"), "a matmul of a sparse matrix", _KEEP_FLOAT),
}
"""Name in ``aten`` -> the arguments that are multiplied, what it is, and what to do (the rule's hint where empty)."""

_RECURRENT = re.compile(r"^(quantized_)?(mkldnn_)?_?(thnn_fused_)?(lstm|gru|rnn)")
_ATEN_ATTENTION = re.compile(
    r"scaled_dot_product|multi_head_attention|transformer_encoder_layer|_flash_attention|_efficient_attention"
)
_MULTIPLIES = re.compile(
    r"(^|_|\d)(q|b|ge|igemm|add|fused|w\d+a\d+)*(mm|mv|mmv)($|_|\d)|gemm|gemv|matmul|linear(?!iz)|conv\d?d?($|_)|attention|attn"
    r"|einsum|(^|_)(dot|moe|experts?|ffn|mlp|lstm|gru)($|_)"
)
"""Names of a tool's operators that multiply matrices."""

_HARMLESS = frozenset(
    ("prims", "quantized_decomposed", "quantpass", "profiler", "_c10d_functional", "_c10d_functional_autograd")
)
"""Namespaces whose operators are known not to multiply matrices."""


def unread_contraction(node: Node, known: bool) -> NoContraction | None:
    """What ``node`` is where it multiplies matrices in a form that is not read, or where nobody knows what it does.

    Args:
        node: a node of the graph that no reader of matmuls has taken.
        known: its operator is in some other table (it dequantizes, quantizes, moves data, ...).
    """
    target = node.target
    if node.op in ("call_module", "call_method"):
        return _opaque(node, f"{node.target} is a call of a module or method, which is not looked into")
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    if namespace == "aten":
        return _of_aten(node, name)
    if known or namespace in _HARMLESS:
        return None
    if _MULTIPLIES.search(name):
        grouped = any(word in name for word in ("group", "expert", "moe"))
        return NoContraction(
            f"{op_name(node)} is not an operator that is read",
            _tensors(node.args, node.kwargs),
            "" if grouped else "write it as F.linear(x, w)",
            rule=EXPERTS if grouped else "read.matmul",
            codes=namespace not in ("npu", "torch_npu"),  # the vendor's fused operators take codes: nothing is left
        )
    return None if namespace == "npu" else _opaque(node, f"{op_name(node)} is not an operator that is known")


def _of_aten(node: Node, name: str) -> NoContraction | None:
    if f"aten::{name}" in _CONVOLUTIONS:
        return _convolution(node, bind(node))
    if _RECURRENT.match(name):
        return NoContraction(
            f"{op_name(node)} is a whole recurrent layer", _tensors(node.args, node.kwargs), _KEEP_FLOAT
        )
    if _ATEN_ATTENTION.search(name):
        arguments = bind(node)
        named = tuple(n for q in _QKV for n in _tensors((arguments.get(q),), {}))
        return NoContraction(
            f"{op_name(node)} is attention in one operator", named or _tensors(node.args, node.kwargs), _ATTENTION
        )
    found = _ATEN.get(name)
    if found is None:
        return None
    (names, what, hint), arguments = found, bind(node)
    operands = tuple(n for a in names if a in arguments for n in _tensors((arguments[a],), {}))
    rule = EXPERTS if "grouped" in name else "read.matmul"
    return NoContraction(f"{op_name(node)} is {what}", operands, hint, rule=rule)


def _convolution(node: Node, arguments: dict[str, Any]) -> NoContraction | None:
    """A convolution that is not a matmul over channels; only a quantized kernel counts."""
    weight = arguments.get("weight")
    fake = weight.meta.get("val") if isinstance(weight, Node) else None
    if not isinstance(weight, Node) or not isinstance(fake, torch.Tensor) or fake.dim() < 3:
        return None
    taps = tuple(fake.shape[2:])
    stride = tuple(arguments.get("stride") or ())
    size = "x".join(str(t) for t in taps)
    what = f"{op_name(node)} with a kernel of {size}"
    if arguments.get("groups", 1) != 1:
        what += f" in {arguments['groups']} groups"
    if arguments.get("transposed") or "transpose" in op_name(node):
        what += ", transposed"
    plain = all(isinstance(t, int) for t in (*taps, *stride)) and arguments.get("groups", 1) == 1
    if plain and stride == taps and any(t != 1 for t in taps):
        hint = (
            "its patches do not overlap, so it is a matmul of them: cut the image into patches with reshape and "
            "permute and use F.linear(patches, weight.flatten(1))"
        )
    else:
        hint = _KEEP_FLOAT
    return NoContraction(f"{what} is not a matmul over channels", (weight,), hint)


def _opaque(node: Node, reason: str) -> NoContraction:
    return NoContraction(reason, _tensors(node.args, node.kwargs), rule="read.consumer", weights_only=True)


def higher_order(node: Node, looked_into: bool) -> NoContraction | None:
    """What an operator that takes other operators or graphs may do with its operands by itself.

    ``looked_into``: its graphs are read, so that only what it does beside calling them counts (attention).
    """
    if not isinstance(node.target, HigherOrderOperator) or (looked_into and "attention" not in op_name(node)):
        return None
    inner = next((a for a in node.args if isinstance(a, OpOverload)), None)
    what = f"{op_name(node)}({inner})" if inner is not None else op_name(node)
    attention = "attention" in op_name(node)
    return NoContraction(
        f"{what} is not an operator that is read",
        _tensors(node.args[:3] if attention else node.args, {} if attention else node.kwargs),
        _ATTENTION if attention else "write it as F.linear(x, w)",
        rule="read.matmul" if attention else "read.consumer",
        weights_only=not attention,
    )


def _tensors(args: Any, kwargs: Any) -> tuple[Node, ...]:
    """The nodes with a tensor value among arguments."""
    found: list[Node] = []
    torch.fx.node.map_arg((args, kwargs), lambda n: found.append(n))
    return tuple(dict.fromkeys(n for n in found if isinstance(n.meta.get("val"), torch.Tensor)))
