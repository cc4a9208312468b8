"""Putting modules in the place of others, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from quantpass.adoption.plain import PlainLinear


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands in another one: ``parent._modules[key]``; ``name`` is its path in the model."""

    parent: nn.Module
    key: str
    name: str
    original: nn.Module
    plain: PlainLinear

    def fill(self) -> None:
        """Put the plain module there."""
        self.parent._modules[self.key] = self.plain

    def put_back(self) -> None:
        """Put the tool's module back, unless something else stands there by now."""
        if self.parent._modules.get(self.key) is self.plain:
            self.parent._modules[self.key] = self.original


def places(model: nn.Module, plain_of: Mapping[nn.Module, PlainLinear]) -> list[Place]:
    """Every place in ``model`` where one of the modules stands, in the model's order."""
    found = []
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None and child in plain_of:
                name = f"{path}.{key}" if path else key
                found.append(Place(parent, key, name, child, plain_of[child]))
    return found
