"""The headers of safetensors files: eight bytes of length, JSON, and what it says of the data behind it, checked.

Nothing of a file is believed before it was compared with the file's size, and nothing is executed. Layout and limits:
the format's documentation and reference implementation (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

LARGEST_HEADER = 100_000_000
"""What the format allows, in bytes."""

LARGEST_JSON = 200_000_000
"""Of any other JSON file: an index of a million tensors is about that long."""

MOST_VALUES = 5_000_000
"""In one JSON text: what Python makes of more would take more memory than looking at a checkpoint should."""

LARGEST_READ = 1 << 26
"""Of a tensor's data that is looked at, in bytes."""

DEEPEST = 64
"""How many axes a tensor has at most."""

DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "BOOL": ("bool", 8),
        "U8": ("uint8", 8),
        "I8": ("int8", 8),
        "I16": ("int16", 16),
        "U16": ("uint16", 16),
        "I32": ("int32", 32),
        "U32": ("uint32", 32),
        "I64": ("int64", 64),
        "U64": ("uint64", 64),
        "F16": ("float16", 16),
        "BF16": ("bfloat16", 16),
        "F32": ("float32", 32),
        "F64": ("float64", 64),
        "F8_E5M2": ("float8_e5m2", 8),
        "F8_E4M3": ("float8_e4m3fn", 8),
        "F8_E8M0": ("float8_e8m0fnu", 8),
        "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
        "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
        "F4": ("float4", 4),
        "F6_E2M3": ("float6_e2m3", 6),
        "F6_E3M2": ("float6_e3m2", 6),
        "C64": ("complex64", 64),
    }
)
"""The format's dtypes: PyTorch's name, where it has one, and bits an element."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read: what was found, what is accepted, what to do."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: PyTorch's name of the element type.
        shape: its sizes.
        path: the file.
        start: where its data begins in the file.
        stop: where it ends.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        """Its data, which has to be small.

        Raises:
            CheckpointError: it is not, or the file has changed.
        """
        if self.nbytes > LARGEST_READ:
            raise CheckpointError(f"{self.path}: a tensor of {self.nbytes} bytes is too large to be looked at")
        if not self.nbytes:
            return b""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            data = file.read(self.nbytes)
        if len(data) < self.nbytes:
            raise CheckpointError(f"{self.path} has become shorter while it was read")
        return data


@dataclass(frozen=True, slots=True)
class Header:
    """One file: its tensors by name, and the words that its writer put beside them."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """What a safetensors file holds.

    Raises:
        CheckpointError: it is no such file, or its header does not go with its size.
    """
    real, size = regular_file(path)
    with real.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head.startswith(b"version "):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
        if len(head) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is no whole safetensors file: its first 8 bytes announce a header of {length} bytes, and the "
                f"file has {size}. Download it again."
            )
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes; the format allows {LARGEST_HEADER}")
        text = file.read(length)
    described = parsed(text, path)
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: the header is a {type(described).__name__}, not an object of tensors")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is no object of texts")
    begin = 8 + length
    tensors = {name: _tensor(name, d, real, begin, size) for name, d in described.items()}
    _check_order(tensors, path, begin, size)
    return Header(tensors, metadata)


def regular_file(path: Path) -> tuple[Path, int]:
    """The file behind ``path``, links followed, and its size.

    Raises:
        CheckpointError: there is none: a link that leads nowhere or to itself, a folder, a pipe, a device.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        found = real.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path} can't be opened: {why}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if not os.access(real, os.R_OK):
        raise CheckpointError(f"{path} can't be opened: permission denied")
    return real, found.st_size


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        CheckpointError: it can't be opened, is too large, or is no JSON.
    """
    real, size = regular_file(path)
    if size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {size} bytes; at most {LARGEST_JSON} are read")
    return parsed(real.read_bytes(), path)


def parsed(text: bytes, path: Path) -> Any:
    """JSON without repeated names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in found if names.count(n) > 1)
            raise CheckpointError(f"{path} names {twice!r} twice in one object")
        return found

    if sum(text.count(c) for c in (b",", b"[", b"{")) > MOST_VALUES:
        raise CheckpointError(f"{path} holds more than {MOST_VALUES} values: no checkpoint needs so many")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} holds no JSON that can be read: {why}") from error


def _tensor(name: str, described: Any, path: Path, begin: int, size: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    if not isinstance(described, dict) or not {"dtype", "shape", "data_offsets"} <= described.keys():
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(s) for s in shape) or len(shape) > DEEPEST:
        raise CheckpointError(f"{where} has shape {_short(shape)}; a list of at most {DEEPEST} sizes is wanted")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise CheckpointError(f"{where} has data_offsets {_short(offsets)}; two numbers are wanted")
    start, stop = (begin + o for o in offsets)
    if not start <= stop <= size:
        raise CheckpointError(
            f"{where} lies at {offsets[0]} to {offsets[1]} of {size - begin} bytes of data: the file is cut off, or "
            "its header is wrong. Download it again."
        )
    bits = DTYPES[dtype][1] * math.prod(shape)
    if bits != 8 * (stop - start):
        raise CheckpointError(
            f"{where}, {dtype} of shape {_short(shape)}, takes {bits / 8:g} bytes; its data_offsets hold {stop - start}"
        )
    return StoredTensor(DTYPES[dtype][0], tuple(shape), path, start, stop)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _check_order(tensors: Mapping[str, StoredTensor], path: Path, begin: int, size: int) -> None:
    """Tensors lie one behind the other and fill the file."""
    placed = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    for (a, first), (b, second) in pairwise(placed):
        if second.start < first.stop:
            raise CheckpointError(f"{path}: tensors {a!r} and {b!r} overlap")
        if second.start > first.stop:
            raise CheckpointError(f"{path}: {second.start - first.stop} bytes between {a!r} and {b!r} are no tensor's")
    used = (placed[-1][1].stop if placed else begin, placed[0][1].start if placed else begin)
    if used != (size, begin):
        raise CheckpointError(
            f"{path}: its tensors do not fill it: they lie at {used[1] - begin} to {used[0] - begin} of "
            f"{size - begin} bytes"
        )
