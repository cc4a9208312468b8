"""Carrying out plans: a site is rewritten whole or not at all, and what it shares is made once."""

import operator

import pytest
import torch

from quantpass import rewrite
from quantpass.graph import expr as ex
from quantpass.graph.expr import Call, Const, Recentred, Ref, Size
from quantpass.graph.records import Plan
from quantpass.graph.torch_internals import contiguous_fake as fake
from quantpass.rewrite import RewriteError, Rewriter
from quantpass.verify_graph import _untrue_values
from tests.unit.graphs import Traced

aten = torch.ops.aten
X = torch.randn(3, 4)


def plan(output, value, int8_codes=None):
    return Plan("op", output, value, (), {}, "ND", int8_codes=int8_codes)


def targets(t):
    return [n.target for n in t.graph.nodes if n.op == "call_function"]


def rewritten(t, *plans, written_to=()):
    rewriter = Rewriter(t.gm)
    for p in plans:
        rewriter.apply(p, "site", p.output)
    merged = rewriter.finish(written_to)
    return merged


def test_a_value_takes_the_place_of_a_node_and_of_what_only_it_needed():
    t = Traced(lambda x: (x * 2.0 + 1.0).relu(), X)
    relu = t.result
    (add,) = t.calls(aten.add.Tensor)
    add.meta["nn_module_stack"], add.meta["stack_trace"] = {"a": ("m", None)}, "trace"
    rewriter = Rewriter(t.gm)
    before, after = rewriter.apply(
        plan(add, ex.mul(Ref(t.inputs[0]), Const(torch.tensor([3.0, 4.0, 5.0, 6.0])))), "mlp.up", add
    )
    rewriter.finish()
    assert targets(t) == [aten.mul.Tensor, aten.relu.default]
    new = relu.args[0]
    assert new.meta["quantpass"] == "mlp.up" and new.meta["quantpass_replaces"] == "add"
    assert new.meta["nn_module_stack"] == {"a": ("m", None)} and new.meta["stack_trace"] == "trace"
    assert [line.split(":")[0] for line in before.split("\n")] == ["%mul", "%add"]
    assert "mul" in after
    assert torch.equal(t.gm(X), (X * torch.tensor([3.0, 4.0, 5.0, 6.0])).relu())


def test_what_others_need_stays():
    t = Traced(lambda x: (x * 2.0, x * 2.0 + 1.0), X)
    (add,) = t.calls(aten.add.Tensor)
    assert rewritten(t, plan(add, ex.mul(Ref(t.inputs[0]), Const(torch.full((4,), 3.0))))) == 0
    assert aten.add.Tensor not in targets(t) and targets(t).count(aten.mul.Tensor) >= 2


def test_asserts_of_what_is_gone_go_with_it():
    t = Traced(lambda x: (x * 2.0 + 1.0).relu(), X)
    (mul,) = t.calls(aten.mul.Tensor)
    (add,) = t.calls(aten.add.Tensor)
    with t.graph.inserting_after(mul):
        t.graph.call_function(aten._assert_tensor_metadata.default, (mul,))
    rewritten(t, plan(add, ex.neg(Ref(t.inputs[0]))))
    assert targets(t) == [aten.neg.default, aten.relu.default]


def test_a_node_that_is_needed_twice_goes_once():
    t = Traced(lambda x: ((x * 2.0).exp() + (x * 2.0).exp()).relu(), X)
    (add,) = t.calls(aten.add.Tensor)
    first, second = add.args
    second.replace_all_uses_with(first, propagate_meta=False)
    rewritten(t, plan(add, ex.neg(Ref(t.inputs[0]))))
    assert aten.add.Tensor not in targets(t) and first._erased


def test_a_node_of_two_paths_that_goes_is_gone_for_both():
    """Erased through one of its users, it is not looked at again through the other."""
    t = Traced(lambda x: ((x * 2.0) + (x * 2.0).relu()) * 3.0, X)
    first, second = t.calls(aten.mul.Tensor)[:2]
    second.replace_all_uses_with(first)
    t.graph.erase_node(second)
    before, _ = Rewriter(t.gm).apply(plan(t.result, ex.neg(Ref(t.inputs[0]))), "site", t.result)
    assert [line.split(":")[0] for line in before.split("\n")] == ["%mul", "%relu", "%add", "%mul_2"]
    assert targets(t) == [aten.neg.default]


def test_impure_nodes_stay():
    t = Traced(lambda x: (x * 2.0 + 1.0).relu(), X)
    (mul,) = t.calls(aten.mul.Tensor)
    (add,) = t.calls(aten.add.Tensor)
    with t.graph.inserting_after(mul):
        written = t.graph.call_function(aten.add_.Tensor, (mul, 1.0))
    written.meta["val"] = mul.meta["val"]
    add.args = (written, 1.0)
    rewritten(t, plan(add, ex.neg(Ref(t.inputs[0]))))
    assert aten.add_.Tensor in targets(t)


