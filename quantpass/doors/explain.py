"""The doors that need no compiler: ``explain``, ``fuse``, ``diff``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_map_only
from typing_extensions import Unpack

from quantpass.basics.boundary import guarded
from quantpass.chips import CHIPS, DOCUMENTED
from quantpass.doors.backend import warn_unmatched
from quantpass.doors.compiled import copied
from quantpass.doors.lower import carry_out
from quantpass.doors.preview import GePreview
from quantpass.doors.settings import CaptureOptions, GraphOptions, make_options
from quantpass.graph.constants import Constants, ModuleConstants, refuse_to_load, weights_of_fused
from quantpass.graph.dump import diff_text, dump
from quantpass.graph.exported import ProgramConstants, program_inputs, refuse_to_load_into, targets_of
from quantpass.graph.hidden_weights import Watch
from quantpass.graph.site_keys import Token
from quantpass.graph.torch_internals import (
    StaticInputs,
    attribute_tensors,
    compile_isolated,
    compile_with_aot,
    decomposition_table,
    fill_in_values,
    without_function_modes,
)
from quantpass.lowering.ge_graph import GeGraph
from quantpass.pipeline import Outcome, explain_graph, fuse_graph
from quantpass.planning.options import Options
from quantpass.report import Report, merged

logger = logging.getLogger(__name__)


def explain(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    dynamic: bool | None = None,
    **options: Unpack[CaptureOptions],
) -> Report:
    """The verdict on every quantized matmul of a model, for one or several targets. Needs no device, changes nothing.

    The model is captured as ``torch.compile`` would. One that is a single graph is not run; where Python has to decide
    between graphs, it runs once on ``args``, unfused: if it communicates with other ranks, these have to call
    ``explain`` too. A model or program whose weights hold no data (on the meta device, or fake) is explained by their
    shapes, nothing is computed or allocated, and the report marks what is conditional on the values.

    Args:
        model: a module or function; an ``ExportedProgram`` or a ``GraphModule`` needs no ``args``. A program's own
            graph is looked at, with or without ``args``.
        args: positional inputs.
        kwargs: keyword inputs.
        target: one target or several; None for the chips of the two module documents.
        dynamic: as for ``torch.compile``.
        options: as for :func:`quantpass.backend`.

    Raises:
        TypeError: ``model`` can't be called, ``args`` is not a tuple or list, or an option that does not exist or that
            ``explain`` does not take.
        ValueError: a value that is not accepted.
    """
    check_call("explain", model, args)
    targets = _targets(target)
    by_chip: dict[str, Options] = {}  # two names of one chip are one target
    for made in [make_options({"target": t, **options}, "explain") for t in targets]:
        by_chip.setdefault(made.chip.name, made)
    settings = list(by_chip.values())
    names = [s.chip.name for s in settings]
    if isinstance(model, ExportedProgram) or (isinstance(model, GraphModule) and not args and not kwargs):
        if settings[0].decompositions != "none":
            raise TypeError(
                "decompositions are for what is captured here: call run_decompositions() on the program first"
            )
        found = [_explain_graph(model, settings)]
    else:
        found = _explain_model(model, args, kwargs or {}, settings, dynamic)
    report = replace(merged(found, names, settings[0].mode), leave=settings[0].leave)
    warn_unmatched(report)
    return report


def check_call(door: str, model: Any, args: Any) -> None:
    """Raise ``TypeError`` where a door is given something that it can't call."""
    if not isinstance(model, ExportedProgram) and not callable(model):
        raise TypeError(
            f"{door}: the model is {model!r}; give a module, a function, an ExportedProgram or a GraphModule"
            if model is None
            else f"{door}: the model is a {type(model).__name__}, which can't be called; give a module, a function, an "
            "ExportedProgram or a GraphModule"
        )
    if not isinstance(args, tuple | list):
        raise TypeError(f"args is a {type(args).__name__}; give the model's inputs as a tuple, e.g. args=(x,)")


