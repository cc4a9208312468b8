"""A legality rule and a chip: data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quantpass.chips.calls import OpCall, VendorOp
from quantpass.chips.requirements import Requirement


@dataclass(frozen=True, slots=True)
class When:
    """A condition on a call, with its words."""

    words: str
    test: Callable[[OpCall], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a chip's legality table.

    Attributes:
        id: stable identifier, e.g. ``"qmm.x1.rank"``.
        op: the vendor operator it speaks of.
        need: what it demands.
        source: document and sentence, or file, that says so.
        evidence: how that is known: ``"documented"``, ``"code"`` (read in vendor code), ``"probed"`` (run on the vendor's
            wheel), ``"inferred"``, or several.
        when: the calls it speaks of; None for all.
        modes: the execution modes it speaks of.
        contradicted: documents and code disagree. Such a rule forbids by default; naming it in ``allow`` lifts it.
        hint: what a user can do.
    """

    id: str
    op: VendorOp
    need: Requirement
    source: str
    evidence: str = "documented"
    when: When | None = None
    modes: tuple[str, ...] = ("graph", "eager")
    contradicted: bool = False
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a legal call makes the vendor's library do, beside the operator, each time that it runs.

    Attributes:
        op: the operator.
        what: what is done.
        source: the file that does it.
        when: the calls that it is done for; None for all.
        modes: the execution modes.
        instead: what avoids it.
    """

    op: VendorOp
    what: str
    source: str
    when: When | None = None
    modes: tuple[str, ...] = ("graph", "eager")
    instead: str = ""

    def is_of(self, call: OpCall) -> bool:
        return self.op == call.op and call.mode in self.modes and (self.when is None or self.when.test(call))

    def __str__(self) -> str:
        return f"at every call: {self.what} ({self.source})" + (f"; {self.instead}" if self.instead else "")


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """A way to lay a static weight out; planning tries a chip's layouts in order and takes the first legal one.

    ``transposed`` None keeps the stored tensor as it is.
    """

    format: str
    transposed: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip family.

    Attributes:
        name: quantpass's name, e.g. ``"ascend310p"``.
        title: the vendor's product name.
        soc_prefixes: what ``torch_npu.npu.get_device_name()`` starts with on it.
        soc_names: the whole names that torch_npu 2.13.0 knows (``c10_npu::SocVersion``); none where it is no NPU.
        typical_soc: the one among them that stands for the family where no NPU is there to ask.
        documented: the two module documents speak of it, so ``explain`` does where no target is given.
        batch_matmul_v4: GE's ``npu_quant_matmul`` is QuantBatchMatmulV4 here, not V3.
        rules: its legality rows.
        layouts: operator to the weight layouts worth trying in graph mode, best first.
        eager_layouts: the same for eager mode.
        costs: what legal calls cost beside the operator.
        saturates: a float16 overflow gives the largest finite number, not infinity.
    """

    name: str
    title: str
    soc_prefixes: tuple[str, ...]
    rules: tuple[Rule, ...]
    layouts: dict[VendorOp, tuple[WeightLayout, ...]] = field(default_factory=dict)
    eager_layouts: dict[VendorOp, tuple[WeightLayout, ...]] = field(default_factory=dict)
    saturates: bool = False
    costs: tuple[Cost, ...] = ()
    soc_names: tuple[str, ...] = ()
    typical_soc: str = ""
    documented: bool = False
    batch_matmul_v4: bool = False

    def soc_name(self, target: str) -> str:
        """What the driver calls a chip that is asked for as ``target``: a family's name stands for its typical chip."""
        return target if target in self.soc_names else self.typical_soc

    def rules_of(self, op: VendorOp) -> tuple[Rule, ...]:
        return tuple(r for r in self.rules if r.op == op)

    def layouts_of(self, op: VendorOp, mode: str) -> tuple[WeightLayout, ...]:
        table = self.layouts if mode == "graph" else self.eager_layouts
        return table.get(op, (WeightLayout("ND", None, "no layout is preferred"),))


def given(*args: str) -> When:
    """Calls that give all of ``args``."""
    return When(f"{', '.join(args)} given", lambda call: all(call.args.get(a) is not None for a in args))


def dtype_is(arg: str, dtype: str) -> When:
    def test(call: OpCall) -> bool:
        spec = call.tensor(arg)
        return spec is not None and spec.dtype_name == dtype

    return When(f"{arg} is {dtype}", test)


def in_nz(arg: str) -> When:
    def test(call: OpCall) -> bool:
        spec = call.tensor(arg)
        return spec is not None and spec.format == "NZ"

    return When(f"{arg} in FRACTAL_NZ", test)


def transposed(arg: str, state: bool = True) -> When:
    def test(call: OpCall) -> bool:
        spec = call.tensor(arg)
        return spec is not None and spec.transposed == state

    return When(f"{arg} {'' if state else 'not '}transposed", test)


def grouped(state: bool = True) -> When:
    def test(call: OpCall) -> bool:
        return bool(call.args.get("antiquant_group_size")) == state

    return When("per-group" if state else "no groups", test)


def both(*conditions: When) -> When:
    return When(" and ".join(c.words for c in conditions), lambda call: all(c.test(call) for c in conditions))
