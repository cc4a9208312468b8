"""What each chip accepts: recorded vectors, and an example and a counterexample for every rule row."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import quantpass as qp
from quantpass.chips import CHIPS
from quantpass.chips.calls import OpCall
from quantpass.chips.checking import spec_of_tensor
from quantpass.chips.companions import ANTI_QUANT, DYNAMIC_QUANT, FORMAT_CAST, INT4PACK, QUANTIZE, TQP
from quantpass.chips.dtype_table import DtypeTable
from quantpass.chips.legality import broken_rules, judge
from quantpass.chips.norms import ADD_RMS_NORM, ADD_RMS_NORM_DYNAMIC_QUANT, RMS_NORM
from quantpass.chips.quant_matmul import QMM
from quantpass.chips.quant_matmul_dequant import QMMD
from quantpass.chips.tables import markdown
from quantpass.chips.weight_quant_matmul import WQMM
from quantpass.doors.cli import main
from quantpass.doors.cli.inputs import parse_argument
from tests.neighbour_calls import NEIGHBOURS

T = qp.TensorSpec
I8, I32, I64, F16, BF16, F32 = torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32
DATA = Path(__file__).parent / "data" / "legality_vectors.json"
VECTORS = json.loads(DATA.read_text())["vectors"]


def argument(value):
    if isinstance(value, dict):
        return T(getattr(torch, value["dtype"]), tuple(value["shape"]), value["format"], value.get("transposed", False))
    named = getattr(torch, value, None) if isinstance(value, str) else None
    return named if isinstance(named, torch.dtype) else value


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_recorded_vectors(vector):
    arguments = {k: argument(v) for k, v in vector["args"].items()}
    for mode in ("graph", "eager") if vector["mode"] == "both" else (vector["mode"],):
        verdict = qp.check_op(vector["op"], target=vector["chip"], mode=mode, **arguments)
        assert verdict.legal == vector["legal"], f"{mode}: {vector['why']}\n{verdict}"
        assert verdict.legal or all(r.rule and r.fact and r.want for r in verdict.rejects)


# -- every row, from both sides ------------------------------------------------------------------------------------
# Legal calls of every form, and edits of them. A rule is shown to hold by a call that it speaks of and that is legal, and
# to forbid by an edited call that it rejects.

QMM_BASES = [
    {
        "x1": T(I8, (16, 512)),
        "x2": T(I8, (512, 128), "NZ", True),
        "scale": T(I64, (128,)),
        "bias": T(I32, (128,)),
        "output_dtype": F16,
    },
    {
        "x1": T(I8, (16, 512)),
        "x2": T(I8, (512, 128), "NZ", True),
        "scale": T(I64, (128,)),
        "offset": T(F32, (128,)),
        "output_dtype": I8,
    },
    {"x1": T(I8, (16, 512)), "x2": T(I8, (512, 128), "ND", False), "scale": T(I64, (128,)), "output_dtype": F16},
    {
        "x1": T(I8, (2, 16, 512)),
        "x2": T(I8, (2, 512, 128)),
        "scale": T(I64, (128,)),
        "bias": T(I32, (2, 1, 128)),
        "output_dtype": F16,
    },
    {"x1": T(I8, (16, 512), "ND", True), "x2": T(I8, (512, 128)), "scale": T(I64, (128,)), "output_dtype": F16},
    {
        "x1": T(I8, (16, 512)),
        "x2": T(I8, (512, 128)),
        "scale": T(F32, (128,)),
        "pertoken_scale": T(F32, (16,)),
        "bias": T(F32, (128,)),
        "output_dtype": BF16,
    },
    {
        "x1": T(I32, (16, 64)),
        "x2": T(I32, (64, 128), "ND", True),
        "scale": T(I64, (128,)),
        "bias": T(I32, (128,)),
        "output_dtype": F16,
    },
    {"x1": T(I32, (16, 64)), "x2": T(I32, (64, 128), "NZ", True), "scale": T(F32, (128,)), "output_dtype": F16},
    {
        "x1": T(I32, (16, 64)),
        "x2": T(I32, (512, 16)),
        "scale": T(F32, (2, 128)),
        "offset": T(F16, (2, 128)),
        "pertoken_scale": T(F32, (16, 1)),
        "output_dtype": BF16,
        "group_sizes": [0, 0, 256],
    },
    {
        "x1": T(I8, (16, 512)),
        "x2": T(I32, (512, 16)),
        "scale": T(I64, (2, 128)),
        "offset": T(F32, (128,)),
        "pertoken_scale": T(F32, (16, 1)),
        "output_dtype": F16,
        "group_sizes": [0, 0, 256],
    },
]
WQMM_BASES = [
    {"x": T(F16, (16, 256)), "weight": T(I8, (256, 128), "NZ", True), "antiquant_scale": T(F16, (128,)), "antiquant_offset": T(F16, (128,)), "bias": T(F16, (128,)), "antiquant_group_size": 0, "inner_precise": 0},
    {"x": T(F16, (16, 256)), "weight": T(I8, (256, 128), "ND", True), "antiquant_scale": T(F16, (128,)), "antiquant_group_size": 0},
    {"x": T(BF16, (16, 256)), "weight": T(I8, (256, 128)), "antiquant_scale": T(BF16, (4, 128)), "antiquant_group_size": 64},
    {"x": T(F16, (16, 256)), "weight": T(I8, (256, 128), "NZ", True), "antiquant_scale": T(F16, (4, 128)), "antiquant_group_size": 64},
    {"x": T(F16, (16, 256), "ND", True), "weight": T(I8, (256, 128)), "antiquant_scale": T(F16, (128,))},
    {"x": T(F16, (16, 256)), "weight": T(I8, (256, 128)), "antiquant_scale": T(F16, (128,)), "quant_scale": T(I64, (128,)), "quant_offset": T(F32, (128,))},
    {"x": T(F16, (16, 256)), "weight": T(I8, (256, 128), "ND", True), "antiquant_scale": T(I64, (128,)), "antiquant_offset": T(I32, (128,)), "antiquant_group_size": 0},
    {"x": T(F16, (16, 256)), "weight": T(I32, (256, 16), "NZ"), "antiquant_scale": T(F16, (4, 128)), "antiquant_group_size": 64},
    {"x": T(F16, (16, 256)), "weight": T(I32, (32, 128), "NZ", True), "antiquant_scale": T(F16, (128,)), "antiquant_group_size": 0},
    {"x": T(BF16, (16, 256)), "weight": T(I8, (256, 128), "NZ"), "antiquant_scale": T(BF16, (128,)), "bias": T(F32, (128,)), "antiquant_group_size": 0},
    {"x": T(F32, (16, 256)), "weight": T(I8, (256, 128)), "antiquant_scale": T(F32, (128,)), "antiquant_group_size": 0},
    {"x": T(F32, (16, 256)), "weight": T(I8, (256, 128)), "antiquant_scale": T(F32, (4, 128)), "antiquant_offset": T(F32, (4, 128)), "antiquant_group_size": 64},
]  # fmt: skip
GAMMA = {"gamma": T(F16, (64,)), "epsilon": 1e-6}
SUM = {"x1": T(F16, (16, 64)), "x2": T(F16, (16, 64)), **GAMMA}
SUM32 = {name: v if name == "epsilon" else T(F32, v.shape) for name, v in SUM.items()}
BASES = {
    **NEIGHBOURS,
    RMS_NORM: [
        {"input": T(F16, (16, 64)), **GAMMA},
        {"input": T(F32, (16, 64)), "gamma": T(F32, (64,)), "epsilon": 1e-5},
    ],
    ADD_RMS_NORM: [SUM, SUM32],
    ADD_RMS_NORM_DYNAMIC_QUANT: [SUM],
    QMM: QMM_BASES,
    WQMM: WQMM_BASES,
    QMMD: [
        {
            "x": T(F16, (16, 512)),
            "quantized_weight": T(I8, (128, 512)),
            "weight_scale": T(F32, (128,)),
            "bias": None,
            "x_scale": x_scale,
            "x_offset": None,
            "smooth_scale": T(F16, (512,)),
            "quant_mode": mode,
        }
        for x_scale, mode in [(None, "pertoken"), (T(F32, (16,)), "pertoken"), (T(F32, (1,)), "pertensor")]
    ],
    TQP: [{"scale": T(F32, (128,)), "offset": T(F32, (128,)), "round_mode": 0}],
    INT4PACK: [{"weight": T(I32, (256, 128))}],
    FORMAT_CAST: [
        {"input": T(I8, (256, 128)), "acl_format": 29, "customize_dtype": None},
        {"input": T(I32, (256, 128)), "acl_format": 29, "customize_dtype": I32},
    ],
    DYNAMIC_QUANT: [
        {"input": T(F16, (4, 128)), "smooth_scales": T(F16, (128,)), "dst_type": I8, "quant_mode": "pertoken"},
        {"input": T(F16, (4, 128)), "dst_type": torch.quint4x2},
        {"input": T(F16, (4, 128)), "smooth_scales": T(F16, (8, 128)), "group_index": T(I32, (8,))},
    ],
    ANTI_QUANT: [{"x": T(I8, (8, 128)), "scale": T(F32, (128,)), "offset": T(F32, (128,)), "dst_dtype": F16}],
    QUANTIZE: [
        {
            "input": T(F16, (8, 128)),
            "scales": T(F16, (128,)),
            "zero_points": None,
            "dtype": torch.qint8,
            "axis": -1,
            "div_mode": True,
        },
        {
            "input": T(F16, (8, 128)),
            "scales": T(F16, (128,)),
            "zero_points": None,
            "dtype": torch.qint8,
            "axis": -1,
            "div_mode": False,
        },
        {
            "input": T(F16, (8, 128)),
            "scales": T(F16, (128,)),
            "zero_points": None,
            "dtype": torch.quint4x2,
            "axis": -1,
            "div_mode": False,
        },
        {
            "input": T(F16, (8, 4, 128)),
            "scales": T(F16, (1, 4, 1)),
            "zero_points": T(F16, (1, 4, 1)),
            "dtype": torch.qint8,
            "axis": -2,
            "div_mode": False,
        },
    ],
}
NUMBERS = frozenset().union(*(op.numbers for op in BASES))
DTYPES = (I8, torch.uint8, I32, I64, F16, BF16, F32, torch.float64)


def edits_of(name, value):
    """Other values for one argument."""
    if value is None and name not in NUMBERS:
        for shape, dtype in product([(1,), (128,), (3,), (128, 1), (1, 128)], (F32, I64, F16)):
            yield T(dtype, shape)
    elif isinstance(value, tuple):
        yield from (None, value[:1], value * 20, *((edit,) * len(value) for edit in edits_of(name, value[0]) if edit))
    elif isinstance(value, T):
        shape = value.shape
        yield None
        for dtype in DTYPES:
            yield T(dtype, shape, value.format, value.transposed)
        if len(shape) in (1, 3):
            yield T(value.dtype, (1025, *shape[1:]), value.format, value.transposed)
        others = [
            (*shape[:-1], 0),
            (3,),
            (1,),
            (1,) * 7,
            (1,) * 9,
            (1, *shape),
            (3, *shape[-2:]),
            shape[1:],
            (1, 1),
            (9, 9),
        ]
        for other in [*others, (shape[-1], 1), (128, 1)]:
            if other:
                yield T(value.dtype, other, value.format, value.transposed and len(other) > 1)
        yield T(value.dtype, (4, 128), "ND", True)
        if len(shape) >= 2:
            for rows, columns in product((shape[-2], 1, 2, 97, 65536, 2**31), (shape[-1], 1, 12, 100, 65536, 2**17)):
                yield T(value.dtype, (*shape[:-2], rows, columns), value.format, value.transposed)
            for form, turned in product(("ND", "NZ"), (False, True)):
                yield T(value.dtype, shape, form, turned)
    elif name == "group_sizes":
        yield from ([0, 0, 128], [0, 0, 256], [2, 0, 256], None)
    elif name == "active_expert_range":
        yield from ([0, 4], [1, 8], [4, 4], [0, 9], [0])
    elif isinstance(value, torch.dtype):
        yield from (*DTYPES, torch.qint8, torch.quint8, torch.qint32, torch.quint4x2)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int) or value is None:
        yield from (None, -2, -1, 0, 1, 2, 3, 29, 32, 48, 64, 128, 255, 256, 8192, 20000)
    else:
        yield from ("other", None)


def edited(arguments, op):
    names = {a for base in BASES[op] for a in base}
    for name in names:
        for value in edits_of(name, arguments.get(name)):
            yield {**arguments, name: value}


CONTRADICTED = tuple(
    {r.id for c in CHIPS.values() for r in c.rules if r.contradicted}
    | {
        row.contradicted
        for c in CHIPS.values()
        for r in c.rules
        if isinstance(r.need, DtypeTable)
        for row in r.need.rows
    }
    - {""}
)


def applies(rule, call):
    return call.op == rule.op and call.mode in rule.modes and (rule.when is None or rule.when.test(call))


def asked(rule):
    """The calls that a rule speaks of: legal ones, then edits of them."""
    for bases in (BASES[rule.op], (edit for base in BASES[rule.op] for edit in edited(base, rule.op))):
        for arguments in bases:
            yield from (c for mode in rule.modes if applies(rule, c := OpCall(rule.op, mode, arguments)))


def rejected_ids(call, chip, allow=()):
    return {b.rule.id for b in broken_rules(call, chip, allow)[0]}


TABLES = [{id(rule) for rule in chip.rules} for chip in CHIPS.values()]


def _its_own(i, rule):
    """Chips of one architecture share their rules: what a later one adds is asked of it, the rest of the first."""
    return not any(id(rule) in table and table <= TABLES[i] for table in TABLES[:i])


ROWS = [(c.name, rule) for i, c in enumerate(CHIPS.values()) for rule in c.rules if _its_own(i, rule)]


@pytest.mark.parametrize(("name", "rule"), ROWS, ids=lambda v: v if isinstance(v, str) else v.id)
def test_every_row_forbids_something(name, rule):
    chip = CHIPS[name]
    for call in asked(rule):
        if rule.need.check(call):
            assert rule.id in rejected_ids(call, chip)
            return
    pytest.fail(f"no edit of a legal call breaks {rule.id}")


def _always_forbids(rule):
    return all(
        rule.need.check(OpCall(rule.op, m, b))
        for m in rule.modes
        for b in BASES[rule.op]
        if applies(rule, OpCall(rule.op, m, b))
    )


@pytest.mark.parametrize(("name", "rule"), ROWS, ids=lambda v: v if isinstance(v, str) else v.id)
def test_every_row_lets_something_pass(name, rule):
    """A call that the rule speaks of and that nothing forbids (contradicted rules lifted)."""
    chip = CHIPS[name]
    for call in asked(rule):
        if not rule.need.check(call) and not rejected_ids(call, chip, CONTRADICTED):
            return
    # A row that says "not on this chip" or "not in this mode" has no other side.
    assert _always_forbids(rule), f"no legal call shows what {rule.id} allows"


@pytest.mark.parametrize("name", CHIPS)
def test_every_line_of_the_dtype_tables_is_legal(name):
    chip = CHIPS[name]
    for rule in chip.rules:
        if not isinstance(rule.need, DtypeTable):
            continue
        for row in rule.need.rows:
            for mode in row.modes:
                if mode not in rule.modes or (rule.id == "qmm.group.dtypes" and mode == "graph"):
                    continue
                if rule.op in NEIGHBOURS:
                    calls = [OpCall(rule.op, mode, a) for a in _calls_of_row(rule, row)]
                    verdicts = [judge(call, chip, CONTRADICTED) for call in calls]
                    assert any(verdicts), f"{mode} {row}\n" + "\n".join(map(str, verdicts))
                    continue
                call = OpCall(rule.op, mode, dict(_call_of_row(rule, row, mode, name)))
                assert rule.id not in rejected_ids(call, chip, CONTRADICTED), f"{rule.id}: {row}"
                verdict = judge(call, chip)
                if row.contradicted:
                    assert verdict.contradicted, f"{row}\n{verdict}"
                    assert judge(call, chip, (row.contradicted,)).legal
                elif rule.id != "qmm.group.dtypes":
                    assert verdict.legal, f"{mode} {row}\n{verdict}"


def _calls_of_row(rule, row):
    """The calls of a neighbour's form, each argument in the first dtype of its cell, and shaped as in some call that has it."""
    cells = dict(zip(rule.need.columns, row.cells, strict=True))
    for base in BASES[rule.op]:
        arguments = dict(base)
        for column, (dtype, *_) in cells.items():
            shaped = base.get(column) or next((b[column] for b in BASES[rule.op] if isinstance(b.get(column), T)), None)
            if dtype is None or column in rule.op.numbers:
                arguments[column] = dtype
            elif isinstance(shaped, tuple):
                arguments[column] = (T(dtype, shaped[0].shape),) * len(shaped)
            else:
                arguments[column] = T(dtype, shaped.shape, shaped.format, shaped.transposed)
        yield arguments


