"""A report counts a matmul once, however often it is compiled, and never two as one."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.graph.site_keys import Token
from tests.helpers import StaticW8A8, WeightOnly


def rows(n, dtype=torch.float16):
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype)


def blocks(n=3):
    """Layers of one class and size, each with weights of its own."""
    model = nn.Sequential(*(WeightOnly(64, 64) for _ in range(n)))
    for i, layer in enumerate(model):
        layer.codes.data = layer.codes.roll(i, 0)
    return model


def called(backend, *models_and_sizes, dynamic=None):
    torch._dynamo.reset()
    with torch.no_grad():
        for model, sizes in models_and_sizes:
            run = torch.compile(model, backend=backend, dynamic=dynamic)
            for n in sizes:
                run(rows(n))
    return backend.report


@pytest.mark.parametrize("dynamic", [None, False])
def test_three_shapes_are_one_model(dynamic):
    report = called(qp.backend(target="ascend910b"), (blocks(), (2, 5, 9)), dynamic=dynamic)
    assert (report.fused, report.total) == (3, 3)
    assert [s.name for s in report.sites] == ["0", "1", "2"]
    compilations = {len(s.compilations) for s in report.sites}
    assert compilations == {3 if dynamic is False else 2}
    assert len(report.graphs) == compilations.pop()
    assert f"3 of 3 quantized matmuls fused, in {len(report.graphs)} compilations" in str(report)
    assert str(report).count("float activation x") == 3
    report.require(fused=1.0)
    report.require(fused=3)
    with pytest.raises(AssertionError, match="3 of 3 quantized matmuls are fused, 4 were required"):
        report.require(fused=4)
    data = report.as_dict()
    assert (data["fused"], data["total"], len(data["sites"]), len(data["formats"])) == (3, 3, 3, 3)
    assert all(s["compilations"] == [True] * len(report.graphs) for s in data["sites"])
    json.dumps(data)


def test_weights_are_totalled_once():
    one = called(qp.backend(target="ascend910b"), (blocks(), (2,)), dynamic=False)
    three = called(qp.backend(target="ascend910b"), (blocks(), (2, 5, 9)), dynamic=False)
    assert [line for line in str(one).splitlines() if line.startswith("total")] == [
        line for line in str(three).splitlines() if line.startswith("total")
    ]
    assert {f.copies for f in three.formats} == {1}


def test_tensors_that_the_pass_prepares_are_there_for_each_compilation():
    """uint8 codes are stored as int8 anew: each compilation keeps its own, and the total says so."""

    class Unsigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(0, 256, (64, 64), dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, (self.codes.half() - 128) * 0.01)

    report = called(qp.backend(target="ascend910b"), (Unsigned(), (2, 5, 9)), dynamic=False)
    (row,) = report.formats
    assert (row.copies, row.bytes_before) == (3, 64 * 64)
    assert "3 copies, one for each compilation" in str(report)
    (total,) = [line.split() for line in str(report).splitlines() if line.startswith("total")]
    assert total == ["total", "12.0", "12.0"]


@pytest.mark.parametrize("sizes", [(2,), (2, 5)])
def test_modules_compiled_one_by_one_are_not_merged(sizes):
    """They share a code object, and their nodes have the same names."""
    model = blocks(12)
    report = called(qp.backend(target="ascend910b"), *((layer, sizes) for layer in model))
    assert (report.fused, report.total) == (12, 12)
    assert len({s.name for s in report.sites}) == 1
    assert len(report.formats) == 12


def test_a_module_made_where_another_one_was_is_another():
    backend = qp.backend(target="ascend910b")
    total = 0
    for _ in range(4):
        total = called(backend, (WeightOnly(64, 64), (2,))).total
    assert total == 4


def test_a_layer_that_is_called_twice_is_two_matmuls_of_one_weight():
    layer = WeightOnly(64, 64)
    report = called(qp.backend(target="ascend910b"), (nn.Sequential(layer, nn.Tanh(), layer), (2, 5)))
    assert (report.fused, report.total) == (2, 2)
    (row,) = report.formats
    assert row.bytes_before == 64 * 64


def test_two_parameters_of_one_tensor_are_one_weight():
    model = blocks(2)
    model[1].codes.data = model[0].codes.data
    report = called(qp.backend(target="ascend910b"), (model, (2, 5)), dynamic=False)
    assert (report.fused, report.total) == (2, 2)
    (total,) = [line.split() for line in str(report).splitlines() if line.startswith("total")]
    assert total == ["total", "4.0", "4.0"]


def test_functions_whose_weights_are_inputs():
    def f(x, codes, scale):
        return x @ (codes.to(x.dtype) * scale).t()

    layer = WeightOnly(64, 64)
    backend = qp.backend(target="ascend910b")
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(f, backend=backend, dynamic=False)
        for n in (2, 5):
            run(rows(n), layer.codes.detach(), layer.scale.detach())
    assert (backend.report.fused, backend.report.total) == (1, 1)
    assert len(backend.report.sites[0].compilations) == 2


class Sized(nn.Module):
    """Float32 for long inputs: the same weight, refused there."""

    def __init__(self):
        super().__init__()
        self.layer = WeightOnly(64, 64, bias=False)

    def forward(self, x):
        return self.layer(x.float() if x.shape[0] > 4 else x)


@pytest.mark.parametrize("sizes", [(2, 9), (9, 2)])
def test_a_site_refused_in_one_compilation_is_refused_and_says_so(sizes):
    report = called(qp.backend(target="ascend910b"), (Sized(), sizes), dynamic=False)
    (site,) = report.sites
    assert not site.fused
    assert site.compilations == (sizes == (2, 9), sizes == (9, 2))
    assert "numerics.float16" in {r.rule for r in site.rejects}
    assert "(fused in 1 of 2 compilations)" in str(report)
    assert "Why not:" in str(report)
    with pytest.raises(AssertionError, match="0 of 1"):
        report.require()
    assert report.as_dict()["sites"][0]["compilations"] == list(site.compilations)


def test_explain_counts_a_layer_behind_graph_breaks_once():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WeightOnly(64, 64)

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
                torch._dynamo.graph_break()
            return x

    report = qp.explain(Looped(), (rows(2),), target=["ascend310p", "ascend910b"])
    assert report["ascend310p"].total == report["ascend910b"].total
    names = [s.name for s in report["ascend910b"].sites]
    assert report["ascend910b"].total <= 3, names


def test_weights_that_change_are_the_same_matmul():
    """Fused anew for new values: still one site."""
    model, backend = WeightOnly(64, 64), qp.backend(target="ascend910b")
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(model, backend=backend)
        run(rows(2))
        model.codes.copy_(-model.codes)
        run(rows(2))
    assert (backend.report.fused, backend.report.total) == (1, 1)


def test_reports_of_two_models_add_up():
    a = called(qp.backend(target="ascend910b"), (blocks(2), (2,)))
    b = called(qp.backend(target="ascend910b"), (nn.Sequential(StaticW8A8(64, 64)), (2,)))
    assert (a + b).total == 3
    assert (a + a).total == 2, "the same compilation, told twice"


def test_a_tokens_identity_outlives_its_tensor():
    a, b = torch.zeros(3), torch.zeros(3)
    of_a, of_b = Token(a), Token(b)
    assert of_a == Token(a) != of_b
    assert hash(of_a) == hash(Token(a))
    assert copy.deepcopy(of_a) == of_a
    del a
    assert all(Token(torch.zeros(3)) != of_a for _ in range(20))
    assert pickle.loads(pickle.dumps(of_a)) is None


def test_a_report_can_be_copied():
    report = called(qp.backend(target="ascend910b"), (blocks(1), (2,)))
    assert (report + copy.copy(report)).total == 1
