"""Running many drawn cases inside one test, so that what was drawn can be counted there.

``QUANTPASS_FUZZ=N`` draws N cases of each kind with random seeds; otherwise a few hundred fixed ones are drawn.
"""

import collections
import os

from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from quantpass.graph.schema import bind
from tests.helpers import CHIPS
from tests.oracle import Unsupported, judge, traced

EXAMPLES = int(os.environ.get("QUANTPASS_FUZZ", "0"))
TARGETS = st.sampled_from(("cpu", "cpu", *CHIPS))


class Fuzz:
    """What the ``fuzz`` fixture gives a test."""

    def __init__(self, say):
        self._say = say

    def __call__(self, kind, cases, check=None, *, few, least, targets=TARGETS, weight=1.0):
        """Judge drawn cases, each for a drawn target.

        Args:
            kind: a name for the counts.
            cases: a strategy.
            check: ``(case, target) -> verdict``; None for :func:`judged`.
            few: how many are drawn where nobody asks for more.
            least: the share of them that has to be fused.
            targets: a strategy.
            weight: the share of ``QUANTPASS_FUZZ`` that this kind takes.
        """
        counts = collections.Counter()
        check = check or judged

        @settings(
            max_examples=round(EXAMPLES * weight) or few,
            deadline=None,
            derandomize=not EXAMPLES,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases, targets)
        def run(case, target):
            counts[target, check(case, target)] += 1

        try:
            run()
        except Exception as error:  # a long run goes on with the other kinds
            self._say(f"{kind}: {error}"[:4000])
            raise
        finally:
            self._say(_summary(kind, counts))
        fused = sum(n for (_, verdict), n in counts.items() if verdict == "fused")
        assert counts.total() >= 0.9 * few, f"{kind}: only {counts.total()} cases were drawn"
        unknown = sum(n for (_, verdict), n in counts.items() if verdict == "not judged")
        assert unknown <= 0.02 * counts.total(), f"{kind}: the oracle could not follow {unknown}: {counts}"
        assert fused >= least * counts.total(), f"{kind}: too few are fused: {counts}"


def _summary(kind, counts):
    lines = []
    for target in sorted({t for t, _ in counts}):
        verdicts = {v: n for (t, v), n in sorted(counts.items()) if t == target}
        lines.append(
            f"{kind}, {target}: {sum(verdicts.values())} drawn, " + ", ".join(f"{n} {v}" for v, n in verdicts.items())
        )
    return "\n".join(lines)


def captured(case):
    """The case as an ATen graph."""
    symbolic, composite = case.capture == "symbolic", case.capture == "pre_dispatch"
    try:
        gm = traced(case.graph, *case.args, sizes="symbolic" if symbolic else "fake", pre_dispatch=composite)
    except UnsupportedOperatorException:  # torch has no shape function for it where sizes are unknown
        reject()
    if case.capture == "keywords":
        _by_keyword(gm.graph)
    return gm


def _by_keyword(graph):
    """Every argument by its name: a call means the same however it is written."""
    for node in graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema") and node.args:
            bound = bind(node)
            given_names = {a.name for a, _ in zip(node.target._schema.arguments, node.args, strict=False)} | set(
                node.kwargs
            )
            node.args, node.kwargs = (), {n: v for n, v in bound.items() if n in given_names}


def judged(case, target, **options):
    """``"fused"`` and right within the stated bound, or ``"refused"``; every quantized matmul has a verdict."""
    gm = captured(case)
    try:
        result = judge(gm, case.args, target=target, **options)
    except Unsupported:
        return "not judged"
    assert result.verdict != "dropped", f"the graph does not run\n{gm.graph}"
    seen = result.report.total
    # A weight that is not finite, or zero everywhere, is no scale times codes: whether it was quantized nobody can tell.
    told = all(bool(t.isfinite().all()) and (t.dim() < 2 or bool(t.any())) for t in gm.buffers())
    assert seen >= case.matmuls or not told, (
        f"{case.matmuls} quantized matmuls, {seen} verdicts\n{gm.graph}\n{result.report}"
    )
    return result.verdict


def untouched(case, target):
    """A graph without anything quantized stays as it is, and the report says nothing of it."""
    gm = captured(case)
    result = judge(gm, case.args, target=target)
    assert result.verdict == "refused", f"{result.verdict}\n{gm.graph}\n{result.report}"
    assert not result.report.total, f"not quantized, and counted\n{gm.graph}\n{result.report}"
    return "left alone"
