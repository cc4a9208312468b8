"""The tensors that go with a graph while it is compiled: those it came with, and those that the pass prepared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

from quantpass.graph.torch_internals import checks_guards, is_erased, storage_key


class Constants(ABC):
    """Tensors by the node that stands for them.

    Args:
        given: tensors that the graph came with: the user's parameters and buffers.

    Attributes:
        consulted: those of ``given`` whose values were asked for by :meth:`values_of`.
        keeps_any_layout: tensors without strides (oneDNN's) can be added.
    """

    keeps_any_layout = False

    def __init__(self, given: Mapping[Node, torch.Tensor]) -> None:
        self.given = dict(given)
        self.prepared: dict[Node, torch.Tensor] = {}
        self.consulted: set[Node] = set()
        self._memory = Counter(_storage(t) for t in self.given.values())

    def add(self, name: str, tensor: torch.Tensor) -> Node:
        """A new tensor beside the graph, and the node that stands for it.

        It is copied where it is a view of a tensor that the graph came with: it must not change with that, nor keep it.
        """
        if self._memory[_storage(tensor)]:
            tensor = tensor.clone()
        node = self._add(name, tensor)
        self.prepared[node] = tensor
        return node

    def tensor(self, node: Node) -> torch.Tensor | None:
        """The tensor behind ``node``; None where it is not known when compiling."""
        prepared = self.prepared.get(node)
        return self.given.get(node) if prepared is None else prepared

    def values_of(self, node: Node) -> torch.Tensor | None:
        """As :meth:`tensor`, for who computes something from its values: it holds for as long as they do."""
        if node in self.given:
            self.consulted.add(node)
        return self.tensor(node)

    def drop_unread(self) -> None:
        """Let go of what the pass prepared and nothing reads any more."""
        check = torch.ops.aten._assert_tensor_metadata.default  # of a tensor that is what it is
        for node in [n for n in self.prepared if all(u.target is check for u in n.users)]:
            for user in list(node.users):
                user.graph.erase_node(user)
            del self.prepared[node]
            self._drop(node)

    def owns(self, node: Node) -> bool:
        """True for a tensor that the pass itself prepared."""
        return node in self.prepared

    def replace(self, node: Node, tensor: torch.Tensor) -> None:
        """Let ``node`` stand for ``tensor`` from now on; only for tensors that the pass owns."""
        if node not in self.prepared:
            raise ValueError(f"{node.name} is the user's tensor; only what the pass prepared can be replaced")
        self.prepared[node] = tensor
        self._store(node, tensor)

    def write_to(self, node: Node, tensor: torch.Tensor) -> None:
        """Let the user's tensor ``node`` have the memory of ``tensor`` from now on; it stays the same object."""
        given = self.given[node]
        self._memory[_storage(given)] -= 1
        given.data = tensor
        self._memory[_storage(given)] += 1

    def take_over(self, nodes: Iterable[Node]) -> None:
        """Part with the user's tensors ``nodes``: those that are still read become copies that the pass owns.

        Whoever loads other weights into what is left must not change a part of what a fused operator computes with.
        """
        copies: dict[Hashable, Node] = {}
        for node in sorted(nodes):
            tensor = self.given.pop(node)
            self._memory[_storage(tensor)] -= 1
            if node.users:
                seen_as = (_storage(tensor), tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
                if seen_as not in copies:
                    copies[seen_as] = self.add(node.name, tensor.detach().clone())
                    copies[seen_as].meta = dict(node.meta)
                    if node.op == "get_attr":
                        node.append(copies[seen_as])  # what reads it may come early
                node.replace_all_uses_with(copies[seen_as])
            self._drop(node)

    def _drop(self, node: Node) -> None:
        """Remove a tensor that nothing reads any more."""
        raise NotImplementedError(f"{type(self).__name__} can't part with {node.name}")

    @abstractmethod
    def _add(self, name: str, tensor: torch.Tensor) -> Node: ...

    def _store(self, node: Node, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` where the graph finds it at run time."""
        del node, tensor


def _storage(t: torch.Tensor) -> int:
    """Tensors that are alive share memory where this is equal."""
    return storage_key(t) if t.layout == torch.strided else id(t)


class InputConstants(Constants):
    """New tensors become placeholders at the end of the graph's inputs; the caller appends them at every call.

    Those without strides become attributes of the graph module: a compiler takes no such inputs.
    """

    keeps_any_layout = True

    def __init__(self, gm: GraphModule, given: Mapping[Node, torch.Tensor]) -> None:
        super().__init__(given)
        self._gm, self._graph = gm, gm.graph
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self._last = placeholders[-1] if placeholders else None

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        graph, last = self._graph, self._last
        if tensor.layout != torch.strided:
            attribute = f"{name}_{len(self.prepared)}"
            self._gm.register_buffer(attribute, tensor, persistent=False)
            with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
                return graph.get_attr(attribute)
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
        node.target = node.name  # unique, as the parameter of a function must be
        self._last = node
        return node

    def _drop(self, node: Node) -> None:
        if node is self._last:
            self._last = next((p for p in reversed(self._graph.find_nodes(op="placeholder")) if p is not node), None)
        self._graph.erase_node(node)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What to append to the graph's own inputs."""
        return tuple(t for n, t in self.prepared.items() if n.op == "placeholder")


class ModuleConstants(Constants):
    """New tensors become buffers of the graph module."""

    def __init__(self, gm: GraphModule, given: Mapping[Node, torch.Tensor]) -> None:
        super().__init__(given)
        self._gm = gm
        self._names: dict[str, int] = {}
        self._after = self._last_placeholder()

    def take_over(self, nodes: Iterable[Node]) -> None:
        super().take_over(nodes)
        self._after = self._last_placeholder()  # the copies lie where the originals did, which may be late

    def _last_placeholder(self) -> Node | None:
        return next(iter(reversed(self._gm.graph.find_nodes(op="placeholder"))), None)

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        unique, count = name, self._names.get(name, 0)
        while hasattr(self._gm, unique):
            count += 1
            unique = f"{name}_{count}"
        self._names[name] = count
        # Not in the state dict: prepared weights of another checkpoint are no weights for this graph.
        self._gm.register_buffer(unique, tensor, persistent=False)
        graph = self._gm.graph
        if self._after is not None and is_erased(self._after):  # merged with its like, meanwhile
            self._after = self._last_placeholder()
        with graph.inserting_after(self._after) if self._after else graph.inserting_before(next(iter(graph.nodes))):
            self._after = graph.get_attr(unique)
        return self._after

    def _store(self, node: Node, tensor: torch.Tensor) -> None:
        setattr(self._gm, str(node.target), tensor)

    def _drop(self, node: Node) -> None:
        gm, name = self._gm, str(node.target)
        gm.graph.erase_node(node)
        read = (str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module") and not checks_guards(n))
        if any(name == r or name.startswith(f"{r}.") for r in read):
            return  # under another node, or by a module that is called
        owner, _, attribute = name.rpartition(".")
        delattr(gm.get_submodule(owner), attribute)


def weights_of_fused(graph: Graph, constants: Constants) -> list[Node]:
    """The user's tensors that fused operators compute with, other than through what is computed at run time."""
    fixed: set[Node] = {*constants.given, *constants.prepared}
    found: dict[Node, None] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(i in fixed for i in inputs):
            fixed.add(node)
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "quantpass":
            stack = [i for i in inputs if i in fixed]
            while stack:
                n = stack.pop()
                if n in constants.given:
                    found[n] = None
                stack.extend(n.all_input_nodes)
    return list(found)


def refuse_to_load(gm: GraphModule, names: Iterable[str]) -> None:
    """Make ``load_state_dict`` of ``gm`` raise, before anything is loaded, where it is given one of ``names``."""
    gm.register_load_state_dict_pre_hook(partial(_refuse, frozenset(names)))


def _refuse(names: frozenset[str], module: Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    del module
    found = sorted(name for name in names if prefix + name in state_dict)
    if found:
        raise RuntimeError(
            f"this graph was fused by quantpass from other weights ({len(found)} of those given, e.g. "
            f"{prefix + found[0]}, are part of fused operators): load the checkpoint into the model, export it and "
            "fuse it again"
        )
