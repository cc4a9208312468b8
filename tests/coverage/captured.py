"""The ATen graphs of a model, with their tensors, inputs and results: from a tool, or from a file.

A file holds plain data only (``torch.load(weights_only=True)`` reads it), so a graph can be looked at where the tool
that made it is not installed. Weights are attributes of the graph module, as after an export.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quantpass.graph.torch_internals import (
    FakeTensorMode,
    StaticInputs,
    compile_isolated,
    compile_with_aot,
    contiguous_fake,
)


@dataclass
class Captured:
    """One graph, its inputs and what the tool computed from them."""

    graph: GraphModule
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[Any, ...]


def capture(model: Any, args: tuple[Any, ...]) -> list[Captured]:
    """Every graph that torch.compile makes of ``model``, as AOTAutograd hands it to a backend."""
    found: list[Captured] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        def look(aot: GraphModule, weights: StaticInputs, fake_inputs: list[Any]) -> Any:
            del fake_inputs
            leaves = weights.known

            def run(*inputs: Any) -> Any:
                outputs = aot(*inputs)
                placeholders = aot.graph.find_nodes(op="placeholder")
                rest = tuple(i for n, i in zip(placeholders, inputs, strict=True) if n not in leaves)
                found.append(Captured(_with_attributes(aot, leaves), rest, tuple(outputs)))
                return outputs

            return run

        return compile_with_aot(gm, example_inputs, look)

    with torch.no_grad():
        compile_isolated(model, backend, None)(*args)
    return found


def _with_attributes(gm: GraphModule, leaves: dict[Node, torch.Tensor]) -> GraphModule:
    """A copy of ``gm`` in which known placeholders are attributes."""
    graph, root, env = Graph(), torch.nn.Module(), {}
    for node in gm.graph.nodes:
        if node in leaves:
            name = str(node.name)
            root.register_buffer(name, leaves[node].detach().clone().as_subclass(torch.Tensor))
            env[node] = graph.get_attr(name)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = {k: v for k, v in node.meta.items() if k == "val"}
    return GraphModule(root, graph)


# -- files ---------------------------------------------------------------------------------------------------------


def store(path: Path, graphs: list[Captured], about: dict[str, str]) -> None:
    """Write graphs to ``path``, with the results of a tool's own operators on weights in place of those operators."""
    for c in graphs:
        _run_on_weights(c.graph)
    torch.save({"about": about, "graphs": [_plain(c) for c in graphs]}, path)


def _run_on_weights(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")
        if not own or not all(i.op == "get_attr" for i in node.all_input_nodes):
            continue
        arguments = map_arg((node.args, node.kwargs), lambda n: getattr(gm, n.target))
        gm.register_buffer(node.name, node.target(*arguments[0], **arguments[1]))
        with gm.graph.inserting_before(node):
            value = gm.graph.get_attr(node.name)
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)


def load(path: Path) -> tuple[list[Captured], dict[str, str]]:
    """Read what :func:`store` wrote."""
    data = torch.load(path, weights_only=True)
    return [_from_plain(g) for g in data["graphs"]], data["about"]


