"""How a fused graph is carried out: an object each for the CPU (reference, native), aclnn and GE."""

from collections.abc import Mapping
from types import MappingProxyType

from quantpass.lowering.aclnn import Aclnn
from quantpass.lowering.ge import Ge
from quantpass.lowering.lowering import Lowering
from quantpass.lowering.native import Native
from quantpass.lowering.reference import Reference

REFERENCE, NATIVE, ACLNN, GE = Reference(), Native(), Aclnn(), Ge()

LOWERINGS: Mapping[str, Lowering] = MappingProxyType({x.name: x for x in (REFERENCE, NATIVE, ACLNN, GE)})
"""Every lowering by name."""

RUN_HERE = (REFERENCE.name, NATIVE.name, ACLNN.name)
"""Those whose graphs PyTorch itself runs; a GE graph is torchair's to run."""
