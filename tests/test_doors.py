"""explain, fuse, diff, Report and the command line."""

import json

import pytest
import torch
from torch import nn

import quantpass as qp
from tests.helpers import CHIPS, StaticW8A8, WeightOnly, assert_close, compiled

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).half()


def test_explain_answers_for_every_chip_and_changes_nothing():
    model = WeightOnly()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = qp.explain(model, (X,))
    assert report.targets == CHIPS
    assert report.fused == report.total == len(CHIPS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report["ascend310p"].total == 1
    with pytest.raises(KeyError, match="ascend310p, ascend910b"):
        report["ascend950"]


def test_explain_can_be_asked_again_and_again():
    """No compile cache fills up: the tenth answer is the first."""
    model = WeightOnly()
    texts = {str(qp.explain(model, (X,), target="ascend310p")) for _ in range(12)}
    assert len(texts) == 1
    assert "1 of 1" in texts.pop()


def test_explain_speaks_of_every_graph_of_a_broken_model():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = WeightOnly(), WeightOnly(k=96, n=32)

        def forward(self, x):
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y)

    report = qp.explain(Broken(), (X,), target="ascend910b")
    assert [s.name for s in report.sites] == ["a", "b"]


def test_soc_names_and_modes():
    report = qp.explain(WeightOnly(), (X,), target="Ascend310P3", mode="eager")
    assert report.sites[0].target == "ascend310p"
    assert report.sites[0].plan.weight_format == "ND", "a FRACTAL_NZ weight works in graph mode only"


def test_explain_with_bad_input():
    with pytest.raises(TypeError, match=r"args=\(x,\)"):
        qp.explain(WeightOnly(), X)
    with pytest.raises(ValueError, match="target is empty"):
        qp.explain(WeightOnly(), (X,), target=[])


def test_report_as_text_json_and_html(tmp_path):
    model = nn.Sequential(WeightOnly(), StaticW8A8(k=96, n=32))
    report = qp.explain(model, (X,), target=["ascend310p", "cpu"])
    text = str(report)
    assert "ascend310p: 2 of 2 quantized matmuls fused" in text
    assert "helpers.py" not in text, "the table names modules; files are in the JSON"
    data = json.loads(report.to_json(tmp_path / "r.json"))
    assert data == json.loads((tmp_path / "r.json").read_text())
    assert {s["name"] for s in data["sites"]} == {"0", "1"}
    assert all("helpers.py" in s["source"] for s in data["sites"])
    report.to_html(tmp_path / "r.html")
    assert "npu_weight_quant_batchmatmul" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("level", ["export", "functional", "make_fx"])
def test_explain_leaves_the_callers_graph_alone(level):
    """Nodes, code and meta of a graph are as they were, also where shapes had to be found first."""
    program = torch.export.export(WeightOnly(), (X,))
    if level == "functional":
        program = program.run_decompositions({})
    given = program if level != "make_fx" else program.module()
    gm = given if level == "make_fx" else given.graph_module
    if level == "make_fx":
        for node in gm.graph.nodes:
            if node.op != "placeholder":
                node.meta.clear()
    attributes = dict(gm.named_buffers()), dict(gm.named_parameters())
    before = [(n, n.name, n.args, n.kwargs, dict(n.meta)) for n in gm.graph.nodes]
    report = qp.explain(given, target=["ascend310p", "ascend910b"])
    assert (report.fused, report.total) == (2, 2)
    after = [(n, n.name, n.args, n.kwargs, dict(n.meta)) for n in gm.graph.nodes]
    assert [b[:4] for b in before] == [a[:4] for a in after]
    for (*_, meta), (*_, now) in zip(before, after, strict=True):
        assert list(meta) == list(now)
        assert all(meta[k] is now[k] for k in meta)
    assert [list(a) for a in (dict(gm.named_buffers()), dict(gm.named_parameters()))] == [list(a) for a in attributes]
    assert qp.fuse(given, target="cpu").fused == 1, "the graph is still one to be fused"


def test_explain_takes_a_program_with_or_without_inputs():
    program = torch.export.export(WeightOnly(), (X,))
    assert str(qp.explain(program, (X,))) == str(qp.explain(program))


@pytest.mark.parametrize("model", [None, 3, "model", [WeightOnly()]])
@pytest.mark.parametrize("door", [qp.explain, qp.verify])
def test_what_can_not_be_called(door, model):
    with pytest.raises(TypeError, match="give a module, a function, an ExportedProgram or a GraphModule"):
        door(model, (X,), target="cpu")


