"""``qp.adopt``: a tool's quantized Linears are exchanged for plain modules with the same tensors, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantpass.adoption.exchange import Place, places
from quantpass.adoption.plain import PlainLinear
from quantpass.adoption.proof import Proof, prove, unchecked
from quantpass.adoption.result import Adopted, Adoption, Left
from quantpass.adoption.tables import Allowances, CannotAdopt, Found, Tool
from quantpass.adoption.tools import TOOLS
from quantpass.graph.hidden_weights import holders


def adopt(
    model: nn.Module,
    *,
    tools: Collection[str] | None = None,
    check: bool = True,
    inputs: Sequence[Any] | None = None,
    drop_outliers: bool = False,
) -> Adoption:
    """Exchange tools' quantized Linears, in place, for plain modules with the same tensors and the same numbers.

    For tools whose own forward can't be captured in one graph: afterwards every door sees the whole model. No weight is
    copied; :meth:`Adoption.release` undoes it. What a module holds decides, not its class. A module that no table
    fits, or whose plain one gives other numbers than the tool's, stays, and the result says why.

    Args:
        model: changed in place; left as it was where anything is raised.
        tools: the tools to look for, by name; None for all.
        check: compare each plain module with the tool's own output (where the tool can't run here: with its own
            dequantization) on random inputs. Without it the tables alone decide.
        inputs: the model's positional inputs. The adopted model is run on them, and each plain module compared with
            the tool's on what it is given there; one that differs is put back.
        drop_outliers: take bitsandbytes' modules with a threshold too, without their path for outliers.

    Raises:
        TypeError: ``model`` is no module, ``inputs`` is no tuple or list.
        ValueError: a tool that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adopt takes a torch.nn.Module, not a {type(model).__name__}")
    if inputs is not None and not isinstance(inputs, tuple | list):
        raise TypeError(f"inputs is a {type(inputs).__name__}; give the model's inputs as a tuple, e.g. inputs=(x,)")
    tables = _chosen(tools)
    left: list[Left] = []
    found = _read_all(model, tables, Allowances(drop_outliers), left)
    proofs = _proven(found, check, left)
    adoption = Adoption()
    try:
        stand = _exchanged(model, tables, found, proofs, adoption)
        if inputs is not None and _differ_on(model, inputs, found, proofs, left):
            adoption.release()
            stand = _exchanged(model, tables, found, proofs, adoption)
    except BaseException:
        adoption.release()
        raise
    names: dict[nn.Module, list[str]] = {}
    for place in stand:
        names.setdefault(place.original, []).append(place.name)
    adoption.exchanged = tuple(
        Adopted(tuple(names[m]), found[m].plain.tool, found[m].plain.scheme, p) for m, p in proofs.items()
    )
    adoption.left = tuple(left)
    return adoption


def _chosen(tools: Collection[str] | None) -> tuple[Tool, ...]:
    if tools is None:
        return TOOLS
    by_name = {t.name.lower(): t for t in TOOLS}
    wanted = [tools] if isinstance(tools, str) else list(tools)
    unknown = [t for t in wanted if str(t).lower() not in by_name]
    if unknown:
        raise ValueError(f"tools names {', '.join(map(repr, unknown))}; known: {', '.join(t.name for t in TOOLS)}")
    return tuple(by_name[t.lower()] for t in wanted)


def _read_all(
    model: nn.Module, tables: tuple[Tool, ...], allowed: Allowances, left: list[Left]
) -> dict[nn.Module, Found]:
    """What each module is by the tables; those that stay are added to ``left``."""
    found: dict[nn.Module, Found] = {}
    named = set()
    for name, module in model.named_modules():
        for tool in tables if not isinstance(module, PlainLinear) else ():
            try:
                read = _read(tool, module, allowed)
                if read is not None and module is model:
                    raise CannotAdopt("it is the model itself, which nothing holds: put it into a module")
            except CannotAdopt as why:
                left.append(Left(name, type(module).__name__, tool.name, str(why)))
                named.add(name)
                break
            if read is not None:
                found[module] = replace(read, name=name)
                named.add(name)
                break
    asked = "no table" if tables is TOOLS else "no table of the tools asked for"
    for h in holders(model):
        if h.name not in named and not isinstance(model.get_submodule(h.name), PlainLinear):
            left.append(Left(h.name, h.kind, h.tool, f"{asked} knows what it holds; its own forward is captured"))
    return found


def _read(tool: Tool, module: nn.Module, allowed: Allowances) -> Found | None:
    try:
        return tool.read(module, allowed)
    except CannotAdopt:
        raise
    except Exception as error:  # another version of the tool may hold anything under these names
        raise CannotAdopt(f"reading it failed: {type(error).__name__}: {error}") from error


def _proven(found: Mapping[nn.Module, Found], check: bool, left: list[Left]) -> dict[nn.Module, Proof]:
    """What stands for each module that may be exchanged; the others are added to ``left``."""
    proofs = {}
    for module, f in found.items():
        try:
            proofs[module] = prove(f) if check else unchecked()
        except CannotAdopt as why:
            left.append(_left(module, f, why))
    return proofs


def _left(module: nn.Module, f: Found, why: CannotAdopt) -> Left:
    return Left(f.name, type(module).__name__, f.plain.tool, str(why))


def _exchanged(
    model: nn.Module,
    tables: tuple[Tool, ...],
    found: Mapping[nn.Module, Found],
    proofs: Mapping[nn.Module, Proof],
    adoption: Adoption,
) -> list[Place]:
    """Put the plain modules in; ``adoption`` gets what undoes it, a step at a time."""
    stand = places(model, {m: found[m].plain for m in proofs})
    for place in stand:
        adoption._undo.append(place.put_back)
        place.fill()
    for tool in tables:
        undo = tool.around(model) if tool.around is not None and stand else None
        if undo is not None:
            adoption._undo.append(undo)
    return stand


def _differ_on(
    model: nn.Module,
    inputs: Sequence[Any],
    found: Mapping[nn.Module, Found],
    proofs: dict[nn.Module, Proof],
    left: list[Left],
) -> bool:
    """Run the model, each plain module beside the tool's; those that differ leave ``proofs``. True where any does."""
    differ: dict[nn.Module, CannotAdopt] = {}
    handles = []
    for module in proofs:

        def compare(plain: nn.Module, args: tuple[torch.Tensor, ...], module: nn.Module = module) -> None:
            del plain
            if not args:
                return  # called with a keyword: what was proved before stands
            try:
                proofs[module] = prove(found[module], [args[0].detach()])
            except CannotAdopt as why:
                differ[module] = why

        handles.append(found[module].plain.register_forward_pre_hook(compare))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for module, why in differ.items():
        del proofs[module]
        left.append(_left(module, found[module], why))
    return bool(differ)
