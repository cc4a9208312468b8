"""The ``aclnn`` lowering: quantpass's operators become the vendor's, ``torch.ops.npu.*``.

For execution operator by operator: eager, npugraph_ex, torchair's reduce-overhead mode. The vendor's conventions:

* no transpose flags: a stored matrix is viewed with its last two dimensions swapped, and the operator looks at strides;
  int4 in int32 likewise, ``(K, N / 8)`` or the view ``(K / 8, N)`` of ``(N, K / 8)``;
* the group scales of a transposed weight are a transposed view of ``(N, groups)`` too;
* dtypes are numbers of PyTorch's own list;
* float16 and int8 results take their scale as an int64 word; an offset travels in the word, never as a tensor (the
  kernels do not read that tensor);
* what the chip itself decides (``template``, ``saturate``) is not passed on.

Source: LinearQuant.md, LinearWeightQuant.md; is_transpose_last_two_dims in QuantMatmulKernelNpuOpApi.cpp:30-50;
linear_quant.py:96-112, linear_weight_quant.py:98-109.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from quantpass.graph.torch_internals import real_tensors
from quantpass.operators.ir import DTYPE_NUMBERS

ops, aten = torch.ops.quantpass, torch.ops.aten

_WORD_RESULTS = (torch.int8, torch.float16)


class Constants(Protocol):
    """The tensors that a graph was compiled with, by the node that stands for them."""

    def tensor(self, node: Node) -> torch.Tensor | None:
        """The tensor behind ``node``; None where it is not known when compiling."""

    def owns(self, node: Node) -> bool:
        """True for a tensor that the pass itself prepared."""

    def replace(self, node: Node, tensor: torch.Tensor) -> None:
        """Let ``node`` stand for ``tensor`` from now on; only for tensors that the pass owns."""


def lower_to_aclnn(gm: GraphModule, constants: Constants | None = None) -> int:
    """Replace every ``torch.ops.quantpass.*`` of a graph by the vendor's operator, in place.

    Args:
        gm: a fused graph whose casts of parameters were carried out.
        constants: the tensors that are known; group scales that the pass prepared are then stored transposed once,
            not at every call.

    Returns:
        How many operators were replaced.

    Raises:
        RuntimeError: ``torch.ops.npu`` lacks the operators.
        ValueError: an operator that can't run there: a format cast or int4 packing of a computed tensor.
    """
    lowering = _Lowering(gm.graph, constants)
    count = 0
    for node in list(gm.graph.nodes):
        replace = lowering.table.get(node.target)
        if replace is not None:
            replace(node)
            count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def npu_operator(name: str) -> OpOverload:
    """``torch.ops.npu.<name>``.

    Raises:
        RuntimeError: it does not exist; the message says what to do.
    """
    packet = getattr(torch.ops.npu, name, None)
    if packet is None:
        raise RuntimeError(
            f"lowering='aclnn' needs torch.ops.npu.{name}, and nothing has defined it in this process. On an Ascend "
            "machine, install torch_npu 2.13.0 (pip install torch_npu==2.13.0) and import it first; anywhere else, "
            "call quantpass.emulate_npu() to run the vendor's operators on CPU tensors."
        )
    overload: OpOverload = packet.default
    return overload


class _Lowering:
    def __init__(self, graph: Graph, constants: Constants | None) -> None:
        self._graph = graph
        self._constants = constants
        self._stored_transposed: dict[Node, Node] = {}
        self.table: dict[Any, Callable[[Node], None]] = {
            ops.quant_matmul.default: self._quant_matmul,
            ops.weight_quant_matmul.default: self._weight_quant_matmul,
            ops.trans_quant_param.default: self._trans_quant_param,
            ops.format_cast.default: _refuse_format_cast,
            ops.pack_int4.default: _refuse_pack,
        }

    def _quant_matmul(self, node: Node) -> None:
        a = _arguments(node)
        out = a["output_dtype"] or torch.int8
        if out not in DTYPE_NUMBERS:
            raise ValueError(
                f"{node.name}: npu_quant_matmul gives {', '.join(map(str, DTYPE_NUMBERS))}, not {out}; "
                "lowering='aclnn' carries out plans for a chip, not for target='cpu'"
            )
        scale, offset = a["scale"], a["offset"]
        grouped = bool(a["group_sizes"] and a["group_sizes"][-1])
        if not grouped:
            scale, offset = self._in_word(node, scale, offset, out, a["pertoken_scale"], a["bias"])
        keywords = {
            "offset": offset,
            "pertoken_scale": a["pertoken_scale"],
            "bias": a["bias"],
            "output_dtype": DTYPE_NUMBERS[out],
            "group_sizes": a["group_sizes"],
        }
        x1 = self._viewed(node, a["x1"], a["transpose_x1"])
        x2 = self._viewed(node, a["x2"], a["transpose_x2"])
        self._replace(node, "npu_quant_matmul", (x1, x2, scale), keywords)

    def _in_word(
        self, node: Node, scale: Node, offset: Node | None, out: torch.dtype, pertoken: Node | None, bias: Node | None
    ) -> tuple[Node, Node | None]:
        """Scale and offset in the form that the result's dtype takes."""
        floating_bias = bias is not None and bias.meta["val"].dtype.is_floating_point
        if out not in _WORD_RESULTS or pertoken is not None or floating_bias:
            return scale, None
        if scale.meta["val"].dtype == torch.float32:
            scale = self._insert(node, npu_operator("npu_trans_quant_param"), (scale, offset), "scale_word")
        return scale, None  # an int64 word carries its own offset

    def _weight_quant_matmul(self, node: Node) -> None:
        a = _arguments(node)
        scale, offset = a["antiquant_scale"], a["antiquant_offset"]
        if a["antiquant_group_size"] and a["transpose_weight"]:
            scale = self._transposed_storage(node, scale)
            offset = None if offset is None else self._transposed_storage(node, offset)
        quant_scale, quant_offset = a["quant_scale"], a["quant_offset"]
        if quant_scale is not None and quant_scale.meta["val"].dtype == torch.float32:
            arguments = (quant_scale, quant_offset)
            quant_scale = self._insert(node, npu_operator("npu_trans_quant_param"), arguments, "quant_word")
        x = self._viewed(node, a["x"], a["transpose_x"])
        weight = self._viewed(node, a["weight"], a["transpose_weight"])
        keywords = {
            "antiquant_offset": offset,
            "quant_scale": quant_scale,
            "quant_offset": None,
            "bias": a["bias"],
            "antiquant_group_size": a["antiquant_group_size"],
            "inner_precise": a["inner_precise"],
        }
        self._replace(node, "npu_weight_quant_batchmatmul", (x, weight, scale), keywords)

    def _trans_quant_param(self, node: Node) -> None:
        a = _arguments(node)
        keywords = {"offset": a["offset"], "round_mode": a["round_mode"]}
        self._replace(node, "npu_trans_quant_param", (a["scale"],), keywords)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _viewed(self, node: Node, operand: Node, transposed: bool) -> Node:
        return self._insert(node, aten.transpose.int, (operand, -2, -1), "transposed") if transposed else operand

    def _transposed_storage(self, node: Node, matrix: Node) -> Node:
        """``matrix`` as a transposed view of contiguous storage."""
        known = self._constants.tensor(matrix) if self._constants is not None else None
        if matrix in self._stored_transposed:
            stored = self._stored_transposed[matrix]
        elif known is not None and self._constants is not None and self._constants.owns(matrix) and _is_mine(matrix):
            with real_tensors():
                self._constants.replace(matrix, known.t().contiguous())
            matrix.meta["val"] = matrix.meta["val"].new_empty(tuple(reversed(known.shape)))
            stored = self._stored_transposed[matrix] = matrix
        else:
            view = self._insert(node, aten.transpose.int, (matrix, -2, -1), "turned")
            format_ = {"memory_format": torch.contiguous_format}
            stored = self._insert(node, aten.clone.default, (view,), "stored", format_)
        return self._viewed(node, stored, True)

    def _insert(
        self, before: Node, target: Any, args: tuple[Any, ...], name: str, kwargs: dict[str, Any] | None = None
    ) -> Node:
        with self._graph.inserting_before(before):
            new = self._graph.create_node("call_function", target, args, kwargs or {}, name=f"{before.name}_{name}")
        new.meta.update({k: v for k, v in before.meta.items() if k != "val"})
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        new.meta["val"] = target(*values, **(kwargs or {}))
        return new

    def _replace(self, node: Node, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        target = npu_operator(name)
        defaults = {p.name: p.default_value for p in target._schema.arguments if p.has_default_value()}
        given = {k: v for k, v in keywords.items() if isinstance(v, Node) or v != defaults[k]}
        with self._graph.inserting_before(node):
            new = self._graph.create_node("call_function", target, args, given, name=name)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of a quantpass operator by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {p.name: p.default_value if p.has_default_value() else None for p in schema}
    bound.update(zip((p.name for p in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def _is_mine(matrix: Node) -> bool:
    """True where only grouped matmuls of a transposed weight read ``matrix``, as scale or offset."""
    for user in matrix.users:
        if user.target is not ops.weight_quant_matmul.default:
            return False
        a = _arguments(user)
        if not (a["antiquant_group_size"] and a["transpose_weight"]):
            return False
    return True


def _refuse_format_cast(node: Node) -> None:
    raise ValueError(
        f"{node.name} casts a tensor that the graph computes to another format. With lowering='aclnn' the cast becomes "
        "part of a captured NPU graph, and aborts the capture. Cast the tensor before the graph, or compile through GE "
        "(quantpass.npu_backend with torchair's default mode)."
    )


def _refuse_pack(node: Node) -> None:
    raise ValueError(
        f"{node.name} packs int4 codes that the graph computes; npu_convert_weight_to_int4pack runs on the host and "
        "can't be part of a compiled graph. Pack the weight before the graph runs."
    )