@pytest.mark.parametrize("value", [
    lambda x: ex.cast(Ref(x), torch.float16), lambda x: ex.reshape(Ref(x), (4, 3)), lambda x: ex.reshape(Ref(x), (12,)),
    lambda x: Call(aten.mm.default, (Ref(x), Ref(x)), {}, torch.float32, (3, 4, 1)),
])  # fmt: skip
def test_a_value_of_another_form_leaves_the_graph_as_it_was(value):
    t = Traced(lambda x: (x * 2.0).relu(), X)
    before = t.gm.print_readable(print_output=False)
    (mul,) = t.calls(aten.mul.Tensor)
    rewriter = Rewriter(t.gm)
    with pytest.raises(RewriteError, match="mlp"):
        rewriter.apply(plan(mul, value(t.inputs[0])), "mlp", mul)
    rewriter.finish()
    assert t.gm.print_readable(print_output=False) == before
    # and the next site is not disturbed
    rewriter.apply(plan(mul, ex.neg(Ref(t.inputs[0]))), "site", mul)
    rewriter.finish()
    assert torch.equal(t.gm(X), (-X).relu())


def test_an_expression_that_two_sites_share_is_made_once():
    t = Traced(lambda x: (x * 2.0, x * 3.0), X)
    first, second = t.calls(aten.mul.Tensor)
    shared = Call(aten.exp.default, (Ref(t.inputs[0]),), {}, torch.float32, (3, 4))
    rewritten(
        t, plan(first, ex.neg(shared)), plan(second, Call(aten.relu.default, (shared,), {}, torch.float32, (3, 4)))
    )
    assert targets(t).count(aten.exp.default) == 1
    a, b = t.gm(X)
    assert torch.equal(a, -X.exp()) and torch.equal(b, X.exp().relu())


def test_a_constant_that_two_sites_share_is_stored_once():
    t = Traced(lambda x: (x * 2.0, x * 3.0), X)
    first, second = t.calls(aten.mul.Tensor)
    stored = Const(torch.tensor([3.0, 4.0, 5.0, 6.0]), label="mlp.scale")
    rewritten(t, plan(first, ex.mul(Ref(t.inputs[0]), stored)), plan(second, ex.sub(Ref(t.inputs[0]), stored)))
    attributes = [n for n in t.graph.nodes if n.op == "get_attr"]
    assert [n.target for n in attributes] == ["quantpass_mlp_scale"]
    a, b = t.gm(X)
    assert torch.equal(a, X * stored.tensor) and torch.equal(b, X - stored.tensor)


@pytest.mark.parametrize(
    ("label", "other", "size", "stored"),
    [
        ("inverse_scale", torch.float32, 4, 1),
        ("zero_point", torch.float32, 4, 1),
        ("unit_scale", torch.float32, 4, 1),
        ("unit_rows", torch.float32, 4, 1),
        ("scale", torch.float32, 4, 2),
        ("zero_point", torch.float32, 1 << 17, 2),
    ],
)
def test_equal_parameters_of_a_quantization_are_stored_once(label, other, size, stored):
    """So that what reads them can be merged; not other constants, nor those that take long to compare."""
    x = torch.randn(2, size)
    t = Traced(lambda x: (x * 2.0, x * 3.0), x)
    a, b = (Const(torch.full((size,), 0.5, dtype=dtype), label=label) for dtype in (torch.float32, other))
    rewritten(
        t,
        *(plan(r, ex.cast(ex.mul(Ref(t.inputs[0]), c), torch.float32)) for r, c in zip(t.results, (a, b), strict=True)),
    )
    assert len(list(t.gm.buffers())) == stored
    assert all(torch.equal(y, x * 0.5) for y in t.gm(x))


def test_a_tensor_of_the_graph_is_used_as_it_is():
    t = Traced(lambda x, w: x * 2.0 + w, X, torch.ones(4))
    (mul,) = t.calls(aten.mul.Tensor)
    rewritten(t, plan(mul, ex.mul(Ref(t.inputs[0]), Const(torch.ones(4), t.inputs[1], "w"))))
    assert not [n for n in t.graph.nodes if n.op == "get_attr"]
    assert t.calls(aten.mul.Tensor)[0].args[1] is t.inputs[1]


