"""What a graph means in exact arithmetic, and whether its fused form keeps what the fused sites promise.

The oracle knows nothing of how the pass reads graphs: it runs the *unfused* graph node by node. Everything up to the
integer codes, and every small parameter, is taken as the graph computes it; from the codes on the arithmetic is done in
float64. Beside each value runs its magnitude ``S = sum_k |x_k * w_kn| + |bias_n|``, which the stated bounds are
relative to. Where the graph rounds a result again, an interval is carried on.

What is not finite is judged exactly: an infinity stays that infinity and what is not a number stays so, but for what
docs/semantics.md says of saturating chips, of float16 overflow inside of the graph, and of codes that are not numbers.
"""

import math
import operator
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

import quantpass as qp
from quantpass.doors.compiled import copied
from quantpass.graph.scale_words import fp19, unpack_scale_word
from quantpass.graph.schema import bind, op_name
from quantpass.graph.torch_internals import fill_in_values

HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

SATURATES = {"ascend310p"}
"""Chips where float16 overflow of a fused operator gives the largest finite number (docs/semantics.md, section 1)."""

OWN_MATMULS = ("npu.npu_quant_matmul", "quantpass.quant_matmul")
CONTRACTIONS = {
    *("aten.mv", "aten.addmv", "aten.addbmm"),
    *("aten.mm", "aten.mm.dtype", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.matmul", "aten.linear"),
    *("aten._int_mm", "aten.convolution", "aten.conv1d", "aten.conv2d", "aten._weight_int8pack_mm", "out_dtype"),
    *OWN_MATMULS,
    *("aten._weight_int4pack_mm_for_cpu", "aten.einsum", "aten._weight_int4pack_mm", "aten._dyn_quant_matmul_4bit"),
}
ROUNDS = {"aten.round", "aten.floor", "aten.ceil", "aten.trunc", "aten.round.decimals"}
FAKE_QUANT = "fake_quantize"
QUANTIZES = "quantize_per_tensor"


class Unsupported(Exception):
    """The oracle does not follow this operator after a matmul; the test has to return the value before it."""


class Wrong(AssertionError):
    """The fused graph computes something else, or the pass failed on the graph."""


@dataclass
class Judged:
    """The outcome for one graph. ``verdict``: ``"fused"`` (and right), ``"refused"``, ``"overflowing"`` (in float16, as the contract
    says) or ``"dropped"`` (does not run)."""

    verdict: str
    report: Any = None
    worst: float = 0.0
    rules: set[str] = field(default_factory=set)


@dataclass
class Value:
    """``v`` in float64 (or the graph's integers); ``mag`` only behind a matmul; ``low``/``high`` only behind a rounding.

    ``held`` is ``v`` where every matmul's own infinities are limited to float16's largest number. ``slack`` is what an
    operator that quantizes x by its own rule may change; it flows through what follows as a magnitude does.
    """

    v: Any
    tainted: bool = False
    mag: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    held: torch.Tensor | None = None
    slack: torch.Tensor | None = None


def traced(f, *args, sizes="fake", pre_dispatch=False):
    """``f`` as an ATen graph; tensors that ``f`` closes over become attributes, so their values are known.

    ``sizes="symbolic"`` leaves the sizes of ``args`` unknown; ``pre_dispatch`` keeps composite operators, as export does.
    """
    with torch.no_grad():
        return make_fx(f, tracing_mode=sizes, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*args)


class _Recorder(Interpreter):
    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)


