"""Is it still right? Fused sites against the graph's own arithmetic, each on the graph's own inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from typing_extensions import Unpack

from quantpass.doors.backend import compile_graph
from quantpass.doors.compiled import CompiledGraph, copied
from quantpass.doors.differences import EDGES, Difference, difference
from quantpass.doors.explain import check_call
from quantpass.doors.float_reference import from_reference, worst_of_each
from quantpass.doors.lower import carry_out
from quantpass.doors.settings import CaptureOptions, make_options
from quantpass.graph.constants import ModuleConstants
from quantpass.graph.exported import flat_inputs, program_values
from quantpass.graph.hidden_weights import Watch
from quantpass.graph.records import Site
from quantpass.graph.torch_internals import attribute_values, compile_isolated, fill_in_values, without_function_modes
from quantpass.pipeline import Outcome, fuse_graph
from quantpass.planning.already_fused import is_own_call
from quantpass.planning.options import Options
from quantpass.planning.unknown_values import require_data
from quantpass.report import Report
from quantpass.report.data import SCHEMA
from quantpass.report.text import as_text, table_of


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` measured.

    Attributes:
        report: the verdict on every quantized matmul.
        sites: each fused site, computed from the inputs that the unfused graph gives it; the largest difference where
            its graph ran several times.
        outputs: the results of the whole model, differences of all sites included.
        missed: fused sites that no run compared, by name.
        reference: how far the quantized model, unfused, is from the float model that was given: the values of sites, in
            order, then the results. What differs at a site comes from that site and from all before it.
    """

    report: Report
    sites: tuple[Difference, ...]
    outputs: tuple[Difference, ...]
    missed: tuple[str, ...] = ()
    reference: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        return as_text(Group(*self._parts()))

    def text(self, *, width: int | None = None, color: bool = False) -> str:
        """What was measured, worst site first; arguments as for :meth:`quantpass.Report.text`."""
        return as_text(Group(*self._parts()), width, color)

    def _parts(self) -> Iterator[Any]:
        yield Text(
            f"{self.report.fused} of {self.report.total} quantized matmuls fused for {', '.join(self.report.targets)}"
        )
        yield Text("\nFused against the graph's own arithmetic, worst first (* the results of the whole model):")
        yield _table([*sorted(self.sites, key=lambda d: -d.relative), *self.outputs], self.outputs)
        if self.reference:
            yield Text("\nQuantized (unfused) against the float model, in order:")
            yield _table(self.reference, ())
        yield from (Text(f"not compared: {name}") for name in self.missed)
        refused = [s for s in self.report.sites if not s.fused]
        if refused:
            yield Text("\nNot fused, so not compared:")
        for site in refused:
            yield Text("\n".join([f"  {site.name} ({site.op})", *(f"    {reject}" for reject in site.rejects)]))
        yield from (Text(f"not seen: {sign}") for sign in self.report.hidden)

    def as_dict(self) -> dict[str, Any]:
        """The measurements as plain data; ``schema`` as in :meth:`quantpass.Report.as_dict`."""
        return {
            "schema": SCHEMA,
            "report": self.report.as_dict(),
            "sites": [d.as_dict() for d in self.sites],
            "outputs": [d.as_dict() for d in self.outputs],
            "missed": list(self.missed),
            "reference": [d.as_dict() for d in self.reference],
            "histogram_edges": list(EDGES),
        }

    def to_json(self) -> str:
        """The measurements as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def require(self, relative: float = 0.02) -> None:
        """Raise ``AssertionError`` unless every fused site was compared and is right.

        That is: where no site was compared at all (nothing is quantized, nothing was fused, or the fused operators are
        the model's own calls), where a fused site was not compared, and where a site's ``relative`` difference is
        larger than given, or not a number. Sites that are not fused run as they were: ``report.require()`` is about
        them.

        Results of the model are not looked at: in a deep model a change of one rounding may grow.
        """
        if not self.sites:
            raise AssertionError(f"no site was compared: {self._why_nothing()}\n{self}")
        if self.missed:
            fused = len(self.sites) + len(self.missed)
            raise AssertionError(
                f"{len(self.missed)} of {fused} fused sites were not compared: {', '.join(self.missed)}\n{self}"
            )
        bad = [d for d in self.sites if not d.relative <= relative]
        if bad:
            raise AssertionError(f"{len(bad)} of {len(self.sites)} sites differ by more than {relative:g}\n{self}")

    def _why_nothing(self) -> str:
        if not self.report.total:
            return "no quantized matmul was found"
        if not self.report.fused:
            return "none is fused"
        if not self.missed:
            return "the fused operators are the model's own calls"
        return f"{len(self.missed)} fused sites did not run"


def _table(rows: Sequence[Difference], results: Sequence[Difference]) -> Table:
    headers = (
        "value",
        "numerics",
        "largest difference",
        "relative",
        "units: mean",
        "max",
        "over 1",
        "SQNR dB",
        "saturated",
    )
    table = table_of(*headers)
    for d in rows:
        over = sum(d.histogram[EDGES.index(1.0) + 1 :]) / max(sum(d.histogram), 1)
        measured = (f"{d.largest:.3g}", f"{d.relative:.2g}", f"{d.mean_units:.2g}", f"{d.units:.3g}", f"{over:.1%}")
        name = f"{d.name} *" if d in results else d.name
        table.add_row(name, str(d.numerics or ""), *measured, f"{d.sqnr:.1f}", f"{d.saturated:.1%}")
    return table


@dataclass(slots=True)
class _Graph:
    """One graph as it was fused, and what its runs measured: by the node that a site replaces, the worst difference."""

    outcome: Outcome
    found: dict[str, Difference] = field(default_factory=dict)

    @property
    def contracts(self) -> dict[str, Site]:
        """The sites that the pass fused, by the node that they replace."""
        return {s.plan.output.name: s for s in self.outcome.sites if s.plan is not None and not is_own_call(s)}


@dataclass(slots=True)
class _Measured:
    """What runs measured; ``kept`` are the values of the unfused graph's sites, where a float model is given."""

    reports: list[Report] = field(default_factory=list)
    graphs: list[_Graph] = field(default_factory=list)
    outputs: list[Difference] = field(default_factory=list)
    kept: dict[str, list[torch.Tensor]] | None = None


def verify(
    model: torch.nn.Module | Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | None = None,
    batches: Sequence[Sequence[Any]] = (),
    reference: torch.nn.Module | None = None,
    **options: Unpack[CaptureOptions],
) -> Verification:
    """Run a model unfused and fused for ``target`` on a CPU, and compare every fused site and every result.

    The fused graph is the one that :func:`quantpass.backend` compiles with these options (for an ``ExportedProgram``,
    what :func:`quantpass.fuse` makes of it). Each site gets the inputs that it has in the unfused graph, so that its
    difference is its own.

    Args:
        model: a module, a function or an ``ExportedProgram``, which is left as it is.
        args: positional inputs.
        kwargs: keyword inputs.
        target: as for :func:`quantpass.backend`.
        batches: more positional inputs to run; each site keeps its largest difference.
        reference: the float model that ``model`` was quantized from, with modules of the same names: says at which
            module the quantized model leaves it. Its inputs are cast to its own dtype.
        options: as for :func:`quantpass.backend`, without ``inner`` and ``on_report``.

    Raises:
        TypeError: ``model`` can't be called, ``args`` is not a tuple or list, or an option that does not exist or that
            ``verify`` does not take.
        ValueError: a value that is not accepted; weights or inputs that hold no data (meta, fake).
    """
    check_call("verify", model, args)
    require_data("verify", model, args, kwargs)
    settings = make_options({"target": target, **options}, "verify")
    measured, watch = _Measured(kept=None if reference is None else {}), Watch()  # sees graph breaks from here on
    runs = [tuple(args), *map(tuple, batches)]
    from_float: list[Difference] = []
    with torch.no_grad():
        if isinstance(model, ExportedProgram):
            run = _program_run(model, kwargs or {}, settings, measured)
        else:
            run = _model_run(model, kwargs or {}, settings, measured)
        for inputs in runs:
            result = run(inputs)
            if reference is not None and measured.kept is not None:
                from_float += from_reference(reference, inputs, kwargs or {}, measured.kept, result)
    if not isinstance(model, ExportedProgram):
        measured.reports.append(_hidden(model, settings, measured, watch))
    report = sum(measured.reports, Report((), (settings.chip.name,), settings.mode))
    sites, missed = _by_site(measured.graphs)
    return Verification(report, sites, tuple(measured.outputs), missed, worst_of_each(from_float))


def _by_site(graphs: Sequence[_Graph]) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """The worst difference of each fused site over all its compilations, and the names of sites that have none."""
    found: dict[Hashable, Difference | None] = {}
    names: dict[Hashable, str] = {}
    for graph in graphs:
        for node, site in graph.contracts.items():
            key = object() if site.key is None else site.key
            names[key] = site.name
            found[key] = _worse(found.get(key), graph.found.get(node))
    missed = tuple(names[key] for key, difference in found.items() if difference is None)
    return tuple(d for d in found.values() if d is not None), missed


def _worse(a: Difference | None, b: Difference | None) -> Difference | None:
    if a is None or b is None:
        return b if a is None else a
    return a if b.relative <= a.relative else b


_Run = Callable[[Sequence[Any]], Any]
"""Runs the model on inputs, compares, and returns what the unfused model does."""


def _model_run(model: Callable[..., Any], kwargs: dict[str, Any], settings: Options, measured: _Measured) -> _Run:
    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, settings, measured.reports.append, partial(_Compared, measured))

    compiled = compile_isolated(model, backend, None)
    return lambda args: compiled(*args, **kwargs)


