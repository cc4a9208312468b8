"""What is found of each node of a graph, once, and without a call stack as deep as the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch.fx import Node

T = TypeVar("T")

_DEEPEST = 16
"""How many questions may be nested: with some eight frames each, a small part of Python's stack."""


class _Postponed(BaseException):
    """A question that was too deep to answer; no reader can catch it by accident."""

    def __init__(self, memo: object, node: Node) -> None:
        super().__init__(node)
        self.memo, self.node = memo, node


class NodeMemo(Generic[T]):
    """Answers about nodes; ``find``, always the same, may ask the memo itself about other nodes.

    A question nested too deeply is taken to the outermost call, answered there and then, from the memo, in its place.
    The memo does not keep ``find``: as a rule that is a method of its owner, which would live in a circle with it.
    """

    def __init__(self) -> None:
        self._known: dict[Node, T] = {}
        self._depth = 0

    def __call__(self, node: Node, find: Callable[[Node], T]) -> T:
        if node in self._known:
            return self._known[node]
        if self._depth == _DEEPEST:
            raise _Postponed(self, node)
        if self._depth:
            return self._answer(node, find)
        todo = [node]
        while todo:
            try:
                self._answer(todo[-1], find)
                todo.pop()
            except _Postponed as question:
                if question.memo is not self:
                    raise
                todo.append(question.node)
        return self._known[node]

    def _answer(self, node: Node, find: Callable[[Node], T]) -> T:
        if node not in self._known:
            self._depth += 1
            try:
                self._known[node] = find(node)
            finally:
                self._depth -= 1
        return self._known[node]

    def forget(self, node: Node) -> None:
        """Drop what is known of ``node`` and of what it was found from; it is found anew if it is asked for again."""
        todo = [node]
        for n in todo:
            if self._known.pop(n, None) is not None:
                todo.extend(n.all_input_nodes)
