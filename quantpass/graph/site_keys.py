"""Which matmul of a model a site is: one that is compiled several times, for several shapes, is one site.

A module path does not tell: modules compiled one by one have the same. The largest tensor that the matmul's operands
were computed from does; where none is known, the frame that Dynamo compiled and the node's name stand in.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quantpass.graph.torch_internals import StorageWeakRef, frame_of


class Token:
    """The memory of one tensor, as long as it lives and afterwards: equal to no other tensor's, and keeps none alive.

    On a device, where a cast gives a parameter other memory, the tensor object. (Not on a CPU: a tensor that is
    referred to weakly can't be swapped by ``torch.utils.swap_tensors``.)
    """

    __slots__ = ("_place", "_ref")

    def __init__(self, tensor: torch.Tensor) -> None:
        on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
        # Python makes one reference object for each tensor; a storage's address is not used again while one is held.
        ref: Any = StorageWeakRef(tensor.untyped_storage()) if on_cpu else weakref.ref(tensor)
        self._ref = ref
        self._place: tuple[Any, ...] = (ref.cdata, tensor.storage_offset()) if on_cpu else (id(ref),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    def __copy__(self) -> Token:
        return self

    def __deepcopy__(self, memo: Any) -> Token:
        return self

    def __reduce__(self) -> Any:
        return (type(None), ())  # means nothing in another process


def site_keys(gm: GraphModule, sites: Collection[Node], leaves: Mapping[Node, torch.Tensor]) -> dict[Node, Hashable]:
    """What tells each site's matmul from every other of the process; None where nothing does.

    Args:
        gm: the graph, not yet rewritten.
        sites: the matmuls.
        leaves: placeholders and attributes whose tensors are known.
    """
    if not sites:
        return {}
    frame = frame_of(gm)
    known = origins(gm.graph, leaves)
    seen: Counter[Hashable] = Counter()
    keys: dict[Node, Hashable] = {}
    for node in sites:
        weights = [n for i in node.all_input_nodes for n in known.get(i) or ()]
        largest = max(weights, key=lambda n: leaves[n].nbytes, default=None)
        if largest is not None:
            what: Hashable = Token(leaves[largest])
        elif frame is not None:
            what = (frame, node.name)
        else:
            keys[node] = None
            continue
        key = (_module(node), what)
        keys[node] = (*key, seen[key])
        seen[key] += 1
    return keys


def origins(graph: Graph, leaves: Mapping[Node, torch.Tensor]) -> dict[Node, frozenset[Node] | None]:
    """For each node the parameters that it was computed from; None where an input of the user's is among its inputs."""
    found: dict[Node, frozenset[Node] | None] = {}
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), torch.Tensor) and node not in leaves:
            found[node] = frozenset()  # sizes are no tensors
        elif node.op in ("placeholder", "get_attr"):
            found[node] = frozenset((node,)) if node in leaves else None
        else:
            inputs = [found[i] for i in node.all_input_nodes]
            found[node] = None if None in inputs else frozenset[Node]().union(*inputs)  # type: ignore[arg-type]
    return found


def _module(node: Node) -> str:
    """Dynamo's number of the module whose forward made the node, or an empty string."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack))) if stack else ""