def _targets(target: str | Sequence[str] | None) -> list[str]:
    if target is None:
        return list(DOCUMENTED)
    targets = [target] if isinstance(target, str) else list(target)
    if not targets:
        raise ValueError(f"target is empty; give one or several of {', '.join(CHIPS)}")
    return targets


def _explain_model(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    settings: list[Options],
    dynamic: bool | None,
) -> list[Report]:
    if is_on_meta(model):
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (tuple(args), kwargs))
    watch = Watch()
    try:
        found = _captured(model, args, kwargs, settings, dynamic, watch, whole=True)
    except Exception as error:  # several graphs, or what is wrong with the model: then it is seen again
        logger.debug("not captured as one graph: %s", error)
        if _ranks() > 1:
            logger.warning(_RUNS, _ranks(), (str(error).strip() or type(error).__name__).splitlines()[0])
        watch = Watch()
        found = _captured(model, args, kwargs, settings, dynamic, watch, whole=False)
    signs = guarded(lambda: watch.signs(model), lambda r: (r.fact,), "looking for quantized weights in no graph")
    return [*found, Report((), tuple(s.chip.name for s in settings), settings[0].mode, hidden=signs)]


_RUNS = (
    "explain: this is one of %d ranks, and the model is not captured as one graph (%s), so it runs on its inputs. "
    "Where it communicates, that waits for the other ranks: call explain on each of them"
)


def _ranks() -> int:
    """How many processes the model may communicate with, this one among them."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _Captured(BaseException):
    """The model is known: it need not run."""


def _captured(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    settings: list[Options],
    dynamic: bool | None,
    watch: Watch,
    *,
    whole: bool,
) -> list[Report]:
    """The verdicts on each graph that a model is captured in; ``whole``: on its one graph, which is not run."""
    found: list[Report] = []

    def not_run(*args: Any) -> Any:
        del args
        raise _Captured

    def capture(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def look(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Callable[..., Any]:
            del fake_inputs
            report, shown = _verdicts(aot, weights, settings)
            found.append(report)
            watch.add(shown, all_known=not weights.unread)
            return not_run if whole else without_function_modes(aot)

        return compile_with_aot(gm, example_inputs, look, decomposition_table(settings[0].decompositions))

    with torch.no_grad(), suppress(_Captured):
        compile_isolated(model, capture, dynamic, whole=whole)(*args, **kwargs)
    return found


def is_on_meta(model: Any) -> bool:
    """True for a module that has parameters and buffers, and none of them elsewhere than on the meta device."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    return bool(tensors) and all(t.device.type == "meta" for t in tensors)


def _explain_graph(model: ExportedProgram | GraphModule, settings: list[Options]) -> Report:
    given = model.graph_module if isinstance(model, ExportedProgram) else model
    gm = copied(given)
    fill_in_values(gm)
    copy_of = dict(zip(given.graph.nodes, gm.graph.nodes, strict=True))
    weights = program_inputs(model) if isinstance(model, ExportedProgram) else StaticInputs({}, {})
    weights = weights.on(copy_of)
    for node, tensor in attribute_tensors(gm):
        weights.add(node, tensor)
    report, _ = _verdicts(gm, weights, settings)
    return report


def _verdicts(gm: GraphModule, weights: StaticInputs, settings: list[Options]) -> tuple[Report, frozenset[Token]]:
    """The report on one graph, and the weights behind its sites."""
    names = tuple(s.chip.name for s in settings)
    outcomes = explain_graph(gm, weights.known, settings, weights.unread)
    sites = tuple(site for outcome in outcomes for site in outcome.sites)
    notes = tuple(dict.fromkeys(note for o in outcomes for note in o.notes))
    return Report(sites, names, settings[0].mode, notes=notes), outcomes[0].shown


