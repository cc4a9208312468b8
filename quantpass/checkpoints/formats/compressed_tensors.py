"""compressed-tensors: what llm-compressor writes.

Layout: ``compressors/quantized_compressors/`` of compressed-tensors 0.20: int8 ``weight`` or int32 ``weight_packed``
along K, ``weight_scale``, ``weight_zero_point``, ``weight_g_idx``, ``input_scale``, ``input_zero_point``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.checkpoints.folder import Checkpoint, Module
from quantpass.checkpoints.formats.gptq import order_of
from quantpass.checkpoints.formats.parts import (
    all_zero,
    groups_of,
    integers,
    matched,
    no_integers,
    positive,
    tensor,
    texts,
)
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.scheme import ActivationScheme, Quantized, WeightScheme


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of modules and their scheme."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None


def known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> CompressedTensors | None:
    """The reader for ``config``; None where another tool wrote it."""
    del checkpoint
    return (
        CompressedTensors(config)
        if config.get("quant_method") in ("compressed-tensors", "compressed_tensors")
        else None
    )


class CompressedTensors:
    """Reads its modules; which scheme one has follows from its name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(
                "compressed-tensors: config_groups is missing; it says how which modules are quantized"
            )
        self._groups = [_group(name, g) for name, g in groups.items()]
        self._ignored = texts(config, "ignore")
        self._ignored_names = frozenset(self._ignored)
        self._expressions = tuple(t for t in self._ignored if t.startswith("re:"))
        self._named = {t: g for g in self._groups for t in g.targets if not t.startswith("re:")}
        self.title = f"compressed-tensors, {config.get('format', 'no format named')}"
        self.notes = tuple(_notes(config))

    def read(self, module: Module) -> Quantized | None:
        if "weight_packed" not in module.tensors and "weight_scale" not in module.tensors:
            return None
        group = self._group_of(module.name)
        if group is None:
            raise CheckpointError(
                f"{module.name} has a weight_scale, and no group of config_groups targets it (ignored: "
                f"{', '.join(self._ignored[:5]) or 'nothing'})"
            )
        return _read(module, group)

    def _group_of(self, name: str) -> _Group | None:
        if name in self._ignored_names or any(matched(e, name) for e in self._expressions):
            return None
        if name in self._named:
            return self._named[name]
        for group in self._groups:
            if any(t.startswith("re:") and matched(t, name) for t in group.targets):
                return group
        parts = name.rpartition(".")[2]
        return (
            self._named.get(parts)
            or self._named.get("Linear")
            or next((g for g in self._groups if any(t.endswith("Linear") for t in g.targets)), None)
        )


def _group(name: str, given: Any) -> _Group:
    if not isinstance(given, dict) or not isinstance(given.get("weights"), dict | None):
        raise CheckpointError(f"compressed-tensors: config_groups.{name} is no group of targets and weights")
    activations = given.get("input_activations")
    if not isinstance(activations, dict | None):
        raise CheckpointError(f"compressed-tensors: config_groups.{name}.input_activations is {activations!r}")
    return _Group(texts(given, "targets"), given.get("weights") or {}, activations)


def _notes(config: Mapping[str, Any]) -> list[str]:
    found = []
    cache = config.get("kv_cache_scheme")
    if isinstance(cache, dict):
        found.append(f"the KV cache is quantized as well ({_plain(cache)}): no matmul of a linear, and not judged here")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        found.append(
            f"weights are stored sparse ({sparsity.get('format')}): judged as the dense ones that they stand for"
        )
    if config.get("transform_config"):
        found.append("transform_config asks for rotations beside the matmuls: they stay in the graph")
    return found


def _plain(args: Mapping[str, Any]) -> str:
    return f"{args.get('num_bits')} bits {args.get('type')}, {args.get('strategy')}"


