"""Which options each door takes: as types, for editors and type checkers, and as what a refusal says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from quantpass.basics.suggestions import did_you_mean
from quantpass.chips.cpu import CPU
from quantpass.graph.torch_versions import require_tested
from quantpass.lowering import LOWERINGS, NATIVE, REFERENCE, RUN_HERE
from quantpass.patterns import Dialect
from quantpass.planning.options import (
    CompareWeights,
    Decompositions,
    Inner,
    Mode,
    NumericsContract,
    NzMode,
    Options,
    one_of,
)

LoweringHere = Literal["reference", "native", "aclnn"]


class PassOptions(TypedDict, total=False):
    """What every door takes beside its target; see :class:`quantpass.planning.options.Options` for all of them."""

    numerics: NumericsContract
    nz: NzMode
    allow: Collection[str]
    leave: Collection[str]
    dialects: Sequence[Dialect]


class NpuOptions(PassOptions, total=False):
    """Where torchair's mode says how a graph is lowered and compiled."""

    on_report: Callable[..., Any] | None


class PreviewOptions(NpuOptions, total=False):
    """Where GE graphs are shown, by the rules of either mode."""

    mode: Mode | None


class GraphOptions(PassOptions, total=False):
    """Where a graph is given, and carried out here."""

    lowering: LoweringHere
    mode: Mode | None


class CaptureOptions(GraphOptions, total=False):
    """Where a model is captured."""

    decompositions: Decompositions


class BackendOptions(CaptureOptions, total=False):
    """Where a model is compiled."""

    inner: Inner | Callable[..., Any] | None
    compare_weights: CompareWeights
    on_report: Callable[..., Any] | None


TAKEN_BY: Mapping[str, type] = MappingProxyType(
    {
        "backend": BackendOptions,
        "torch.compile(backend='quantpass')": BackendOptions,
        "explain": CaptureOptions,
        "fuse": GraphOptions,
        "verify": CaptureOptions,
        "npu_backend": NpuOptions,
        "register": NpuOptions,
        "npugraph_ex_options": NpuOptions,
        "preview_ge": PreviewOptions,
    }
)
"""The doors, and the type of what they take."""

_NUMERICS: Mapping[type, NumericsContract] = MappingProxyType({NpuOptions: "vendor", PreviewOptions: "vendor"})
"""Doors to an NPU let its operators quantize; anywhere else the graph's own numbers are kept unless told otherwise."""

_RUN = ("backend", "torch.compile(backend='quantpass')", "fuse")
"""Doors whose graphs are run for their results; the others look at what is fused, and at its meaning."""

_TORCHAIRS = ("lowering", "mode", "inner")
_NPU_DOORS = tuple(door for door, taken in TAKEN_BY.items() if taken is NpuOptions)

_WHY: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        **{(d, n): f": {d} sets {n} itself, from torchair's mode" for d in _NPU_DOORS for n in _TORCHAIRS},
        ("npu_backend", "decompositions"): ": it has custom_decompositions, as torchair.get_npu_backend does",
        ("fuse", "decompositions"): ": it takes the graph as it is; call run_decompositions() on the program first",
        **{(d, "on_report"): ": the report is returned" for d in ("explain", "fuse", "verify")},
    }
)
"""Why a door does not take an option, where there is more to say."""


def make_options(given: Mapping[str, Any], door: str = "backend") -> Options:
    """Options from the keyword arguments of a door.

    Raises:
        TypeError: an argument that does not exist (the message names the nearest one that does), or one that ``door``
            would not carry out (the message names the doors that do).
        ValueError: a value that is not accepted.
        RuntimeError: a PyTorch that quantpass is not tested with.
    """
    require_tested()
    names = [f.name for f in fields(Options)]
    accepted = [n for n in names if n == "target" or n in _names(TAKEN_BY[door])]
    for name in given:
        if name not in names:
            meant = did_you_mean(name, accepted)
            raise TypeError(f"unknown option {name!r}. Accepted: {', '.join(accepted)}.{meant}")
        if name not in accepted:
            takers = ", ".join(d for d, taken in TAKEN_BY.items() if name in _names(taken))
            raise TypeError(
                f"{door} does not take the option {name!r}{_WHY.get((door, name), '')}. Taken by: {takers}. "
                f"{door} takes: {', '.join(accepted)}."
            )
    lowering = given.get("lowering", _lowering_of(given.get("target"), door))
    one_of("lowering", lowering, RUN_HERE)
    mode = given.get("mode")
    own = {"numerics": _NUMERICS.get(TAKEN_BY[door], "strict"), "lowering": lowering}
    return Options(**{**own, **given, "mode": LOWERINGS[lowering].mode if mode is None else mode})


def _lowering_of(target: Any, door: str) -> str:
    """What carries a graph out where nothing is said: for a CPU, its fastest kernels; for a chip, what defines them."""
    return (NATIVE if target == CPU.name and door in _RUN else REFERENCE).name


def _names(taken: type) -> frozenset[str]:
    return taken.__optional_keys__  # type: ignore[attr-defined,no-any-return]
