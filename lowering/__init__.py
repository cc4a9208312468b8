"""How a fused graph is carried out: a lowering each for the CPU kernels, aclnn and GE."""

from collections.abc import Mapping
from types import MappingProxyType

from quantpass.lowering.aclnn import Aclnn
from quantpass.lowering.ge import Ge
from quantpass.lowering.lowering import Lowering
from quantpass.lowering.reference import Reference

REFERENCE, ACLNN, GE = Reference(), Aclnn(), Ge()

LOWERINGS: Mapping[str, Lowering] = MappingProxyType({x.name: x for x in (REFERENCE, ACLNN, GE)})
"""Every lowering by name."""

RUN_HERE = (REFERENCE.name, ACLNN.name)
"""Those whose graphs PyTorch itself runs; a GE graph is torchair's to run."""
