"""GPTQ: what AutoGPTQ, GPTQModel and auto-round write.

Layout: int32 ``qweight`` ``(K * bits / 32, N)``, ``qzeros`` ``(groups, N * bits / 32)``, ``scales`` ``(groups, N)``,
``g_idx`` ``(K,)``: the group of each row (``gptqmodel/nn_modules/qlinear/torch.py`` 7.7).
"""

from __future__ import annotations

import array
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import groups_of, has_zero_points, matched, positive, tensor
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import Quantized, WeightScheme

BITS = (2, 3, 4, 8)


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Gptq | None:
    """The reader for ``config``; None where another tool wrote it."""
    del checkpoint
    method = config.get("quant_method")
    packing = str(config.get("packing_format", ""))
    own = method == "gptq" or (method in ("auto-round", "intel/auto-round") and "awq" not in packing)
    return Gptq(config) if own or (method is None and "desc_act" in config and "bits" in config) else None


class Gptq:
    """Reads its modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        written = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if "marlin" in written or config.get("is_marlin_format"):
            raise CheckpointError("GPTQ in Marlin's own layout, which is made for one GPU kernel: save it as 'gptq'")
        self._bits = positive(config.get("bits"), "GPTQ: bits", ", ".join(map(str, BITS)))
        self._group = positive(config.get("group_size", -1), "GPTQ: group_size", "a positive number, or -1", (-1,))
        self._stored_less_one = "v2" not in written
        self._dynamic = config.get("dynamic") or {}
        if not isinstance(self._dynamic, dict):
            raise CheckpointError(f"GPTQ: dynamic is {self._dynamic!r}; expressions and their settings are wanted")
        self.title = f"GPTQ, {self._bits} bits, {'groups of ' + str(self._group) if self._group > 0 else 'per channel'}"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        if "qweight" not in module.tensors:
            return None
        bits, group = self._settings_of(module.name)
        if bits not in BITS:
            raise CheckpointError(f"{module.name}: {bits} bits; accepted: {', '.join(map(str, BITS))}")
        words = tensor(module, "qweight", (2,), ("int32",))
        scales = tensor(module, "scales", (2,))
        k, n = words.shape[0] * 32 // bits, words.shape[1]
        if scales.shape[1] != n:
            raise CheckpointError(f"{module.name}: scales have shape {scales.shape}, and qweight has {n} columns")
        size = groups_of(module, k, scales.shape[0], None if group == -1 else group)
        middle = 2 ** (bits - 1) - self._stored_less_one
        zero_point = has_zero_points(module.tensors.get("qzeros"), middle, bits)
        weight = WeightScheme(bits, size, zero_point=zero_point)
        per = 32 // math.gcd(32, bits)
        return Quantized(
            k, n, order_of(module, "g_idx", k, weight), bias="bias" in module.tensors, packed_k=per, packed_n=per
        )

    def _settings_of(self, name: str) -> tuple[int, int]:
        """Bits and group size, as ``dynamic`` changes them for some modules."""
        bits, group = self._bits, self._group
        for entry, changes in self._dynamic.items():
            if not isinstance(changes, dict) or entry.startswith("-:") or not matched(entry.removeprefix("+:"), name):
                continue
            bits = positive(changes.get("bits", bits), f"GPTQ: bits of {entry}", ", ".join(map(str, BITS)))
            group = positive(changes.get("group_size", group), f"GPTQ: group_size of {entry}", "a number, -1", (-1,))
            break
        return bits, group


def order_of(module: Module, name: str, k: int, weight: WeightScheme) -> WeightScheme:
    """``weight`` with what the groups of its rows say: together, or in order of activation size.

    Raises:
        CheckpointError: there is not one group for each row.
    """
    found = module.tensors.get(name)
    if found is None or not weight.group:
        return weight
    found = tensor(module, name, (1,), ("int32", "int64"))
    if found.shape != (k,):
        raise CheckpointError(f"{module.name}: {name} has shape {found.shape}, and K is {k}")
    numbers = array.array("i" if found.dtype == "int32" else "q", found.read())
    if sys.byteorder == "big":
        numbers.byteswap()
    together = array.array(numbers.typecode, (row // weight.group for row in range(k)))
    if numbers == together or (numbers and numbers.count(-1) == k):
        return weight
    sizes = Counter(numbers)
    regular = math.gcd(*sizes.values())
    return replace(weight, group=regular if len(sizes) > 1 else 0, ordered=len(sizes) > 1)