def _plain(c: Captured) -> dict[str, Any]:
    nodes = [
        {
            "name": n.name,
            "op": n.op,
            "target": _target_name(n),
            "args": _encode(n.args),
            "kwargs": _encode(dict(n.kwargs)),
            "val": _encode_val(n.meta.get("val")),
        }
        for n in c.graph.graph.nodes
    ]
    schemas = {str(n.target._schema) for n in c.graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    outputs = [o for o in c.outputs if isinstance(o, torch.Tensor)]
    return {
        "nodes": nodes,
        "schemas": sorted(s for s in schemas if not s.startswith(("aten::", "prims::"))),
        "tensors": dict(c.graph.named_buffers()),
        "inputs": list(c.inputs),
        "outputs": outputs,
    }


def _target_name(n: Node) -> str:
    if isinstance(n.target, torch._ops.OpOverload):
        return f"{n.target._schema.name}.{n.target._overloadname}"
    if isinstance(n.target, torch._ops.HigherOrderOperator):
        return f"hop::{n.target.name()}"
    return f"operator::{n.target.__name__}" if callable(n.target) else str(n.target)


def _encode(a: Any) -> Any:
    if isinstance(a, Node):
        return {"node": a.name}
    if isinstance(a, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(a).removeprefix("torch.")}
    if isinstance(a, torch.device):
        return {"device": str(a)}
    if isinstance(a, torch._ops.OpOverload):
        return {"op": f"{a._schema.name}.{a._overloadname}"}
    if isinstance(a, list | tuple):
        return {"tuple" if isinstance(a, tuple) else "list": [_encode(x) for x in a]}
    if isinstance(a, dict):
        return {"dict": {k: _encode(v) for k, v in a.items()}}
    if a is None or isinstance(a, bool | int | float | str):
        return a
    raise TypeError(f"{a!r} can't be stored")


def _decode(a: Any, env: dict[str, Node]) -> Any:
    if not isinstance(a, dict):
        return a
    ((kind, value),) = a.items()
    if kind == "node":
        return env[value]
    if kind == "torch":
        return getattr(torch, value)
    if kind == "device":
        return torch.device(value)
    if kind == "op":
        return _operator(value)
    if kind == "dict":
        return {k: _decode(v, env) for k, v in value.items()}
    return (tuple if kind == "tuple" else list)(_decode(x, env) for x in value)


def _encode_val(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return [list(val.shape), str(val.dtype).removeprefix("torch."), list(val.stride())]
    if isinstance(val, list | tuple):
        return {"several": [_encode_val(v) for v in val]}
    return None


def _operator(name: str) -> Any:
    kind, rest = name.split("::", 1)
    if kind == "operator":
        return getattr(operator, rest)
    if kind == "hop":
        return getattr(torch.ops.higher_order, rest)
    op, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, kind), op), overload)


def _from_plain(data: dict[str, Any]) -> Captured:
    _define_missing(data["schemas"])
    root, graph, mode = torch.nn.Module(), Graph(), FakeTensorMode()
    for name, tensor in data["tensors"].items():
        root.register_buffer(name, tensor)
    env: dict[str, Node] = {}

    def fake(val: Any) -> Any:
        if isinstance(val, dict):
            return [fake(v) for v in val["several"]]
        if val is None:
            return None
        shape, dtype, stride = val
        whole = contiguous_fake(mode, shape, getattr(torch, dtype), torch.device("cpu"))
        with mode:
            return whole if list(whole.stride()) == stride else torch.empty_strided(shape, stride, dtype=whole.dtype)

    for n in data["nodes"]:
        target = _operator(n["target"]) if n["op"] == "call_function" else n["target"]
        node = graph.create_node(n["op"], target, _decode(n["args"], env), _decode(n["kwargs"], env), name=n["name"])
        if n["val"] is not None:
            node.meta["val"] = fake(n["val"])
        env[n["name"]] = node
    return Captured(GraphModule(root, graph), tuple(data["inputs"]), tuple(data["outputs"]))


def _define_missing(schemas: list[str]) -> None:
    """Operators of tools that are not installed get their schema, so that a graph can hold them."""
    for schema in schemas:
        namespace, rest = schema.split("::", 1)
        name = rest.split("(")[0]
        op, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), op, None) if _has(namespace, op) else None
        if packet is None or (overload or "default") not in packet.overloads():
            library = torch.library.Library(namespace, "FRAGMENT")
            library.define(rest)
            _LIBRARIES.append(library)


def _has(namespace: str, op: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), op)


_LIBRARIES: list[torch.library.Library] = []
"""Definitions live as long as the process."""


def run(c: Captured, graph: GraphModule) -> tuple[Any, ...]:
    """The results of ``graph`` on the inputs of ``c``."""
    with torch.no_grad():
        return tuple(o for o in graph(*c.inputs) if isinstance(o, torch.Tensor))