def _call_of_row(rule, row, mode, chip):
    """A call with the first dtype of every cell."""
    grouped = rule.id == "qmm.group.dtypes"
    turned = CHIPS[chip].layouts_of(QMM, "graph")[0].transposed
    for column, cell in zip(rule.need.columns, row.cells, strict=True):
        dtype = cell[0]
        if column == "output_dtype":
            yield column, dtype
        elif dtype is None:
            yield column, None
        elif column in ("x1", "x"):
            yield column, T(dtype, (16, 64 if dtype == "int32" else 512))
        elif column in ("x2", "weight"):
            form = "NZ" if turned and mode == "graph" else "ND"
            word = column == "weight" and row.cells[2][0] == "int64"  # the int64 scale wants a transposed weight
            if dtype == "int32":
                yield column, T(dtype, (512, 16))
            else:
                yield column, T(dtype, (512, 128), form, turned or word)
        elif column == "pertoken_scale":
            yield column, T(dtype, (16, 1) if grouped else (16,))
        elif grouped and (column == "scale" or (column == "offset" and row.cells[0][0] == "int32")):
            yield column, T(dtype, (2, 128))
        else:
            yield column, T(dtype, (128,))
    if grouped:
        yield "group_sizes", [0, 0, 256]


def test_every_row_cites_its_source():
    for chip in CHIPS.values():
        for rule in chip.rules:
            assert rule.source, rule.id
            assert set(re.split(r", ", rule.evidence)) <= {"documented", "code", "probed", "inferred"}, rule.id
            assert rule.need.want, rule.id
        ids = [r.id for r in chip.rules]
        assert len(ids) == len(set(ids)), f"{chip.name}: one id, one rule"


