"""FX graphs as plain data, to hand one to another process: nodes, shapes and small constants, but no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

LARGEST_CONSTANT = 1 << 20
"""Elements of a tensor attribute; larger ones should have become inputs."""


@dataclass(frozen=True, slots=True)
class TensorValue:
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class NodeRef:
    """The value of an earlier node."""

    name: str


@dataclass(frozen=True, slots=True)
class OpRef:
    """An operator by name: ``aten::add`` and its overload."""

    name: str
    overload: str


@dataclass(frozen=True, slots=True)
class DeviceRef:
    """The device of the graph, whatever it is where the graph is unpacked."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    value: Any
    acl_format: int | None


@dataclass(frozen=True, slots=True)
class Parcel:
    """A graph: its nodes in order, and the tensors that it holds itself."""

    nodes: tuple[NodeRecord, ...]
    constants: dict[str, torch.Tensor]


def pack(gm: GraphModule) -> Parcel:
    """A graph as plain data.

    Args:
        gm: an ATen graph of static shapes whose nodes carry ``meta["val"]``.

    Raises:
        ValueError: the graph holds what can't be packed; the message names it.
    """
    constants: dict[str, torch.Tensor] = {}
    nodes = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = _attribute(gm, str(node.target))
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"the graph calls {node.target}, a {type(tensor).__name__}: control flow has no preview"
                )
            if tensor.numel() > LARGEST_CONSTANT:
                raise ValueError(f"the graph holds {node.target} of shape {tuple(tensor.shape)} as a constant")
            constants[str(node.target)] = tensor.detach().cpu()
        elif node.op not in ("placeholder", "call_function", "output"):
            raise ValueError(f"the graph is not at ATen level: {node.format_node()}")
        nodes.append(
            NodeRecord(
                node.name,
                node.op,
                _packed(node.target),
                map_aggregate(node.args, _packed),
                map_aggregate(node.kwargs, _packed),
                _value(node.meta.get("val"), node),
                node.meta.get("acl_format"),
            )
        )
    return Parcel(tuple(nodes), constants)


def unpack(parcel: Parcel, make_fake: Callable[[TensorValue], Any], device: torch.device) -> GraphModule:
    """The graph again.

    Args:
        parcel: what :func:`pack` made.
        make_fake: makes the value of a node.
        device: what stands for the devices that the graph names.

    Raises:
        ValueError: an operator that is not defined here.
    """
    graph = Graph()
    known: dict[str, Node] = {}

    def restored(a: Any) -> Any:
        if isinstance(a, NodeRef):
            return known[a.name]
        if isinstance(a, OpRef):
            return _operator(a)
        return device if isinstance(a, DeviceRef) else a

    for record in parcel.nodes:
        args, kwargs = map_aggregate(record.args, restored), map_aggregate(record.kwargs, restored)
        node = graph.create_node(record.op, restored(record.target), args, kwargs, name=record.name)
        known[record.name] = node
        if record.value is not None:
            node.meta["val"] = map_aggregate(record.value, lambda v: make_fake(v) if isinstance(v, TensorValue) else v)
        if record.acl_format is not None:
            node.meta["acl_format"] = record.acl_format
    root = torch.nn.Module()
    for name, tensor in parcel.constants.items():
        root.register_buffer(name, tensor)
    return GraphModule(root, graph)


def _packed(a: Any) -> Any:
    if isinstance(a, Node):
        return NodeRef(a.name)
    if isinstance(a, OpOverload):
        return OpRef(a._schema.name, a._schema.overload_name or "default")
    if isinstance(a, torch.device):
        return DeviceRef()
    if isinstance(a, HigherOrderOperator):
        raise ValueError(f"the graph calls {a}: control flow and other higher-order operators have no preview")
    return a


def _operator(ref: OpRef) -> Any:
    namespace, _, name = ref.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        raise ValueError(f"the operator {ref.name} is not defined in the process that converts the graph")
    return getattr(packet, ref.overload)


def _value(value: Any, node: Node) -> Any:
    if isinstance(value, torch.Tensor):
        if not all(isinstance(size, int) for size in (*value.shape, *value.stride())):
            raise ValueError(f"{node.name} has the dynamic shape {tuple(value.shape)}; a preview takes static shapes")
        return TensorValue(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_value(v, node) for v in value)
    return value if isinstance(value, int | float | bool) else None


def _attribute(gm: GraphModule, path: str) -> Any:
    value: Any = gm
    for part in path.split("."):
        value = getattr(value, part)
    return value
