"""Argument-complete reading: a reader names every argument of its operator, or is refused."""

import operator

import pytest
import torch
from torch.fx import Graph

from quantpass.graph.schema import (
    REQUIRED,
    ReaderTable,
    arguments_of,
    bind,
    call_reader,
    op_name,
    qualified_name,
)

aten = torch.ops.aten


def call(target, *args, **kwargs):
    graph = Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args), kwargs)


def test_arguments_with_their_defaults():
    assert arguments_of(aten.add.Tensor) == (("self", REQUIRED), ("other", REQUIRED), ("alpha", 1))
    assert repr(REQUIRED) == "<required>"


def test_bind_fills_in_the_defaults():
    node = call(aten.add.Tensor, 3)
    assert bind(node) == {"self": node.args[0], "other": 3, "alpha": 1}
    assert bind(call(aten.add.Tensor, 3, alpha=2))["alpha"] == 2


def test_readers_are_called_with_every_argument():
    def read(first, *, self, other, alpha):
        return first, other, alpha

    assert call_reader(read, call(aten.add.Tensor, 3), "first") == ("first", 3, 1)


def test_an_argument_called_input_has_another_name_for_readers():
    def read(*, input_, p, train):
        return p

    assert call_reader(read, call(aten.dropout.default, 0.5, False)) == 0.5
    assert ReaderTable({aten.dropout.default: read}, leading=0).get(aten.dropout.default) is read


@pytest.mark.parametrize("reader", [lambda *, self, other: None, lambda *, self, other, alpha, more: None])
def test_a_reader_that_misses_or_invents_an_argument_is_refused(reader):
    with pytest.raises(TypeError, match="must name every argument"):
        ReaderTable({aten.add.Tensor: reader}, leading=0)


def test_a_parameter_with_a_default_may_be_one_that_a_version_lacks():
    def read(*, self, other, alpha, newer=None):
        return alpha, newer

    table = ReaderTable({aten.add.Tensor: read}, leading=0)
    assert call_reader(table.get(aten.add.Tensor), call(aten.add.Tensor, 3)) == (1, None)


def test_leading_parameters_are_the_callers():
    def read(graph, *, self):
        return graph

    assert ReaderTable({aten.relu.default: read}, leading=1).get(aten.relu.default) is read
    with pytest.raises(TypeError):
        ReaderTable({aten.relu.default: read}, leading=0)


def test_operators_by_name():
    def read(*, self):
        return None

    table = ReaderTable({"aten::relu": read, "aten::add.Tensor": read, "tool::missing": read}, leading=0)
    assert table.get(aten.relu.default) is read
    assert table.get(aten.neg.default) is None
    assert table.get(operator.add) is None
    with pytest.warns(UserWarning, match="does not know this version"):
        assert table.get(aten.add.Tensor) is None
    assert set(table.readers()) == {"aten::relu", "aten::add.Tensor", "tool::missing", aten.relu.default}


def test_merged_tables_have_one_reader_for_each_operator():
    def read(*, self):
        return None

    table = ReaderTable({aten.relu.default: read}, leading=0)
    assert table.merged({aten.neg.default: read}).get(aten.neg.default) is read
    with pytest.raises(ValueError, match="two readers for aten"):
        table.merged({aten.relu.default: read})


def test_names():
    assert qualified_name(aten.add.Tensor) == "aten::add.Tensor"
    assert qualified_name(aten.relu.default) == "aten::relu"
    assert op_name(call(aten.add.Tensor, 1)) == "aten.add.Tensor"
    assert op_name(call(aten.relu.default)) == "aten.relu"
    assert op_name(call(torch.ops.higher_order.out_dtype)) == "out_dtype"
    assert op_name(call(operator.getitem, 0)) == "getitem"