# -- what the answers look like ------------------------------------------------------------------------------------

LEGAL_310P = {**QMM_BASES[0]}


def ask(op=QMM, target="ascend310p", mode="graph", allow=(), **changes):
    return qp.check_op(op, target=target, mode=mode, allow=allow, **{**(LEGAL_310P if op == QMM else {}), **changes})


def test_all_broken_rules_come_back_not_the_first():
    verdict = ask(x1=T(I8, (16, 512), "ND", True), x2=T(I8, (512, 128)), bias=T(F16, (127,)))
    assert {r.rule for r in verdict.rejects} >= {
        "qmm.310p.x1",
        "qmm.310p.nz.graph",
        "qmm.bias.shape",
        "qmm.310p.dtypes.bias",
    }
    assert all(r.doc for r in verdict.rejects)


def test_nearest_legal_call_is_legal():
    verdict = ask(bias=T(F16, (127,)), x2=T(I8, (512, 128)))
    assert verdict.nearest is not None
    assert ask(**{"bias": T(F16, (127,)), "x2": T(I8, (512, 128)), **verdict.nearest}).legal


def test_contradicted_is_off_until_it_is_named():
    call = {"scale": T(F32, (128,)), "pertoken_scale": T(F32, (16,))}
    verdict = ask(**call)
    assert (verdict.legal, verdict.contradicted) == (False, True)
    assert "allow=('qmm.310p.pertoken',)" in verdict.rejects[0].hint
    assert ask(**call, allow=("qmm.310p.pertoken",)).legal


