"""Which layer breaks the accuracy: the quantized model beside the float model that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from quantpass.doors.differences import Difference, difference


def from_reference(
    reference: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], kept: dict[str, list[Any]], result: Any
) -> Iterator[Difference]:
    """The values of sites, and the results, beside those of the float model on the same inputs.

    Args:
        reference: the float model; a site is compared with the module of its name, where there is one.
        args: the inputs that the quantized model had.
        kwargs: likewise.
        kept: what the quantized model computed at its sites, by name; is emptied.
        result: what the quantized model returned.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    modules = dict(reference.named_modules())
    hooks = [modules[n].register_forward_hook(partial(_keep, seen.setdefault(n, []))) for n in kept if n in modules]
    try:
        dtype = next((p.dtype for p in reference.parameters() if p.dtype.is_floating_point), torch.float32)
        given = tree_map_only(torch.Tensor, partial(_cast, dtype), (tuple(args), kwargs))
        wanted = reference(*given[0], **given[1])
    finally:
        for hook in hooks:
            hook.remove()
    for name, values in kept.items():
        for ours, theirs in zip(values, seen.get(name, []), strict=False):
            if ours.dtype.is_floating_point and ours.numel() == theirs.numel():
                yield difference(name, None, ours, theirs.to(ours.dtype))
    kept.clear()
    ours_theirs = zip(tree_leaves(result), tree_leaves(wanted), strict=False)
    for number, (ours, theirs) in enumerate(ours_theirs):
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and ours.shape == theirs.shape:
            yield difference(f"output {number}", None, ours, theirs.to(ours.dtype))


def worst_of_each(found: Iterable[Difference]) -> tuple[Difference, ...]:
    """The largest difference of each value over all batches, in the order of the first."""
    worst: dict[str, Difference] = {}
    for d in found:
        worst[d.name] = d if d.name not in worst or d.sqnr < worst[d.name].sqnr else worst[d.name]
    return tuple(worst.values())


def _keep(into: list[torch.Tensor], module: torch.nn.Module, args: Any, value: Any) -> None:
    del module, args
    if isinstance(value, torch.Tensor):
        into.append(value.detach())


def _cast(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return value.to(dtype) if value.dtype.is_floating_point else value
