"""Finding the quantized matmuls: each has its reading, and what a float model computes has none."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed

from quantpass.graph.records import Weight
from quantpass.graph.static_values import StaticValues
from quantpass.patterns.affine import Affine, NotAffine
from quantpass.patterns.contractions import NoContraction
from quantpass.patterns.net import Net
from quantpass.patterns.sites import _unread_site, find_sites, matmul_name, provenance
from tests.unit.graphs import Traced, node_of

CODES = torch.arange(-32, 32, dtype=torch.int8).reshape(8, 8)
SCALE = torch.linspace(0.1, 0.8, 8)
X = torch.randn(3, 8)


def sites(function, *inputs, known=0):
    t = Traced(function, *inputs, known=known)
    return list(find_sites(t.graph, t.values, t.dialects))


def site(function, *inputs, known=0):
    (found,) = sites(function, *inputs, known=known)
    return found


def rules(reading):
    return [r.rule for r in reading.rejects]


# -- what is a site ----------------------------------------------------------------------------------------------------


def test_a_float_matmul_is_none():
    assert sites(lambda x, w: x @ w, X, torch.randn(8, 4), known=1) == []
    assert sites(lambda x, w: x @ w, X, torch.randn(8, 4)) == []


def test_a_quantized_weight_is_one():
    r = site(lambda x, c, s: x @ (c.float() * s), X, CODES, SCALE, known=2)
    assert isinstance(r.weight, Weight) and isinstance(r.activation, NotAffine) and not r.rejects
    assert r.epilogue.steps == ()
    assert matmul_name(r.node) == "aten.mm"


def test_a_quantized_activation_alone_is_one_with_a_reason():
    r = site(lambda x, w: (x.float() * 0.5) @ w, CODES, torch.randn(8, 4), known=1)
    assert isinstance(r.activation, Affine) and rules(r) == ["read.weight.float"]
    assert r.rejects[0].hint and r.epilogue is None
    r = site(lambda x, w: (x.float() * 0.5) @ (w * 1.0), CODES, torch.randn(8, 4))
    assert rules(r) == ["read.weight.float"] and not r.rejects[0].hint
    r = site(lambda x, w: (x.float() * 0.5) @ w, CODES, torch.randn(8, 4))
    assert r.rejects[0].hint


def test_a_quantized_weight_that_can_not_be_read():
    r = site(lambda x, c, s: x @ (c.float() * s[:, None]), X, CODES, SCALE)
    assert rules(r) == ["read.weight.along_k"] and r.rejects[0].hint


def test_every_matmul_in_graph_order():
    found = sites(lambda x, c, s: (x @ (c.float() * s)) @ (c.float() * s), X, CODES, SCALE, known=2)
    assert [r.node.name for r in found] == ["mm", "mm_1"]


# -- which side --------------------------------------------------------------------------------------------------------


def test_a_weight_on_the_left_is_swapped():
    r = site(lambda x, c, s: (c.float() * s[:, None]) @ x, X.t(), CODES, SCALE, known=2)
    assert isinstance(r.weight, Weight) and r.contraction.rhs_transposed and r.contraction.out_order == (1, 0)
    assert not r.rejects


def test_two_weights_stay_where_they_are():
    r = site(lambda c, d: (c.float() * 0.5) @ (d.float() * 0.25), CODES, CODES + 1, known=2)
    assert not r.contraction.rhs_transposed and isinstance(r.weight, Weight) and isinstance(r.activation, Affine)


def test_a_quantized_left_operand_that_is_computed_is_no_weight():
    r = site(lambda x, w: (x.round().clamp(-8, 7) * 0.5) @ w, X, torch.randn(8, 4), known=1)
    assert not r.contraction.rhs_transposed and rules(r) == ["read.weight.float"]


# -- what stands against a site ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "covered"), [((3, 8), False), ((1, 3, 8), False), ((2, 3, 8), True)])
def test_one_matrix_for_more_batches_than_rows(shape, covered):
    x = torch.randn(shape)
    t = Traced.call(torch.ops.aten.matmul.default, x, CODES.float().expand(2, 8, 8))
    expand, codes = t.inputs[1], CODES
    with t.graph.inserting_before(expand):
        source = t.graph.placeholder("codes")
    with t.graph.inserting_after(expand):
        cast = t.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": torch.float32})
        source.meta["val"], cast.meta["val"] = codes, codes.float()
    with t.graph.inserting_after(cast):
        repeated = t.graph.call_function(torch.ops.aten.expand.default, (cast, [2, 8, 8]))
        repeated.meta["val"] = codes.float().expand(2, 8, 8)
    t.result.args = (t.inputs[0], repeated)
    values = StaticValues(t.graph, {source: codes})
    (r,) = find_sites(t.graph, values, t.dialects)
    assert rules(r) == ([] if covered else ["read.matmul"])


def test_a_result_that_is_written_to():
    t = Traced(lambda x, c: x @ (c.float() * 0.5), X, CODES, known=1)
    with t.graph.inserting_after(t.result):
        t.graph.call_function(torch.ops.aten.add_.Tensor, (t.result, 1.0))
    values = StaticValues(t.graph, {t.inputs[1]: CODES})
    (r,) = find_sites(t.graph, values, t.dialects)
    assert rules(r) == ["read.mutated"]


def test_an_activation_that_does_not_follow_a_transposition():
    r = site(lambda x, c, s: (c.float() * s[:, None]) @ (x.float() * 0.5), CODES, CODES, SCALE, known=2)
    assert isinstance(r.activation, Affine) or r.activation.reason


# -- in words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda c, s: c.float() * 0.5, "int8 per tensor (static)"),
        (lambda c, s: c.float() * s[:, None], "int8 per token (dynamic)"),
        (lambda c, s: c.float() * s, "int8 per column of x (dynamic)"),
        (lambda c, s: c.float(), "int8 codes"),
        (lambda c, s: (c.float() - 3) * 0.5, "asymmetric int8 per tensor (static)"),
        (lambda c, s: c.float() - 3, "asymmetric int8 codes"),
        (lambda c, s: s * s[:, None], "float32"),
    ],
)
def test_activations(function, words):
    r = site(lambda c, s, w: function(c, s) @ (w.float() * 0.5), CODES, SCALE, CODES, known=1)
    assert r.text.startswith(words + " x ")


@pytest.mark.parametrize(
    ("codes", "function", "words"),
    [
        (CODES, lambda c, s: c.float() * s, "int8 per channel"),
        (CODES, lambda c, s: c.float() * 0.5, "int8 per tensor"),
        (CODES, lambda c, s: c.float(), "int8 codes"),
        (CODES, lambda c, s: (c.float() - 3) * s, "asymmetric int8 per channel"),
        (CODES.clamp(-8, 7), lambda c, s: c.float() * s, "int4 per channel"),
        (CODES.clamp(-9, 7), lambda c, s: c.float() * s, "int8 per channel"),
        (CODES.clamp(-8, 8), lambda c, s: c.float() * s, "int8 per channel"),
        (CODES, lambda c, s: c.float() * s[:2].repeat_interleave(4)[:, None], "int8 per group of 4"),
        (CODES, lambda c, s: c.float().exp(), "a weight that is not read"),
    ],
)
def test_weights(codes, function, words):
    found = sites(lambda x, c, s: (x * 0.5) @ function(c, s), CODES.float().round(), codes, SCALE, known=2)
    assert [r.text.split(" x ")[1] for r in found] == [words]


def test_where_a_site_comes_from():
    node = node_of(torch.ones(1), name="mm")
    assert provenance(node) == ("mm", "")
    node.meta["nn_module_stack"] = {"a": ("L['self']", torch.nn.Module), "b": ("L['self'].mlp.up", torch.nn.Linear)}
    node.meta["stack_trace"] = '  File "a.py", line 3, in f\n  File "b.py", line 7, in g\n'
    assert provenance(node) == ("mlp.up", "b.py:7")
    node.meta["stack_trace"] += '  File "c.py", line 9, in h\n'
    assert provenance(node)[1] == "c.py:9"
    node.meta["nn_module_stack"] = {"a": ("L['self']", torch.nn.Module)}
    assert provenance(node)[0] == "mm"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].layers.0.up", "layers.0.up"),
        ("L['self'].layers._modules['0'].up", "layers.0.up"),
        ("L['self']._modules['layers']._modules['0']._modules['up']", "layers.0.up"),
        ("L['self']._modules[\"it's\"]._modules['b']", "it's.b"),
        ("L['model']._modules['10']", "10"),
        ("self._modules['0']", "0"),
        ("L['self'].my_modules['0']", "my_modules['0']"),
    ],
)
def test_a_site_has_its_modules_name_whichever_way_dynamo_writes_it(path, name):
    node = node_of(torch.ones(1), name="mm")
    node.meta["nn_module_stack"] = {"a": (path, torch.nn.Module)}
    assert provenance(node)[0] == name


def test_the_value_of_a_weight_that_has_no_form():
    """What a re-fit would start from: only of a weight that is known, and nothing else in the way."""
    levels = torch.tensor([-1.0, -0.5, 0.1, 0.9])
    codes = torch.arange(64).remainder(4).reshape(8, 8).to(torch.uint8)
    r = site(lambda x, c, t: x @ t[c.long()], X, codes, levels, known=2)
    assert rules(r) == ["read.weight.nonlinear"]
    assert torch.equal(r.own_value().float(), levels[codes.long()])
    turned = site(lambda x, c, t: x @ t[c.long()].t(), X, codes, levels, known=2)
    assert torch.equal(turned.own_value().float(), levels[codes.long()].t())
    assert site(lambda x, c, s: x @ (c.float() * s), X, CODES, SCALE, known=2).own_value is None  # it has a form
    assert site(lambda x, c, s: x @ (c.float() * s[:, None]), X, CODES, SCALE).own_value is None  # not known


def test_a_float_weight_behind_which_codes_are():
    """A sum with something of the run hides the weight: it is named, and so is what hides it."""
    r = site(lambda x, n, c, s: x @ (c.float() * s + n), X, torch.randn(8, 8), CODES, SCALE, known=2)
    assert rules(r) == ["read.weight.runtime"] and "adds something" in r.rejects[0].fact
    assert sites(lambda x, n, c, s: (x * n) @ torch.ones(8, 8), X, torch.randn(8), CODES, SCALE, known=2) == []


def test_a_left_operand_behind_which_codes_are():
    """Stored codes make it a weight, codes of the run an activation."""

    def function(n, x, c, s):
        return (c.float() * s + n) @ x

    inputs = torch.randn(8, 8), X.t(), CODES, SCALE
    r = site(function, *inputs, known=2)
    assert rules(r) == ["read.weight.runtime"] and "adds something" in r.rejects[0].fact
    assert sites(function, *inputs) == []


def test_what_the_graph_says_of_a_zero_point():
    """Bounds of the integers in the activation's zero point, where the graph clamps them."""
    zero = torch.tensor(3.2)

    def function(x, z, c, s, bounded):
        z = (z.round().clamp(-100, 100) if bounded else z.round()).to(torch.int32)
        x = torch.ops.quantized_decomposed.dequantize_per_tensor.tensor(x, s[0], z, -128, 127, torch.int8)
        return x @ (c.float() * s)

    clamped = site(lambda x, z, c, s: function(x, z, c, s, True), CODES, zero, CODES, SCALE, known=2)
    assert (-100, 100) in clamped.ranges.values()
    free = site(lambda x, z, c, s: function(x, z, c, s, False), CODES, zero, CODES, SCALE, known=2)
    assert (-100, 100) not in free.ranges.values()
    assert site(lambda x, c, s: x @ (c.float() * s), X, CODES, SCALE, known=2).ranges == {}


@pytest.mark.parametrize(
    ("certain", "quantized", "found"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_an_operator_that_is_not_read_is_a_site_where_something_is_quantized(certain, quantized, found):
    """By its own name, or by an operand."""
    t = Traced(lambda x, c, s: x @ (c.float() * s), X, CODES, SCALE, known=2)
    net = Net(t.reader)
    operand = t.result.args[1] if quantized else t.inputs[0]
    reading = _unread_site(net, t.result, NoContraction("a form", (operand,), certain=certain))
    assert (reading is not None) == found
    if reading is not None:
        assert rules(reading) == ["read.matmul"]
