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

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from quantpass.graph.torch_internals import known_contiguous, real_tensors
from quantpass.lowering.torchair_versions import install_line
from quantpass.operators import OPERATORS
from quantpass.operators.arguments import bound, schema_of
from quantpass.operators.preparation import TRANS_QUANT_PARAM

if TYPE_CHECKING:
    from quantpass.chips.calls import VendorOp
    from quantpass.chips.rules import Chip
    from quantpass.graph.constants import Constants

aten = torch.ops.aten


class Aclnn:
    """The vendor's operators in place of quantpass's."""

    name = "aclnn"
    mode = "eager"
    needs_a_chip = True
    keeps_casts = False

    def prepare(self, chip: Chip) -> None:
        """Nothing: an operator that is missing is named when a graph needs it."""

    def lower(self, gm: GraphModule, constants: Constants | None = None) -> None:
        """As :func:`lower_to_aclnn`."""
        lower_to_aclnn(gm, constants)


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
    table: dict[Any, Any] = {op.overload: op for op in OPERATORS}
    graph = _AclnnGraph(gm.graph, constants)
    mine = [node for node in gm.graph.nodes if node.target in table]
    for node in mine:
        op = table[node.target]
        op.aclnn(graph, node, op.bind(node))
    if mine:
        gm.graph.lint()
        gm.recompile()
    return len(mine)


def npu_operator(name: str) -> OpOverload:
    """``torch.ops.npu.<name>``.

    Raises:
        RuntimeError: it does not exist; the message says what to do.
    """
    packet = getattr(torch.ops.npu, name, None)
    if packet is None:
        raise RuntimeError(
            f"lowering='aclnn' needs torch.ops.npu.{name}, and nothing has defined it in this process. On an Ascend "
            f"machine, install torch_npu ({install_line()}) and import it first; anywhere else, "
            "call quantpass.emulate_npu() to run the vendor's operators on CPU tensors."
        )
    overload: OpOverload = packet.default
    return overload


def lacking(op: VendorOp, given: Mapping[str, Any]) -> list[str]:
    """The arguments, other than at their defaults, that this torch_npu's operator does not have.

    Args:
        op: the vendor's operator.
        given: arguments by their names in ``op``'s schema, which is the newest torch_npu's.

    Raises:
        RuntimeError: the operator does not exist at all.
    """
    theirs, defaults = _their_arguments(op), vars(bound(schema_of(op), (), {}))
    return [k for k, v in given.items() if k not in theirs and k in defaults and v != defaults[k]]


def called_there(op: VendorOp, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names that this torch_npu has for them, without those that are at its defaults.

    Args:
        op: the vendor's operator.
        given: as for :func:`lacking`, which these are not.
    """
    theirs = _their_arguments(op)
    return {theirs[k].name: v for k, v in given.items() if k in theirs and not _is_default(v, theirs[k])}


def _is_default(value: Any, argument: torch.Argument) -> bool:
    if isinstance(value, Node | torch.Tensor) or not argument.has_default_value():
        return False
    return bool(value == argument.default_value)


def _their_arguments(op: VendorOp) -> dict[str, torch.Argument]:
    """This torch_npu's arguments by the newest one's names.

    In the same place one may be called otherwise, where whatever both know by name stands in the same places: else one
    that is missing would be taken for the one behind it.
    """
    theirs, newest = npu_operator(op.name)._schema.arguments, schema_of(op).arguments
    own, names = {a.name: a for a in theirs}, {a.name for a in newest}
    place = {a.name: i for i, a in enumerate(a for a in theirs if not a.kwarg_only)}
    if any(place.get(a.name, i) != i for i, a in enumerate(newest)):
        return own
    renamed = {a.name: t for a, t in zip(newest, theirs, strict=False) if not t.kwarg_only and t.name not in names}
    return renamed | own


def _looks_transposed(t: torch.Tensor) -> bool:
    return t.dim() >= 2 and not known_contiguous(t) and known_contiguous(t.transpose(-2, -1))


class _AclnnGraph:
    """:class:`quantpass.operators.operator.AclnnGraph` of one graph."""

    def __init__(self, graph: Graph, constants: Constants | None) -> None:
        self._graph = graph
        self._constants = constants
        self._stored_transposed: dict[Node, Node] = {}

    def viewed(self, node: Node, operand: Node, transposed: bool) -> Node:
        if _looks_transposed(operand.meta["val"]):  # to the vendor, which is not what the call was judged with
            operand = self._dense(node, operand)
        return self._insert(node, aten.transpose.int, (operand, -2, -1), "transposed") if transposed else operand

    def stored_transposed(self, node: Node, matrix: Node, reads_transposed: Callable[[Node], bool]) -> Node:
        known = self._constants.tensor(matrix) if self._constants is not None else None
        if matrix in self._stored_transposed:
            stored = self._stored_transposed[matrix]
        elif (
            known is not None
            and self._constants is not None
            and self._constants.owns(matrix)
            and all(map(reads_transposed, matrix.users))
        ):
            with real_tensors():
                self._constants.replace(matrix, known.t().contiguous())
            matrix.meta["val"] = matrix.meta["val"].new_empty(tuple(reversed(known.shape)))
            stored = self._stored_transposed[matrix] = matrix
        else:
            stored = self._dense(node, self._insert(node, aten.transpose.int, (matrix, -2, -1), "turned"))
        return self.viewed(node, stored, True)

    def _dense(self, node: Node, view: Node) -> Node:
        return self._insert(node, aten.clone.default, (view,), "stored", {"memory_format": torch.contiguous_format})

    def scale_word(self, node: Node, scale: Node, offset: Node | None, name: str) -> Node:
        return self._insert(node, npu_operator(TRANS_QUANT_PARAM.vendor.name), (scale, offset), name)

    def replace(self, node: Node, op: VendorOp, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        target = npu_operator(op.name)
        if missing := lacking(op, keywords):
            raise RuntimeError(
                f"{node.name} becomes torch.ops.npu.{op.name} with {', '.join(missing)}, which this torch_npu's does "
                f"not have. Install a newer torch_npu ({install_line()}), or keep the site as it is: "
                f"leave=({node.meta.get('quantpass', 'its name')!r},)"
            )
        given = called_there(op, keywords)
        with self._graph.inserting_before(node):
            new = self._graph.create_node("call_function", target, args, given, name=op.name)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)

    def _insert(
        self, before: Node, target: Any, args: tuple[Any, ...], name: str, kwargs: dict[str, Any] | None = None
    ) -> Node:
        with self._graph.inserting_before(before):
            new = self._graph.create_node("call_function", target, args, kwargs or {}, name=f"{before.name}_{name}")
        new.meta.update({k: v for k, v in before.meta.items() if k != "val"})
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        new.meta["val"] = target(*values, **(kwargs or {}))
        return new