def _hidden(model: Callable[..., Any], settings: Options, measured: _Measured, watch: Watch) -> Report:
    """What the model has quantized that no graph showed."""
    for graph in measured.graphs:
        watch.add(graph.outcome.shown)
    return Report((), (settings.chip.name,), settings.mode, hidden=watch.signs(model))


class _Compared(CompiledGraph):
    """A compiled graph that is run beside the graph that it was made from; it returns what that one computes."""

    def __init__(self, measured: _Measured, gm: GraphModule, weights: Any, fakes: Any, options: Options, told: Any):
        self._measured = measured

        def on_outcome(outcome: Outcome, fused: str, formats: Any) -> None:
            measured.graphs.append(_Graph(outcome))
            told(outcome, fused, formats)

        super().__init__(gm, weights, fakes, options, on_outcome)

    def _inner(
        self, gm: GraphModule, fake_inputs: list[Any], constants: tuple[torch.Tensor, ...]
    ) -> Callable[[list[Any]], Any]:
        del fake_inputs
        graph, own = self._measured.graphs[-1], len(constants)
        compare = without_function_modes(_compare)
        return lambda inputs: compare(self._pristine, gm, inputs[: len(inputs) - own], inputs, graph, self._measured)


def _program_run(program: ExportedProgram, kwargs: dict[str, Any], options: Options, measured: _Measured) -> _Run:
    if options.decompositions != "none":
        raise TypeError("decompositions are for what is captured here: call run_decompositions() on the program first")
    plain, fused = copied(program.graph_module), copied(program.graph_module)
    fill_in_values(fused)
    copy_of = dict(zip(program.graph.nodes, fused.graph.nodes, strict=True))
    leaves = {copy_of[n]: t for n, t in program_values(program).items()} | attribute_values(fused)
    constants = ModuleConstants(fused, leaves)
    outcome = fuse_graph(fused, leaves, options, constants.add)
    carry_out(fused, outcome, options, constants, casts=not options.lowerer.keeps_casts)
    measured.reports.append(Report(outcome.sites, (options.chip.name,), options.mode, notes=outcome.notes))
    measured.graphs.append(_Graph(outcome))

    def run(args: Sequence[Any]) -> Any:
        # A program's run writes to nothing of the caller's.
        inputs = _cloned(flat_inputs(program, args, kwargs))
        return _compare(plain, fused, inputs, inputs, measured.graphs[-1], measured)

    return run


