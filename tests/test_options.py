"""Names and options: a typo is an error with the nearest name, and no door takes what it does not carry out."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from typing_extensions import Unpack

import quantpass as qp
from quantpass.chips import CHIPS, chip_named, chip_of_device, liftable_rules
from quantpass.chips.legality import refit_limit
from quantpass.doors.backend import dynamo_backend
from quantpass.doors.settings import TAKEN_BY, make_options
from quantpass.lowering import RUN_HERE
from quantpass.planning.options import Options
from tests.helpers import WeightOnly

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("Ascend910Bfoobar", "ascend910b"),
        ("Ascend310P33", "Ascend310P3"),
        ("ascend910b3", "Ascend910B3"),
        (" ascend910b ", "ascend910b"),
        ("ASCEND310P", "ascend310p"),
        ("ascend310", "ascend310p"),
        ("CPU", "cpu"),
        ("Ascend910_9392x", "Ascend910_9392"),
        ("Ascend910_93-92", "Ascend910_9392"),
        ("Ascend950PR_9599 ", "Ascend950PR_9599"),
    ],
)
def test_a_mistyped_chip_is_an_error_with_the_nearest_name(target, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        qp.explain(WeightOnly(), (X,), target=target)
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        qp.check_op("npu_quant_matmul", target=target)


@pytest.mark.parametrize("both", ["Ascend910B3,Ascend310P3", "ascend910b ascend310p", "ascend910b; cpu"])
def test_two_chips_in_one_text(both):
    with pytest.raises(ValueError, match=r"names several chips in one text.*-t repeated"):
        qp.backend(target=both)


def test_every_soc_name_is_the_chip_of_one_family():
    names = [name for chip in CHIPS.values() for name in chip.soc_names]
    assert len(set(names)) == len(names) > 40
    for chip in CHIPS.values():
        assert all(chip_named(name) is chip and chip_of_device(name) is chip for name in chip.soc_names)
        assert chip_named(chip.typical_soc) is chip if chip.soc_names else not chip.typical_soc


def test_a_device_that_is_newer_than_the_names_goes_by_its_family():
    assert chip_of_device("Ascend910B9").name == "ascend910b"
    assert chip_of_device("Ascend910_9399").name == "ascend910_93"
    with pytest.raises(ValueError, match="unknown target"):
        chip_of_device("Ascend000X4")


def test_two_names_of_one_chip_are_one_target():
    report = qp.explain(WeightOnly(), (X,), target=["Ascend310P1", "ascend310p", "ascend910b", "Ascend310P3"])
    assert report.targets == ("ascend310p", "ascend910b")
    assert [s.target for s in report.sites] == ["ascend310p", "ascend910b"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("wqmm.310.group", "is no rule that can be lifted.*Did you mean 'wqmm.310p.group'"),
        ("numerics.float61", "is no rule that can be lifted.*Did you mean 'numerics.float16'"),
        ("weights.refti", "is no rule that can be lifted.*Did you mean 'weights.refit'"),
        (
            "weights.refit:",
            "what follows the colon is ''; give the least SQNR in dB, from 0 to 200, e.g. 'weights.refit:35'",
        ),
        ("weights.refit:good", "what follows the colon is 'good'"),
        ("weights.refit:nan", "what follows the colon is 'nan'"),
        ("weights.refit:-1", "what follows the colon is '-1'"),
        ("weights.refit:inf", "what follows the colon is 'inf'"),
        ("numerics.float16:35", "is no rule that can be lifted"),
        ("read.weight", "is no rule that can be lifted"),
        ("", "is no rule that can be lifted"),
        ("qmm.k.range", "is a rule about which documents and code agree, and can't be lifted"),
        ("qmm.310p.dtypes.bias", "is a rule about which documents and code agree, and can't be lifted"),
    ],
)
def test_a_rule_that_can_not_be_lifted(rule, message):
    asked = [
        lambda: qp.backend(target="ascend310p", allow=("qmm.310p.pertoken", rule)),
        lambda: qp.explain(WeightOnly(), (X,), allow=[rule]),
        lambda: qp.check_op("npu_quant_matmul", target="ascend310p", allow=(rule,)),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("allow", ["qmm.310p.pertoken", 3, (3,), None])
def test_allow_is_a_tuple_of_names(allow):
    with pytest.raises(TypeError, match="give a tuple of rule ids"):
        qp.check_op("npu_quant_matmul", target="ascend310p", allow=allow)
    with pytest.raises(TypeError, match="give a tuple of rule ids"):
        qp.backend(target="ascend310p", allow=allow)


def test_every_rule_that_a_refusal_offers_to_lift_is_accepted():
    for rule, chips in liftable_rules().items():
        for chip in chips:
            assert make_options({"target": chip, "allow": (rule,)}).allow == (rule,)
    for name in ("numerics.float16", "weights.refit", "weights.refit:35", "weights.refit:27.5"):
        assert Options(target="cpu", allow=(name,)).allow == (name,)
    assert refit_limit(("weights.refit",)) == 30
    assert refit_limit(("weights.refit:35", "weights.refit")) == 35
    assert refit_limit(("numerics.float16",)) is None


def model_doors():
    program = torch.export.export(WeightOnly(), (X,))
    return {
        "explain": lambda **o: qp.explain(WeightOnly(), (X,), target="cpu", **o),
        "fuse": lambda **o: qp.fuse(program, target="cpu", **o),
        "verify": lambda **o: qp.verify(WeightOnly(), (X,), target="cpu", **o),
        "preview_ge": lambda **o: qp.preview_ge(WeightOnly(), (X,), target="ascend310p", **o),
        "npu_backend": lambda **o: qp.npu_backend(target="ascend310p", **o),
        "npugraph_ex_options": lambda **o: qp.npugraph_ex_options(target="ascend310p", **o),
    }


@pytest.mark.parametrize(
    ("door", "option"),
    [
        *((d, "inner") for d in model_doors()),
        *((d, "on_report") for d in ("explain", "fuse", "verify")),
        *((d, "decompositions") for d in ("fuse", "preview_ge", "npu_backend", "npugraph_ex_options")),
        *((d, "lowering") for d in ("preview_ge", "npu_backend", "npugraph_ex_options")),
        *((d, "mode") for d in ("npu_backend", "npugraph_ex_options")),
    ],
)
def test_an_option_that_a_door_would_ignore_is_refused_by_it(door, option):
    value = {"inner": "eager", "on_report": print, "decompositions": "core", "lowering": "reference", "mode": "graph"}
    with pytest.raises(TypeError, match=f"{door} does not take the option '{option}'.*Taken by: backend") as error:
        model_doors()[door](**{option: value[option]})
    assert f"{option}," not in str(error.value).partition(f"{door} takes: ")[2]


@pytest.mark.parametrize("door", [d for d in TAKEN_BY if d.isidentifier()])
def test_a_type_checker_sees_what_a_door_takes(door):
    hints = get_type_hints(getattr(qp, door))
    assert hints["options"] == Unpack[TAKEN_BY[door]]
    assert {f.name for f in fields(Options)} >= TAKEN_BY[door].__optional_keys__
    assert get_args(get_type_hints(TAKEN_BY[door]).get("lowering")) in (RUN_HERE, ())


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("lowering", "ge", "'reference', 'native', 'aclnn'"),
        ("numerics", "", "'strict', 'vendor'"),
        ("mode", "", "'graph', 'eager'"),
        ("nz", None, "'auto', 'never'"),
        ("decompositions", "inductr", "'none', 'inductor', 'core'.* Did you mean 'inductor'"),
        ("inner", "aot", "'eager', 'inductor'"),
    ],
)
def test_a_value_that_is_not_accepted(option, value, accepted):
    with pytest.raises(ValueError, match=f"{option} is {value!r}. Accepted: {accepted}"):
        qp.backend(target="cpu", **{option: value})


def test_a_mistyped_option_names_one_that_the_door_takes():
    with pytest.raises(TypeError, match="Did you mean 'numerics'"):
        qp.fuse(torch.export.export(WeightOnly(), (X,)), target="cpu", numeric="strict")


def test_explain_carries_decompositions_out():
    """The matmul's operator in the report says at which level the graph was read."""
    plain = qp.explain(WeightOnly(bias=False), (X[None],), target="cpu")
    core = qp.explain(WeightOnly(bias=False), (X[None],), target="cpu", decompositions="core")
    assert plain.fused == core.fused == 1
    with pytest.raises(TypeError, match="run_decompositions"):
        qp.explain(torch.export.export(WeightOnly(), (X,)), target="cpu", decompositions="core")


