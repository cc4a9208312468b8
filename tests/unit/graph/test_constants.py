"""Tensors beside a graph: what shares memory with a tensor of the user's is copied, and nothing else."""

import pytest
import torch
from torch.fx import Graph, GraphModule

from quantpass.graph.constants import ModuleConstants


@pytest.fixture
def held():
    """The constants of a graph that reads one tensor of the user's, its node, and the tensor."""
    module = torch.nn.Module()
    module.register_buffer("w", torch.arange(6.0))
    graph = Graph()
    node = graph.get_attr("w")
    graph.output(node)
    gm = GraphModule(module, graph)
    return ModuleConstants(gm, {node: gm.w}), node, gm.w


def is_copied(constants, tensor):
    return constants.tensor(constants.add("new", tensor)).data_ptr() != tensor.data_ptr()


def test_a_view_of_a_given_tensor_is_copied(held):
    constants, _, w = held
    assert is_copied(constants, w.view(2, 3))
    assert not is_copied(constants, torch.ones(6))


def test_memory_that_a_given_tensor_gets_later_is_the_users_too(held):
    """A weight that is laid out anew in place."""
    constants, node, w = held
    before, after = w.data, torch.ones(6)
    assert not is_copied(constants, after)
    constants.write_to(node, after)
    assert w.data_ptr() == after.data_ptr()
    assert is_copied(constants, after.view(2, 3))
    assert not is_copied(constants, before)


def test_what_was_taken_over_is_the_users_no_longer(held):
    constants, node, w = held
    constants.take_over([node])
    assert not is_copied(constants, w)
