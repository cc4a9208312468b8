"""``quantpass selftest``: what is tried, that it can fail, and that no case takes the others with it."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import quantpass as qp
from quantpass.chips import CHIPS
from quantpass.chips.legality import judge
from quantpass.doors.cli import main
from quantpass.doors.doctor import Diagnosis, Finding
from quantpass.doors.selftest import cases as cases_module
from quantpass.doors.selftest import planned, routes
from quantpass.doors.selftest.cases import cases_of
from quantpass.doors.selftest.findings import NO_DEVICE, SelfTest
from quantpass.doors.selftest.isolation import isolated
from quantpass.doors.selftest.run import ENDED, NOT_RUN, RAISED, RIGHT, WRONG, Outcome, outcomes
from quantpass.lowering.aclnn import npu_operator

MATMULS = ("npu_quant_matmul", "npu_weight_quant_batchmatmul", "npu_quant_matmul_dequant")


@pytest.fixture(scope="module", params=["ascend310p", "ascend910b"])
def chosen(request):
    return [c for route in ("aclnn", "ge") for c in cases_of(request.param, route)]


@pytest.fixture(autouse=True)
def a_short_look_at_the_machine(monkeypatch):
    """What is installed here is asked for by processes that take seconds; tests/test_doctor.py has that."""
    parts = (Finding("quantpass", "this"),)
    monkeypatch.setattr("quantpass.doors.selftest.examine", lambda: Diagnosis(parts, ()))


def found(cases, kinds, device=""):
    tried = tuple(Outcome(c.id, kind) for c, kind in zip(cases, kinds, strict=True))
    return SelfTest(device, tuple(dict.fromkeys(c.chip for c in cases)), tuple(cases), tried, (), {})


# -- which cases ---------------------------------------------------------------------------------------------------


def test_every_case_is_what_the_rules_allow(chosen):
    for case in chosen:
        allow = (case.contradicted,) if case.contradicted else ()
        verdict = judge(case.call, CHIPS[case.chip], allow)
        assert verdict.legal, f"{case.words}\n{verdict}"
        assert bool(case.contradicted) == (not judge(case.call, CHIPS[case.chip]).legal)
    assert len({c.id for c in chosen}) == len(chosen)


FORBID_ALL = {  # rules that no legal call can be about
    "ascend310p": {"qmm.310p.group", "format_cast.graph", "int4pack.310p", "quantize.310p.int4"}
    | {"add_rms_norm_dynamic_quant.310p"},
    "ascend910b": {"qmm.group.graph", "format_cast.graph", "qmmd.unavailable"},
}
NOT_TRIED = {
    "ascend310p": {"qmm.m.range"},  # of a transposed x1, which this chip does not take
    "ascend910b": set(),
}


def test_every_rule_has_cases(chosen):
    """A new rule is tried without anything being said here, or stands among those that say that nothing is legal."""
    chip = chosen[0].chip
    untried = {name.removeprefix(f"{chip} ") for name in found(chosen, [NOT_RUN] * len(chosen)).untried()}
    assert untried == FORBID_ALL[chip] | NOT_TRIED[chip]


def test_every_operator_goes_both_ways(chosen):
    made = {(c.route, c.call.op.name) for c in chosen}
    for name in MATMULS[: 3 if chosen[0].chip == "ascend310p" else 2]:
        assert {("aclnn", name), ("ge", name)} <= made


def test_edges_are_those_of_the_rules(monkeypatch):
    edges = {c.edge: c.call for c in cases_of("ascend310p", "aclnn", "npu_quant_matmul")}
    assert edges["qmm.k.range: k is 65535"].sizes["k"] == 65535
    assert edges["qmm.x1.rank: rank of x1 is 6"].tensor("x1").rank == 6
    rules = CHIPS["ascend310p"].rules
    (moved,) = [r for r in rules if r.id == "qmm.k.range"]
    moved = replace(moved, need=replace(moved.need, high=4096))
    chip = replace(CHIPS["ascend310p"], rules=tuple(moved if r.id == "qmm.k.range" else r for r in rules))
    monkeypatch.setattr(cases_module, "CHIPS", {**CHIPS, "ascend310p": chip})
    assert "qmm.k.range: k is 4096" in {c.edge for c in cases_of("ascend310p", "aclnn", "npu_quant_matmul")}


# -- it can fail ---------------------------------------------------------------------------------------------------


class Miscomputed:
    """A vendor's operator that is not what the documents say."""

    def __init__(self, name, change):
        self._operator, self._change = npu_operator(name), change
        self._schema = self._operator._schema

    def __call__(self, *args, **kwargs):
        return self._change(self._operator, args, kwargs)


