"""Is it still right? Fused sites against the graph's own arithmetic, each on the graph's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch.fx import GraphModule, Interpreter, Node

from quantpass.compiled import copied
from quantpass.doors import check_call
from quantpass.options import Options, make_options
from quantpass.pipeline import fuse_graph
from quantpass.records import Numerics
from quantpass.report import Report
from quantpass.torch_internals import aot_placeholder_values, attribute_values, compile_isolated, compile_with_aot


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a fused value is from the graph's.

    Attributes:
        name: the site, or ``output 0`` for a result of the model.
        numerics: the site's contract; None for a result.
        largest: largest absolute difference; for integer values in steps of one code.
        relative: ``largest`` over the largest magnitude of the graph's value.
        cosine: cosine similarity of the two values, flattened.
    """

    name: str
    numerics: Numerics | None
    largest: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` measured.

    Attributes:
        report: the verdict on every quantized matmul.
        sites: each fused site, computed from the inputs that the unfused graph gives it.
        outputs: the results of the whole model, differences of all sites included.
    """

    report: Report
    sites: tuple[Difference, ...]
    outputs: tuple[Difference, ...]

    def __str__(self) -> str:
        rows = [
            [d.name, str(d.numerics or ""), f"{d.largest:.3g}", f"{d.relative:.2g}", f"{d.cosine:.6f}"]
            for d in (*self.sites, *self.outputs)
        ]
        headers = ["value", "numerics", "largest difference", "relative", "cosine"]
        head = (
            f"{self.report.fused} of {self.report.total} quantized matmuls fused for {', '.join(self.report.targets)}"
        )
        return f"{head}\n\n{tabulate(rows, headers, tablefmt='simple', disable_numparse=True)}"

    def require(self, relative: float = 0.02) -> None:
        """Raise ``AssertionError`` where a fused site's ``relative`` difference is larger, or not a number.

        Results of the model are not looked at: in a deep model a change of one rounding may grow.
        """
        bad = [d for d in self.sites if not d.relative <= relative]
        if bad:
            raise AssertionError(f"{len(bad)} of {len(self.sites)} sites differ by more than {relative:g}\n{self}")


@dataclass(slots=True)
class _Measured:
    reports: list[Report] = field(default_factory=list)
    sites: list[Difference] = field(default_factory=list)
    outputs: list[Difference] = field(default_factory=list)


def verify(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | None = None,
    **options: Any,
) -> Verification:
    """Run a model unfused and fused for ``target`` on a CPU, and compare every fused site and every result.

    Each site gets the inputs that it has in the unfused graph, so that its difference is its own.

    Args:
        model: a module or function.
        args: positional inputs.
        kwargs: keyword inputs.
        target: as for :func:`quantpass.backend`.
        options: as for :func:`quantpass.backend`.

    Raises:
        TypeError: ``args`` is not a tuple or list, or an option that does not exist.
        ValueError: a value that is not accepted.
    """
    check_call("verify", model, args)
    settings = make_options({"target": target, **options}, "verify")
    measured = _Measured()

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def compiler(aot: GraphModule, fake_inputs: list[Any]) -> Callable[..., Any]:
            del fake_inputs
            return lambda *inputs: _compare(aot, example_inputs, inputs, settings, measured)

        return compile_with_aot(gm, example_inputs, compiler)

    with torch.no_grad():
        compile_isolated(model, backend, None)(*args, **(kwargs or {}))
    report = sum(measured.reports, Report((), (settings.chip.name,), settings.mode))
    return Verification(report, tuple(measured.sites), tuple(measured.outputs))


def _compare(
    aot: GraphModule, example_inputs: list[Any], inputs: tuple[Any, ...], options: Options, measured: _Measured
) -> Any:
    fused = copied(aot)
    outcome = fuse_graph(fused, aot_placeholder_values(fused, example_inputs) | attribute_values(fused), options)
    measured.reports.append(Report(outcome.sites, (options.chip.name,), options.mode))
    contracts = {s.plan.output.name: (s.name, s.numerics) for s in outcome.sites if s.plan is not None}
    plain = _Recorded(aot, set(contracts))
    results = plain.run(*_cloned(inputs))
    forced = _Forced(fused, plain.values)
    forced.run(*_cloned(inputs))
    for replaced, value in forced.found.items():
        measured.sites.append(_difference(*contracts[replaced], value, plain.values[replaced]))
    ours = fused(*_cloned(inputs))
    for a, b in zip(ours, results, strict=True):
        if isinstance(b, torch.Tensor):
            measured.outputs.append(_difference(f"output {len(measured.outputs)}", None, a, b))
    return results


def _cloned(inputs: tuple[Any, ...]) -> list[Any]:
    """A graph may write to its inputs."""
    return [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]


class _Recorded(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, gm: GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self._names, self.values = names, dict[str, torch.Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = value
        return value


class _Forced(Interpreter):
    """Runs a fused graph; what comes after a site gets the value of the unfused graph."""

    def __init__(self, gm: GraphModule, expected: dict[str, torch.Tensor]) -> None:
        super().__init__(gm)
        self._expected, self.found = expected, dict[str, torch.Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        replaced = n.meta.get("quantpass_replaces")
        if replaced not in self._expected:
            return value
        self.found[replaced] = value
        return self._expected[replaced]


def _difference(name: str, numerics: Numerics | None, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    a, b = ours.double().flatten(), theirs.double().flatten()
    if not a.numel():
        return Difference(name, numerics, 0.0, 0.0, 1.0)
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities are no difference
    apart = torch.where(same, 0.0, (a - b).abs())
    largest, scale = float(apart.max()), float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    relative = 0.0 if largest == 0 else largest / scale if scale else float("inf")
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0)) if largest else 1.0
    return Difference(name, numerics, largest, relative, cosine)
