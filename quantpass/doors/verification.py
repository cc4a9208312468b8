"""Is it still right? Fused sites against the graph's own arithmetic, each on the graph's own inputs."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from typing_extensions import Unpack

from quantpass.basics.progress import counted
from quantpass.doors.backend import compile_graph, warn_unmatched
from quantpass.doors.bisect import Bisection, bisected
from quantpass.doors.compiled import CompiledGraph, copied
from quantpass.doors.differences import Difference, difference
from quantpass.doors.explain import check_call
from quantpass.doors.float_reference import from_reference, worst_of_each
from quantpass.doors.lower import carry_out
from quantpass.doors.settings import CaptureOptions, make_options
from quantpass.doors.verified import Verification
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
    bisect: bool = False,
    within: float = 0.02,
    **options: Unpack[CaptureOptions],
) -> Verification:
    """Run a model unfused and fused for ``target`` on a CPU, and compare every fused site and every result.

    The fused graph is the one that :func:`quantpass.backend` compiles with these options (for an ``ExportedProgram``,
    what :func:`quantpass.fuse` makes of it), by the kernels that define the operators where no ``lowering`` is given.
    Each site gets the inputs that it has in the unfused graph, so that its difference is its own.

    Args:
        model: a module, a function or an ``ExportedProgram``, which is left as it is.
        args: positional inputs.
        kwargs: keyword inputs.
        target: as for :func:`quantpass.backend`.
        batches: more positional inputs to run; each site keeps its largest difference.
        reference: the float model that ``model`` was quantized from, with modules of the same names: says at which
            module the quantized model leaves it. Its inputs are cast to its own dtype.
        bisect: where the results differ by more than ``within``, fuse the model's sites up to one and another (as many
            times as the number of sites has binary digits) to find the site that breaks its accuracy.
        within: the largest relative difference of the results that counts as right for ``bisect``.
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
        for inputs in counted(runs, "quantpass verifies", "batches"):
            result = run(inputs)
            if reference is not None and measured.kept is not None:
                from_float += from_reference(reference, inputs, kwargs or {}, measured.kept, result)
    if not isinstance(model, ExportedProgram):
        measured.reports.append(_hidden(model, settings, measured, watch))
    report = sum(measured.reports, Report((), (settings.chip.name,), settings.mode, leave=settings.leave))
    warn_unmatched(report)
    sites, missed = _by_site(measured.graphs)
    found = _bisected(model, kwargs or {}, runs, settings, measured, within) if bisect else None
    return Verification(report, sites, tuple(measured.outputs), missed, worst_of_each(from_float), found)


def _bisected(
    model: Any, kwargs: dict[str, Any], runs: Sequence[Any], settings: Options, whole: _Measured, within: float
) -> Bisection:
    names = list(dict.fromkeys(s.name for g in whole.graphs for s in g.contracts.values()))

    def measure(fused: Sequence[str]) -> float:
        left = (*settings.leave, *(glob.escape(n) for n in names if n not in set(fused)))
        measured = _Measured()
        make = _program_run if isinstance(model, ExportedProgram) else _model_run
        with torch.no_grad():
            run = make(model, kwargs, replace(settings, leave=left), measured)
            for inputs in runs:
                run(inputs)
        return _furthest(measured)

    return bisected(names, measure, _furthest(whole), within)


def _furthest(measured: _Measured) -> float:
    """The largest relative difference of the results; infinite where one is not a number."""
    return max((d.relative if math.isfinite(d.relative) else math.inf for d in measured.outputs), default=0.0)


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
        pristine = self._pristine.module()
        return lambda inputs: compare(pristine, gm, inputs[: len(inputs) - own], inputs, graph, self._measured)


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