def _without(name):
    return lambda op, args, kwargs: op(*args, **{k: v for k, v in kwargs.items() if k != name})


def _other(index, change):
    return lambda op, args, kwargs: op(*[change(a) if i == index else a for i, a in enumerate(args)], **kwargs)


BROKEN = [
    ("npu_quant_matmul", "bias=int32", _without("bias")),
    ("npu_quant_matmul", "x2=int8*:T", _other(1, lambda w: w.t().reshape(w.shape))),
    ("npu_quant_matmul", "scale=int64*float16", lambda op, a, k: op(*a, **k) * 1.05),
    (
        "npu_quant_matmul",
        "output_dtype=int8",
        lambda op, a, k: op(*a, **k).to(torch.int16).add(2).clamp(max=127).char(),
    ),
    ("npu_quant_matmul", "output_dtype=float16", lambda op, a, k: op(*a, **k).bfloat16()),
    ("npu_weight_quant_batchmatmul", "antiquant_offset=", _other(3, lambda o: None if o is None else -o)),
    ("npu_weight_quant_batchmatmul", "bias=", _other(6, lambda b: None)),
    ("npu_weight_quant_batchmatmul", "antiquant_scale=float16", lambda op, a, k: op(*a, **k) * float("nan")),
    ("npu_quant_matmul_dequant", "smooth_scale=", _without("smooth_scale")),
    ("npu_rms_norm", "gamma", _other(1, torch.ones_like)),
    ("npu_trans_quant_param", "scale", lambda op, a, k: op(*a, **k) + 1),
]


@pytest.mark.parametrize(("name", "about", "change"), BROKEN, ids=[f"{n}-{a}" for n, a, _ in BROKEN])
def test_an_operator_that_computes_something_else_is_wrong(monkeypatch, name, about, change):
    _, cases = planned("ascend310p", [f"{name}*{about}"], "")
    cases = [c for c in cases if c.route == "aclnn" and c.call.op.name == name][:4]
    assert {o.outcome for o in outcomes(cases, "cpu")} == {RIGHT}
    monkeypatch.setattr(routes, "npu_operator", lambda name: Miscomputed(name, change))
    assert {o.outcome for o in outcomes(cases, "cpu")} <= {WRONG, RAISED}


def test_a_rule_that_claims_too_much_is_seen(monkeypatch):
    """ascend910b's tables, where ascend310p's packed int4 is refused by the operator."""
    rules = tuple(r for r in CHIPS["ascend910b"].rules if r.id != "qmm.k")
    chip = replace(CHIPS["ascend910b"], rules=rules)
    monkeypatch.setattr(cases_module, "CHIPS", {**CHIPS, "ascend910b": chip})
    made = cases_of("ascend910b", "aclnn", "npu_anti_quant")
    assert {o.outcome for o in outcomes(made, "cpu")} == {RIGHT}
    rows = tuple(
        replace(r, need=replace(r.need, dtypes=("int8", "int16"))) if r.id == "anti_quant.x.dtype" else r for r in rules
    )
    monkeypatch.setattr(cases_module, "CHIPS", {**CHIPS, "ascend910b": replace(chip, rules=rows)})
    made = cases_of("ascend910b", "aclnn", "npu_anti_quant")
    said = {o.said for o in outcomes(made, "cpu") if o.outcome != RIGHT}
    assert any("x is torch.int16" in s for s in said), said


def test_contradicted_rules_get_a_verdict():
    _, cases = planned("ascend310p", ["wqmm.310p.group"], "")
    rule = "wqmm.310p.group"
    assert {c.contradicted for c in cases} == {rule}

    def verdict(kinds, device="Ascend310P3"):
        kinds = [*kinds, *[kinds[-1]] * (len(cases) - len(kinds))]
        told = found(cases, kinds, device)
        assert told.passed or not device
        return told.contradicted()[rule]["verdict"]

    assert verdict([RIGHT]) == "the code's: it runs and is right"
    assert verdict([RIGHT, WRONG]) == "the document's: it runs, and is wrong"
    assert verdict([RAISED, ENDED]) == "the document's: it is refused"
    assert verdict([RIGHT, RAISED]).startswith("not decided")
    assert verdict([RIGHT], device="") == "not decided, no device"


