"""quantpass: fuse dequantize -> matmul -> (quantize) in FX graphs into Ascend's quantized matmul operators."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import MappingProxyType as _MappingProxyType
from typing import TYPE_CHECKING

if __name__ != "quantpass":
    # In a checkout the folder of this one is on its own path (below): whoever walks through the modules, as PyTorch
    # does for TORCH_LOGS="+quantpass", would find quantpass.quantpass.quantpass and never end.
    raise ImportError(f"{__name__} is quantpass itself", name=__name__)

_root = _Path(__file__).resolve().parent.parent
if (_root / "patterns" / "dialect.py").is_file():
    # A checkout: patterns/ and lowering/ lie beside this folder and are its subpackages, whatever else is installed.
    __path__.append(str(_root))
del _Path, _root

from quantpass.basics.late_import import when_imported as _when_imported
from quantpass.version import __version__

if TYPE_CHECKING:
    from quantpass import nn
    from quantpass.adoption import Adoption, adopt
    from quantpass.basics.reject import Reject
    from quantpass.basics.tensor_spec import TensorSpec
    from quantpass.chips.checking import check_op
    from quantpass.doors.backend import backend
    from quantpass.doors.checkpoint import check_checkpoint
    from quantpass.doors.differences import Difference
    from quantpass.doors.explain import diff, explain, fuse
    from quantpass.doors.npu import npu_backend, npugraph_ex_options, register
    from quantpass.doors.preview import GePreview, preview_ge
    from quantpass.doors.selftest import SelfTest, selftest
    from quantpass.doors.verification import verify
    from quantpass.doors.verified import Verification
    from quantpass.graph.records import Numerics, Plan, Site, WeightFormat
    from quantpass.lowering.emulation import emulate_npu
    from quantpass.lowering.standin_cann import StandinError
    from quantpass.lowering.standin_process import PreviewError, TorchairProcess
    from quantpass.messages.explain import Explanation, explain_error
    from quantpass.planning.options import Options
    from quantpass.report import Report

__all__ = [
    "Adoption",
    "Difference",
    "Explanation",
    "GePreview",
    "Numerics",
    "Options",
    "Plan",
    "PreviewError",
    "Reject",
    "Report",
    "SelfTest",
    "Site",
    "StandinError",
    "TensorSpec",
    "TorchairProcess",
    "Verification",
    "WeightFormat",
    "__version__",
    "adopt",
    "backend",
    "check_checkpoint",
    "check_op",
    "diff",
    "emulate_npu",
    "explain",
    "explain_error",
    "fuse",
    "nn",
    "npu_backend",
    "npugraph_ex_options",
    "preview_ge",
    "register",
    "selftest",
    "verify",
]

_NAMES = {
    "adoption": ("Adoption", "adopt"),
    "basics.reject": ("Reject",),
    "basics.tensor_spec": ("TensorSpec",),
    "chips.checking": ("check_op",),
    "doors.backend": ("backend",),
    "doors.checkpoint": ("check_checkpoint",),
    "doors.explain": ("diff", "explain", "fuse"),
    "doors.npu": ("npu_backend", "npugraph_ex_options", "register"),
    "doors.preview": ("GePreview", "preview_ge"),
    "doors.differences": ("Difference",),
    "doors.selftest": ("SelfTest", "selftest"),
    "doors.verification": ("verify",),
    "doors.verified": ("Verification",),
    "graph.records": ("Numerics", "Plan", "Site", "WeightFormat"),
    "lowering.emulation": ("emulate_npu",),
    "lowering.standin_cann": ("StandinError",),
    "lowering.standin_process": ("PreviewError", "TorchairProcess"),
    "messages.explain": ("Explanation", "explain_error"),
    "planning.options": ("Options",),
    "report": ("Report",),
}
_HOMES = _MappingProxyType({name: f"quantpass.{module}" for module, names in _NAMES.items() for name in names})
_MODULES = frozenset(
    (
        *(
            "basics",
            "chips",
            "checkpoints",
            "messages",
            "graph",
            "patterns",
            "operators",
            "planning",
            "lowering",
            "adoption",
            "doors",
        ),
        *("nn", "pipeline", "report", "rewrite", "testing", "version"),
    )
)
del _NAMES

if not TYPE_CHECKING:  # where mypy sees it, it takes every name to be there

    def __getattr__(name):
        """A public name or a module, imported at its first use: most of them need PyTorch, which takes seconds."""
        if name in _HOMES:
            value = getattr(_import_module(_HOMES[name]), name)
        elif name in _MODULES:
            value = _import_module(f"quantpass.{name}")
        else:
            raise AttributeError(f"module 'quantpass' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__, *_MODULES})


def _define_operators() -> None:
    _import_module("quantpass.operators")


# A saved program that holds torch.ops.quantpass.* loads wherever quantpass and torch were imported, in either order and
# whatever was used of quantpass: the operators are defined as soon as both are there.
_when_imported("torch", _define_operators)
