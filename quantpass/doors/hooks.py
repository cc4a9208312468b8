"""The pass as a function that torchair or npugraph_ex calls: ``post_grad_custom_pre_pass``.

What they ask of such a function, and what follows from it here:

* It edits the graph in place and knows fake tensors only: weights are read symbolically, no tensor is prepared.
* Their compile cache is keyed on the text of its disassembly. So it is a plain function, and its code holds a constant
  that names quantpass's version, target and options: equal for equal settings in every process, different otherwise.
* torchair turns ``enable_view_optimize`` off for graphs with a weight-quant matmul, but looks before passes have run.
* Two modes of dumping data skip all passes, which only the report can tell.
"""

from __future__ import annotations

import dis
import hashlib
import io
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantpass.graph.constants import ModuleConstants
from quantpass.graph.dump import dump
from quantpass.graph.torch_internals import attribute_values
from quantpass.lowering.torchair_graphs import turn_off_view_optimize
from quantpass.pipeline import Outcome, fuse_graph
from quantpass.planning.options import Options
from quantpass.report import Report

HookFunction = Callable[[GraphModule, Sequence[Any], Any], None]
"""``(graph_module, example_inputs, config)``; edits the graph in place."""

_PLACE = "quantpass settings"
_MARK = "__quantpass__"

ops = torch.ops.quantpass


def make_hook(run: HookFunction, options: Options, user_hook: HookFunction | None = None) -> HookFunction:
    """A plain function for ``post_grad_custom_pre_pass``.

    Args:
        run: the pass.
        options: what its settings are; they become a constant of the function's code.
        user_hook: a hook that was there before. It is called first, on the graph that it was written for.
    """

    def quantpass_pre_pass(gm: GraphModule, example_inputs: Sequence[Any], config: Any) -> None:
        settings = "quantpass settings"
        del settings
        if user_hook is not None:
            user_hook(gm, example_inputs, config)
        run(gm, example_inputs, config)

    code = quantpass_pre_pass.__code__
    fingerprint = f"quantpass {options.fingerprint} {digest_of(user_hook)}".rstrip()
    assert _PLACE in code.co_consts
    constants = tuple(fingerprint if c == _PLACE else c for c in code.co_consts)
    hook = types.FunctionType(
        code.replace(co_consts=constants),
        quantpass_pre_pass.__globals__,
        quantpass_pre_pass.__name__,
        None,
        quantpass_pre_pass.__closure__,
    )
    setattr(hook, _MARK, user_hook)
    return hook


def users_own(hook: HookFunction | None) -> HookFunction | None:
    """The user's part of a hook: the hook itself, or what one of quantpass's was chained to."""
    return getattr(hook, _MARK) if hasattr(hook, _MARK) else hook


def digest_of(hook: Callable[..., Any] | None) -> str:
    """A name for what a hook does, as torchair's cache sees it: from its disassembly."""
    if hook is None:
        return ""
    text = io.StringIO()
    try:
        dis.dis(hook, file=text)
        what = text.getvalue()
    except TypeError:
        what = ""
    if not what:  # an object with __call__
        what = f"{type(hook).__module__}.{type(hook).__qualname__}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def run_pass(gm: GraphModule, config: Any, options: Options, door: str) -> Report:
    """Fuse a graph that torchair (or npugraph_ex) is compiling, reading it symbolically.

    Args:
        gm: the graph, edited in place.
        config: torchair's; ``enable_view_optimize`` is turned off where needed.
        options: target, settings and lowering.
        door: the name of the door, for the report.
    """
    constants = _GraphConstants(gm, attribute_values(gm))
    outcome = fuse_graph(gm, constants.given, options, constants.add)
    graphs = ((outcome.before, dump(gm)),)
    notes = (*outcome.notes, *_gains(gm, outcome, door))
    turn_off_view_optimize(gm, config)
    options.lowerer.lower(gm)
    return Report(outcome.sites, (options.chip.name,), options.mode, graphs, (), notes)