def judge(gm, args, *, target="cpu", **options) -> Judged:
    """Fuse a copy of ``gm``, run both, and compare within the stated bounds.

    Raises:
        Wrong: the pass raised, left a graph that does not run, or left a graph that computes something else.
    """
    args = list(args)
    recorder = _Recorder(gm)
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            native_out = recorder.run(*_cloned(args))
            if not all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function"):
                _run_on_fakes(gm, args)
    except Exception:
        return Judged("dropped")
    fill_in_values(gm)
    if any(isinstance(t, torch.Tensor) and t.device.type != "cpu" for t in _flat(native_out)):
        return Judged("dropped")
    if any(_other_shape(n.meta.get("val"), recorder.env[n]) for n in gm.graph.nodes if n.op == "call_function"):
        return Judged("dropped")  # an operator that was called in a way that its own shape function does not know
    fused = copied(gm)
    try:
        report = qp.fuse(fused, target=target, **options)
    except Exception as error:
        raise Wrong(f"the pass raised {type(error).__name__}: {error}\n{gm.graph}") from error
    rules = {r.rule for s in report.sites if not s.fused for r in s.rejects}
    if "rewrite.failed" in rules:
        raise Wrong(f"a plan could not be carried out: {report}\n{gm.graph}")
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            actual_out = fused(*_cloned(args))
    except Exception as error:
        raise Wrong(f"the fused graph does not run: {type(error).__name__}: {error}\n{fused.graph}") from error
    if not report.fused:
        return Judged("refused", report, rules=rules)
    loose = [s for s in report.sites if s.fused and not math.isfinite(s.numerics.absolute + s.numerics.relative)]
    if loose:
        raise Wrong(f"no finite bound is stated: {loose[0].numerics}\n{gm.graph}\n{report}")
    if any("overflows above 65504" in w for s in report.sites if s.fused for w in s.numerics.why) and any(
        bool((t.abs().nan_to_num(0.0, posinf=0.0) > 65504).any())
        for t in recorder.env.values()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ):
        return Judged("overflowing", report, rules=rules)  # the contract says so, and bounds the rest only
    checker = _Checker(gm, recorder.env, report, fused, saturates=target in SATURATES)
    try:
        worst = checker.check(_flat(native_out), _flat(actual_out))
    except Wrong as error:
        raise Wrong(f"{error}\n--- graph\n{gm.graph}\n--- fused\n{fused.graph}\n{report}") from None
    return Judged("fused", report, worst, rules)


def _run_on_fakes(gm, args):
    """Raises where an operator's own shape function does not know a call that its kernel runs."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        Interpreter(gm).run(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))


def _cloned(args):
    """Copies with the same strides: what a graph writes to stays out of the next run."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


def _is_random(node):
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return bind(node).get("train", True) is not False


def _other_shape(expected, t):
    if not isinstance(expected, torch.Tensor) or not isinstance(t, torch.Tensor):
        return isinstance(expected, torch.Tensor) != isinstance(t, torch.Tensor)
    sizes = zip(expected.shape, t.shape, strict=False)
    return expected.dim() != t.dim() or any(isinstance(a, int) and a != b for a, b in sizes)


def _flat(out):
    return list(out) if isinstance(out, tuple | list) else [out]


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