def test_a_site_reads_what_an_earlier_one_became():
    t = Traced(lambda x: (x * 2.0).relu(), X)
    (mul,), relu = t.calls(aten.mul.Tensor), t.result
    rewritten(t, plan(mul, ex.neg(Ref(t.inputs[0]))), plan(relu, ex.neg(ex.neg(ex.cast(Ref(mul), torch.float32)))))
    assert torch.equal(t.gm(X), -X)
    t = Traced(lambda x: (x * 2.0).relu(), X)
    (mul,), relu = t.calls(aten.mul.Tensor), t.result
    rewritten(
        t,
        plan(mul, ex.neg(Ref(t.inputs[0]))),
        plan(relu, Call(aten.cat.default, ([Ref(mul)], 0), {}, torch.float32, (3, 4))),
    )
    assert torch.equal(t.gm(X), -X)


def test_codes_made_from_int8_ones_are_read_as_those():
    t = Traced(lambda x: ((x * 2.0).round().clamp(0, 255).to(torch.uint8)).to(torch.float32) - 128.0, X)
    (codes,) = t.calls(aten._to_copy.default)[:1]
    int8 = Call(aten._to_copy.default, (Ref(t.inputs[0]),), {"dtype": torch.int8}, torch.int8, (3, 4))
    uint8 = ex.cast(Call(aten.add.Scalar, (ex.cast(int8, torch.int32), 128), {}, torch.int32, (3, 4)), torch.uint8)
    otherwise = Call(aten.neg.default, (Ref(codes),), {}, torch.int8, (3, 4))
    less = t.result
    rewritten(t, plan(codes, uint8, int8), plan(less, ex.cast(Recentred(codes, otherwise), torch.float32)))
    assert aten.neg.default not in targets(t)
    assert torch.equal(t.gm(X), X.to(torch.int8).float())
    # where the codes were not made from int8 ones, they are moved down in the graph
    t = Traced(lambda c: c.to(torch.float32) - 128.0, torch.zeros(3, 4, dtype=torch.uint8))
    moved = Call(aten.sub.Scalar, (ex.cast(Ref(t.inputs[0]), torch.int32), 128), {}, torch.int32, (3, 4))
    rewritten(t, plan(t.result, ex.cast(Recentred(t.inputs[0], moved), torch.float32)))
    assert aten.sub.Scalar in targets(t)


def test_sizes_of_the_run():
    t = Traced(lambda x: (x * 2.0).view(x.shape[0] * x.shape[1]), X, symbolic=True)
    (mul,) = t.calls(aten.mul.Tensor)
    x = t.inputs[0]
    m, n = x.meta["val"].shape
    value = ex.reshape(ex.reshape(ex.neg(Ref(x)), (Size(x, 1, n), Size(x, 0, m))), (Size(x, 0, m), Size(x, 1, n)))
    rewritten(t, plan(mul, value))
    assert torch.equal(t.gm(X), (-X).flatten())
    assert sum(n.target is aten.sym_size.int and n.args[1] == 0 for n in t.graph.nodes) <= 2


def test_contiguous_values_are_viewed_and_others_reshaped():
    t = Traced(lambda x: (x * 2.0).view(12), X)
    rewritten(t, plan(t.result, ex.reshape(Ref(t.inputs[0]), (12,))))
    assert targets(t) == [aten.view.default]
    t = Traced(lambda x: (x.t() * 2.0).reshape(12), X)
    turned = Call(aten.transpose.int, (Ref(t.inputs[0]), 0, 1), {}, torch.float32, (4, 3))
    rewritten(t, plan(t.result, ex.reshape(turned, (12,))))
    assert targets(t) == [aten.transpose.int, aten.reshape.default]
    assert torch.equal(t.gm(X), X.t().reshape(12))


def test_what_is_quantized_twice_is_merged():
    fused = torch.ops.quantpass.pack_int4.default

    def function(x):
        return (x * 2.0).to(torch.int8).float(), (x * 2.0).to(torch.int8).float()

    x = torch.randn(3, 8)
    t = Traced(function, x)
    results = t.results
    plans = []
    for r in results:
        codes = r.args[0]
        packed = Call(fused, (Ref(codes),), {}, torch.int32, (3, 1))
        plans.append(
            plan(r, ex.cast(Call(aten.expand.default, (packed, [3, 8]), {}, torch.int32, (3, 8)), torch.float32))
        )
    merged = rewritten(t, *plans)
    assert merged >= 2
    assert targets(t).count(aten.mul.Tensor) == 1
    t = Traced(function, x)
    plans = [
        plan(
            r,
            ex.cast(
                Call(
                    aten.expand.default,
                    (Call(fused, (Ref(r.args[0]),), {}, torch.int32, (3, 1)), [3, 8]),
                    {},
                    torch.int32,
                    (3, 8),
                ),
                torch.float32,
            ),
        )
        for r in t.results
    ]
    assert rewritten(t, *plans, written_to={t.inputs[0]}) < merged