class _GraphConstants(ModuleConstants):
    """Constants of a graph whose compiler takes no attributes: numbers become ``aten.full``."""

    def _add(self, name: str, tensor: torch.Tensor) -> Node:
        first = tensor.reshape(-1)[:1]
        if not tensor.numel() or bool((tensor != first).any()):
            return super()._add(name, tensor)
        graph = self._gm.graph
        with graph.inserting_after(self._after) if self._after else graph.inserting_before(next(iter(graph.nodes))):
            self._after = graph.call_function(
                torch.ops.aten.full.default,
                (list(tensor.shape), first.item()),
                {"dtype": tensor.dtype, "device": self._device()},
            )
        return self._after

    def _device(self) -> torch.device:
        fakes = (n.meta.get("val") for n in self._gm.graph.find_nodes(op="placeholder"))
        return next((f.device for f in fakes if isinstance(f, torch.Tensor)), torch.device("cpu"))


def _gains(gm: GraphModule, outcome: Outcome, door: str) -> list[str]:
    """What :func:`quantpass.npu_backend` would have done with the values of the weights."""
    notes = []
    by_value = [
        s.name for s in outcome.sites if not s.fused and any(r.rule.startswith("read.weight") for r in s.rejects)
    ]
    if by_value:
        notes.append(
            f"{_count(by_value, 'matmul')} not fused: the weight has to be read by value, and {door} sees no values; "
            "quantpass.npu_backend does"
        )
    waiting = [(s.name, s.plan.weight_format) for s in outcome.sites if s.plan is not None and s.plan.awaits_values]
    cast = [name for name, weight_format in waiting if weight_format == "NZ"]
    if cast:
        notes.append(
            f"{_count(cast, 'weight')} cast to FRACTAL_NZ at every call; quantpass.npu_backend casts the parameter once"
        )
    in_nd = [name for name, weight_format in waiting if weight_format == "ND"]
    if in_nd:
        notes.append(f"{_count(in_nd, 'weight')} left in ND; quantpass.npu_backend puts them in FRACTAL_NZ once")
    words = gm.graph.find_nodes(op="call_function", target=ops.trans_quant_param.default)
    if words:
        notes.append(
            f"{len(words)} int64 scale word{'s' * (len(words) > 1)} (and the int32 biases that go with them) computed "
            "at every call; quantpass.npu_backend prepares them once"
        )
    fused = [s.name for s in outcome.sites if s.plan is not None]
    if fused:
        notes.append("int4 codes stored as int8 stay int8, and readings are not proved on the weights' values")
    return notes


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)} (first: {names[0]})"


def skipped_by(config: Any) -> str | None:
    """Why torchair will run no pass with this config; None where it will.

    Source: torchair/npu_fx_compiler.py, _get_compiled_gm and _gen_compiled_gm (torch_npu 2.13.0).
    """
    mode = _value(config, "mode")
    captured = mode in ("reduce-overhead", "npugraph_ex")
    dumps = _value(config, "dump_config.enable_dump") in ("1", True)
    if captured and dumps and _value(config, "dump_config.data_dump_stage") == "original":
        return "dump_config.enable_dump with data_dump_stage='original'"
    if getattr(getattr(getattr(config, "debug", None), "data_dump", None), "enabled", False):
        return "debug.data_dump"
    summary = getattr(getattr(config, "debug", None), "fx_summary", None)
    if mode == "max-autotune" and getattr(summary, "enabled", False) and getattr(summary, "skip_compile", False):
        return "debug.fx_summary with skip_compile"
    return None


def skipped_by_options(given: dict[str, Any]) -> str | None:
    """The same for npugraph_ex's options.

    Source: npugraph_ex/npu_fx_compiler.py, _get_compiled_gm and _gen_compiled_gm (torch_npu 2.13.0).
    """
    if not given.get("dump_tensor_data"):
        return None
    if given.get("data_dump_stage") == "original":
        return "dump_tensor_data with data_dump_stage='original'"
    return "dump_tensor_data with force_eager" if given.get("force_eager") else None


def skip_note(why: str) -> str:
    """The report's words for a config that runs no passes."""
    return f"no pass runs with {why}: graphs are compiled as they are. Turn it off to see quantpass's effect"


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return getattr(config, "value", config)
