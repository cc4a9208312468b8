"""A node replaced by what a function of tensors does, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from quantpass.graph.torch_internals import fake_mode_of, real_tensors, running_fakes

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "quantpass")
_OF_THE_RESULT = ("quantpass_replaces", "quantpass_codes_of")

_NOTHING_KNOWN: Mapping[Node, torch.Tensor] = {}


def expand(
    gm: GraphModule,
    node: Node,
    function: Callable[..., Any],
    inputs: Sequence[Node],
    known: Mapping[Node, torch.Tensor] = _NOTHING_KNOWN,
    keep: Callable[[str, torch.Tensor], Node] | None = None,
) -> None:
    """Put the operators that ``function`` calls in place of ``node``.

    Args:
        gm: an ATen graph whose nodes carry ``meta["val"]``.
        node: what is replaced; its users read what ``function`` returns.
        function: takes the values of ``inputs``, in order.
        inputs: nodes before ``node``.
        known: the tensors behind some inputs: what is computed from these alone is computed now, once.
        keep: gives such a result a node.

    Raises:
        RuntimeError: ``function`` makes constant tensors.
    """
    fakes = [n.meta["val"] for n in inputs]
    mode = fake_mode_of([f for f in [*fakes, node.meta["val"]] if isinstance(f, torch.Tensor)])
    assert mode is not None
    with running_fakes(mode, fakes):
        traced = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    placeholders = traced.graph.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    values = {p: known[n] for p, n in copies.items() if n in known}

    def copy_of(n: Node) -> Node:
        if n not in copies:  # computed from what is known, and read by something that is not
            assert keep is not None
            copies[n] = keep(f"{node.name}_{n.name}", values[n])
            copies[n].meta["val"] = n.meta["val"]
        found: Node = copies[n]
        return found

    with gm.graph.inserting_before(node):
        for n in traced.graph.nodes:
            if n.op == "call_function":
                if keep is not None and n.all_input_nodes and all(i in values for i in n.all_input_nodes):
                    values[n] = _value(n, values)
                    continue
                copies[n] = gm.graph.node_copy(n, copy_of)
                copies[n].meta |= {k: v for k, v in node.meta.items() if k in _PROVENANCE}
            elif n.op == "output":
                result = copy_of(n.args[0])
                if result not in inputs:
                    result.meta |= {k: v for k, v in node.meta.items() if k in _OF_THE_RESULT}
                node.replace_all_uses_with(result)
            elif n.op == "get_attr":
                raise RuntimeError(f"{node.target} can't be expanded: its definition makes constant tensors")
    gm.graph.erase_node(node)


def _value(n: Node, values: Mapping[Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
    with torch.no_grad(), real_tensors():
        result: torch.Tensor = n.target(*args, **kwargs)  # type: ignore[operator]
    return result
