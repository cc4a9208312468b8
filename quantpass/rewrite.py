"""The one place that edits graphs.

A site is rewritten whole or not at all: if anything fails on the way, every node that was added is taken out again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from quantpass.basics.symbolic import is_one, same_size
from quantpass.graph import expr as ex
from quantpass.graph.constants import ModuleConstants
from quantpass.graph.dump import describe_node
from quantpass.graph.expr import Call, Const, Expr, Recentred, Ref, Size
from quantpass.graph.merge import duplicates
from quantpass.graph.records import Plan
from quantpass.graph.torch_internals import (
    FakeTensorMode,
    contiguous_fake,
    fake_mode_of,
    fake_result,
    is_erased,
    known_contiguous,
    order_key,
    real_tensors,
)
from quantpass.planning.norms import PlannedNorm

aten = torch.ops.aten

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node", "custom")


SHARED = ("inverse_scale", "zero_point", "smooth_scales", "unit_scale", "unit_rows")
"""Constants of which equal ones are one: the parameters of a quantization, and ones."""

_FEW = 1 << 16


class RewriteError(RuntimeError):
    """A plan could not be carried out; the graph is as it was."""


def _inner_calls(e: Call, made: Container[int], twins: Container[Node]) -> Iterator[Call]:
    """``e`` and the calls among its arguments that are not in ``made`` yet, innermost first.

    Not those of codes that have an int8 twin already: what they were made of may have gone into another site.
    """
    stack: list[tuple[Any, bool]] = [(e, False)]
    while stack:
        top, ready = stack.pop()
        if isinstance(top, list | tuple):
            stack.extend((a, False) for a in reversed(top))
        elif isinstance(top, Recentred):
            if top.node not in twins:
                stack.append((top.otherwise, False))
        elif isinstance(top, Call) and id(top) not in made:
            if ready:
                yield top
            else:
                stack.append((top, True))
                stack.extend((a, False) for a in reversed((*top.args, *top.kwargs.values())))


def _is_contiguous(call: Call, inputs: Sequence[torch.Tensor]) -> bool:
    """True where the result of a call is known to be contiguous without asking the operator."""
    if call.target is aten.sym_size.int or not all(isinstance(s, int) for s in call.shape):
        return False
    move = ex.movement_in(call, len(call.shape)) if call.target.is_view else None
    keeps = not call.target.is_view or (move is not None and move.kind in ("same", "reshape"))
    return keeps and all(known_contiguous(i) for i in inputs)


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True where the strides agree wherever they matter; unknown sizes are taken to be greater than one."""
    return all(is_one(s) or same_size(x, y) for s, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def _order_in_memory(t: torch.Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which a tensor is contiguous; None where there is none."""
    return next((p for p in itertools.permutations(range(t.dim())) if known_contiguous(t.permute(p))), None)


class Rewriter:
    """Carries out plans on one graph module.

    Args:
        gm: the graph module.
        add_constant: puts a tensor beside the graph and returns the node that stands for it; None stores it as a
            buffer of ``gm``.
    """

    def __init__(self, gm: GraphModule, add_constant: Callable[[str, torch.Tensor], Node] | None = None) -> None:
        self._gm = gm
        self._graph = gm.graph
        self._add_constant = add_constant or ModuleConstants(gm, {}).add
        placeholders = list(self._graph.find_nodes(op="placeholder"))
        values = [n.meta.get("val") for n in self._graph.nodes]
        self._mode = fake_mode_of([v for v in values if isinstance(v, torch.Tensor)]) or FakeTensorMode()
        devices = [v.device for v in values if isinstance(v, torch.Tensor)]
        self._device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        self._first = placeholders[-1] if placeholders else None
        self._constants: dict[Any, tuple[torch.Tensor, Node]] = {}
        self._made: dict[int, tuple[Expr, Node]] = {}
        self._sizes: dict[tuple[Node, int], Node] = {}
        self._replaced: dict[Node, Node] = {}
        self._int8_twins: dict[Node, Node] = {}
        self._new: list[Node] = []
        self._fused: list[Node] = []

    def apply(self, plan: Plan, site_name: str, like: Node) -> tuple[str, str]:
        """Carry out ``plan``.

        Args:
            plan: what to do.
            site_name: recorded in the new nodes' metadata.
            like: the matmul, whose module path and source line the new nodes take over.

        Returns:
            The consumed nodes and the new ones, as text.

        Raises:
            RewriteError: the plan's value does not have the shape or dtype of what it replaces.
        """
        self._new = []
        made, sizes = dict(self._made), dict(self._sizes)
        try:
            # Constants are made of real tensors, also while a compiler's fake mode is on.
            with real_tensors():
                value = self._in_layout_of(plan.output, self._node(plan.value))
                if plan.int8_codes is not None:
                    self._int8_twins[plan.output] = self._node(plan.int8_codes)
            self._check(plan.output, value)
        except Exception as error:
            for node in reversed(self._new):
                self._graph.erase_node(node)
            self._made, self._sizes = made, sizes
            self._int8_twins.pop(plan.output, None)
            raise RewriteError(f"{site_name}: {type(error).__name__}: {error}") from error
        for node in self._new:
            node.meta.update({k: like.meta[k] for k in _PROVENANCE if k in like.meta})
            node.meta["quantpass"] = site_name
        self._fused.extend(self._new)
        after = "\n".join(describe_node(n) for n in self._new)
        plan.output.replace_all_uses_with(value)
        self._replaced[plan.output] = value
        value.meta["quantpass_replaces"] = plan.output.name
        if plan.output in self._int8_twins:
            self._int8_twins[plan.output].meta["quantpass_codes_of"] = (plan.output.name, plan.int8_shift)
        consumed = self._erase_dead(plan.output)
        return "\n".join(consumed), after

    def apply_norm(self, norm: PlannedNorm) -> bool:
        """Put a norm's operator in place of the norm; False where a site that reads it was not rewritten after all.

        Raises:
            RewriteError: a result of the operator is not what it replaces; what was replaced before it stays so.
        """
        made = [self._made.get(id(call)) for call in norm.quantizers]
        nodes = [found[1] for found in made if found is not None and not is_erased(found[1])]
        if len(nodes) < len(made):
            return False
        name, like = nodes[0].meta["quantpass"], norm.norm.output
        for call, results in norm.quantizations:
            for user in list(self._made[id(call)][1].users):
                self._apply(user, results[user.args[1]], name, like)  # type: ignore[index]
        for node, value in norm.outputs.items():
            if not is_erased(node) and node.users:
                self._apply(node, value, name, like)
        return True

    def _apply(self, output: Node, value: Expr, name: str, like: Node) -> None:
        self.apply(Plan("", output, value, (), {}, "ND"), name, like)

    def finish(self, written_to: Collection[Node] = ()) -> int:
        """Merge what is quantized several times, check the graph and regenerate the module's code.

        Args:
            written_to: nodes that the graph writes to in place.

        Returns:
            How many nodes were merged into an equal one.
        """
        results = set(self._graph.output_node().all_input_nodes)
        pairs = list(duplicates((n for n in self._fused if not is_erased(n)), written_to, results))
        for later, earlier in pairs:
            later.replace_all_uses_with(earlier)
        for later, _ in reversed(pairs):
            self._graph.erase_node(later)
        self._graph.lint()
        self._gm.recompile()
        return len(pairs)

    def _in_layout_of(self, old: Node, new: Node) -> Node:
        """``new`` with the strides of ``old``: views behind it were traced for these, and callers expect them."""
        want, have = old.meta["val"], new.meta["val"]
        if want.dim() != have.dim() or _same_strides(want, have):
            return new
        order = _order_in_memory(want)
        if order is None:
            raise RewriteError(f"{old.name} has strides {want.stride()}, which no order of its dimensions gives")
        if order == tuple(range(have.dim())):
            return self._call(aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
        turned = self._call(aten.permute.default, (new, list(order)), {})
        dense = self._call(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
        back = sorted(range(len(order)), key=lambda d: order[d])
        return self._call(aten.permute.default, (dense, back), {})

    # -- expressions to nodes --------------------------------------------------------------------------------------

    def _node(self, e: Any) -> Any:
        if isinstance(e, Ref):
            return self._current(e.node)
        if isinstance(e, Const):
            return self._constant(e)
        if isinstance(e, Size):
            return self._size(e)
        if isinstance(e, Recentred):
            twin = self._int8_twins.get(e.node)
            return twin if twin is not None else self._node(e.otherwise)
        if not isinstance(e, Call):
            return e
        for inner in _inner_calls(e, self._made, self._int8_twins):  # an expression may be as deep as the graph
            self._made[id(inner)] = (inner, self._emit(inner))
        return self._made[id(e)][1]

    def _current(self, node: Node) -> Node:
        while node in self._replaced:
            node = self._replaced[node]
        if is_erased(node):
            raise RewriteError(f"{node.name} went into another site")
        return node

    def _emit(self, e: Call) -> Node:
        args = tuple(self._arguments(a) for a in e.args)
        kwargs = {k: self._arguments(a) for k, a in e.kwargs.items()}
        target = e.target
        source = args[0] if args and isinstance(args[0], Node) else None
        if target is aten.reshape.default and source is not None and known_contiguous(source.meta["val"]):
            target = aten.view.default
        return self._call(target, args, kwargs, e)

    def _arguments(self, a: Any) -> Any:
        if isinstance(a, list | tuple):
            return [self._arguments(x) for x in a]
        if isinstance(a, Node):
            return self._current(a)
        return self._node(a)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Call | None = None) -> Node:
        inputs: list[Node] = []
        map_aggregate((args, kwargs), lambda x: inputs.append(x) if isinstance(x, Node) else None)
        name = target._schema.name.rpartition("::")[2].strip("_") if isinstance(target, OpOverload) else "result"
        node = self._insert(inputs, lambda: self._graph.create_node("call_function", target, args, kwargs, name=name))
        node.meta["val"] = self._fake(node, inputs, known)
        return node

    def _fake(self, node: Node, inputs: list[Node], known: Call | None) -> Any:
        """What the node's value looks like; asking the operator itself is slow, so only where planning can't say."""
        fakes = [i.meta["val"] for i in inputs if isinstance(i.meta["val"], torch.Tensor)]
        one = isinstance(node.target, OpOverload) and len(node.target._schema.returns) == 1
        if one and known is not None and fakes and _is_contiguous(known, fakes):
            return contiguous_fake(self._mode, known.shape, known.dtype, fakes[0].device)
        args, kwargs = map_aggregate(
            (node.args, dict(node.kwargs)), lambda x: x.meta["val"] if isinstance(x, Node) else x
        )
        return fake_result(self._mode, node.target, args, kwargs)  # type: ignore[arg-type]

    def _insert(self, inputs: list[Node], make: Callable[[], Node]) -> Node:
        """A node placed right after the last of its inputs, so that whoever shares it comes later."""
        after = max(inputs, default=self._first)
        if after is None or after.op == "placeholder":
            after = self._first
        context = self._graph.inserting_after(after) if after is not None else self._graph.inserting_before(None)
        with context:
            node = make()
        self._new.append(node)
        return node

    def _size(self, e: Size) -> Node:
        source = self._current(e.node)
        key = (source, e.dim)
        if key not in self._sizes:
            self._sizes[key] = self._call(aten.sym_size.int, (source, e.dim), {})
        return self._sizes[key]

    def _constant(self, e: Const) -> Node:
        if e.origin is not None:
            return e.origin
        key: Any = id(e.tensor)
        if e.label in SHARED and e.tensor.numel() <= _FEW:
            key = (e.label, e.tensor.dtype, tuple(e.tensor.tolist()))  # so that what reads them can be merged
        if key not in self._constants:
            name = f"quantpass_{e.label or 'constant'}".replace(".", "_")
            tensor = e.tensor.to(self._device)  # it was computed on the CPU
            node = self._add_constant(name, tensor)
            node.meta["val"] = contiguous_fake(self._mode, tensor.shape, tensor.dtype, tensor.device)
            self._constants[key] = (e.tensor, node)
            self._first = max(self._first, node) if self._first is not None else node
        return self._constants[key][1]

    # -- checks and cleaning ---------------------------------------------------------------------------------------

    def _check(self, old: Node, new: Node) -> None:
        want, have = old.meta["val"], new.meta["val"]
        if (
            want.dtype != have.dtype
            or len(want.shape) != len(have.shape)
            or any(
                isinstance(w, int) and isinstance(h, int) and w != h
                for w, h in zip(want.shape, have.shape, strict=True)
            )
        ):
            raise RewriteError(f"the fused value is {describe_node(new)}, the graph has {describe_node(old)}")

    def _erase_dead(self, node: Node) -> list[str]:
        """Erase ``node`` and what only it needed; returns their text in graph order."""
        erased: list[tuple[Any, str]] = []
        todo = [node]
        while todo:
            n = todo.pop()
            if is_erased(n) or n.op != "call_function" or n.is_impure():
                continue
            asserts = [u for u in n.users if u.target is aten._assert_tensor_metadata.default]
            if len(asserts) != len(n.users):
                continue
            for u in asserts:
                self._graph.erase_node(u)
            inputs = list(n.all_input_nodes)
            erased.append((order_key(n), describe_node(n)))
            self._graph.erase_node(n)
            todo.extend(inputs)
        return [text for _, text in sorted(erased, key=lambda pair: pair[0])]
