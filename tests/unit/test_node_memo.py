"""Answers about nodes, without a call stack as deep as the graph."""

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
        return 0 if node.op == "placeholder" else 1 + memo(node.args[0])

    memo = NodeMemo(find)
    return memo(nodes[-1])


def test_a_chain_longer_than_the_stack():
    assert depth_of(chain(3 * sys.getrecursionlimit())) == 3 * sys.getrecursionlimit()


def test_what_is_known_is_not_found_again():
    asked = []
    memo = NodeMemo(lambda n: asked.append(n) or len(asked))
    (x, y) = chain(1)
    assert memo(x) == memo(x) == 1 and memo(y) == 2 and asked == [x, y]


def test_short_chains_are_answered_in_one_go():
    counted = []
    assert depth_of(chain(10), counted) == 10
    assert len(counted) == len(set(counted))


def test_two_memos_that_ask_each_other():
    nodes = chain(400)

    def even(node):
        return True if node.op == "placeholder" else odd(node.args[0])

    def other(node):
        return False if node.op == "placeholder" else evens(node.args[0])

    evens, odd = NodeMemo(even), NodeMemo(other)
    assert evens(nodes[-1]) is True and evens(nodes[-2]) is False and odd(nodes[-2]) is True


def test_an_error_leaves_the_memo_usable():
    (x, y) = chain(1)
    failing = [True]

    def find(node):
        if failing[0]:
            raise ValueError("unreadable")
        return node

    memo = NodeMemo(find)
    with pytest.raises(ValueError, match="unreadable"):
        memo(y)
    failing[0] = False
    assert memo(y) is y
    deep = chain(100)
    assert depth_of(deep) == 100 and x.op == "placeholder"