def fuse(graph: GraphModule | ExportedProgram, *, target: str | None = None, **options: Unpack[GraphOptions]) -> Report:
    """Rewrite a graph in place.

    The fused graph holds its own weights, as they are now: what fused operators compute with is copied or prepared, and
    leaves the state dict. ``load_state_dict`` with one of these raises, for a graph module and for every module that
    the program makes (also where ``strict=False``); after ``torch.export.save`` and ``load`` only a strict one does.
    What can't be seen: in-place writes and ``.data`` to the model that a program was exported from. They reach the
    parts that were not fused, as in any exported program, and no fused operator. To change weights, load them into the
    model, export it and fuse it again.

    Args:
        graph: an ATen-level ``GraphModule`` (from ``torch.export(...).module()``, PT2E's ``convert_pt2e``,
            ``make_fx``) or an ``ExportedProgram``.
        target: as for :func:`quantpass.backend`.
        options: as for :func:`quantpass.backend`.

    Returns:
        The report; ``report.diff()`` shows what changed.

    Raises:
        TypeError: ``graph`` is neither, or an option that does not exist.
        ValueError: the graph's nodes carry no shapes, or a value that is not accepted.
    """
    settings = make_options({"target": target, **options}, "fuse")
    constants: Constants
    if isinstance(graph, ExportedProgram):
        gm, weights = graph.graph_module, program_inputs(graph)
    elif isinstance(graph, GraphModule):
        gm, weights = graph, StaticInputs({}, {})
    else:
        raise TypeError(
            f"fuse takes a GraphModule or an ExportedProgram, not {type(graph).__name__}. For a module, use "
            "torch.compile(model, backend=qp.backend(...)), or export it first with torch.export.export(model, args)."
        )
    fill_in_values(gm)
    for node, tensor in attribute_tensors(gm):
        weights.add(node, tensor)
    program, leaves = graph if isinstance(graph, ExportedProgram) else None, weights.known
    constants = ProgramConstants(program, leaves) if program is not None else ModuleConstants(gm, leaves)
    outcome = fuse_graph(gm, leaves, settings, constants.add, unread=weights.unread)
    if any(s.fused for s in outcome.sites):
        _part_with_weights(graph, outcome, constants)
    graphs = ((outcome.before, dump(gm)),)
    # A graph for an NPU keeps its casts as planned: whoever runs it has the tensors.
    formats = carry_out(gm, outcome, settings, constants, casts=not settings.lowerer.keeps_casts)
    if isinstance(constants, ProgramConstants):
        constants.update_signature()
    report = Report(
        outcome.sites, (settings.chip.name,), settings.mode, graphs, formats, outcome.notes, leave=settings.leave
    )
    warn_unmatched(report)
    return report


def _part_with_weights(graph: GraphModule | ExportedProgram, outcome: Outcome, constants: Constants) -> None:
    """Leave one source of truth for each weight of a fused graph: the graph's own."""
    gm = graph.graph_module if isinstance(graph, ExportedProgram) else graph
    read = [n for n in constants.given if n in outcome.leaves]
    weights = list(dict.fromkeys((*read, *weights_of_fused(gm.graph, constants))))
    if isinstance(graph, ExportedProgram):
        refuse_to_load_into(graph, targets_of(graph, weights))
    else:
        refuse_to_load(graph, [str(n.target) for n in weights])
    constants.take_over(weights)
    gm.recompile()


def diff(before: Any, after: Any, context: int = 2) -> str:
    """The difference between two graphs, as text.

    Args:
        before: a ``Graph``, ``GraphModule``, ``ExportedProgram``, the text of :func:`quantpass.graph.dump.dump`, or
            a GE graph: what :func:`quantpass.preview_ge` returns, or the ``graph`` of one of its ``graphs``.
        after: another.
        context: how many unchanged lines to show around a change.
    """
    return diff_text(_text(before), _text(after), context)


def _text(graph: Any) -> str:
    if isinstance(graph, str):
        return graph
    if isinstance(graph, GePreview | GeGraph):
        return graph.outline()
    if isinstance(graph, ExportedProgram):
        return dump(graph.graph)
    if isinstance(graph, Graph | GraphModule):
        return dump(graph)
    raise TypeError(
        "diff takes graphs (Graph, GraphModule, ExportedProgram, GePreview, GeGraph, or text), "
        f"not {type(graph).__name__}"
    )