def test_a_firm_rule_can_not_be_lifted():
    for rule in ("qmm.310p.dtypes.bias", "qmm.310p.dtypes", "qmm.k.range"):
        with pytest.raises(ValueError, match=f"{rule}' is a rule about which documents and code agree"):
            ask(bias=T(F16, (128,)), allow=(rule,))


def test_symbolic_sizes_become_assumptions():
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = ShapeEnv()
    m, k = (
        env.create_symintnode(env.create_symbol(8, ConstantSource(n), dynamic_dim=DimDynamic.DYNAMIC), hint=8)
        for n in ("m", "k")
    )
    verdict = ask(x1=T(I8, (m, 512)))
    assert verdict.legal
    assert verdict.assumptions == ()
    verdict = qp.check_op(
        WQMM, target="ascend910b", x=T(F16, (m, k), "ND", True), weight=T(I8, (k, 128)), antiquant_scale=T(F16, (128,))
    )
    assert verdict.legal
    assert set(verdict.assumptions) >= {"k <= 65535", "m <= 65535"}
    assert "assuming" in str(verdict)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"op": "npu_quant_matmull"}, ValueError, "Did you mean 'npu_quant_matmul'"),
        ({"target": "910c"}, ValueError, "unknown target '910c'"),
        ({"mode": "jit"}, ValueError, "mode is 'jit'"),
        ({"x3": T(I8, (1, 1))}, TypeError, "no argument 'x3'"),
        ({"x1": (16, 512)}, TypeError, r"x1 is \(16, 512\); give a TensorSpec"),
    ],
)
def test_questions_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        ask(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("int9", (2, 2)), TypeError, "give a torch.dtype .*Did you mean 'int8'"),
        ((8, (2, 2)), TypeError, "give a torch.dtype"),
        ((I8, 5), TypeError, "give a tuple of sizes"),
        ((I8, (2.0,)), TypeError, "every size is an int"),
        ((I8, (-1, 2)), ValueError, "negative size"),
        ((I8, (2, 2), "NC1HWC0"), ValueError, "'ND', 'NZ'"),
        ((I8, (2,), "ND", True), ValueError, "needs two dimensions"),
    ],
)
def test_tensor_specs_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        T(*arguments)


