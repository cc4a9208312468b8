"""The first hour on a device: every operator, dtype, format and rule that quantpass claims, tried one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from quantpass.basics.progress import counted
from quantpass.chips import DOCUMENTED, NPUS, chip_named
from quantpass.doors.doctor import examine
from quantpass.doors.selftest.cases import MODES, Case, cases_of
from quantpass.doors.selftest.findings import SelfTest
from quantpass.doors.selftest.isolation import isolated, isolated_times
from quantpass.doors.selftest.run import Outcome, outcomes, runnable
from quantpass.doors.selftest.speed import times
from quantpass.planning.options import device_target

__all__ = ["SelfTest", "planned", "selftest"]


def selftest(
    target: str | Sequence[str] | None = None,
    *,
    only: Sequence[str] = (),
    isolate: bool | None = None,
    measure: bool = True,
) -> SelfTest:
    """Try what quantpass claims of a chip's operators, through aclnn and through GE, against the reference kernels.

    The calls are made from the chip's rules: every two choices of dtype, format, shape and form that are legal
    together, the edges of each range, and each rule about which documents and code disagree. Whatever a call raises is
    noted, and the next one is tried. Where there is no NPU the emulation is tried in its place, which the result says
    first.

    Args:
        target: chip or SoC name, or several; None is the NPU of this machine, or without one the documented chips.
        only: try the cases that match one of these alone: a part of a case's id
            (``"ascend310p/aclnn/npu_quant_matmul"``), of its call or of the rule that it is about, or a pattern with
            ``*``.
        isolate: run cases in processes of their own, so that one that ends its process ends nothing else; None does so
            where there is an NPU.
        measure: also time a quantized linear before and after fusing.

    Returns:
        What was found; ``passed``, and ``to_json()``, the file to send back.

    Raises:
        ValueError: an unknown target, one that is not the NPU of this machine, or an ``only`` that matches nothing.
    """
    device = npu_here()
    chips, cases = planned(target, only, device)
    where = "npu" if device else "cpu"
    alone = bool(device) if isolate is None else isolate
    run = isolated(cases, where) if alone else outcomes(cases, where)
    found = _ordered(cases, counted(run, "self-test", "cases"))
    measured = [t for c in chips if measure and not only for t in (isolated_times if alone else times)(c, where)]
    environment = json.loads(examine().to_json())
    return SelfTest(device, chips, tuple(cases), found, tuple(measured), environment, tuple(only))


def planned(
    target: str | Sequence[str] | None, only: Sequence[str], device: str | None = None
) -> tuple[tuple[str, ...], list[Case]]:
    """The chips and the cases that :func:`selftest` tries; ``device`` is the NPU's name, None to look for one."""
    device = npu_here() if device is None else device
    targets = [target] if isinstance(target, str) else list(target or ())
    chips = tuple(dict.fromkeys(chip_named(t).name for t in targets))
    if device:
        own = chip_named(device).name
        if any(c != own for c in chips):
            raise ValueError(f"target is {target!r}, and the NPU of this machine is {device} ({own})")
        chips = (own,)
    chips = chips or DOCUMENTED
    if any(c not in NPUS for c in chips):
        raise ValueError(f"target is {target!r}; a self-test takes {', '.join(NPUS)}, or SoC names")
    cases = [c for chip in chips for route in MODES for c in runnable(cases_of(chip, route)) if _wanted(c, only)]
    if not cases:
        raise ValueError(f"no case matches {', '.join(map(repr, only))}; quantpass selftest --list shows them")
    return chips, cases


def npu_here() -> str:
    """The name of this machine's NPU; empty where there is none."""
    try:
        return device_target()
    except ValueError:
        return ""


def _wanted(case: Case, only: Sequence[str]) -> bool:
    told = (case.id, case.words, case.rule)
    return not only or any(fnmatchcase(text, f"*{pattern}*") for pattern in only for text in told)


def _ordered(cases: Sequence[Case], found: Iterator[Outcome]) -> tuple[Outcome, ...]:
    by_case = {o.case: o for o in found}
    return tuple(by_case[c.id] for c in cases)
