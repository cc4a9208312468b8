"""HQQ: what transformers and hqq save.

Layout: ``W_q``, packed along its rows, with ``scale``, ``zero``, ``nbits``, ``group_size``, ``axis`` and ``shape``,
each a tensor (``HQQLinear.state_dict`` with ``encode_safetensor_type``, hqq 0.2.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.parts import integers, tensor
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import Quantized, WeightScheme


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Hqq | None:
    """The reader for ``config``; None where another tool wrote it."""
    del checkpoint
    return Hqq(config) if config.get("quant_method") == "hqq" else None


class Hqq:
    """Reads its modules: each says itself how it is quantized."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        del config
        self.title = "HQQ"
        self.notes: tuple[str, ...] = ()

    def read(self, module: Module) -> Quantized | None:
        if "W_q" not in module.tensors:
            return None
        (bits,), (axis,) = (_numbers(module, name, 1) for name in ("nbits", "axis"))
        n, k = _numbers(module, "shape", 2)
        group = _numbers(module, "group_size", 1)[0] if "group_size" in module.tensors else 0
        if not 1 <= bits <= 8 or n < 1 or k < 1 or group < 0:
            raise CheckpointError(f"{module.name}: {bits} bits, shape ({n}, {k}), groups of {group}")
        weight = WeightScheme(bits, group if 0 < group < k else 0, zero_point=True)
        rejects: tuple[Reject, ...] = ()
        if axis == 0:
            rejects = (
                refuse("read.weight.along_k", f"its groups of {group} lie along N, so that scales vary along K"),
            )
        return Quantized(k, n, weight, bias="bias" in module.tensors, packed_k=group or 1, rejects=rejects)


def _numbers(module: Module, name: str, count: int) -> tuple[int, ...]:
    found = integers(tensor(module, name, (0, 1)))
    if len(found) != count:
        raise CheckpointError(f"{module.name}: {name} holds {len(found)} numbers; {count} are wanted")
    return found
