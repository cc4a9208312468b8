"""What is read of each tool, from the tool's own graphs; ``docs/coverage.md`` is the table of the same rows."""

import math
from contextlib import nullcontext

import pytest
import torch

import quantpass as qp
from quantpass.doors.compiled import copied
from quantpass.graph.torch_internals import traced_as_on_npu
from tests.coverage import elsewhere, here
from tests.coverage.captured import capture, load
from tests.coverage.store import CAPTURES
from tests.coverage.table import PAGE, PERMISSIONS, TARGETS, page, rows
from tests.coverage.unread import unread

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return list(rows())


def test_the_page_is_what_the_tools_give_today(found):
    assert PAGE.read_text(encoding="utf-8") == page(found), "run `make coverage`"


def test_what_can_be_mapped_is_fused_somewhere_and_agrees_with_the_tool(found):
    for row in found:
        name = f"{row.scheme.tool}, {row.scheme.name}"
        assert row.sites, name
        if row.scheme.maps:
            assert max(row.fused.values()) == row.sites, f"{name}: {row.refused_by}"
            assert math.isnan(row.error) or row.error < 0.1, name
        else:
            assert not any(row.fused.values()), name
            assert row.refused_by, name


def test_what_the_310p_gains_by_permission_is_what_was_offered(found):
    for row in found:
        name = f"{row.scheme.tool}, {row.scheme.name}"
        assert row.allowed.fused == row.allowed.offered, name
        assert row.allowed.sqnr > 30 and (math.isnan(row.allowed.error) or row.allowed.error < 0.1), name
    assert sum(r.allowed.fused[PERMISSIONS[-1]] for r in found) >= 110


def test_only_graphs_that_need_their_tool_go_unchecked(found):
    unchecked = {f"{r.scheme.tool}, {r.scheme.name}" for r in found if math.isnan(r.error)}
    assert unchecked == {"bitsandbytes, LLM.int8()"}  # its activation quantizer stays in the graph


@pytest.mark.parametrize("scheme", list(elsewhere.schemes()), ids=lambda s: s.slug)
def test_every_stored_site_has_a_verdict(scheme):
    graphs, about = load(CAPTURES / f"{scheme.slug}.pt")
    assert about["version"] and about["torch"].startswith("2.13.")  # as the page says
    for c in graphs:
        for site in qp.explain(copied(c.graph), target=TARGETS).sites:
            assert site.fused or site.rejects
            assert site.numerics if site.fused else all(r.fact and r.want for r in site.rejects)


def test_every_capture_is_of_a_scheme_and_says_its_tools_version():
    about = {path.stem: load(path)[1] for path in CAPTURES.glob("*.pt")}
    assert about.keys() == {s.slug for s in elsewhere.schemes()}
    versions = {(a["tool"], a["version"]) for a in about.values()}
    assert len(versions) == len({tool for tool, _ in versions}), "a tool's captures are of one version"
    looked_at = {(u.tool, u.version) for u in unread() if u.package != "torch"}
    assert looked_at <= versions, "what is not read was looked at with the captures' version"


FORMS = [s for s in here.schemes() if s.maps and not s.name.endswith("bfloat16") and s.tool in ("torchao", "by hand")]


@pytest.mark.parametrize("form", ["inductor", "core", "as on an NPU"])
@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: s.slug)
def test_other_forms_of_a_graph_are_read_as_well(scheme, form):
    """Decomposed by a table, or with ``matmul`` whole as NPU tensors leave it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, args = scheme.build()
    on_npu = form == "as on an NPU"
    with torch.no_grad(), traced_as_on_npu() if on_npu else nullcontext():
        expected = model(*args)
        backend = qp.backend(target="cpu", decompositions="none" if on_npu else form)
        actual = torch.compile(model, backend=backend)(*args)
    backend.report.require()
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().mean()
    assert float(difference) < 0.1


@pytest.mark.parametrize("decompose", ["training", "none", "core"])
@pytest.mark.parametrize("scheme", FORMS, ids=lambda s: s.slug)
def test_exported_programs_are_read_as_well(scheme, decompose):
    torch.manual_seed(0)
    model, args = scheme.build()
    with torch.no_grad():
        expected = model(*args)
        program = torch.export.export(model, args)
        if decompose != "training":
            program = program.run_decompositions({} if decompose == "none" else None)
        report = qp.fuse(program, target="cpu")
        if decompose == "training":  # not functional yet, and weights are still of the tool's own tensor types
            assert all(s.fused or s.rejects[0].rule in ("read.mutated", "read.weight") for s in report.sites)
        else:
            report.require()
        actual = program.module()(*args)
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().mean()
    assert float(difference) < 0.1


def test_captures_come_back_as_they_were(tmp_path):
    scheme = next(s for s in here.schemes() if s.name == "zero point")
    (c,) = capture(*scheme.build())
    from tests.coverage.captured import run, store

    store(tmp_path / "c.pt", [c], {"tool": "by hand", "version": "1"})
    ((again,), about) = load(tmp_path / "c.pt")
    assert about["tool"] == "by hand"
    assert torch.equal(run(again, again.graph)[0], c.outputs[0])
    assert [n.name for n in again.graph.graph.nodes] == [n.name for n in c.graph.graph.nodes]
