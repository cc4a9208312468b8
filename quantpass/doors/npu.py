"""The doors for an Ascend machine: ``npu_backend``, ``register`` and ``npugraph_ex_options`` (docs/npu.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule
from typing_extensions import Unpack

from quantpass.chips.ascend310p import ASCEND310P
from quantpass.doors.backend import log_report, refuse_training, report_of, warn_unmatched
from quantpass.doors.compiled import CompiledGraph
from quantpass.doors.hooks import (
    HookFunction,
    make_hook,
    run_pass,
    skip_note,
    skipped_by,
    skipped_by_options,
    users_own,
)
from quantpass.doors.settings import NpuOptions, make_options
from quantpass.graph.torch_internals import static_inputs
from quantpass.lowering import ACLNN, GE
from quantpass.lowering.torchair_graphs import hand_over
from quantpass.lowering.torchair_versions import (
    PASS_HOOK,
    compile_with,
    install_line,
    load_torchair,
    loaded_note,
    merged_decompositions,
    without_hook,
)
from quantpass.planning.options import Options, device_target
from quantpass.report import Report

logger = logging.getLogger("quantpass")


class NpuBackend:
    """What :func:`npu_backend` returns: a Dynamo backend.

    ``report`` gathers the verdicts on every graph compiled so far.
    """

    def __init__(self, config: Any, options: Options, decompositions: dict[Any, Any]) -> None:
        self.config = config
        self.options = options
        self._decompositions = decompositions
        self._report = Report((), (options.chip.name,), options.mode, notes=_notes(), leave=options.leave)

    @property
    def report(self) -> Report:
        """The verdicts so far."""
        return self._report

    def __repr__(self) -> str:
        return f"<quantpass.npu_backend, so far {self.report!r}>"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        from torchair import npu_fx_compiler

        refuse_training(example_inputs)
        compiler = _FusingCompiler(self, [gm, list(example_inputs)], npu_fx_compiler.get_compiler(self.config))
        compiled = compile_with(compiler, gm, example_inputs, self.config, self._decompositions)
        compiler.given.clear()  # what is compiled outlives the first call's inputs
        return compiled

    def _gather(self, report: Report) -> None:
        self._report = self._report + report
        warn_unmatched(self._report)


class _FusingCompiler:
    """Stands where torchair expects its own compiler: fuses, then lets torchair's compile."""

    def __init__(self, backend: NpuBackend, given: list[Any], compiler: Callable[..., Any]) -> None:
        self._backend = backend
        self.given = given
        self._compiler = compiler

    def __call__(self, aot: GraphModule, fake_inputs: list[Any]) -> Callable[..., Any]:
        backend = self._backend
        inner = hand_over(self._compiler, backend.config, len(fake_inputs))
        weights = static_inputs(aot, *self.given)
        listener = report_of(backend.options, backend._gather)
        return CompiledGraph(aot, weights, fake_inputs, replace(backend.options, inner=inner), listener)

    def set_arg_pos_to_source(self, positions: Any) -> None:
        """torchair asks this of its compiler when exporting."""
        self._compiler.set_arg_pos_to_source(positions)  # type: ignore[attr-defined]


