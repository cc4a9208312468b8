"""Is a tensor still what it was when its values were read?

An address says nothing: memory that was freed is handed out again. Nor does a version counter: it does not count what
is written through ``tensor.data``, NumPy or DLPack, nor anything at all in tensors made in inference mode. So on a CPU
the contents themselves are compared, by a 64-bit hash (XXH3) that reads them as fast as memory gives them. On a
device that would be a pass over all weights at every call and a stop of its queue; there, and on a CPU whose user asks
for it, a tensor is the same while the tensor object, its memory (whose address is kept from being used again) and its
version are.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import xxhash

from quantpass.graph.torch_internals import StorageWeakRef, no_data_reason, storage_key

State = tuple[Hashable, ...]


def state_of(t: torch.Tensor, contents: bool = True) -> State:
    """What changes when the tensor's values do.

    Args:
        t: the tensor.
        contents: read the values where that is possible (on a CPU); otherwise what the module says of a device holds.

    To be asked inside :func:`~quantpass.graph.torch_internals.real_tensors`: entering that takes longer than a tensor.
    """
    why = no_data_reason(t)
    if why:
        return (why,)
    layout = (t.dtype, t.shape, t.stride(), t.device)
    if _contents_count(t, contents):
        return (*layout, _hash(t))
    return (*layout, storage_key(t), t.storage_offset(), t._version)


def _contents_count(t: torch.Tensor, contents: bool) -> bool:
    return t.is_cpu and (contents or t.is_inference())  # that has no version


def _hash(t: torch.Tensor) -> int:
    plain = t.detach()
    if type(plain) is not torch.Tensor:
        plain = plain.as_subclass(torch.Tensor)
    dense = plain.resolve_conj().resolve_neg().contiguous()
    # Not through NumPy: a tensor that has been an array once can't be resized any more.
    memory = (ctypes.c_ubyte * dense.nbytes).from_address(dense.data_ptr()) if dense.numel() else b""
    return xxhash.xxh3_64_intdigest(memory)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A tensor as it was. Keeps neither the tensor nor its memory alive.

    Attributes:
        state: what :func:`state_of` said.
        storage: its memory; the address is not used again while this is held.
        tensor: on a device, the tensor itself: a version counter is that of one tensor and its views.
    """

    state: State
    storage: StorageWeakRef
    tensor: weakref.ref[torch.Tensor] | None

    @classmethod
    def now(cls, t: torch.Tensor, contents: bool = True) -> Seen:
        """``t`` as it is; it has data. ``contents`` as for :func:`state_of`."""
        # A tensor that is referred to weakly can't be swapped (torch.utils.swap_tensors): only where it must be.
        tensor = None if _contents_count(t, contents) else weakref.ref(t)
        return cls(state_of(t, contents), StorageWeakRef(t.untyped_storage()), tensor)

    def is_still(self, t: torch.Tensor, state: State) -> bool:
        """True where ``t``, whose state is ``state``, has the values that were read."""
        return state == self.state and (self.tensor is None or self.tensor() is t)

    @property
    def is_freed(self) -> bool:
        """True where the memory that was read is gone."""
        return bool(self.storage.expired())
