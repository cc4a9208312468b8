"""The torch.compile doors: ``qp.backend(...)`` and ``torch.compile(backend="quantpass", options=...)``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule
from typing_extensions import Unpack

from quantpass.doors.compiled import CompiledGraph, OnOutcome
from quantpass.doors.settings import BackendOptions, make_options
from quantpass.graph.records import WeightFormat
from quantpass.graph.torch_internals import StaticInputs, compile_with_aot, count, decomposition_table, trace_artifact
from quantpass.pipeline import Outcome
from quantpass.planning.options import Options
from quantpass.report import Report

logger = logging.getLogger("quantpass")


class Backend:
    """A Dynamo backend with fixed settings.

    ``report`` gathers the verdicts on every graph compiled so far.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.report = Report((), (options.chip.name,), options.mode, leave=options.leave)

    def __repr__(self) -> str:
        return f"<quantpass.backend, so far {self.report!r}>"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, self.options, self._gather)

    def _gather(self, report: Report) -> None:
        self.report = self.report + report
        warn_unmatched(self.report)


def backend(target: str | None = None, **options: Unpack[BackendOptions]) -> Backend:
    """A backend for ``torch.compile(model, backend=qp.backend(target="ascend310p"))``.

    What was prepared from weights holds for their values. On a CPU the contents are compared at each call, so that
    every change is seen: ``load_state_dict``, ``.data``, NumPy, inference mode. On another device a weight is the same
    while the tensor object, its memory and its version are; writes through ``tensor.data`` or a pointer (``data_ptr``,
    DLPack) can't be seen there: write to the parameter itself under ``torch.no_grad()``. Weights made in inference mode
    on a device have no version, and are taken for inputs; the report says so.

    Args:
        target: chip name (``"ascend310p"``, ``"ascend910b"``, ``"ascend910_93"``), SoC name, ``"cpu"``, or None to ask
            the NPU of this machine.
        options: fields of :class:`quantpass.planning.options.Options`: ``lowering``, ``inner``, ``numerics``,
            ``mode``, ``nz``, ``allow``, ``on_report``.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value that is not accepted.
    """
    return Backend(make_options({"target": target, **options}, "backend"))


def dynamo_backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """What ``torch.compile(backend="quantpass", options={...})`` calls."""
    if mode is not None:
        raise ValueError(f"torch.compile(mode={mode!r}) is Inductor's; give options={{'inner': 'inductor'}} instead")
    settings = make_options(options or {}, "torch.compile(backend='quantpass')")

    def look(report: Report) -> None:
        warn_unmatched(replace(report, leave=settings.leave))

    return compile_graph(gm, example_inputs, settings, look)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    gather: Callable[[Report], None] | None = None,
    compiled: Callable[..., Any] = CompiledGraph,
) -> Callable[..., Any]:
    """Trace a Dynamo graph to ATen, fuse it and compile the rest with the inner compiler.

    ``compiled`` makes the callable from what :class:`CompiledGraph` takes.
    """
    refuse_training(example_inputs)
    on_outcome = report_of(options, gather)

    def compiler(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = compiled(aot, weights, fake_inputs, options, on_outcome)
        return made

    return compile_with_aot(gm, example_inputs, compiler, decomposition_table(options.decompositions))


def report_of(options: Options, gather: Callable[[Report], None] | None) -> OnOutcome:
    """What makes a report of each outcome and tells those who asked for it."""
    chip = options.chip

    def on_outcome(outcome: Outcome, fused: str, formats: tuple[WeightFormat, ...]) -> None:
        report = Report(outcome.sites, (chip.name,), options.mode, ((outcome.before, fused),), formats, outcome.notes)
        log_report(report)
        for listener in (gather, options.on_report):
            if listener is not None:
                listener(report)

    return on_outcome


def refuse_training(example_inputs: Sequence[Any]) -> None:
    """Raise where autograd would record the graph: the fused operators have no gradient."""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        raise ValueError(
            "quantpass compiles inference graphs, and autograd is recording this one: gradients are enabled and some "
            "inputs or parameters require them. Call the model under torch.no_grad() or torch.inference_mode(), or "
            "call model.requires_grad_(False) first."
        )


def warn_unmatched(report: Report) -> None:
    """Warn of what ``leave`` names and no site is called."""
    for said in report.unmatched:
        logger.warning("%s", said)


def log_report(report: Report) -> None:
    """A line in the log for one graph: a warning where something was not fused; in detail, a line for each site."""
    trace_artifact("quantpass_report", lambda: report.text(width=120))
    trace_artifact("quantpass_diff", report.diff)
    left = report.total - report.fused
    count("fused", report.fused)
    count("not_fused", left)
    for site in report.sites if logger.isEnabledFor(logging.DEBUG) else ():
        logger.debug("%s: %s", site.name, site.plan or "; ".join(map(str, site.rejects)))
    if left:
        logger.warning(
            "%d of %d quantized matmuls are not fused for %s (first reason: %s); qp.explain says why for each",
            left,
            report.total,
            ", ".join(report.targets),
            next(s.rejects[0] for s in report.sites if not s.fused),
        )
    else:
        logger.info("%d of %d quantized matmuls fused for %s", report.fused, report.total, ", ".join(report.targets))