# -- one by one ----------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from multiprocessing.connection import Connection
from quantpass.doors.selftest import isolation, run
tried = run.tried
def broken(case, route):
    if case.id == os.environ["ENDS_AT"]:
        print("a kernel went wrong", flush=True)
        os.abort()
    if case.id == os.environ["HANGS_AT"]:
        time.sleep(600)
    return tried(case, route)
run.tried = broken
isolation.serve(Connection(int(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_case_that_ends_or_holds_up_its_process_is_noted_and_the_next_goes_on(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    cases = cases_of("ascend310p", "aclnn", "npu_rms_norm")[:5]
    monkeypatch.setenv("ENDS_AT", cases[1].id)
    monkeypatch.setenv("HANGS_AT", cases[3].id)
    done = list(isolated(cases, "cpu", 3, (sys.executable, str(tmp_path / "worker.py"))))
    assert [o.case for o in done] == [c.id for c in cases]
    assert [o.outcome for o in done] == [RIGHT, ENDED, RIGHT, ENDED, RIGHT]
    assert "exit status -6" in done[1].said and "a kernel went wrong" in done[1].said
    assert done[3].said.startswith("nothing came for 3 s")


def test_what_needs_the_wheel_is_not_run_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTPASS_TORCH_NPU", str(tmp_path))
    result = qp.selftest("ascend310p", only=["ge/npu_rms_norm"])
    assert {o.outcome for o in result.outcomes} == {NOT_RUN}
    assert not result.passed
    assert "\nNot run: GE: " in str(result)


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_says_first_that_nothing_ran_on_a_device(tmp_path):
    path = tmp_path / "found.json"
    run = CliRunner().invoke(
        main, ["selftest", "-t", "Ascend310P3", "--only", "npu_quant_matmul_dequant", "--json", str(path)]
    )
    assert run.exit_code == 0, run.output
    assert run.output.startswith(NO_DEVICE)
    data = json.loads(path.read_text())
    assert (data["device"], data["what ran"], data["passed"]) == (None, NO_DEVICE, True)
    assert data["rules"]["ascend310p qmmd.k.multiple"]["edges"]
    assert {c["outcome"] for c in data["cases"]} == {"right"}
    assert {c["route"] for c in data["cases"]} == {"aclnn", "ge"}
    assert data["only"] and "Rules that no case is about" not in run.output
    assert data["environment"]["parts"]
    run = CliRunner().invoke(
        main, ["check-op", *data["cases"][0]["call"].split(), "-t", "ascend310p", "--mode", "eager"]
    )
    assert run.output.startswith("legal"), run.output


def test_the_command_fails_where_a_case_is_wrong(monkeypatch):
    monkeypatch.setattr(routes, "npu_operator", lambda name: Miscomputed(name, lambda op, a, k: op(*a, **k).neg()))
    arguments = ["selftest", "-t", "ascend310p", "--only", "aclnn/npu_anti_quant"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 1, run.output
    assert "Failed (8):\n  ascend310p/aclnn/npu_anti_quant/0: wrong, off by" in run.output
    run = CliRunner().invoke(main, [*arguments, "--json", "-"])
    assert not json.loads(run.output)["passed"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["-t", "ascend310p", "--only", "no such case"], 2, "no case matches 'no such case'"),
        (["-t", "cpu"], 2, "a self-test takes ascend310p"),
        (["-t", "ascend310"], 2, "unknown target"),
        (["-t", "ascend310p", "--json", "/no/folder/x.json"], 2, "there is no folder"),
        (["-t", "ascend310p", "--only", "wqmm.310p.rank", "--list"], 0, "x=float16[2,16,512]"),
    ],
)
def test_what_it_can_be_asked(arguments, status, said):
    run = CliRunner().invoke(main, ["selftest", *arguments])
    assert run.exit_code == status, run.output
    assert said in run.output


def test_times_are_of_runs():
    from quantpass.doors.selftest.speed import times

    for t in times("ascend310p", "cpu"):
        assert not t.said
        assert t.before > 0
        assert t.after > 0
