"""The plain modules that stand in for a tool's: its tensors, its names, its arithmetic in PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class PlainLinear(nn.Module):
    """A quantized Linear whose forward any capture sees whole.

    It shares the tensors of the module that it stands in for (parameters stay the same objects, so that what was tied
    stays tied) and has their names, so that the model's state dict keeps its keys.

    Args:
        module: what it stands in for.
        tool: the tool's name.
        scheme: what the weight and the activation are, in words.
        names: the tensors that it takes over; absent ones become None.
        sizes: ``(in_features, out_features)``.
    """

    bias: torch.Tensor | None

    def __init__(self, module: nn.Module, tool: str, scheme: str, names: Iterable[str], sizes: tuple[int, int]) -> None:
        super().__init__()
        self.tool, self.scheme = tool, scheme
        self.in_features, self.out_features = sizes
        self.train(module.training)
        for name in names:
            share(self, name, getattr(module, name, None))

    def dequantized(self, x: torch.Tensor) -> torch.Tensor:
        """The weight that ``x`` is multiplied by, as ``linear`` wants it: ``(out_features, in_features)``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes, the tool and the scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.tool}: {self.scheme}"


def share(plain: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    """Give ``plain`` a tensor under a name: the same parameter, or a buffer."""
    if type(tensor) is nn.Parameter:
        plain.register_parameter(name, tensor)
    else:
        plain.register_buffer(name, tensor)
