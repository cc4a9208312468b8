"""What a graph's static nodes evaluate to.

A node is static where it depends only on tensors that are known when compiling (parameters, buffers, constants) and
on deterministic operators. Its value is found by running it: that is how any spelling of a dequantization can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from quantpass.graph.decode import Decoder
from quantpass.graph.expr import Const, Expr, Ref
from quantpass.graph.instructions import Cast, Move, Part, Round
from quantpass.graph.schema import arguments_of, bind, bind_call
from quantpass.graph.sums import large_sum
from quantpass.graph.torch_internals import can_run, is_wrapper_subclass
from quantpass.graph.writes import written_arguments

aten = torch.ops.aten

SMALL = 1 << 16
"""Values up to this many elements are kept once evaluated; larger ones are evaluated anew."""


PARAMETER_SHARE = 16
"""Tensors with less than this share of a weight's elements are its parameters, not the weight itself."""

_COMMUNICATE = frozenset(("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "_dtensor"))
"""Namespaces of operators that wait for other ranks, who need not be reading the same graph at the moment."""


class StaticValues:
    """Evaluates static nodes of one graph on demand, on the CPU; to be used outside any fake mode and without autograd.

    Args:
        graph: the graph.
        leaves: placeholders and attributes whose tensors are known. Leaves that the graph itself writes to, and every
            view of them, are not static.
    """

    def __init__(self, graph: Graph, leaves: Mapping[Node, torch.Tensor]) -> None:
        self.mutated = _mutated(graph)
        written = {_storage(t) for n, t in leaves.items() if n in self.mutated}
        if written:
            # The same memory under another name.
            self.mutated = _mutated(graph, [n for n, t in leaves.items() if _storage(t) in written])
        self.decode = Decoder()
        self._leaves = {n: t for n, t in leaves.items() if n not in self.mutated}
        self._static: dict[Node, bool] = {}
        self._runs: dict[OpOverload, bool] = {}
        self._kept: dict[Node, Any] = {}
        self._uniform: dict[Node, float | None] = {}
        self.read_leaves: set[Node] = set()

    def leaf(self, node: Node) -> torch.Tensor | None:
        """The tensor behind a placeholder or attribute; None where it is not known, or written to by the graph."""
        return self._leaves.get(node)

    def is_static(self, node: Node) -> bool:
        """True where ``node`` can be evaluated."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._static:
                stack.pop()
            elif top.op in ("placeholder", "get_attr"):
                self._static[top] = top in self._leaves
            else:
                inputs = [(i, self._static.get(i)) for i in top.all_input_nodes]
                missing = [i for i, static in inputs if static is None]
                if any(static is False for _, static in inputs):
                    self._static[top] = False
                elif not missing:
                    self._static[top] = self._is_pure(top)
                stack.extend(missing if top not in self._static else ())
        return self._static[node]

    def _is_pure(self, node: Node) -> bool:
        target = node.target
        if node.op != "call_function" or node in self.mutated or isinstance(target, HigherOrderOperator):
            return False
        if written_arguments(node):
            return False
        if isinstance(target, OpOverload):
            if torch.Tag.nondeterministic_seeded in target.tags or target.namespace in _COMMUNICATE:
                return False
            if target not in self._runs:
                self._runs[target] = can_run(target)
            return self._runs[target]
        return getattr(target, "__module__", "") == "_operator"

    def value(self, node: Node) -> Any:
        """The value of a static node, computed as the graph computes it."""
        return self._evaluate(node, {}, None)

    def widened(self, node: Node, replaced: Mapping[Node, torch.Tensor] | None = None) -> torch.Tensor:
        """The value of a static node with the arithmetic on tensors of its size done in float64.

        Integers, what is rounded to them, and parameters (scales, zero points: what is small, or made of no integers)
        are taken as the graph computes them: they are what the graph uses.

        Args:
            node: what to evaluate.
            replaced: nodes whose value is to be taken from here instead.
        """
        values = dict(replaced or {})
        todo, seen = [node], {node}
        taken = self.taken_as_it_is(node)
        while todo:
            n = todo.pop()
            if n in values:
                continue
            if taken(n):
                values[n] = _as(self.value(n), torch.float64)
                continue
            todo.extend(i for i in n.all_input_nodes if i not in seen)
            seen.update(n.all_input_nodes)
        result: torch.Tensor = self._evaluate(node, values, torch.float64)
        return result

    def taken_as_it_is(self, node: Node) -> Callable[[Node], bool]:
        """Tells of what ``node`` is computed from: is it taken as the graph computes it, not widened?"""
        least = node.meta["val"].numel() // PARAMETER_SHARE
        carriers = self._carriers_of_codes(node, least)

        def taken(n: Node) -> bool:
            return n is not node and (self._makes_integers(n) or _is_smaller(n, least) or n not in carriers)

        return taken

    def _makes_integers(self, n: Node) -> bool:
        """True for a cast or rounding of floats to integers."""
        fake = n.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return False
        if isinstance(self.decode(n), Round):
            return True
        inputs = (i.meta.get("val") for i in n.all_input_nodes)
        return not fake.dtype.is_floating_point and any(
            isinstance(i, torch.Tensor) and i.is_floating_point() for i in inputs
        )

    def _carriers_of_codes(self, node: Node, least: int) -> set[Node]:
        """``node`` and what it is computed from through which integers, at least ``least`` of them, reach it."""
        order, _ = self._cone(node, {})
        carriers = {node}
        for n in order:
            fake = n.meta.get("val")
            integers = isinstance(fake, torch.Tensor) and not fake.dtype.is_floating_point and fake.numel() >= least
            if integers or self._makes_integers(n) or any(i in carriers for i in n.all_input_nodes):
                carriers.add(n)
        return carriers

    def expr(self, node: Node) -> Expr:
        """A constant where ``node`` is static, else a reference to it."""
        if not self.is_static(node):
            return Ref(node)
        value = self.value(node)
        return Const(value, origin=node if node.op != "call_function" else None, label=node.name)

    def uniform(self, node: Any) -> float | None:
        """The one number that every element of ``node`` has, where that follows from how it was made, else None.

        Covers constants that have the shape of an activation (``zeros_like(amax)``), which are not static.
        """
        if isinstance(node, int | float) and not isinstance(node, bool):
            return node
        if not isinstance(node, Node):
            return None
        moved: list[Node] = []  # views and casts on the way to where the number comes from
        source: Any = node
        while isinstance(source, Node) and source not in self._uniform and source not in self.mutated:
            # It holds one number where its input does, and no other way is tried.
            instruction = self.decode(source)
            if not isinstance(instruction, Move | Part | Cast):
                break
            moved.append(source)
            source = instruction.source
        if not isinstance(source, Node):
            number = self.uniform(source)
        else:
            if source not in self._uniform:
                self._uniform[source] = self._find_uniform(source)
            number = self._uniform[source]
        for n in reversed(moved):
            if number is not None and "val" in n.meta:
                number = as_dtype(number, n.meta["val"].dtype)
            self._uniform[n] = number
        return number

    def _find_uniform(self, node: Node) -> float | None:
        fake = node.meta.get("val")
        if node in self.mutated or (isinstance(fake, torch.Tensor) and not _holds_numbers(fake)):
            return None
        if isinstance(node.target, OpOverload):
            name = node.target._schema.name
            arguments = bind(node)
            if name in ("aten::zeros_like", "aten::zeros", "aten::new_zeros"):
                return 0
            if name in ("aten::ones_like", "aten::ones", "aten::new_ones"):
                return 1
            if name in ("aten::full_like", "aten::full", "aten::new_full"):
                fill = arguments["fill_value"]
                if isinstance(fill, Node) or "val" not in node.meta or node.meta["val"].dtype == torch.bool:
                    return None
                return as_dtype(fill, node.meta["val"].dtype)
        if self.is_static(node) and not _is_large(fake):
            value = self.value(node)
            if isinstance(value, torch.Tensor) and 0 < value.numel() <= SMALL and value.dtype != torch.bool:
                flat = value.reshape(-1)
                first = flat[0].item()
                if first == flat[-1].item() and bool((flat == first).all()):
                    return first
        return None

    def _evaluate(self, node: Node, replaced: Mapping[Node, torch.Tensor], wide: torch.dtype | None) -> Any:
        if wide is None and node in self._kept:
            return self._kept[node]
        if wide is None and node.op in ("placeholder", "get_attr"):
            return self.leaf_value(node)
        order, uses = self._cone(node, replaced)
        env: dict[Node, Any] = {}
        for n in order:
            env[n] = self._run(n, env, replaced, wide)
            for i in n.all_input_nodes if n not in replaced else ():
                uses[i] -= 1
                if not uses[i]:
                    del env[i]
        result = env[node]
        if wide is None and (not isinstance(result, torch.Tensor) or result.numel() <= SMALL):
            self._kept[node] = result
        return result

    def _cone(self, node: Node, replaced: Mapping[Node, torch.Tensor]) -> tuple[list[Node], dict[Node, int]]:
        """The nodes that ``node`` needs, in order of evaluation, and how often each is used."""
        order: list[Node] = []
        uses: dict[Node, int] = {}
        stack = [(node, False)]
        while stack:
            n, ready = stack.pop()
            if ready:
                order.append(n)
            elif n not in uses:
                uses[n] = 0
                stack.append((n, True))
                if n not in replaced:
                    stack.extend((i, False) for i in n.all_input_nodes)
        for n in order:
            for i in n.all_input_nodes if n not in replaced else ():
                uses[i] += 1
        return order, uses

    def _run(
        self, n: Node, env: dict[Node, Any], replaced: Mapping[Node, torch.Tensor], wide: torch.dtype | None
    ) -> Any:
        if n in replaced:
            return replaced[n]
        if n.op in ("placeholder", "get_attr"):
            value = self.leaf_value(n)
            return value.to(wide) if wide and value.is_floating_point() else value
        return call(n, env, wide)

    def leaf_value(self, leaf: Node) -> torch.Tensor:
        """The plain tensor behind a static placeholder or attribute, from now on one that decisions rest on."""
        self.read_leaves.add(leaf)
        value = self._leaves[leaf].detach().cpu()  # an NPU has no float64
        # Of a tool's own parameter class only the data matters.
        return value if type(value) is torch.Tensor else value.as_subclass(torch.Tensor)


def call(n: Node, env: Mapping[Node, Any], wide: torch.dtype | None) -> Any:
    """What the operator of ``n`` makes of the values in ``env``, on a CPU; floating numbers in ``wide`` if given."""
    args, kwargs = map_aggregate((n.args, dict(n.kwargs)), lambda a: _on_cpu(env[a] if isinstance(a, Node) else a))
    if n.target is aten.sum.dim_IntList and (found := large_sum(bind_call(n.target, args, kwargs))) is not None:
        return found
    if wide is None or not isinstance(n.target, OpOverload):
        return n.target(*args, **kwargs)  # type: ignore[operator]
    return _run_wide(n, args, kwargs, wide)


def _holds_numbers(fake: torch.Tensor) -> bool:
    """True for real numbers (and booleans) that PyTorch computes with: not complex, not quantized, not float8."""
    exotic = fake.dtype.is_complex or fake.is_quantized or fake.layout != torch.strided
    return not exotic and (fake.dtype.itemsize > 1 or fake.dtype in (torch.int8, torch.uint8, torch.bool))


def _is_large(fake: Any) -> bool:
    return isinstance(fake, torch.Tensor) and isinstance(fake.numel(), int) and fake.numel() > SMALL


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _storage(t: torch.Tensor) -> Any:
    """What tensors that share memory have in common."""
    if t.layout != torch.strided or is_wrapper_subclass(t):
        return id(t)
    return t.untyped_storage().data_ptr() or id(t)


def as_dtype(number: float, dtype: torch.dtype) -> float:
    """What becomes of ``number`` in a tensor of ``dtype``: a one-element tensor says so."""
    return torch.tensor(number, dtype=torch.float64).to(dtype).item()


def _is_smaller(n: Node, least: int) -> bool:
    fake = n.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.numel() < least


def _run_wide(n: Node, args: Any, kwargs: Any, wide: torch.dtype) -> Any:
    """Run one operator with floating dtypes among its arguments replaced by ``wide``."""
    target: Any = n.target
    if target is aten.view.dtype:  # a bit cast is of the narrow type
        return target(*args, **kwargs)

    names = [name for name, _ in arguments_of(target)]
    for dtype in (wide, torch.float32):  # a tool's own operator may know no float64

        def widen(a: Any, dtype: torch.dtype = dtype) -> Any:
            if isinstance(a, torch.dtype) and a.is_floating_point:
                return dtype
            return a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a

        try:
            result = target(*(widen(a) for a in args), **{k: widen(v) for k, v in kwargs.items() if k in names})
            return _as(result, wide)
        except Exception:  # whatever an operator of some tool raises on a dtype that it does not take
            continue
    # An operator that has no kernel for a wider type runs in its own; its result is widened.
    narrow = [v.meta["val"] if isinstance(v, Node) and "val" in v.meta else None for v in n.args]
    own = [
        a.to(m.dtype) if isinstance(a, torch.Tensor) and isinstance(m, torch.Tensor) else a
        for a, m in zip(args, narrow, strict=True)
    ]
    return _as(target(*own, **kwargs), wide)


def _as(result: Any, wide: torch.dtype) -> Any:
    return result.to(wide) if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def _mutated(graph: Graph, more: Sequence[Node] = ()) -> frozenset[Node]:
    """Nodes whose value some node of the graph writes to and ``more``, with every node that may share their memory."""
    seeds: list[Node] = [*more]
    for n in graph.nodes:
        written = written_arguments(n)
        if written:
            seeds.extend((*written, n))
    reached: set[Node] = set()
    while seeds:
        n = seeds.pop()
        if n in reached:
            continue
        reached.add(n)
        seeds.extend(u for u in n.users if _may_alias(u))
        if _may_alias(n):
            seeds.extend(n.all_input_nodes)
    return frozenset(reached)


def _may_alias(n: Node) -> bool:
    if isinstance(n.target, OpOverload):
        # Those three may return their input, or its memory, though their schemas do not say so.
        silent = (aten._unsafe_view.default, aten._to_copy.default, aten.dropout.default)
        return any(r.alias_info is not None for r in n.target._schema.returns) or n.target in silent
    return getattr(n.target, "__module__", "") == "_operator"
