"""How many operators of a graph its plans take away, before anything is rewritten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, Node

from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Expr, Recentred, Ref, Size

_OF_THE_RUN = (Ref, Recentred, Size, Node)


class Removals:
    """Counts what is left of a graph while one value after the other is replaced by an expression."""

    def __init__(self, graph: Graph) -> None:
        self._users: dict[Node, set[Any]] = {n: {*n.users} for n in graph.nodes}
        self._made: list[Call] = []  # held, so that no id is used twice
        self._runs: dict[int, bool] = {}

    def of(self, output: Node, value: Expr) -> int:
        """How many operators fewer there are once ``value`` stands for ``output``; operators on constants are none."""
        added = self._add(value)
        readers = self._users.get(output, set())
        for leaf in ex.leaves_of(value):
            node = leaf if isinstance(leaf, Node) else leaf.node if isinstance(leaf, Ref | Size) else None
            if node in self._users:
                # What reads the replaced value reads this now; one that nobody reads is a result.
                self._users[node].update(readers or {value})
        return self._taken(output) - added

    def _add(self, value: Any) -> int:
        """How many operators of ``value`` run, of those that were not in another one before."""
        added = 0
        todo: list[tuple[Any, bool]] = [(value, False)]
        while todo:
            top, ready = todo.pop()
            if ready:
                self._runs[id(top)] = runs = self._any_runs((*top.args, *top.kwargs.values()))
                added += runs
            elif isinstance(top, list | tuple):
                todo.extend((x, False) for x in top)
            elif isinstance(top, Recentred):
                todo.append((top.otherwise, False))
            elif isinstance(top, Call) and id(top) not in self._runs:
                self._made.append(top)
                self._runs[id(top)] = True  # until its arguments are known
                todo.append((top, True))
                todo.extend((x, False) for x in (*top.args, *top.kwargs.values()))
        return added

    def _any_runs(self, arguments: Iterable[Any]) -> bool:
        """True where an argument is known only when the graph runs, so that the operator is not computed before."""
        return any(
            self._any_runs(a) if isinstance(a, list | tuple) else self._runs.get(id(a), isinstance(a, _OF_THE_RUN))
            for a in arguments
        )

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