def test_real_tensors_are_described_by_their_strides():
    x, w = torch.zeros(16, 512, dtype=I8), torch.zeros(128, 512, dtype=I8)
    verdict = qp.check_op(QMM, target="ascend910b", x1=x, x2=w.t(), scale=torch.zeros(128, dtype=I64), output_dtype=F16)
    assert verdict.legal
    assert spec_of_tensor(w.t()) == T(I8, (512, 128), "ND", True)


# -- the command line and the page ---------------------------------------------------------------------------------

QUESTION = [
    "check-op",
    QMM.name,
    "-t",
    "Ascend310P3",
    "x1=int8[16,512]",
    "x2=int8[512,128]:NZ:T",
    "scale=int64[128]",
    "output_dtype=float16",
]


def test_command_line():
    assert CliRunner().invoke(main, QUESTION).output.strip() == "legal"
    run = CliRunner().invoke(main, [*QUESTION, "bias=float16[128]"])
    assert run.exit_code == 1
    assert "qmm.310p.dtypes.bias" in run.output
    assert "nearest legal: bias=int32(128)" in run.output
    run = CliRunner().invoke(main, [*QUESTION, "bias"])
    assert "is not NAME=VALUE" in run.output
    assert parse_argument("group=64") == ("group", 64)
    assert parse_argument("div_mode=False") == ("div_mode", False)


