"""What a user can ask for, validated once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from quantpass.basics.suggestions import did_you_mean, either
from quantpass.chips import DOCUMENTED, NPUS, chip_named, chip_of_device
from quantpass.chips.legality import checked_allow
from quantpass.chips.rules import Chip
from quantpass.lowering import LOWERINGS, REFERENCE
from quantpass.lowering.lowering import Lowering
from quantpass.patterns import Dialect
from quantpass.version import __version__

Inner = Literal["eager", "inductor"]
NumericsContract = Literal["strict", "vendor"]
Mode = Literal["graph", "eager"]
NzMode = Literal["auto", "never"]
Decompositions = Literal["none", "inductor", "core"]
CompareWeights = Literal["contents", "identity"]


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of one compilation.

    Attributes:
        target: chip name, SoC name or ``"cpu"``; None asks the device.
        lowering: how fused operators are carried out: ``"reference"`` (CPU kernels that define their semantics),
            ``"native"`` (the fastest of PyTorch's own CPU kernels, measured on the first weight of each shape) or
            ``"aclnn"`` (``torch.ops.npu.*``: on an NPU, or on a CPU after :func:`quantpass.emulate_npu`). ``backend``
            and ``fuse`` have ``"native"`` by default for the target ``"cpu"``.
        inner: what compiles the rest of the graph: None or ``"eager"``, ``"inductor"``, or a function
            ``(graph_module, example_inputs) -> callable``.
        numerics: ``"strict"`` keeps the integer codes that the graph's own quantize operators produce, and after an
            integer matmul the graph's own roundings; ``"vendor"`` lets the operators quantize activations by their own
            rule (codes differ by at most one or two; each site says so, with a bound) and take in the whole epilogue,
            which rounds once where the graph rounds several times. Doors to an NPU (``npu_backend``, ``register``,
            ``npugraph_ex_options``, ``preview_ge``) have the latter by default, all others the former.
        mode: which of a chip's rules hold: ``"graph"`` (GE, through torchair) or ``"eager"`` (aclnn). For a door, None
            is ``"eager"`` with ``lowering="aclnn"`` and ``"graph"`` otherwise.
        nz: ``"auto"`` lays weights out in FRACTAL_NZ where the chip wants it, ``"never"`` leaves them in ND.
        allow: rules to lift by name: contradicted ones, about which documents and code disagree;
            ``"numerics.float16"``, which has bfloat16 and float32 sites computed in float16 where a chip needs it; and
            ``"weights.refit"``, which has a static weight re-fitted as symmetric int8 per channel where a chip has no
            form for it, if that keeps an SQNR of at least 30 dB in each column (``"weights.refit:35"`` asks for 35).
        leave: sites to leave as they are, by name; ``*`` stands for anything (``"*.lm_head"``). The reports say so.
        decompositions: which operators are broken down before the pass sees the graph: ``"none"``, ``"inductor"``
            (Inductor's table) or ``"core"`` (core ATen); for backends only.
        dialects: tools that quantpass does not know, as :class:`quantpass.patterns.Dialect` objects.
        compare_weights: how a backend on a CPU sees at each call that a weight has changed: ``"contents"`` reads it
            (about as long as the matmul of one row takes); ``"identity"`` looks at the tensor, its memory and its
            version only, as on a device, and does not see writes through ``tensor.data``, NumPy or a pointer.
        on_report: called with the :class:`quantpass.Report` of every graph that is compiled.
    """

    target: str | None = None
    lowering: str = REFERENCE.name
    inner: Inner | Callable[..., Any] | None = None
    numerics: NumericsContract = "strict"
    mode: Mode = "graph"
    nz: NzMode = "auto"
    allow: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    decompositions: Decompositions = "none"
    dialects: tuple[Dialect, ...] = ()
    compare_weights: CompareWeights = "contents"
    on_report: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            chip_named(self.target)
        one_of("lowering", self.lowering, tuple(LOWERINGS))
        if self.lowerer.needs_a_chip and self.target is not None and chip_named(self.target).name not in NPUS:
            raise ValueError(
                f"lowering is {self.lowering!r} and target {self.target!r}: the vendor's operators follow a chip's "
                f"rules. Give target={either(DOCUMENTED)}; with quantpass.emulate_npu() they run on CPU tensors."
            )
        one_of("numerics", self.numerics, get_args(NumericsContract))
        one_of("mode", self.mode, get_args(Mode))
        one_of("nz", self.nz, get_args(NzMode))
        one_of("compare_weights", self.compare_weights, get_args(CompareWeights))
        one_of("decompositions", self.decompositions, get_args(Decompositions))
        if self.inner is not None and not callable(self.inner):
            one_of(
                "inner",
                self.inner,
                get_args(Inner),
                extra=" Also accepted: None, or a function (graph_module, example_inputs) -> callable.",
            )
        object.__setattr__(self, "allow", checked_allow(self.allow))
        if not isinstance(self.leave, tuple | list | set | frozenset) or not all(
            isinstance(n, str) for n in self.leave
        ):
            raise TypeError(f"leave is {self.leave!r}; give a tuple of sites' names, e.g. leave=('lm_head',)")
        object.__setattr__(self, "leave", tuple(sorted(self.leave)))
        if not isinstance(self.dialects, tuple | list) or not all(isinstance(d, Dialect) for d in self.dialects):
            raise TypeError(f"dialects is {self.dialects!r}; give a tuple of quantpass.patterns.Dialect")
        object.__setattr__(self, "dialects", tuple(self.dialects))
        if self.on_report is not None and not callable(self.on_report):
            raise TypeError(f"on_report is {self.on_report!r}; give a function of one argument, the Report")

    @property
    def chip(self) -> Chip:
        """The chip that ``target`` names."""
        return chip_named(self.target if self.target is not None else device_target())

    def leaves(self, site: str) -> bool:
        """Whether the site of this name is to be left as it is."""
        return any(fits(pattern, site) for pattern in self.leave)

    @property
    def lowerer(self) -> Lowering:
        """The lowering that ``lowering`` names."""
        return LOWERINGS[self.lowering]

    @property
    def fingerprint(self) -> str:
        """A short name for these settings under this version of quantpass."""
        left_out = ("inner", "on_report", "dialects")
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        settings["dialects"] = [d.name for d in self.dialects]
        text = repr((__version__, sorted(settings.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def device_target() -> str:
    """The name of the NPU in this machine; that of its family where the NPU is newer than the names known here.

    Raises:
        ValueError: there is none to ask.
    """
    try:
        import torch_npu

        name = str(torch_npu.npu.get_device_name())
    except Exception as error:
        raise ValueError(
            "target is None, which asks the NPU for its name, and no NPU can be asked here "
            f"({type(error).__name__}: {error}). Name one: target={either((*DOCUMENTED, 'cpu'))}."
        ) from error
    chip = chip_of_device(name)
    return name if name in chip.soc_names else chip.name


def fits(pattern: str, site: str) -> bool:
    """Whether what ``leave`` was given is a site's name, or a pattern of it."""
    return site == pattern or fnmatchcase(site, pattern)


def one_of(name: str, value: Any, accepted: tuple[str, ...], extra: str = "") -> None:
    if value not in accepted:
        meant = did_you_mean(value, accepted)
        raise ValueError(f"{name} is {value!r}. Accepted: {', '.join(map(repr, accepted))}.{extra}{meant}")