def npu_backend(
    compiler_config: Any = None,
    target: str | None = None,
    *,
    custom_decompositions: Mapping[Any, Any] | None = None,
    **options: Unpack[NpuOptions],
) -> NpuBackend:
    """A drop-in for ``torchair.get_npu_backend`` that fuses quantized matmuls first.

    ``torch.compile(model, backend=qp.npu_backend(compiler_config=config))``. It sees the real weights, so whatever can
    be done once is done when compiling: int4 packed, biases folded to int32, scales put in int64 words, weights cast
    to FRACTAL_NZ (in place: the parameters change their storage, not their values). With torchair's default mode the
    fused operators become GE operators; in its ``reduce-overhead`` and ``npugraph_ex`` modes the vendor's aclnn calls.

    Weights that change are noticed as long as the tensor object, its memory or its version does: new parameters,
    ``.data =``, ``load_state_dict``, in-place operators. Writes through ``tensor.data`` or a pointer (``data_ptr``,
    DLPack) can't be seen on a device. Weights made in inference mode there have no version: they are taken for inputs,
    nothing is prepared of them, and the report says so; load weights under ``torch.no_grad()`` instead.

    Args:
        compiler_config: ``torchair.CompilerConfig``; None for torchair's defaults. Its own
            ``post_grad_custom_pre_pass`` runs afterwards, on the fused graph.
        target: chip or SoC name; None asks the NPU.
        custom_decompositions: as for ``torchair.get_npu_backend``.
        options: fields of :class:`quantpass.planning.options.Options` other than ``lowering``, ``mode`` and ``inner``,
            which follow from ``compiler_config``, and ``decompositions``.

    Returns:
        The backend; its ``report`` tells what was fused and how each weight is stored.

    Raises:
        ImportError: torch_npu or torchair can't be imported; says what to install.
        TypeError: an option that does not exist or that the door sets itself.
        ValueError: a value that is not accepted; no target was given and there is no NPU to ask.
    """
    chosen = _chosen("npu_backend", target, options)
    torchair = require_torchair("quantpass.npu_backend")
    config = torchair.CompilerConfig() if compiler_config is None else compiler_config
    # Whoever runs the graph operator by operator needs operators that an NPU has.
    eagerly = bool(getattr(getattr(config, "debug", None), "run_eagerly", False)) or skipped_by(config) is not None
    settings = _settings(chosen, captured=_is_captured(config), aclnn=_is_captured(config) or eagerly)
    settings.lowerer.prepare(settings.chip)
    return NpuBackend(config, settings, merged_decompositions(config, custom_decompositions or {}))


class Registration:
    """What :func:`register` returns. ``report`` gathers the verdicts on every graph compiled so far."""

    def __init__(self, options: Options, skipped: Callable[[], str | None], *notes: str) -> None:
        self.options = options
        self._skipped = skipped
        self._found = Report((), (options.chip.name,), options.mode, notes=_notes(*notes), leave=options.leave)

    @property
    def report(self) -> Report:
        """The verdicts so far, and what :func:`npu_backend` would have gained."""
        why = self._skipped()
        notes = (*self._found.notes, skip_note(why)) if why else self._found.notes
        return replace(self._found, notes=notes)

    def __repr__(self) -> str:
        return f"<quantpass.register, so far {self.report!r}>"

    def add(self, report: Report) -> None:
        """Take in the verdicts on one more graph."""
        log_report(report)
        if self.options.on_report is not None:
            self.options.on_report(report)
        self._found = self._found + report
        warn_unmatched(self._found)


def register(config: Any, target: str | None = None, **options: Unpack[NpuOptions]) -> Registration:
    """Put the pass into a ``torchair.CompilerConfig``; everything else about compiling stays torchair's.

    Only ``config.post_grad_custom_pre_pass`` is set. A hook that is there already is kept and runs first, on the graph
    that it was written for; one that ``register`` put there is replaced. A hook sees no weights, only their shapes:
    plain spellings are read symbolically, nothing is prepared, no weight is cast beforehand. The report says what
    :func:`npu_backend` would have gained. So weights may change in any way, as far as torchair itself follows (its
    frozen parameters and captured graphs); only tensors that are constants of the graph itself are read when compiling,
    and a later write to those can't be seen.

    Args:
        config: ``torchair.CompilerConfig``, or npugraph_ex's.
        target: chip or SoC name; None asks the NPU.
        options: as for :func:`npu_backend`.

    Returns:
        A :class:`Registration`, whose ``report`` fills as graphs are compiled.

    Raises:
        TypeError: ``config`` has no ``post_grad_custom_pre_pass``; an option that does not exist.
        ValueError: a value that is not accepted; no target was given and there is no NPU to ask.
    """
    if why := without_hook(config):
        raise TypeError(why)
    captured = _is_captured(config)
    settings = _settings(_chosen("register", target, options), captured=captured, aclnn=captured)
    registration = Registration(settings, lambda: skipped_by(config))
    slot = getattr(config, PASS_HOOK)
    existing = users_own(getattr(slot, "value", slot))
    config.post_grad_custom_pre_pass = make_hook(_runner(registration, "a registered pass"), settings, existing)
    _warn_if_skipped(skipped_by(config))
    return registration


class NpugraphExOptions(dict[str, Any]):
    """Options for ``torch.compile(backend="npugraph_ex", options=...)``: a dict, with a ``report`` beside it."""

    def __init__(self, given: Mapping[str, Any], registration: Registration) -> None:
        super().__init__(given)
        self._registration = registration

    @property
    def report(self) -> Report:
        """The verdicts so far."""
        return self._registration.report


