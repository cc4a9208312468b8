"""A report counts a matmul once, however often it is compiled, and never two as one."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.graph.site_keys import Token
from quantpass.report.folding import fold
from quantpass.report.worth import worth
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
    assert "{0..2} x3" in str(report) and str(report).count("float16 x int8") == 1
    assert report.text(sites=True).count("float16 x int8") == 3
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
    assert total == ["total", "12.0", "KiB", "12.0", "KiB"]


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
    assert total == ["total", "4.0", "KiB", "4.0", "KiB"]


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
    assert "Why not, and what to change" in str(report)
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


# -- what people read --------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, group=0):
        super().__init__()
        self.attn = nn.ModuleDict({"q": WeightOnly(64, 64), "k": WeightOnly(64, 64)})
        self.down = Grouped() if group else WeightOnly(64, 64)

    def forward(self, x):
        return self.down(self.attn["q"](x) + self.attn["k"](x))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-8, 8, (64, 2, 32), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(64, 2, 1).half() * 0.01 + 0.01, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.codes.to(x.dtype) * self.scale).flatten(1))


class DynamicW8A8(nn.Module):
    """Scales behind an integer matmul, one for each row as the run finds it."""

    def __init__(self):
        super().__init__()
        codes = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
        self.codes, self.scale = nn.Parameter(codes, requires_grad=False), nn.Parameter(torch.rand(64) * 0.01)

    def forward(self, x):
        row = x.abs().amax(-1, keepdim=True).float() / 127
        codes = (x / row).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(codes, self.codes.t()).float() * row * self.scale).half()


def test_layers_that_are_alike_are_one_row_and_reasons_are_told_once():
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(group=i % 2) for i in range(4)))
    report = qp.explain(model, (rows(2),), target=["ascend310p", "ascend910b"])
    assert report.text(width=120).splitlines()[1:] == EXPECTED.splitlines()[1:]
    assert report.text(sites=True).count("x int8 per channel") == 10
    assert all(len(line) <= 80 for line in report.text(width=80).splitlines())


def test_a_narrow_terminal_has_a_paragraph_a_site_and_loses_no_verdict():
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(group=i % 2) for i in range(4)))
    lines = qp.explain(model, (rows(2),), target=["ascend310p", "ascend910b"]).text(width=60).splitlines()
    assert all(len(line) <= 60 for line in lines)
    begin = lines.index("{1,3}.down x2")
    assert lines[begin + 1 : begin + 4] == [
        "  float16 x int4 per group of 32; 64 x 64",
        "  ascend310p: not fused, see 1",
        "  ascend910b: WQMM ND, exact",
    ]


EXPECTED = """
  ascend310p: 10 of 12 quantized matmuls fused
    12 of 12 with allow=('weights.refit',), SQNR at least 45.1 dB
  ascend910b: 12 of 12 quantized matmuls fused

site                  quantized as                    K x N    ascend310p        ascend910b
-----------------------------------------------------------------------------------------------
{0..3}.attn.{q,k} x8  float16 x int8 per channel      64 x 64  WQMM NZ, exact    WQMM NZ, exact
{0,2}.down x2         float16 x int8 per channel      64 x 64  WQMM NZ, exact    WQMM NZ, exact
{1,3}.down x2         float16 x int4 per group of 32  64 x 64  not fused, see 1  WQMM ND, exact
(WQMM: npu_weight_quant_batchmatmul; NZ: weight in FRACTAL_NZ)

Why not, and what to change (most sites first):
  1. 2 sites on ascend310p: {1,3}.down x2
     wqmm.310p.group
       found:  antiquant_group_size is 32
       wanted: no groups
       source: LinearWeightQuant.md, parameters: antiquant_group_size is not supported on the Atlas inference series
     weights.refit
       found:  the chip has no form for the weight
       wanted: a weight that is known when compiling, and an SQNR of its re-fit of at least 30 dB in each column, or
               what allow asks for
       source: docs/semantics.md, 9 (re-fitted weights, and float16)
     change: quantize per channel for this chip; documents and code disagree here: allow=('wqmm.310p.group',) permits it
     change: allow=('weights.refit',) would have it fused

Saved at each run, one token when decoding (counted, not measured):
  - ascend310p: weights read: 40.0 KiB in place of 200.0 KiB, 5.0 times less (unfused, 80.0 KiB of float16 weights are
    made of the codes, written and read)
  - ascend310p: operators: 30 fewer in the graph for 10 matmuls
  - ascend910b: weights read: 44.0 KiB in place of 236.0 KiB, 5.4 times less (unfused, 96.0 KiB of float16 weights are
    made of the codes, written and read)
  - ascend910b: operators: 38 fewer in the graph for 12 matmuls

Notes:
  - {1,3}.down x2 on ascend910b: the weight stays in ND: wqmm.nz.int4.group.weight: weight is in FRACTAL_NZ, transposed
