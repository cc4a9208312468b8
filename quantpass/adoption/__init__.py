"""Tools' quantized Linears exchanged for plain modules that any capture sees whole."""

from quantpass.adoption.adopt import adopt
from quantpass.adoption.result import Adopted, Adoption, Left

__all__ = ["Adopted", "Adoption", "Left", "adopt"]
