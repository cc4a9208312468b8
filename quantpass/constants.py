"""The tensors that go with a graph while it is compiled: those it came with, and those that the pass prepared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node


class Constants(ABC):
    """Tensors by the node that stands for them.

    Args:
        given: tensors that the graph came with: the user's parameters and buffers.
    """

    def __init__(self, given: Mapping[Node, torch.Tensor]) -> None:
        self.given = dict(given)
        self.prepared: dict[Node, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> Node:
        """A new tensor beside the graph, and the node that stands for it.

        It is copied where it is a view of a tensor that the graph came with: it must not change with that, nor keep it.
        """
        if any(_storage(tensor) == _storage(t) for t in self.given.values()):
            tensor = tensor.clone()
        node = self._add(name, tensor)
        self.prepared[node] = tensor
        return node

    def tensor(self, node: Node) -> torch.Tensor | None:
        """The tensor behind ``node``; None where it is not known when compiling."""
        prepared = self.prepared.get(node)
        return self.given.get(node) if prepared is None else prepared

    def owns(self, node: Node) -> bool:
        """True for a tensor that the pass itself prepared."""
        return node in self.prepared

    def replace(self, node: Node, tensor: torch.Tensor) -> None:
        """Let ``node`` stand for ``tensor`` from now on; only for tensors that the pass owns."""
        if node not in self.prepared:
            raise ValueError(f"{node.name} is the user's tensor; only what the pass prepared can be replaced")
        self.prepared[node] = tensor
        self._store(node, tensor)

    @abstractmethod
    def _add(self, name: str, tensor: torch.Tensor) -> Node: ...

    def _store(self, node: Node, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` where the graph finds it at run time."""
        del node, tensor


def _storage(t: torch.Tensor) -> int:
    """Tensors that are alive share memory where this is equal."""
    return int(t.untyped_storage()._cdata) if t.layout == torch.strided else id(t)


class InputConstants(Constants):
    """New tensors become placeholders at the end of the graph's inputs; the caller appends them at every call."""

    def __init__(self, gm: GraphModule, given: Mapping[Node, torch.Tensor]) -> None:
        super().__init__(given)
        self._graph = gm.graph
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self._last = placeholders[-1] if placeholders else None

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        del tensor
        graph, last = self._graph, self._last
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
        node.target = node.name  # unique, as the parameter of a function must be
        self._last = node
        return node

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What to append to the graph's own inputs."""
        return tuple(self.prepared.values())


class ModuleConstants(Constants):
    """New tensors become buffers of the graph module."""

    def __init__(self, gm: GraphModule, given: Mapping[Node, torch.Tensor]) -> None:
        super().__init__(given)
        self._gm = gm
        self._names: dict[str, int] = {}
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self._after = placeholders[-1] if placeholders else None

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        unique, count = name, self._names.get(name, 0)
        while hasattr(self._gm, unique):
            count += 1
            unique = f"{name}_{count}"
        self._names[name] = count
        self._gm.register_buffer(unique, tensor)
        graph = self._gm.graph
        with graph.inserting_after(self._after) if self._after else graph.inserting_before(next(iter(graph.nodes))):
            self._after = graph.get_attr(unique)
        return self._after

    def _store(self, node: Node, tensor: torch.Tensor) -> None:
        setattr(self._gm, str(node.target), tensor)