def _read(module: Module, group: _Group) -> Quantized:
    w = group.weights
    bits = _bits(module, w)
    packed = module.tensors.get("weight_packed")
    bias = "bias" in module.tensors
    if w.get("type", "int") != "int" or (packed is not None and packed.dtype == "uint8"):
        stored = tensor(module, "weight" if packed is None else "weight_packed", (2, 3))
        n, k = stored.shape[-2], stored.shape[-1] * (2 if packed else 1)
        return no_integers(k, n, f"{_plain(w)} weight", f"the weight is {_plain(w)}: floats, not integers", bias=bias)
    if packed is None and tensor(module, "weight", (2, 3)).dtype.startswith(("float", "bfloat")):
        n, k = module.tensors["weight"].shape[-2:]
        fact = "the weight is kept as floats beside its scale: the checkpoint is not compressed"
        return no_integers(k, n, f"{_plain(w)} weight, not compressed", fact, bias=bias)
    if packed is not None:
        n, k, per = _packed_sizes(module, bits)
        experts = packed.shape[0] if len(packed.shape) == 3 else 0
    else:
        stored = tensor(module, "weight", (2, 3), ("int8",))
        n, k, per = stored.shape[-2], stored.shape[-1], 1
        experts = stored.shape[0] if len(stored.shape) == 3 else 0
    scale = tensor(module, "weight_scale", (0, 1, 2, 3))
    strategy = w.get("strategy")
    rejects: tuple[Reject, ...] = ()
    if strategy == "block":
        rejects = (refuse("checkpoint.scheme", "the weight has a scale for each block of rows and columns"),)
    along_k = scale.shape[-1] if len(scale.shape) > 1 and scale.shape[-2] == n else 1
    size = w.get("group_size") if strategy in ("group", "tensor_group") else None
    given = None if size is None else positive(size, f"{module.name}: group_size", "a positive number, or -1", (-1,))
    weight = WeightScheme(
        bits,
        0 if rejects else groups_of(module, k, along_k, given),
        per_tensor=strategy == "tensor",
        zero_point=not w.get("symmetric", True) and not all_zero(module.tensors.get("weight_zero_point")),
    )
    ordered = order_of(module, "weight_g_idx", k, weight)
    return Quantized(k, n, ordered, _activation(module, group), bias, packed_k=per, experts=experts, rejects=rejects)


def _bits(module: Module, args: Mapping[str, Any]) -> int:
    bits = args.get("num_bits")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise CheckpointError(f"{module.name}: num_bits is {bits!r}; accepted: 1 to 8")
    return bits


def _packed_sizes(module: Module, bits: int) -> tuple[int, int, int]:
    packed = tensor(module, "weight_packed", (2, 3), ("int32",))
    per = 32 // bits
    n, words = packed.shape[-2:]
    k = words * per
    if "weight_shape" in module.tensors:
        shape = integers(tensor(module, "weight_shape", (1,), ("int32", "int64")))
        if len(shape) != 2 or shape[0] != n or not 0 <= words * per - shape[1] < per:
            # A file of headers alone has zeros there.
            if any(shape):
                raise CheckpointError(
                    f"{module.name}: weight_shape is {shape}, and weight_packed, {bits} bits, has shape {packed.shape}"
                )
        else:
            k = shape[1]
    return n, k, per


def _activation(module: Module, group: _Group) -> ActivationScheme | None:
    a = group.activations
    if a is None:
        return None
    if a.get("type", "int") != "int":
        raise CheckpointError(f"{module.name}: {_plain(a)} activations beside integer weights")
    bits = _bits(module, a)
    dynamic = a.get("dynamic") is True or a.get("dynamic") == "local"
    per = {"token": "token", "tensor": "tensor"}.get(str(a.get("strategy")), "group")
    symmetric = a.get("symmetric", True)
    zero = not symmetric and (dynamic or not all_zero(module.tensors.get("input_zero_point")))
    return ActivationScheme(bits, dynamic, per, zero)