def test_new_nodes_come_after_all_inputs():
    t = Traced(lambda x, y: (x * 2.0) + y, X, X)
    (mul,) = t.calls(aten.mul.Tensor)
    rewritten(t, plan(mul, ex.neg(Ref(t.inputs[0]))))
    assert [n.op for n in t.graph.nodes][:2] == ["placeholder", "placeholder"]


def test_constants_lie_where_the_graph_computes():
    for device in ("cpu", "meta"):
        t = Traced(lambda x: x * 2.0, X.to(device))
        rewritten(t, plan(t.result, ex.mul(Ref(t.inputs[0]), Const(torch.tensor([3.0, 4.0, 5.0, 6.0]), label="scale"))))
        assert t.gm.get_buffer("quantpass_scale").device.type == device


@pytest.mark.parametrize(
    ("build", "target"),
    [
        (lambda x: (x * 2.0).t().contiguous(), aten.clone.default),
        (lambda x: (x * 2.0).t(), aten.permute.default),
        (lambda x: (x * 2.0).unsqueeze(0).permute(2, 0, 1), aten.permute.default),
    ],
)
def test_a_value_gets_the_strides_of_what_it_replaces(build, target):
    """The same elements in another order of memory: a copy where the original is dense, a turned copy where it is not."""
    t = Traced(build, X)
    output = t.result
    want = output.meta["val"]
    source = Ref(t.inputs[0])
    if target is aten.clone.default:
        value = ex.permute(source, (1, 0))
    else:
        dense = ex.reshape(source, tuple(want.shape)) if want.dim() == 3 else ex.reshape(source, (4, 3))
        value = dense
    rewritten(t, plan(output, value))
    (result,) = t.graph.output_node().all_input_nodes
    assert result.target is target
    assert result.meta["val"].stride() == want.stride()
    (given,) = t.graph.output_node().args[0] if isinstance(t.graph.output_node().args[0], tuple) else [result]
    assert t.gm(X).stride() == want.stride() and given is result


def test_a_value_with_the_right_strides_is_not_copied():
    t = Traced(lambda x: (x * 2.0).relu(), X)
    rewritten(t, plan(t.result, ex.mul(Ref(t.inputs[0]), Const(torch.full((4,), 3.0)))))
    assert targets(t) == [aten.mul.Tensor]


# -- what a new node looks like ----------------------------------------------------------------------------------------


def turned(x):
    return ex.permute(x, (1, 0))


def row_of_ones(x):
    """As many ones as ``x`` has rows, which only the run knows."""
    rows = Call(aten.sym_size.int, (x, -2), {}, torch.int64, ())
    return Call(aten.expand.default, (Const(torch.ones(1)), [rows]), {}, torch.float32, x.node.meta["val"].shape[:1])


def scale_of(x):
    """The second result of an operator that has two."""
    both = Call(torch.ops.quantpass.dynamic_quant.default, (x,), {}, torch.int8, (3, 4))
    return Call(operator.getitem, (both, 1), {}, torch.float32, (3,))


LOOKS = [
    # function, what replaces it, the same in PyTorch, how many of the new nodes' looks planning knows
    (lambda x: x * 2.0, ex.neg, lambda x: -x, 1),
    (lambda x: x.view(12) * 2.0, lambda x: ex.neg(ex.reshape(x, (12,))), lambda x: -x.view(12), 2),
    (lambda x: x.t() * 2.0, lambda x: ex.neg(turned(x)), lambda x: -x.t(), 0),
    (lambda x: x.half().abs().amax(-1).float(), scale_of, lambda x: x.abs().amax(-1) / 127, 0),
]


def test_new_nodes_look_like_what_their_operators_give(monkeypatch):
    """Asking an operator is slow: it is asked where views, memory order or several results leave something open."""
    believed = []
    monkeypatch.setattr(
        rewrite, "contiguous_fake", lambda mode, shape, *a: believed.append(shape) or fake(mode, shape, *a)
    )
    for function, value, same, known in LOOKS:
        believed.clear()
        x = X.half() if value is scale_of else X
        t = Traced(function, x)
        rewritten(t, plan(t.result, value(Ref(t.inputs[0]))))
        assert list(_untrue_values(t.gm)) == []
        assert len(believed) == known
        torch.testing.assert_close(t.gm(x), same(x.float() if value is scale_of else x))


def test_sizes_that_only_the_run_knows_are_asked_for():
    t = Traced(lambda x: x[:, 0] * 2.0, X, symbolic=True)
    rewritten(t, plan(t.result, row_of_ones(Ref(t.inputs[0]))))
    assert list(_untrue_values(t.gm)) == []
    assert torch.equal(t.gm(torch.randn(7, 4)), torch.ones(7))
    t = Traced(lambda x: x * 2.0, X, symbolic=True)
    rewritten(t, plan(t.result, ex.neg(Ref(t.inputs[0]))))
    assert list(_untrue_values(t.gm)) == []
