"""Quantized weights that no graph shows: a report must not pass over them.

A tool may dequantize its weight outside the graph that multiplies (a graph break between the two), or keep both in an
operator of its own. Then no graph holds a quantized matmul; the modules still hold codes and scales.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantpass.graph.site_keys import Token
from quantpass.graph.torch_internals import graph_breaks, is_wrapper_subclass

_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
_FEW = 16
"""Tensors of fewer elements are no weights."""

_SCALE = re.compile(r"scale|absmax|scb$|_step|step_size", re.IGNORECASE)
_ZERO = re.compile(r"zero|offset|amax$|quant_min", re.IGNORECASE)

_MATMULS = frozenset(f"aten::{n}" for n in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_int_mm"))
_LOOKUPS = frozenset(
    f"aten::{n}" for n in ("embedding", "embedding_bag", "index", "index_select", "gather", "select", "convolution")
)


@dataclass(frozen=True, slots=True)
class Holder:
    """A module that holds a quantized weight.

    Attributes:
        name: its path in the model.
        kind: its class, and of a weight that is a tensor subclass that class.
        tool: the package that the class comes from.
        codes: its codes (or its float weight); empty where they are out of reach. Scales do not count: one that is
            looked up in a graph does not show the weight.
    """

    name: str
    kind: str
    tool: str
    codes: tuple[torch.Tensor, ...]


def holders(model: torch.nn.Module) -> Iterator[Holder]:
    """The modules of ``model`` that hold codes with scales, or a float weight with the parameters of its quantization.

    They are told by what they hold, not by their class.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            continue
        own = dict(_tensors_of(module))
        near = {**own, **{f"{c}.{k}": t for c, child in module.named_children() for k, t in _leaf_tensors(child)}}
        scales = [t for k, t in near.items() if t.is_floating_point() and _SCALE.search(k)]
        codes = [t for k, t in own.items() if _are_codes(t, scales) and not _ZERO.search(k)]
        weight = own.get("weight")
        is_fake = (
            weight is not None
            and weight.is_floating_point()
            and weight.dim() >= 2
            and any(_ZERO.search(k) for k in near)
            and (bool(scales) or any(k.lower().endswith("amax") for k in near))
        )
        if codes and scales:
            yield Holder(name, *_kind(module), tuple(codes))
        elif is_fake and weight is not None:
            yield Holder(name, *_kind(module), (weight,))
        elif _has_packed_object(module):
            yield Holder(name, *_kind(module), ())


def _are_codes(t: torch.Tensor, scales: list[torch.Tensor]) -> bool:
    if t.is_quantized:
        return True
    if t.dtype not in _CODES or t.dim() < 2 or t.numel() < _FEW:
        return False
    if t.dtype != torch.int32:
        return True
    # Tables of indices are int32 too: packed codes have scales along one of their sides.
    sides = {size * n for size in t.shape for n in (1, 2, 4, 8, 16)}
    return any(size > 1 and size in sides for s in scales for size in s.shape)


def _leaf_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module that has no weight of its own: a quantizer beside the weight."""
    if "weight" not in module._parameters:
        yield from _tensors_of(module)


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
    state = {  # of an object beside the module's own, as bitsandbytes keeps one
        f"{key}.{k}": v
        for key, value in vars(module).items()
        if not isinstance(value, torch.nn.Module | torch.Tensor | dict)
        for k, v in getattr(value, "__dict__", {}).items()
    }
    for name, t in {**module._parameters, **module._buffers, **plain, **state}.items():
        if isinstance(t, torch.Tensor):
            yield from _parts(name, t)


def _parts(name: str, t: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors of one: those inside a subclass, and those that a tool keeps as its attributes."""
    if is_wrapper_subclass(t):
        for inner in t.__tensor_flatten__()[0]:
            part = getattr(t, inner)
            if isinstance(part, torch.Tensor):  # a DTensor's mesh is none
                yield from _parts(f"{name}.{inner}", part)
        return
    yield name, t
    for key, value in getattr(t, "__dict__", {}).items():
        for part, inner in ((key, value), *((f"{key}.{k}", v) for k, v in getattr(value, "__dict__", {}).items())):
            if isinstance(inner, torch.Tensor) and inner is not t:
                yield f"{name}.{part}", inner


