"""quantpass: fuse dequantize -> matmul -> (quantize) in FX graphs into Ascend's quantized matmul operators."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "patterns" / "dialect.py").is_file():
    # A checkout: patterns/ and lowering/ lie beside this folder and are its subpackages, whatever else is installed.
    __path__.append(str(_root))
del _Path, _root

from quantpass import nn
from quantpass.basics.reject import Reject
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.checking import check_op
from quantpass.doors.backend import backend
from quantpass.doors.explain import diff, explain, fuse
from quantpass.doors.npu import npu_backend, npugraph_ex_options, register
from quantpass.doors.preview import GePreview, preview_ge
from quantpass.doors.verification import Difference, Verification, verify
from quantpass.graph.records import Numerics, Plan, Site, WeightFormat
from quantpass.lowering import reference as _reference
from quantpass.lowering.emulation import emulate_npu
from quantpass.operators import ir as _ir
from quantpass.report import Report
from quantpass.version import __version__

__all__ = [
    "Difference",
    "GePreview",
    "Numerics",
    "Plan",
    "Reject",
    "Report",
    "Site",
    "TensorSpec",
    "Verification",
    "WeightFormat",
    "__version__",
    "backend",
    "check_op",
    "diff",
    "emulate_npu",
    "explain",
    "fuse",
    "nn",
    "npu_backend",
    "npugraph_ex_options",
    "preview_ge",
    "register",
    "verify",
]

del _ir, _reference  # imported for the operators that they define