class Both(nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.up, self.lm_head, self.broken = WeightOnly(), WeightOnly(k=96, n=64), broken

    def forward(self, x):
        y = self.up(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.lm_head(y)


SAID = "leave: 'lm_hed' fits no site seen here (up, lm_head). Did you mean 'lm_head'?"


def _compiled(options, **given):
    backend = qp.backend(target="cpu", **options)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Both(**given), backend=backend)(X)
    return backend.report


LEAVING = {
    "explain": lambda options: qp.explain(Both(), (X,), target=("cpu", "ascend310p"), **options),
    "fuse": lambda options: qp.fuse(torch.export.export(Both(), (X,)), target="cpu", **options),
    "verify": lambda options: qp.verify(Both(), (X,), target="cpu", **options).report,
    "backend": _compiled,
}


@pytest.mark.parametrize("door", LEAVING)
def test_a_name_in_leave_that_no_site_has_is_said(door, caplog):
    report = LEAVING[door]({"leave": ("lm_hed", "up")})
    assert caplog.messages.count(SAID) == 1
    assert SAID in str(report) and SAID in report.as_dict()["notes"]
    assert [s.fused for s in report.sites if s.target == "cpu"] == [False, True], "up is left, lm_head is not"


@pytest.mark.parametrize("door", LEAVING)
def test_nothing_is_said_of_a_pattern_that_fits(door, caplog):
    report = LEAVING[door]({"leave": ("lm_*",)})
    assert report.unmatched == ()
    assert "fits no site" not in caplog.text


def test_a_site_of_a_later_graph_is_named_once_that_is_compiled(caplog):
    report = _compiled({"leave": ("lm_head",)}, broken=True)
    assert report.unmatched == ()
    assert "leave: 'lm_head' fits no site seen here (up)" in caplog.text


def test_dynamos_backend_by_name_says_it_too(caplog):
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Both(), backend=dynamo_backend, options={"target": "cpu", "leave": ("*.hed",)})(X)
    assert "leave: '*.hed' fits no site seen here (up, lm_head)." in caplog.text