def _compare(
    plain: GraphModule,
    fused: GraphModule,
    inputs: Sequence[Any],
    fused_inputs: Sequence[Any],
    graph: _Graph,
    measured: _Measured,
) -> Any:
    """Run both graphs, note the differences, and return the unfused graph's results."""
    contracts, random = graph.contracts, torch.random.get_rng_state()
    for_sites, for_results = _cloned(fused_inputs), _cloned(fused_inputs)
    recorded = _Recorded(plain, set(contracts))
    results = recorded.run(*inputs)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(random)
    forced = _Forced(fused, recorded.values)
    forced.run(*for_sites)
    for replaced, value in forced.found.items():
        site = contracts[replaced]
        found = difference(site.name, site.numerics, value, recorded.values[replaced])
        graph.found[replaced] = _worse(graph.found.get(replaced), found) or found
        if measured.kept is not None:
            measured.kept.setdefault(site.name, []).append(recorded.values[replaced].clone())
    torch.random.set_rng_state(random)
    ours = fused(*for_results)
    torch.random.set_rng_state(after)
    for a, b in zip(ours, results, strict=True):
        if isinstance(b, torch.Tensor):
            measured.outputs.append(difference(f"output {len(measured.outputs)}", None, a, b))
    return results


def _cloned(inputs: Sequence[Any]) -> list[Any]:
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
        replaced, (codes_of, shift) = n.meta.get("quantpass_replaces"), n.meta.get("quantpass_codes_of", (None, 0))
        if codes_of in self._expected:
            # The next site reads the int8 codes; the graph has uint8 ones, or keeps them in another container.
            self.found.setdefault(codes_of, value.to(torch.int16) + shift)
            return (self._expected[codes_of].to(torch.int16) - shift).to(torch.int8)
        if replaced not in self._expected:
            return value
        self.found.setdefault(replaced, value)
        return self._expected[replaced]