def test_chips_command():
    assert all(chip in CliRunner().invoke(main, ["chips"]).output for chip in CHIPS)
    assert "contradicted: qmm.310p.pertoken" in CliRunner().invoke(main, ["chips", "ascend310p"]).output
    assert "unknown target" in CliRunner().invoke(main, ["chips", "ascend31"]).output


def test_page_of_chips_is_up_to_date():
    page = Path(__file__).parent.parent / "docs" / "chips.md"
    assert page.read_text() == markdown(), "run `make pages`"


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3, 1), (1, 1), (0, 3), (2, 3, 4), (2, 1, 4), (5,)])
def test_a_tensor_is_seen_as_its_strides_are(shape):
    t = torch.empty(shape, dtype=torch.int8)
    for view in (t, t.transpose(-1, 0), t.mT if t.dim() > 1 else t, t[..., :1]):
        stored_otherwise = not view.is_contiguous() and view.dim() > 1 and view.transpose(-2, -1).is_contiguous()
        assert bool(spec_of_tensor(view).transposed) == stored_otherwise, view.stride()


def test_nothing_is_asked_of_a_size_that_only_the_run_knows():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = mode.shape_env.create_unbacked_symint()
    with mode:
        t = torch.empty(rows, 64, dtype=torch.int8)
    assert (spec_of_tensor(t).transposed, spec_of_tensor(t.t()).transposed) == (False, True)
    assert not mode.shape_env.guards