def _has_packed_object(module: torch.nn.Module) -> bool:
    """True where the weight is in an object of TorchScript's: ``torch.ao``'s dynamically quantized modules."""
    objects = [v for v in vars(module).values() if isinstance(v, torch.ScriptObject)]
    return any("quantized" in str(o._type()) for o in objects)


def _kind(module: torch.nn.Module) -> tuple[str, str]:
    for parameter in module._parameters.values():
        kind = type(parameter)
        if parameter is not None and kind not in (torch.nn.Parameter, torch.Tensor):
            return f"{type(module).__name__} with {kind.__name__}", _package(kind)
    return type(module).__name__, _package(type(module))


def _package(kind: type) -> str:
    parts = kind.__module__.split(".")
    return ".".join(parts[:2]) if parts[0] == "torch" else parts[0]


class Watch:
    """Looks on while a model is captured, and tells afterwards what no graph has shown."""

    def __init__(self) -> None:
        self._breaks = Counter(graph_breaks())
        self._shown: set[Token] = set()
        self._graphs = 0
        self._all_known = True

    def add(self, shown: Collection[Token], *, all_known: bool = True) -> None:
        """Take note of one graph; ``shown``: the weights behind its sites."""
        self._graphs += 1
        self._shown.update(shown)
        self._all_known &= all_known

    def signs(self, model: Any) -> tuple[str, ...]:
        """What stands for a quantized matmul that no graph shows, in words; a line for each kind of module."""
        if not isinstance(model, torch.nn.Module) or not self._all_known:
            return ()
        groups: dict[tuple[str, str], list[str]] = {}
        for h in holders(model):
            if not any(Token(t) in self._shown for t in h.codes if t.layout == torch.strided):
                groups.setdefault((h.kind, h.tool), []).append(h.name or "the model itself")
        if not groups:
            return ()
        broken = [reason.strip().splitlines()[0] for reason in Counter(graph_breaks()) - self._breaks if reason.strip()]
        where = f"; Dynamo broke the graph: {'; '.join(dict.fromkeys(broken[:3]))}" if broken else ""
        graphs = f"{self._graphs} captured graph{'s' * (self._graphs != 1)}"
        return tuple(
            f"{len(names)} {kind} of {tool} hold{'s' * (len(names) == 1)} quantized weights that no matmul of the "
            f"{graphs} reads (first: {names[0]}). They are unpacked or multiplied outside of the graphs, or were not "
            f"called with these inputs{where}. "
            "qp.adopt(model) exchanges the modules of several tools for ones that are seen; docs/coverage.md says how "
            "each tool is read"
            for (kind, tool), names in groups.items()
        )


def weights_behind(gm: GraphModule, sites: Collection[Node], leaves: Mapping[Node, torch.Tensor]) -> frozenset[Token]:
    """The weights that a graph's sites (and its lookups and convolutions, which are no matmuls) are computed from.

    Also where something known at run time only was added to one. What lies behind another matmul is that one's.
    """
    ends = {*sites, *(n for n in gm.graph.nodes if _schema_name(n) in _LOOKUPS)}
    todo = [i for n in ends for i in n.all_input_nodes]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if node in seen or node in ends or _multiplies(node):
            continue
        seen.add(node)
        todo.extend(node.all_input_nodes)
    return frozenset(Token(leaves[n]) for n in seen if n in leaves)


def _multiplies(node: Node) -> bool:
    """True for a matmul of floats and for a tool's own operator, which may be one."""
    name = _schema_name(node)
    known = ("aten::", "prims::", "quantized_decomposed::", "torchao::")
    return name in _MATMULS or bool(name and not name.startswith(known))


def _schema_name(node: Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))
