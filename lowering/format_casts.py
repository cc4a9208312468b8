"""FRACTAL_NZ carried out: casts of known tensors happen on the tensors, once, before the graph runs.

A cast can't be part of an NPU graph that is captured (the capture aborts), and the cast of a constant should not be
part of any. Tensors are cast one after the other and each original is let go before the next one is cast, so the extra
memory at any time is that of one weight (int4 weights: of one weight unpacked, which is what the vendor's packing
takes). On a CPU, where a tensor has one format, a cast is nothing.

Source: npu_format_cast.md, allow_internal_format.md; FormatCastKernelNpu.cpp:71-82,155; TensorFactories.cpp:404-409;
ConvertWeightToINT4PackKernelNpuOpApi.cpp:93-113.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from quantpass.graph.constants import Constants
from quantpass.graph.records import WeightFormat
from quantpass.graph.torch_internals import real_tensors
from quantpass.lowering.fractal_nz import nz_bytes
from quantpass.operators import OPERATORS
from quantpass.operators.arguments import NZ
from quantpass.operators.int4 import unpack_int4
from quantpass.operators.operator import Operator

ops = torch.ops.quantpass


class FormatLayer(Protocol):
    """What a device can do about storage formats."""

    def format_of(self, tensor: torch.Tensor) -> int:
        """The number of the tensor's storage format."""

    def cast(self, tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
        """The tensor in another storage format."""


class NpuFormats:
    """Storage formats through torch_npu."""

    def __init__(self) -> None:
        import torch_npu

        self._npu = torch_npu

    def format_of(self, tensor: torch.Tensor) -> int:
        """``torch_npu.get_npu_format``."""
        return int(self._npu.get_npu_format(tensor))

    def cast(self, tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
        """``torch_npu.npu_format_cast``, with internal formats allowed meanwhile, and checked.

        int32 holds int4 here: its tiles are 8 columns wide, which only the vendor's packing of a cast weight gives.

        Raises:
            RuntimeError: the result does not have the format.
        """
        with self._internal_formats_allowed():
            if tensor.dtype == torch.int32 and acl_format == NZ:
                codes = unpack_int4(tensor.cpu()).to(torch.int32).to(tensor.device)
                result = self._npu.npu_convert_weight_to_int4pack(self._npu.npu_format_cast(codes, acl_format))
            else:
                result = self._npu.npu_format_cast(tensor.contiguous(), acl_format)
        found = self.format_of(result)
        if found != acl_format:
            raise RuntimeError(
                f"torch_npu.npu_format_cast left a {tensor.dtype} tensor of shape {tuple(tensor.shape)} in format "
                f"{found}, not {acl_format}. torch_npu does so where internal formats are not allowed: set "
                "torch_npu.npu.config.allow_internal_format = True before the first use of the device, or compile "
                "with nz='never'."
            )
        return result  # type: ignore[no-any-return]

    @contextmanager
    def _internal_formats_allowed(self) -> Iterator[None]:
        before = self._npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
        # Where it was never set, the default holds: allowed on the inference series, not on A2 and A3.
        was = before.decode() == "enable" if before else "310P" in self._npu.npu.get_device_name()
        self._npu.npu.config.allow_internal_format = True
        try:
            yield
        finally:
            self._npu.npu.config.allow_internal_format = was


def layer_for(device: torch.device) -> FormatLayer | None:
    """How tensors of ``device`` change their format; None where they have only one."""
    return NpuFormats() if device.type == "npu" else None


def carry_out_casts(gm: GraphModule, constants: Constants) -> dict[Node, str]:
    """Cast the tensors behind a graph's ``format_cast`` nodes and take those nodes out, in place.

    Args:
        gm: a fused graph.
        constants: the tensors that are known; one that is not keeps its node, unless it is on a CPU.

    Returns:
        The tensor's node, and how its cast was carried out (``WeightFormat.how``). Inputs whose cast was carried out
        (or, on a CPU, planned) carry the number of their format as ``meta["acl_format"]``.
    """
    casts: dict[Node, list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=ops.format_cast.default):
        if isinstance(node.args[0], Node) and node.args[0].op in ("placeholder", "get_attr"):
            casts.setdefault(node.args[0], []).append(node)
    done: dict[Node, str] = {}
    copies: dict[Node, Node] = {}
    for source, nodes in casts.items():
        with torch.no_grad(), real_tensors():
            stored, how = _carry_out(source, int(nodes[0].args[1]), constants, copies)  # type: ignore[arg-type]
        done[source] = how
        if how == "at every call":
            continue
        stored.meta["acl_format"] = nodes[0].args[1]  # for whoever describes the graph's inputs
        for node in nodes:
            node.replace_all_uses_with(stored)
            gm.graph.erase_node(node)
    gm.recompile()
    return done


def _carry_out(source: Node, acl_format: int, constants: Constants, copies: dict[Node, Node]) -> tuple[Node, str]:
    if source in copies:
        return copies[source], "copied"
    tensor = constants.tensor(source)
    layer = layer_for((source.meta["val"] if tensor is None else tensor).device)
    if layer is None:
        return source, "planned"
    if tensor is None:
        return source, "at every call"
    if layer.format_of(tensor) == acl_format:
        return source, "already"
    if constants.owns(source):
        constants.replace(source, layer.cast(tensor, acl_format))
        return source, "prepared"
    same, overlapping = aliases(source, constants.given)
    only_casts = all(u.target is ops.format_cast.default for n in (source, *same) for u in n.users)
    if overlapping or not only_casts:
        copy = constants.add(f"quantpass_{source.name}_nz", layer.cast(tensor, acl_format))
        copy.meta["val"] = source.meta["val"]
        copies.update(dict.fromkeys((source, *same), copy))
        return copy, "copied"
    # In place: the parameter keeps its identity, and no second copy of the weight stays.
    cast = layer.cast(tensor, acl_format)
    for n in (source, *same):
        constants.write_to(n, cast)
    return source, "in place"


def aliases(source: Node, given: Mapping[Node, torch.Tensor]) -> tuple[list[Node], list[Node]]:
    """Other tensors that are the same memory as ``source``'s: seen the same way, and seen in another way."""
    tensor = given.get(source)
    if tensor is None or not tensor.untyped_storage().data_ptr():
        return [], []
    same: list[Node] = []
    overlapping: list[Node] = []
    for node, other in given.items():
        if node is source or other.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            continue
        views = [(t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (tensor, other)]
        (same if views[0] == views[1] else overlapping).append(node)
    return same, overlapping


def ledger(gm: GraphModule, constants: Constants, nd_reasons: Mapping[str, str]) -> dict[Node, WeightFormat]:
    """How each fused site's weight is stored, before casts are carried out.

    Args:
        gm: a fused graph.
        constants: the tensors that are known.
        nd_reasons: by site, why its weight stays in ND.
    """
    rows: dict[Node, WeightFormat] = {}
    fused: dict[Any, Operator] = {op.overload: op for op in OPERATORS if op.vendor.weight}
    for node in gm.graph.nodes:
        if node.target not in fused:
            continue
        op = fused[node.target]
        weight, site = getattr(op.bind(node), op.vendor.weight), str(node.meta.get("quantpass", node.name))
        is_cast = weight.target is ops.format_cast.default
        source: Any = weight.args[0] if is_cast else weight
        if source in rows:
            row = rows[source]
            rows[source] = _with_site(row, site)
            continue
        fake = source.meta["val"]
        shape = tuple(s if isinstance(s, int) else -1 for s in fake.shape)
        size = fake.numel() * fake.element_size() if -1 not in shape else 0
        padded = nz_bytes(shape, fake.dtype, packed_int4=fake.dtype == torch.int32) if is_cast and size else size
        same, _ = aliases(source, constants.given)
        rows[source] = WeightFormat(
            tensor=source.name,
            sites=(site,),
            dtype=str(fake.dtype).removeprefix("torch."),
            shape=shape,
            format="NZ" if is_cast else "ND",
            bytes_before=int(size),
            bytes_after=int(padded),
            how="planned" if is_cast else "",
            aliases=tuple(n.name for n in same),
            why="" if is_cast else nd_reasons.get(site, ""),
        )
    return rows


def _with_site(row: WeightFormat, site: str) -> WeightFormat:
    return row if site in row.sites else replace(row, sites=(*row.sites, site))
