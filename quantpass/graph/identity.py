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
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import xxhash

from quantpass.graph.torch_internals import StorageWeakRef, no_data_reason, storage_key

State = tuple[Hashable, ...]


def state_of(t: torch.Tensor) -> State:
    """What changes when the values of a tensor on a CPU do; of any other, what is never equal to that.

    To be asked inside :func:`~quantpass.graph.torch_internals.real_tensors`: entering that takes longer than a tensor.
    """
    why = no_data_reason(t)
    if why or not t.is_cpu:
        return (why,)
    return (t.dtype, t.shape, t.stride(), _hash(t))


def _glance(t: torch.Tensor) -> State:
    """What changes when the same tensor is written to, or is given other memory; takes about a microsecond."""
    size = t.untyped_storage().nbytes()
    return (storage_key(t), size, t.storage_offset(), t._version, t.dtype, t.shape, t.stride())


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
    """A tensor as it was. Keeps neither the tensor nor its memory alive. To be made and asked as :func:`state_of`.

    Attributes:
        state: what :func:`state_of` said; where contents don't count, the tensor's memory, version and layout.
        storage: its memory; the address is not used again while this is held.
        tensor: where contents don't count, the tensor itself: a version counter is that of one tensor and its views.
    """

    state: State
    storage: StorageWeakRef
    tensor: weakref.ref[torch.Tensor] | None

    @classmethod
    def now(cls, t: torch.Tensor, contents: bool = True) -> Seen:
        """``t`` as it is; it has data. ``contents``: go by its values where they can be read (on a CPU)."""
        storage = StorageWeakRef(t.untyped_storage())
        if _contents_count(t, contents):
            return cls(state_of(t), storage, None)
        # A tensor that is referred to weakly can't be swapped (torch.utils.swap_tensors): only where it must be.
        return cls(_glance(t), storage, weakref.ref(t))

    def is_still(self, t: torch.Tensor, known_state: Callable[[torch.Tensor], State] = state_of) -> bool:
        """True where ``t`` has the values that were read; ``known_state`` is a :func:`state_of` that may remember."""
        if self.tensor is None:
            return known_state(t) == self.state
        return self.tensor() is t and _glance(t) == self.state

    @property
    def is_freed(self) -> bool:
        """True where the memory that was read is gone."""
        return bool(self.storage.expired())
