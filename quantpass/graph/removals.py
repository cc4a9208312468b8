"""How many operators of a graph its plans take away, before anything is rewritten."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Expr, Recentred, Ref, Size


class Removals:
    """Counts what is left of a graph while one value after the other is replaced by an expression."""

    def __init__(self, graph: Graph) -> None:
        self._users: dict[Node, set[Any]] = {n: {*n.users} for n in graph.nodes}
        self._made: list[Call] = []  # held, so that no id is used twice
        self._known: set[int] = set()

    def of(self, output: Node, value: Expr) -> int:
        """How many operators fewer there are once ``value`` stands for ``output``; operators on constants are none."""
        added = sum(1 for call in self._new_calls(value))
        readers = self._users.get(output, set())
        for leaf in ex.leaves_of(value):
            node = leaf if isinstance(leaf, Node) else leaf.node if isinstance(leaf, Ref | Size) else None
            if node in self._users:
                # What reads the replaced value reads this now; one that nobody reads is a result.
                self._users[node].update(readers or {value})
        return self._taken(output) - added

    def _new_calls(self, value: Any) -> list[Call]:
        todo, found = [value], []
        while todo:
            top = todo.pop()
            if isinstance(top, list | tuple):
                todo.extend(top)
            elif isinstance(top, Recentred):
                todo.append(top.otherwise)
            elif isinstance(top, Call) and id(top) not in self._known:
                self._known.add(id(top))
                self._made.append(top)
                arguments = (*top.args, *top.kwargs.values())
                todo.extend(arguments)
                if not all(isinstance(x, Const) for x in ex.leaves_of(list(arguments))):
                    found.append(top)
        return found

    def _taken(self, output: Node) -> int:
        taken, todo = 0, [output]
        while todo:
            node = todo.pop()
            if self._users.pop(node, None) is None:
                continue
            taken += node.op == "call_function"
            for given in node.all_input_nodes:
                if given in self._users:
                    self._users[given].discard(node)
                    if not self._users[given]:
                        todo.append(given)
        return taken
