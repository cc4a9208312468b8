"""Trouble with one site stays that site's: the others are fused, the model runs, and the report says what happened."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpass as qp
from quantpass import pipeline, rewrite
from quantpass.basics.boundary import RAISE
from quantpass.patterns import sites
from quantpass.planning import already_fused


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("a", "b"):
            self.register_buffer(name, torch.randint(-127, 128, (64, 64), dtype=torch.int8))

    def forward(self, x):
        return F.linear(torch.relu(F.linear(x, self.a.half() * 0.01)), self.b.half() * 0.02)


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Tests raise what is unexpected; users get a verdict."""
    monkeypatch.delenv(RAISE)


class Trouble(Exception):
    pass


def first_time(function):
    """``function``, which fails at its first call."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise Trouble("the moon is full\nand more")
        return function(*args, **kwargs)

    return failing


STAGES = {
    "reading": (sites, "_read_site", "read.failed"),
    "epilogue": (sites, "read_epilogue", "read.failed"),
    "planning": (pipeline, "plan_as_allowed", "read.failed"),
    "streams": (pipeline, "stream_reject", "read.failed"),
    "rewriting": (rewrite.Rewriter, "_check", "rewrite.failed"),
}


def test_all_goes_well_without_trouble():
    assert qp.fuse(torch.export.export(Two(), (torch.randn(4, 64).half(),)), target="ascend910b").fused == 2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_failing_site_is_refused_and_the_other_fused(stage, monkeypatch, caplog):
    owner, name, rule = STAGES[stage]
    monkeypatch.setattr(owner, name, first_time(getattr(owner, name)))
    model, x = Two().eval(), torch.randn(4, 64).half()
    backend = qp.backend(target="ascend910b")
    with caplog.at_level(logging.ERROR, "quantpass"), torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
        wanted = model(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
    failed, fused = backend.report.sites
    assert (failed.fused, fused.fused) == (False, True)
    (reject,) = failed.rejects
    assert reject.rule == rule
    assert "Trouble" in reject.fact
    assert "the moon is full" in reject.fact
    assert "and more" not in reject.fact
    assert RAISE in reject.hint
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_tests_see_the_exception(stage, monkeypatch):
    owner, name, _ = STAGES[stage]
    monkeypatch.setattr(owner, name, first_time(getattr(owner, name)))
    program = torch.export.export(Two(), (torch.randn(4, 64).half(),))
    with pytest.raises(Exception, match="the moon is full"):
        qp.fuse(program, target="ascend910b")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_graph_that_can_not_be_read_at_all_runs_as_it_was(monkeypatch):
    def fails(*args):
        raise Trouble("no writes today")

    monkeypatch.setattr(pipeline, "writes_of", fails)
    model, x = Two().eval(), torch.randn(4, 64).half()
    backend = qp.backend(target="ascend910b")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    (site,) = backend.report.sites
    assert (site.name, site.rejects[0].rule) == ("(the whole graph)", "read.failed")
    with pytest.raises(AssertionError, match="no writes today"):
        backend.report.require()


@pytest.mark.usefixtures("as_users_run_it")
def test_a_call_of_the_models_own_that_can_not_be_judged(monkeypatch):
    def fails(*args):
        raise Trouble("no bench sits")

    monkeypatch.setattr(already_fused, "judge", fails)
    linear = qp.nn.LinearWeightQuant.from_linear(nn.Linear(64, 64).half())
    report = qp.explain(linear, (torch.randn(4, 64).half(),), target="ascend910b")
    assert [r.rule for s in report.sites for r in s.rejects] == ["read.failed"]


@pytest.mark.usefixtures("as_users_run_it")
def test_running_out_of_stack_is_a_verdict_too(monkeypatch):
    def endless(*args):
        return endless(*args)

    monkeypatch.setattr(pipeline, "plan_as_allowed", endless)
    report = qp.explain(Two(), (torch.randn(4, 64).half(),), target="ascend910b")
    assert {r.rule for s in report.sites for r in s.rejects} == {"read.failed"}
