"""Running cases: each by itself, whatever it raises."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from quantpass.doors.selftest.cases import Case
from quantpass.doors.selftest.reference import distance, expected, kernel_arguments, nearest_template
from quantpass.doors.selftest.routes import NotHere, Route, route_named
from quantpass.doors.selftest.tensors import drawn

RIGHT, WRONG, RAISED, ENDED, NOT_RUN = "right", "wrong", "raised", "ended the process", "not run"
"""What became of a case: within the bound; outside it; refused or failed; took the process with it, or did not come to
an end; could not be tried here."""

_SAID = 2000
"""Characters kept of an exception's message."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: its id.
        outcome: ``"right"``, ``"wrong"``, ``"raised"``, ``"ended the process"`` or ``"not run"``.
        seconds: how long it took, compilation included.
        error: the largest absolute difference from the reference; in codes for integers.
        share: that difference as a share of what is allowed.
        rms: the root mean square of the differences over that of the reference, where results are floats.
        differing: the share of elements that are not equal.
        template: which arithmetic of ``weight_quant_matmul`` is nearest (docs/semantics.md, 2).
        said: what was raised, or the end of what the process said.
    """

    case: str
    outcome: str
    seconds: float = 0.0
    error: float | None = None
    share: float | None = None
    rms: float | None = None
    differing: float | None = None
    template: str = ""
    said: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def runnable(cases: Iterable[Case]) -> list[Case]:
    """Those that their route can carry out: through GE go calls that quantpass's own operators can say."""
    return [c for c in cases if c.route == "aclnn" or kernel_arguments(c) is not None]


def outcomes(cases: Iterable[Case], device: str) -> Iterator[Outcome]:
    """Run cases one after the other; a route is started when its first case comes."""
    routes: dict[str, Route] = {}
    try:
        for case in cases:
            if case.route not in routes:
                routes[case.route] = route_named(case.route, device)
            yield tried(case, routes[case.route])
    finally:
        for route in routes.values():
            route.close()


def tried(case: Case, route: Route) -> Outcome:
    """Run one case and compare it with the reference."""
    stored = drawn(case)
    try:
        wanted = expected(case, stored)
    except ValueError as error:
        return Outcome(case.id, NOT_RUN, said=f"the reference kernels do not compute this call: {error}"[:_SAID])
    started = time.perf_counter()
    try:
        found = route.run(case, stored)
        seconds = time.perf_counter() - started
        apart = distance(case, stored, found, wanted)
        template = nearest_template(case, stored, found)
    except NotHere as error:
        return Outcome(case.id, NOT_RUN, said=str(error)[:_SAID])
    except Exception as error:  # anything: the next case is run all the same
        said = f"{type(error).__name__}: {error}"[:_SAID]
        return Outcome(case.id, RAISED, round(time.perf_counter() - started, 4), said=said)
    numbers: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in asdict(apart).items()}
    outcome = RIGHT if apart.right else WRONG
    return Outcome(case.id, outcome, round(seconds, 4), **numbers, template=template)
