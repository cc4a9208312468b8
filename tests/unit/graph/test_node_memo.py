"""Answers about nodes, without a call stack as deep as the graph."""

import operator
import sys

import pytest
from torch.fx import Graph

from quantpass.graph.node_memo import NodeMemo


def chain(length):
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(length):
        nodes.append(graph.call_function(len, (nodes[-1],)))
    return nodes


def depth_of(nodes, counted=None):
    def find(node):
        if counted is not None:
            counted.append(node)
        return 0 if node.op == "placeholder" else 1 + memo(node.args[0], find)

    memo = NodeMemo()
    return memo(nodes[-1], find)


def test_a_chain_longer_than_the_stack():
    assert depth_of(chain(3 * sys.getrecursionlimit())) == 3 * sys.getrecursionlimit()


def test_what_is_known_is_not_found_again():
    asked = []
    memo = NodeMemo()

    def find(n):
        asked.append(n)
        return len(asked)

    (x, y) = chain(1)
    assert memo(x, find) == memo(x, find) == 1 and memo(y, find) == 2 and asked == [x, y]


def test_short_chains_are_answered_in_one_go():
    counted = []
    assert depth_of(chain(10), counted) == 10
    assert len(counted) == len(set(counted))


def test_two_memos_that_ask_each_other():
    nodes = chain(400)

    def even(node):
        return True if node.op == "placeholder" else odd(node.args[0], other)

    def other(node):
        return False if node.op == "placeholder" else evens(node.args[0], even)

    evens, odd = NodeMemo(), NodeMemo()
    assert evens(nodes[-1], even) is True and evens(nodes[-2], even) is False and odd(nodes[-2], other) is True


def test_an_error_leaves_the_memo_usable():
    (x, y) = chain(1)
    failing = [True]

    def find(node):
        if failing[0]:
            raise ValueError("unreadable")
        return node

    memo = NodeMemo()
    with pytest.raises(ValueError, match="unreadable"):
        memo(y, find)
    failing[0] = False
    assert memo(y, find) is y
    deep = chain(100)
    assert depth_of(deep) == 100 and x.op == "placeholder"


def test_what_is_forgotten_is_found_anew():
    graph = Graph()
    x = graph.placeholder("x")
    y, other = graph.call_function(operator.neg, (x,)), graph.call_function(operator.abs, (x,))
    asked, memo = [], NodeMemo()

    def find(node):
        asked.append(node)
        return [node, *(memo(i, find) for i in node.all_input_nodes)]

    found = memo(y, find), memo(other, find)
    memo.forget(y)
    assert asked == [y, x, other]
    assert (memo(y, find), memo(other, find)) == found
    assert asked[3:] == [y, x]