"""


def test_numbers_fold_where_all_combinations_are_there():
    def folded(*names):
        return [p.name + p.times for p in fold(names, str, lambda _: None)]

    assert folded("a.0.b", "a.1.b", "a.2.b", "a.4.b") == ["a.{0..2,4}.b x4"]
    assert folded(*(f"l.{i}.e.{j}.up" for i in range(2) for j in range(3))) == ["l.{0..1}.e.{0..2}.up x6"]
    assert folded("l.0.e.0", "l.0.e.1", "l.1.e.0") == ["l.0.e.{0..1} x2", "l.1.e.0"]
    assert folded("mm", "mm_1", "mm_2", "conv2d", "conv3d") == ["mm", "mm_{1..2} x2", "conv2d", "conv3d"]
    assert folded("f", "f", "f") == ["f x3"]


@pytest.mark.parametrize(
    ("model", "dtype", "scheme"),
    [
        (WeightOnly(64, 64), torch.float16, "float16 x int8 per channel"),
        (Grouped().bfloat16(), torch.bfloat16, "bfloat16 x int4 per group of 32"),
        (StaticW8A8(64, 64), torch.float16, "int8 per tensor (static) x int8 per channel"),
        (DynamicW8A8(), torch.float16, "int8 per token (dynamic) x int8 per channel"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_schemes_are_told_in_words(model, dtype, scheme):
    """Wherever the graph multiplies by the scales: before the matmul, or behind it."""
    (site,) = qp.explain(model, (rows(32, dtype),), target="ascend910b").sites
    assert site.reading == scheme


def test_what_is_saved_is_counted_from_the_graph():
    report = qp.explain(blocks(3), (rows(2),), target="ascend910b")
    (found,) = worth(report.sites, report.targets)
    assert (found.stored, found.floats, found.moved) == (3 * 64 * 64, 3 * 2 * 64 * 64, 3 * 5 * 64 * 64)


def test_operators_saved_are_those_that_the_rewrite_takes_away():
    """Casts to FRACTAL_NZ aside: these are carried out once."""

    def operators(graph):
        casts = graph.find_nodes(op="call_function", target=torch.ops.quantpass.format_cast.default)
        return sum(n.op == "call_function" for n in graph.nodes) - len(casts)

    program = torch.export.export(blocks(3), (rows(2),))
    before = operators(program.graph)
    report = qp.fuse(program, target="ascend910b")
    assert [s.operators for s in report.sites] == [2, 2, 2]
    assert before - operators(program.graph) == 6


def test_a_notebook_and_a_prompt_show_something_readable():
    report = qp.explain(blocks(2), (rows(2),), target="ascend910b")
    assert repr(report) == "<quantpass.Report: ascend910b 2 of 2 fused>"
    assert report._repr_html_().startswith("<pre>quantpass ")
    assert "\x1b" not in str(report)
    assert "\x1b[" in report.text(color=True)


def test_json_is_typed_and_documented():
    report = qp.explain(nn.Sequential(StaticW8A8(64, 64), Grouped()), (rows(2),), target=["ascend310p", "ascend910b"])
    data = json.loads(report.to_json())
    assert data["schema"] == 1
    assert data["coverage"]["ascend910b"]["total"] == 2
    plans = [s["plan"] for s in data["sites"] if s["plan"]]
    assert {t["dtype"] for p in plans for t in p["call"].values() if isinstance(t, dict)} >= {"int8"}
    assert all(isinstance(p["call"]["x1"]["shape"], list) for p in plans if p["op"] == "npu_quant_matmul")
    page = (Path(__file__).resolve().parent.parent / "docs" / "report_schema.md").read_text()

    def keys(value):
        if isinstance(value, list):
            yield from (k for v in value for k in keys(v))
        elif isinstance(value, dict):
            for key, inner in value.items():
                if key not in ("call", "coverage"):
                    yield key
                    yield from keys(inner)

    assert not [k for k in keys(data) if f"`{k}`" not in page]


# -- what objects say of themselves --------------------------------------------------------------------------------


def test_reprs_are_short_and_tell():
    backend = qp.backend(target="ascend310p")
    assert repr(backend) == "<quantpass.backend, so far <quantpass.Report: ascend310p 0 of 0 fused>>"
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(WeightOnly(), backend=backend)(torch.randn(4, 64).half())
    assert repr(backend) == "<quantpass.backend, so far <quantpass.Report: ascend310p 1 of 1 fused>>"
    (site,) = backend.report.sites
    assert repr(site).startswith("<quantpass.Site addmm for ascend310p: fused, npu_weight_quant_batchmatmul(x=float16(")
    assert repr(qp.Options(target="ascend310p")).startswith("Options(target='ascend310p', lowering='reference'")


def test_a_report_of_floats_names_their_matmuls():
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    report = qp.explain(layers, (torch.randn(2, 8),), target="ascend310p")
    assert not report.sites
    assert "matmuls of floats, none of them quantized: {0..2}" in str(report)
    both = report + qp.explain(WeightOnly(), (torch.randn(4, 64).half(),), target="ascend310p")
    assert "matmuls of floats" not in str(both)