def test_require():
    report = qp.explain(nn.Sequential(WeightOnly(dtype=torch.float32)), (X.float(),), target=["ascend310p", "cpu"])
    report.require(fused=1)
    report.require(fused=0.5)
    with pytest.raises(AssertionError, match="1 of 2 quantized matmuls are fused, 2 were required"):
        report.require()


def test_fuse_a_graph_module():
    gm = torch.export.export(WeightOnly(zero_point=True), (X,)).module()
    expected = gm(X)
    report = qp.fuse(gm, target="cpu", lowering="reference")
    assert report.fused == 1
    assert torch.ops.quantpass.weight_quant_matmul.default in [n.target for n in gm.graph.nodes]
    assert_close(gm(X), expected)
    again = qp.fuse(gm, target="cpu")
    assert again.total == 0, "nothing is left to fuse"


@pytest.mark.parametrize("decompositions", [None, {}])
def test_fuse_an_exported_program(decompositions):
    program = torch.export.export(StaticW8A8(zero_point=5), (X,))
    if decompositions is not None:
        program = program.run_decompositions(decompositions)
    expected = program.module()(X)
    report = qp.fuse(program, target="ascend910b")
    assert report.fused == 1
    program._validate()
    assert_close(program.module()(X), expected, torch.bfloat16)


def test_saved_program_runs_like_the_one_in_memory(tmp_path):
    program = torch.export.export(WeightOnly(), (X,))
    qp.fuse(program, target="cpu")
    torch.export.save(program, tmp_path / "fused.pt2")
    assert torch.equal(torch.export.load(tmp_path / "fused.pt2").module()(X), program.module()(X))


def test_fuse_with_bad_input():
    with pytest.raises(TypeError, match=r"torch\.export\.export"):
        qp.fuse(WeightOnly(), target="cpu")
    with pytest.raises(ValueError, match="not at ATen level"):
        qp.fuse(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), target="cpu")


def test_diff():
    gm = torch.export.export(WeightOnly(), (X,)).module()
    before = torch.export.export(WeightOnly(), (X,)).module()
    assert qp.diff(gm, before) == ""
    qp.fuse(gm, target="cpu")
    text = qp.diff(before, gm)
    assert "-%linear" in text
    assert "+%weight_quant_matmul" in text
    with pytest.raises(TypeError, match="diff takes graphs"):
        qp.diff(gm, 3)


def test_provenance_of_new_nodes():
    """What replaced a node says which module and line it stands for."""
    for lowering, name in (("reference", "weight_quant_matmul"), ("native", "mm")):
        program = torch.export.export(nn.Sequential(WeightOnly()), (X,)).run_decompositions({})
        qp.fuse(program, target="cpu", lowering=lowering)
        (node,) = [n for n in program.graph.nodes if n.op == "call_function" and name in str(n.target)]
        assert "helpers.py" in node.meta["stack_trace"]
        assert list(node.meta["nn_module_stack"].values())[-1][0] == "0"
        assert node.meta["quantpass"] == "0"


@pytest.mark.parametrize("module", [WeightOnly, StaticW8A8])
@pytest.mark.parametrize("target", [*CHIPS, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_of_new_nodes_are_right(module, target, dtype):
    """meta["val"] of every node is what running the graph gives."""
    program = torch.export.export(module(dtype=dtype), (X.to(dtype),))
    qp.fuse(program, target=target)
    gm = program.module()

    class Check(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            fake = n.meta.get("val")
            if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
                assert (value.dtype, value.shape, value.stride()) == (fake.dtype, fake.shape, fake.stride()), n
            return value

    Check(gm).run(X.to(dtype))


def test_rewrite_is_whole_or_not_at_all(monkeypatch, caplog):
    """A failure in the middle of one site leaves the graph as it was there, and fuses the others."""
    from quantpass import rewrite

    original = rewrite.Rewriter._check
    calls = []

    def failing(self, old, new):
        calls.append(old)
        if len(calls) == 1:
            raise RuntimeError("boom")
        original(self, old, new)

    monkeypatch.setattr(rewrite.Rewriter, "_check", failing)
    monkeypatch.delenv("QUANTPASS_RAISE")  # as users run it
    model = nn.Sequential(WeightOnly(), WeightOnly(k=96, n=64))
    actual, report = compiled(model, X)
    assert [s.fused for s in report.sites] == [False, True]
    assert report.sites[0].rejects[0].rule == "rewrite.failed"
    assert_close(actual, model(X), torch.bfloat16)
    text = report.graphs[0][1]
    assert text.count("weight_quant_matmul(") == 1
    assert text.count("aten.addmm") == 1