class _Checker:
    def __init__(self, gm, native, report, fused, *, saturates=False):
        self.gm, self.native, self.report, self.saturates = gm, native, report, saturates
        self.values: dict[Any, Value] = {}
        self.sites = [s for s in report.sites if s.fused]
        self.relative = sum(s.numerics.relative for s in self.sites)
        self.absolute = sum(s.numerics.absolute for s in self.sites)
        self.of_step = max((s.numerics.of_step for s in self.sites), default=0.0)
        self.of_w = max((s.numerics.of_w for s in self.sites), default=0.0)
        why = " ".join(w for s in self.sites for w in s.numerics.why)
        self.floor = max((float(f) for f in re.findall(r"in rows with magnitudes above (\S+)", why)), default=0.0)
        self.odd_codes = False  # a code in front of a matmul is not a number, and no integer either
        self.endless = False  # an operand of a matmul is infinite somewhere
        self.outputs = {s.plan.output.name for s in self.sites}
        self.left = {n.name for n in fused.graph.nodes}
        self.added = [n for n in fused.graph.nodes if n.name not in {m.name for m in gm.graph.nodes}]
        self.rounding = sum(
            HALF_UNIT.get(n.meta["val"].dtype, 0.0)
            for n in self.added
            if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor) and op_name(n).startswith("aten.")
            and op_name(n).split(".")[1] in ("mul", "add", "sub", "div", "_to_copy")
        )  # fmt: skip
        self.output_rounding = sum(HALF_UNIT.get(s.plan.output.meta["val"].dtype, 0.0) for s in self.sites)
        # What a result of the operators loses below the smallest number of its dtype may be scaled up behind it.
        self.underflow = sum(_smallest(s.plan.output.meta["val"].dtype) for s in self.sites)
        self.worst = 0.0

    def check(self, native, actual) -> float:
        (output,) = self.gm.graph.find_nodes(op="output")
        results, restarted = {}, set()
        for node, n, a in zip(_flat(output.args[0]), native, actual, strict=True):
            if isinstance(node, torch.fx.Node):
                results[node] = (n, a)
        for node in self.gm.graph.nodes:
            if node.op == "output":
                break
            if any(i in restarted for i in node.all_input_nodes):
                args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda i: self.native[i])
                self.native[node] = node.target(*args, **kwargs)
                restarted.add(node)
            self.values[node] = value = self._value(node)
            if node in results:
                given = results[node][1]
                self._compare(node, value, self.native[node], given)
                if isinstance(given, torch.Tensor) and (value.mag is not None or value.low is not None):
                    # What follows starts from this very result.
                    self.values[node], self.native[node] = Value(wide(given), tainted=_holds_integers(given)), given
                    restarted.add(node)
        return self.worst

    # -- one node ------------------------------------------------------------------------------------------------------

    def _value(self, node) -> Value:
        native = self.native.get(node)
        if node.op in ("placeholder", "get_attr"):
            return Value(wide(native), tainted=_holds_integers(native))
        inputs = [self.values[i] for i in node.all_input_nodes]
        name = "out_dtype" if isinstance(node.target, HigherOrderOperator) else op_name(node)
        if not isinstance(native, torch.Tensor):
            return Value(native)
        if any(i.low is not None for i in inputs):
            return self._interval(node, native)
        if _is_random(node):
            if any(i.mag is not None for i in inputs):
                raise Unsupported(f"{name} at random")
            return Value(wide(native), True)
        if name in CONTRACTIONS:
            return self._contraction(node, name, native, inputs)
        behind = any(i.mag is not None for i in inputs)
        floating = native.is_floating_point()
        if not behind:
            if FAKE_QUANT in name:
                self.odd_codes |= any(bool(wide(self.native[i]).isnan().any()) for i in node.all_input_nodes)
                found = self._fake_quantized(node)
                source = self.native[node.all_input_nodes[0]]  # which code NaN becomes, the machine chooses
                return Value(found.masked_fill(source.isnan(), math.nan), tainted=True)
            if name in ROUNDS or not floating or node.target is operator.getitem:
                self.odd_codes |= floating and bool(native.isnan().any())
                lost = self._no_integer(node, native)
                if lost is not None:  # which integer NaN becomes, PyTorch leaves to the machine
                    self.odd_codes = True
                    return Value(native.double().masked_fill(lost, math.nan), tainted=True)
                return Value(wide(native), tainted=native.dtype != torch.bool)
            if not any(i.tainted for i in inputs):
                return Value(wide(native))
            self._count_rounding(node, native, name)
            return Value(self._run(node, lambda i: i.v, native), tainted=True)
        return self._behind(node, name, native)

    def _no_integer(self, node, native):
        """Where a cast to wide integers, or an operator that casts within, meets NaN; None for nowhere."""
        (source,) = node.all_input_nodes if len(node.all_input_nodes) == 1 else (None,)
        if source is not None and node.target is operator.getitem and FAKE_QUANT in op_name(source):
            source = source.all_input_nodes[0]
        elif native.dtype not in (torch.int16, torch.int32, torch.int64):
            source = None
        if source is None:
            return None
        source = self.native[source]
        if not isinstance(source, torch.Tensor) or not source.is_floating_point() or source.shape != native.shape:
            return None
        return source.isnan() if bool(source.isnan().any()) else None

    def _behind(self, node, name, native) -> Value:
        """A node that a matmul's result flows into."""
        into_integers = not native.is_floating_point() and any(
            i.mag is not None and self.native[n].is_floating_point()
            for n, i in ((n, self.values[n]) for n in node.all_input_nodes)
        )
        if name in ROUNDS or into_integers or QUANTIZES in name or FAKE_QUANT in name:
            if native.dtype == torch.bool:
                raise Unsupported(name)
            return self._interval(node, native)
        self._count_rounding(node, native, name)
        v = wide(native) if not native.is_floating_point() else self._run(node, lambda i: i.v, native)
        held = None
        if self.saturates and native.is_floating_point():
            held = self._run(node, lambda i: i.v if i.held is None else i.held, native)
        slack = self._passed_on(node, name, v) if any(i.slack is not None for i in self._inputs(node)) else None
        return Value(v, True, self._magnitude(node, name, v), held=held, slack=slack)

    def _inputs(self, node):
        return [self.values[i] for i in node.all_input_nodes]

    def _passed_on(self, node, name, v):
        """The slack of a node behind a matmul that quantizes by its own rule."""
        base = name.split(".")[1] if name.count(".") else name
        bound = bind(node) if isinstance(node.target, OpOverload) else {}

        def slack(a):
            found = self.values[a].slack if isinstance(a, torch.fx.Node) else None
            return torch.zeros(()).double() if found is None else found

        def size(a):
            value = self.values[a].v if isinstance(a, torch.fx.Node) else a
            return torch.as_tensor(value).double().abs()

        if base in ("add", "sub", "rsub"):
            alpha, first, second = abs(bound.get("alpha", 1)), slack(bound["self"]), slack(bound["other"])
            return (first + alpha * second if base != "rsub" else first * alpha + second).expand_as(v)
        if base == "mul":
            a, b = bound["self"], bound["other"]
            return slack(a) * size(b) + slack(b) * size(a) + slack(a) * slack(b)
        if base == "div" and self.values.get(bound["other"], Value(None)).slack is None:
            return slack(bound["self"]) / size(bound["other"])
        if base in ("relu", "clamp", "clamp_min", "clamp_max", "neg", "abs", "minimum", "maximum"):
            return sum(i.slack for i in self._inputs(node) if i.slack is not None).expand_as(v)
        if base in MOVES or base in ("masked_fill", "where"):

            def moved(i):
                if i.slack is not None or not isinstance(i.v, torch.Tensor):
                    return i.v if i.slack is None else i.slack  # a size is what it is
                return torch.zeros_like(wide_abs(i.v))

            return self._run(node, moved, v).double()
        raise Unsupported(name)

    def _own_rule(self, name, operands, sized):
        """What quantizing an operand by another rule may change: ``(of_step * step + of_w) * sum_k |other|``.

        Which of them is the activation the oracle does not know, and neither what its scale is: but no code other than
        0 stands for less than a step, and the largest of a row that has its own scale for 126 of them.

        Args:
            name: the operator.
            operands: its two matrices.
            sized: the operator on magnitudes, from a function that gives those of a node.
        """
        operands = [o for o in operands if isinstance(o, torch.fx.Node) and self.native[o].numel()]
        if not self.of_step or not operands:
            return None
        base = sized(lambda i: _finite(_mag(self.values[i])))
        found = torch.zeros_like(base)
        for place, operand in enumerate(operands):
            along_k = -1 if place == 0 or name == "aten.linear" else -2
            more = self._moved(
                operand, None if name in ("aten.einsum", "aten.mv", "aten.addmv") or "conv" in name else along_k
            )
            replaced = sized(lambda i, o=operand, m=more: _finite(_mag(self.values[i])) + (m if i is o else 0.0))
            found = torch.maximum(found, replaced - base)
        return found

    def _moved(self, operand, along_k):
        """How far each element of an operand may be moved; ``along_k`` None for operands whose rows are not known."""
        size = _finite(wide_abs(self.native[operand]))
        if _holds_integers(self.native[operand]):
            return torch.full_like(size, self.of_step)
        least = size[size > 0].min() if bool((size > 0).any()) else size.new_zeros(())
        largest = size.max() if along_k is None else size.amax(along_k, keepdim=True)
        # Rows below what the report names are divided by as much as that row would be.
        largest = largest.clamp_min(self.floor)
        return (self.of_step * torch.maximum(largest / 126, least) + self.of_w).expand_as(size)

    def _magnitude(self, node, name, v):
        base = name.split(".")[1] if name.count(".") else name
        bound = bind(node) if isinstance(node.target, OpOverload) else {}

        def mag(a):
            if isinstance(a, torch.fx.Node):
                value = self.values[a]
                return value.mag if value.mag is not None else wide_abs(value.v)
            return abs(a) if isinstance(a, int | float) and not isinstance(a, bool) else a

        if base in ("add", "sub", "rsub"):
            alpha = abs(bound.get("alpha", 1))
            first, second = mag(bound["self"]), mag(bound["other"])
            return first + alpha * second if base != "rsub" else first * alpha + second
        if base == "mul":
            return torch.as_tensor(mag(bound["self"])).double() * torch.as_tensor(mag(bound["other"])).double()
        if base == "div":
            other = bound["other"]
            by = self.values[other].v.double().abs() if isinstance(other, torch.fx.Node) else abs(other)
            return torch.as_tensor(mag(bound["self"])).double() * mag(other) / by**2
        if base in ("masked_fill", "where"):
            return self._run(node, lambda i: i.mag if i.mag is not None else wide_abs(i.v), v).double().abs()
        if base in ("relu", "clamp", "clamp_min", "clamp_max", "neg", "abs", "minimum", "maximum"):
            own = next(mag(i) for i in node.all_input_nodes if self.values[i].mag is not None)
            return torch.maximum(own.expand_as(v), v.double().abs())
        if base in MOVES:
            return self._run(node, lambda i: i.mag if i.mag is not None else wide_abs(i.v), v).double()
        raise Unsupported(name)

    def _contraction(self, node, name, native, inputs) -> Value:
        if native.dtype == torch.bool:
            raise Unsupported(name)
        if name in OWN_MATMULS:
            return self._own_matmul(node, native)
        if name == "out_dtype":
            _, _, a, b = node.args
            flip = node.args[0] is torch.ops.aten.linear.default
            x, w = (self.values[i] for i in (a, b))
            slack = self._own_rule(
                "aten.linear" if flip else name, (a, b), lambda mag: mag(a) @ (mag(b).mT if flip else mag(b))
            )
            return Value(wide(native), True, _mag(x) @ (_mag(w).mT if flip else _mag(w)), slack=slack)
        bound = bind(node)
        k = self._inner_size(name, bound)
        unfused = node.name in self.left
        first = next((bound[n] for n in ("mat1", "batch1", "mat", "input", "self") if n in bound), None)
        operands = (first, *(bound[n] for n in ("mat2", "batch2", "vec", "weight", "other") if n in bound))
        for operand in operands:
            if not isinstance(operand, torch.fx.Node) or not self.native[operand].numel():
                continue
            self.endless |= bool(torch.isinf(wide(self.native[operand])).any())
            if any(s.numerics.of_x for s in self.sites):
                x = _mag(self.values[operand]).nan_to_num(0.0, posinf=0.0)
                most = max(float(x.sum(d).max()) for d in range(x.dim()))
                self.absolute += max(s.numerics.of_x for s in self.sites) * most
        if unfused and native.is_floating_point():
            self.rounding += (k + 2) * HALF_UNIT[native.dtype]
        if name in ("aten._weight_int8pack_mm", "aten._weight_int4pack_mm_for_cpu"):
            x, w = self.values[bound["self"]], self._packed(name, bound)
            return Value(x.v @ w, True, _mag(x) @ w.abs())
        v = self._run(node, lambda i: i.v, native) if native.is_floating_point() else wide(native)
        absolute = {
            n: (abs(a) if n in ("alpha", "beta") and not isinstance(a, torch.fx.Node) else a) for n, a in bound.items()
        }
        keyword = {a.name for a in node.target._schema.arguments if a.kwarg_only}
        target = torch.ops.aten.mm.default if name in ("aten._int_mm", "aten.mm.dtype") else node.target

        def sized(mag):
            given = {a.name: map_arg(absolute[a.name], mag) for a in node.target._schema.arguments}
            kwargs = {n: a for n, a in given.items() if n in keyword}
            args = [a for n, a in given.items() if n not in keyword]
            if name == "aten.mm.dtype":
                args, kwargs = args[:2], {}
            return target(*args, **kwargs).abs()

        slack = self._own_rule(name, bound.get("tensors", operands), sized)
        return Value(v, True, sized(lambda i: _mag(self.values[i])), held=self._held(v, bound, name), slack=slack)

    def _own_matmul(self, node, native) -> Value:
        """``npu_quant_matmul`` as the model calls it: docs/semantics.md, section 1, in exact arithmetic."""
        a = bind(node)
        given = {n: self.native[t] for n, t in a.items() if isinstance(t, torch.fx.Node)}
        x, w, scale, rows, bias = (given.get(n) for n in ("x1", "x2", "scale", "pertoken_scale", "bias"))
        others = ("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "y_scale")
        if (
            {x.dtype, w.dtype} != {torch.int8}
            or any(a.get(n) is not None for n in others)
            or any(a["group_sizes"] or ())
        ):
            raise Unsupported(op_name(node))
        if a.get("transpose_x1"):
            x = x.mT
        if a.get("transpose_x2"):
            w = w.mT
        floating = bias is not None and bias.is_floating_point()
        offset, out = given.get("offset"), native.dtype
        if scale.dtype == torch.int64:
            scale, offset = unpack_scale_word(scale)
        elif out in (torch.int8, torch.float16) and rows is None and not floating:
            scale = fp19(scale)
        by = torch.ones(()).double() if out == torch.int32 else scale.double()
        by = by if rows is None else by * rows.double()[:, None]
        more = torch.zeros(()).double() if bias is None else bias.double()

        def product(size, plus):
            acc = size(x.double()) @ size(w.double())
            return (acc if floating else acc + plus) * size(by) + (plus if floating else 0.0)

        v, mag = product(lambda t: t, more), product(torch.abs, more.abs())
        slack = self.of_step * wide_abs(w).sum(0) * by.abs() if self.of_step else None
        if out.is_floating_point and node.name in self.left:
            self.rounding += HALF_UNIT[out]
        value = Value(v, True, mag, held=v.clamp(-65504.0, 65504.0) if self.saturates else None, slack=slack)
        if out != torch.int8:
            return value
        off = self.allowance(value, node)
        zero = 0 if offset is None else offset.double()
        low, high = (((v + s * off).round().clamp(-256, 255) + zero).clamp(-128, 127).to(out) for s in (-1, 1))
        return Value(low, True, None, low, high)

    def _held(self, v, bound, name):
        """``v`` with the product's infinities limited to float16's largest number; an addend's own stay."""
        if not self.saturates:
            return None
        held = v.double().clamp(-65504.0, 65504.0)
        addend = next((bound[n] for n in ("bias", "self") if isinstance(bound.get(n), torch.fx.Node)), None)
        if addend is None or not name.startswith(("aten.add", "aten.badd", "aten.linear")):
            return held
        added = self.values[addend].v
        return torch.where(torch.isinf(added.double()), added.double(), held)

    def _inner_size(self, name, bound):
        first = next(bound[n] for n in ("mat1", "batch1", "self", "input", "tensors") if n in bound)
        if name == "aten.addmv":
            first = bound["mat"]
        value = self.native[first] if isinstance(first, torch.fx.Node) else torch.empty(64)
        return value.shape[1] if "conv" in name else value.shape[-1]

    def _packed(self, name, bound):
        if name == "aten._weight_int8pack_mm":
            return (self.values[bound["mat2"]].v.double() * wide(self.native[bound["scales"]])[:, None]).t()
        sz = self.native[bound["qScaleAndZeros"]].float()
        k = self.native[bound["self"]].shape[-1]
        packed = self.native[bound["mat2"]]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(k), packed, bound["qGroupSize"], sz).double()

    def _fake_quantized(self, node):
        """The operator on the graph's own values in float32: the same codes, no rounding to 16 bits."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda i: self.native[i])
        first = args[0] if args else kwargs["self"]
        result = node.target(first.float(), *args[1:], **kwargs)
        self._count_rounding(node, result if isinstance(result, torch.Tensor) else result[0], "fake")
        return wide(result)

    def _interval(self, node, native) -> Value:
        ends, turns = [], []
        for sign in (-1, 1):

            def end(value, sign=sign, node=node):
                if value.low is not None:
                    return value.low if sign < 0 else value.high
                if value.mag is not None:
                    return value.v.double() + sign * _finite(self.allowance(value, node))
                return value.v

            name = op_name(node)
            if not native.is_floating_point() and name.split(".")[1] in ("_to_copy", "to", "convert_element_type"):
                whole = end(self.values[node.all_input_nodes[0]]).to(torch.int64)
                ends.append(whole.to(native.dtype))  # wraps as the cast from float32 does
                turns.append(whole - ends[-1].to(torch.int64))
            else:
                ends.append(self._run(node, end, native))
        if len(turns) == 2:  # between two ends that wrap to different turns lies every integer
            info, torn = torch.iinfo(native.dtype), turns[0] != turns[1]
            ends = [ends[0].masked_fill(torn, info.min), ends[1].masked_fill(torn, info.max)]
        ends = [e if not native.is_floating_point() else e.double() for e in ends]
        low, high = torch.minimum(*ends), torch.maximum(*ends)
        if native.is_floating_point() and op_name(node).split(".")[1] in ("add", "sub", "mul", "div"):
            slack = torch.maximum(low.abs(), high.abs())
            if op_name(node).split(".")[1] in ("add", "sub"):
                slack = slack + sum(wide_abs(self.native[i]) for i in node.all_input_nodes)
            slack = 2 * HALF_UNIT[native.dtype] * _finite(slack)
            low, high = low - slack, high + slack
        return Value(ends[0], True, None, *self._unjudged(node, native, low, high))

    def _unjudged(self, node, native, low, high):
        """Anything goes for codes of what is no number, and, where the graph itself overflowed, its own result as well."""
        fresh = [i for i in node.all_input_nodes if self.values[i].low is None]
        sources, exact = [wide(self.native[i]) for i in fresh], [self.values[i].v for i in fresh]
        if all(bool(torch.as_tensor(t).isfinite().all()) for t in (*sources, *exact)):
            return low, high
        kind = torch.finfo(torch.float64) if native.is_floating_point() else torch.iinfo(native.dtype)
        nan = sum(torch.as_tensor(t).isnan() for t in (*sources, *exact)).bool().expand_as(low)
        over = sum(torch.as_tensor(t).isinf() for t in sources).bool().expand_as(low)
        nan = nan | (low.isnan() | high.isnan() if native.is_floating_point() else False)
        if self.saturates:
            nan = nan | over
        own = native.double() if native.is_floating_point() else native
        low, high = torch.where(over, torch.minimum(low, own), low), torch.where(over, torch.maximum(high, own), high)
        return torch.where(nan, kind.min, low), torch.where(nan, kind.max, high)

    def _run(self, node, pick, native):
        """The node on other values, floating dtypes among its arguments widened to float64."""

        def widen(a):
            return torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a

        if isinstance(node.target, OpOverload):
            bound = bind(node)
            schema = {a.name: a for a in node.target._schema.arguments}
            values = {n: widen(map_arg(a, lambda i: pick(self.values[i]))) for n, a in bound.items()}
            args = [values[n] for n, a in schema.items() if not a.kwarg_only]
            kwargs = {n: values[n] for n, a in schema.items() if a.kwarg_only}
            try:
                return node.target(*args, **kwargs)
            except Exception:  # no kernel for float64
                args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda i: _as(pick(self.values[i]), None))
            try:
                return wide(node.target(*args, **kwargs))
            except Exception:  # nor for float32: the graph's own dtypes, and their rounding
                self.rounding += 4 * HALF_UNIT.get(native.dtype, 0.0)
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda i: _as(pick(self.values[i]), self.native[i]))
            return wide(node.target(*args, **kwargs))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda i: pick(self.values[i]))
        return node.target(*args, **kwargs)

    # -- tolerance and comparison --------------------------------------------------------------------------------------

    def _count_rounding(self, node, native, name):
        base = name.split(".")[1] if name.count(".") else name
        if (
            node.name in self.left
            and native.is_floating_point()
            and base not in MOVES - {"_to_copy", "to", "convert_element_type"}
        ):
            self.rounding += HALF_UNIT[native.dtype]
            self.underflow += _smallest(native.dtype)

    def allowance(self, value, node):
        largest = [self.values[n].mag for n in self.values if n.name in self.outputs and self.values[n].mag is not None]
        gain = 1.0
        if largest and value.mag is not None and value.mag.numel():
            own = max(float(_finite(m).max()) for m in largest if m.numel())
            gain = max(1.0, float(_finite(value.mag).max()) / own) if own else 1.0
        # A fused result that other nodes go on with was rounded to its dtype.
        rounded = 0.0 if node.name in self.outputs else self.output_rounding
        return (
            value.mag.double() * (self.relative + self.rounding + rounded + 2.0**-23)
            + (0.0 if value.slack is None else _finite(value.slack))
            + self.absolute * gain
            + self.underflow * 256 * gain
        )

    def _compare(self, node, value, native, actual):
        if not isinstance(native, torch.Tensor):
            return
        if native.shape != actual.shape or native.dtype != actual.dtype:
            raise Wrong(f"{node.name}: {actual.dtype}{tuple(actual.shape)} for {native.dtype}{tuple(native.shape)}")
        if value.mag is None and value.low is None:
            if not torch.equal(native.nan_to_num(nan=0.125), actual.nan_to_num(nan=0.125)):
                raise Wrong(f"{node.name} is no result of a matmul and has changed")
            return
        half = HALF_UNIT.get(native.dtype, 0.0)
        if value.low is not None:
            slack = half * torch.maximum(value.low.abs(), value.high.abs())
            low, high = value.low - slack, value.high + slack
            right = (actual.double() >= low) & (actual.double() <= high) | low.isnan() | high.isnan()
        else:
            v = value.v.double()
            tiny = torch.finfo(native.dtype).tiny if native.dtype.is_floating_point else 0.0
            slack = self.allowance(value, node) + half * v.abs() + tiny
            low, high = v - slack, v + slack
            right = self._right(native.double(), actual.double(), value, low, high, native.dtype)
        bad = ~right
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            at = tuple(where)
            raise Wrong(
                f"{node.name}{where}: {float(actual[at]):.9g}, wanted {float(low[at]):.9g} to {float(high[at]):.9g}, "
                f"the graph gives {float(native[at]):.9g} ({int(bad.sum())} of {bad.numel()} wrong)"
            )

    def _right(self, native, actual, value, low, high, dtype):
        """Which elements are right; ``low`` and ``high`` mean something where ``value.v`` is finite."""
        v = value.v.double()
        limit = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
        same = (actual == v) | (actual.isnan() & v.isnan())
        inside = (actual >= low) & (actual <= high)
        over = (actual == math.inf) & (high >= limit) | (actual == -math.inf) & (low <= -limit)
        if self.saturates:
            over |= (actual.abs() == limit) & ((actual > 0) & (high >= limit) | (actual < 0) & (low <= -limit))
        right = torch.where(v.isfinite(), inside | over, same) | (actual == native)
        # The graph overflows on its way to a finite number; so may what is left of it.
        lost = v.isfinite() & ~native.isfinite()
        right |= lost & (~actual.isfinite() | self.saturates)
        right |= ~v.isfinite() & native.isnan() & actual.isnan()
        if value.held is not None:  # the product alone is infinite, and the chip has a largest number
            right |= ~v.isfinite() & ~(v == value.held) & ~(v.isnan() & value.held.isnan()) & ~actual.isnan()
        if value.mag is not None:  # zero but for rounding, times infinity
            right |= v.isnan() & (value.mag == math.inf) & ~actual.isfinite()
        if self.endless:
            right |= v.isnan() & ~actual.isfinite()
        if self.odd_codes:
            right |= v.isnan()
        return right


def _as(value, native):
    if native is None:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    return value.to(native.dtype) if isinstance(value, torch.Tensor) and isinstance(native, torch.Tensor) else value


def _mag(value):
    return value.mag.double() if value.mag is not None else wide_abs(value.v)


def _smallest(dtype):
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _finite(t):
    return t.nan_to_num(0.0, posinf=0.0, neginf=0.0)


def wide_abs(v):
    return v.double().abs() if isinstance(v, torch.Tensor) else abs(v)


def _holds_integers(t):
    return isinstance(t, torch.Tensor) and not t.is_floating_point() and t.dtype != torch.bool


MOVES = {
    *("view", "reshape", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "clone", "mT"),
    *("alias", "detach", "contiguous", "slice", "select", "flatten", "unflatten", "numpy_T", "swapaxes", "view_copy"),
    *(
        "lift_fresh",
        "lift_fresh_copy",
        "dropout",
        "_to_copy",
        "to",
        "convert_element_type",
        "cat",
        "index",
        "split",
        "flip",
    ),
}
