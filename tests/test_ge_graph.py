"""GE graphs as data: comparing two of them."""

import re
from dataclasses import replace

import pytest
import torch

import quantpass as qp
from quantpass.lowering.ge_constants import constant_tensor
from quantpass.lowering.ge_graph import GeConstant, GeGraph, GeOp, GeTensor, first_difference, same_up_to_names
from quantpass.lowering.ge_interpreter import interpret

F32 = GeTensor("y", "FLOAT", (2, 2))


def data(name, index, shape=(2, 2)):
    return GeOp(name, "Data", (), {"index": index}, (), (GeTensor("y", "FLOAT", shape),))


def op(name, kind, *inputs, **attrs):
    names = ("x1", "x2", "bias")
    given = tuple(GeTensor(n, "FLOAT") for n in names[: len(inputs)])
    return GeOp(name, kind, tuple((i, 0) if isinstance(i, str) else i for i in inputs), attrs, given, (F32,))


def output(*names):
    tensors = tuple(GeTensor(f"input{i}") for i in range(len(names)))
    return GeOp("NetOutput", "NetOutput", tuple((n, 0) for n in names), {}, tensors, ())


def graph(*ops):
    positions = tuple(o.attrs["index"] for o in ops if o.type == "Data")
    return GeGraph(ops, positions, tuple(range(len(ops[-1].inputs))))


PRODUCT = {"transpose_x1": False, "transpose_x2": False}
A = graph(data("a", 0), data("b", 1), op("MatMul", "MatMul", "a", "b", **PRODUCT), op("Relu", "Relu", "MatMul"),
          op("Add", "Add", "Relu", "a"), output("Add"))  # fmt: skip


def renamed(g):
    new = {o.name: f"n{i}" for i, o in enumerate(g.ops)}
    ops = [
        replace(o, name=new[o.name], inputs=tuple(s and (new[s[0]], s[1]) for s in o.inputs)) for o in reversed(g.ops)
    ]
    order = sorted(ops, key=lambda o: int(o.name[1:]))
    return replace(g, ops=tuple(order))


def changed(g, name, **what):
    return replace(g, ops=tuple(replace(o, **what) if o.name == name else o for o in g.ops))


def test_same_graph_with_other_names():
    assert same_up_to_names(A, renamed(A))
    assert first_difference(A, A) is None


def test_operators_that_nothing_needs_do_not_count():
    dead = op("Cast", "Cast", "a", dst_type=1)
    assert same_up_to_names(A, replace(A, ops=(*A.ops[:-1], dead, A.ops[-1])))


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (changed(A, "Relu", type="Sigmoid"), "Relu and Sigmoid"),
        (changed(A, "MatMul", attrs={**PRODUCT, "transpose_x2": True}), "attribute transpose_x2"),
        (changed(A, "MatMul", inputs=(("b", 0), ("a", 0))), "attribute index"),
        (changed(A, "Add", inputs=(("Relu", 0), ("b", 0))), "input 1: %Add"),
        (changed(A, "Add", inputs=(("Relu", 1), ("a", 0))), "input 0"),
        (changed(A, "a", outputs=(GeTensor("y", "FLOAT", (2, 3)),)), r"f32\[2, 2\] and f32\[2, 3\]"),
        (changed(A, "a", outputs=(GeTensor("y", "FLOAT", (2, 2), "NZ"),)), "f32.*:NZ"),
        (changed(A, "NetOutput", inputs=(("Add", 0), ("Relu", 0))), "1 and 2 inputs"),
    ],
)
def test_the_first_difference(other, where):
    found = first_difference(A, other)
    assert found is not None
    assert re.search(where, found), found
    assert not same_up_to_names(A, other)


def test_sharing_counts():
    shared = graph(data("a", 0), op("Exp", "Exp", "a"), op("Add", "Add", "Exp", "Exp"), output("Add"))
    twice = graph(data("a", 0), op("Exp", "Exp", "a"), op("Exp_1", "Exp", "a"), op("Add", "Add", "Exp", "Exp_1"),
                  output("Add"))  # fmt: skip
    assert "input 1" in first_difference(shared, twice)


def test_constants_by_value():
    def scaled(value):
        constant = GeConstant("FLOAT", (1,), torch.tensor([value]).numpy().tobytes())
        const = GeOp("Const", "Const", (), {"value": constant}, (), (GeTensor("y", "FLOAT", (1,)),))
        return graph(data("a", 0), const, op("Mul", "Mul", "a", "Const"), output("Mul"))

    assert same_up_to_names(scaled(2.0), scaled(2.0))
    assert "attribute value" in first_difference(scaled(2.0), scaled(3.0))
    assert torch.equal(constant_tensor(scaled(3.0)["Const"].attrs["value"]), torch.tensor([3.0]))


def test_interpreting_a_graph():
    x, w = torch.randn(2, 2), torch.randn(2, 2)
    (y,) = interpret(A, (x, w), target="ascend910b")
    assert torch.equal(y, (x @ w).relu() + x)


def test_an_unknown_operator_is_named():
    with pytest.raises(
        NotImplementedError, match=r"GE operator Frobnicate \(at %Frob: f32\[2, 2\] = Frobnicate\(x1=%a"
    ):
        interpret(graph(data("a", 0), op("Frob", "Frobnicate", "a"), output("Frob")), (torch.ones(2, 2),),
                  target="ascend910b")  # fmt: skip


def test_networkx():
    net = A.to_networkx()
    assert set(net.edges) == {("a", "MatMul"), ("b", "MatMul"), ("MatMul", "Relu"), ("Relu", "Add"), ("a", "Add"),
                              ("Add", "NetOutput")}  # fmt: skip
    assert net.nodes["Relu"]["type"] == "Relu"


def test_diff_of_graphs():
    assert qp.diff(A, renamed(changed(A, "Relu", type="Sigmoid")), context=0).count("Sigmoid") == 2