def npugraph_ex_options(
    target: str | None = None, *, npugraph_ex: Mapping[str, Any] | None = None, **options: Unpack[NpuOptions]
) -> NpugraphExOptions:
    """Options with which ``torch.compile(model, backend="npugraph_ex", options=...)`` fuses quantized matmuls.

    The fused operators are the vendor's aclnn calls, and no format cast is ever part of the graph (it would abort the
    capture): a weight is used in the format that it has. To have weights in FRACTAL_NZ, cast the parameters before
    compiling, or use :func:`npu_backend` with ``compiler_config.mode = "reduce-overhead"``. Nothing is prepared from
    weights, which may change as far as npugraph_ex itself follows; only a later write to a tensor that is a constant of
    the graph itself can't be seen.

    Args:
        target: chip or SoC name; None asks the NPU.
        npugraph_ex: npugraph_ex's own options, e.g. ``{"static_kernel_compile": True}``; a
            ``post_grad_custom_pre_pass`` among them is kept and runs first.
        options: as for :func:`npu_backend`.

    Returns:
        A dict to pass on as it is; its ``report`` fills as graphs are compiled.

    Raises:
        TypeError: an option that does not exist.
        ValueError: a value that is not accepted; no target was given and there is no NPU to ask.
    """
    given = dict(npugraph_ex or {})
    settings = _settings(_chosen("npugraph_ex_options", target, options), captured=True, aclnn=True)
    registration = Registration(settings, lambda: skipped_by_options(result), *_unsupported(settings.chip.name))
    existing = users_own(given.get(PASS_HOOK))
    given[PASS_HOOK] = make_hook(_runner(registration, "an npugraph_ex pass"), settings, existing)
    result = NpugraphExOptions(given, registration)
    _warn_if_skipped(skipped_by_options(result))
    return result


def _runner(registration: Registration, door: str) -> HookFunction:
    def run(gm: GraphModule, example_inputs: Sequence[Any], config: Any) -> None:
        del example_inputs
        options = registration.options
        # The mode may have been set after registering.
        if _is_captured(config):
            options = _settings(options, captured=True, aclnn=True)
        try:
            options.lowerer.prepare(options.chip)
        except ImportError as error:
            raise _missing(door, error) from error
        registration.add(run_pass(gm, config, options, door))

    return run


def require_torchair(door: str) -> Any:
    """The torchair module.

    Raises:
        ImportError: it can't be imported; the message says what to install.
    """
    try:
        import torch_npu  # noqa: F401  - finds torchair

        return load_torchair()
    except ImportError as error:
        raise _missing(door, error) from error


def _missing(door: str, error: ImportError) -> ImportError:
    return ImportError(
        f"{door} needs torch_npu and torchair, and {error}. Install torch_npu, which brings torchair, in a version "
        f"that matches torch ({install_line()}), and protobuf, on a machine with CANN and an Ascend NPU. Without one, "
        "quantpass.preview_ge shows the GE graph and quantpass.backend(target=...) computes the numbers."
    )


def _chosen(door: str, target: str | None, options: NpuOptions) -> Options:
    made = make_options({"target": target, **options}, door)
    # The name is asked for now, so that a compile cache never mixes two chips.
    return replace(made, target=device_target()) if target is None else made


def _settings(chosen: Options, *, captured: bool, aclnn: bool) -> Options:
    return replace(chosen, lowering=(ACLNN if aclnn else GE).name, mode="eager" if captured else "graph")


def _is_captured(config: Any) -> bool:
    mode = getattr(config, "mode", None)
    return getattr(mode, "value", mode) in ("reduce-overhead", "npugraph_ex")


def _notes(*notes: str) -> tuple[str, ...]:
    """Notes on what is installed here, and others; each is logged."""
    found = tuple(note for note in (loaded_note(), *notes) if note)
    for note in found:
        logger.warning("%s", note)
    return found


def _unsupported(chip: str) -> tuple[str, ...]:
    # vllm-ascend, vllm_ascend/ascend_config.py:757 (main of 2026-08-22) and its pull request 10874.
    if chip != ASCEND310P.name:
        return ()
    return (
        "npugraph_ex is not supported on Ascend 310P (vllm-ascend turns it off there); quantpass.npu_backend and "
        "quantpass.register in torchair's default mode are the doors for this chip",
    )


def _warn_if_skipped(why: str | None) -> None:
    if why:
        logger.warning("%s", skip_note(why))
