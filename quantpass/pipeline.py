"""The pass: read, judge, plan, rewrite, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.fx import GraphModule, Node

from quantpass.basics.boundary import failed, guarded, must_raise
from quantpass.basics.folding import folded
from quantpass.basics.progress import counted
from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.graph.dump import dump
from quantpass.graph.hidden_weights import weights_behind
from quantpass.graph.records import FLOATS, Plan, Site, Weight
from quantpass.graph.removals import Removals
from quantpass.graph.site_keys import Token, site_keys
from quantpass.graph.static_values import StaticValues
from quantpass.graph.torch_internals import real_tensors
from quantpass.graph.user_streams import stream_labels, stream_reject
from quantpass.graph.writes import Writes, writes_of
from quantpass.patterns import default_dialects
from quantpass.patterns.contractions import read_contraction
from quantpass.patterns.sites import Reading, find_sites, matmul_name, matmuls_named, unreadable
from quantpass.planning.already_fused import (
    Around,
    already_fused,
    completed,
    is_own,
    left_around,
    may_be_completed,
    own_calls,
)
from quantpass.planning.choose import Others, Planned, others_of
from quantpass.planning.norms import PlannedNorm, plan_norms, with_norms
from quantpass.planning.options import Options
from quantpass.planning.permissions import Fit, plan_as_allowed
from quantpass.planning.traffic import weight_use
from quantpass.planning.unknown_values import UNREAD, conditional, fed_by_unread, made_of_integers, unread_note
from quantpass.rewrite import RewriteError, Rewriter
from quantpass.verify_graph import is_asked_for, verify_graph

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the pass found and did.

    Attributes:
        sites: one record for each quantized matmul.
        leaves: placeholders and attributes whose values the decisions rest on.
        before: the graph before the rewrite, as text; empty where nothing was rewritten.
        notes: what else a user should know.
        shown: the weights behind the sites.
    """

    sites: tuple[Site, ...]
    leaves: frozenset[Node]
    before: str = ""
    notes: tuple[str, ...] = ()
    shown: frozenset[Token] = frozenset()


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is to be done with each site, and with the norms in front of them.

    ``leaves`` as in :class:`Outcome`, ``mutated``: what the graph writes to, ``left``: fused matmuls that the model
    calls itself and that stay as they are, with what the graph does by hand around them.
    """

    planned: list[tuple[Reading, Planned]]
    leaves: frozenset[Node] = frozenset()
    mutated: frozenset[Node] = frozenset()
    norms: tuple[PlannedNorm, ...] = ()
    left: Mapping[Node, Around] = field(default_factory=dict)


@dataclass(slots=True)
class _Target:
    """What is found for one target while the sites of a graph are planned, in their order."""

    options: Options
    others: Others
    planned: list[tuple[Reading, Planned]] = field(default_factory=list)
    left: dict[Node, Around] = field(default_factory=dict)

    def plan(self, reading: Reading, writes: Writes, labels: dict[Node, str], fit: Fit) -> None:
        found = _planned(reading, self.options, writes, labels, self.others, fit)
        if is_own(reading.node):
            more = completed(reading.node, found)
            if more is None:
                around = partial(left_around, reading, found, self.options, self.others.int8)
                self.left[reading.node] = guarded(around, lambda _: Around(), f"looking around {reading.name}")
                return
            found = more
        self.planned.append((reading, found))
        if found.plan is not None and found.plan.int8_codes is not None:
            self.others.int8.add(found.plan.output)


def analyse(
    gm: GraphModule, leaves: Mapping[Node, torch.Tensor], targets: Sequence[Options], *, measured: bool = False
) -> list[Analysis]:
    """Read every site once and plan it for each of ``targets``, which differ in nothing but the chip; pure.

    ``measured``: what a permission would cost is measured on whole weights, which takes its time.
    """

    def nothing(reject: Reject) -> list[Analysis]:
        whole = unreadable(gm.graph.output_node(), reject)
        return [Analysis([(replace(whole, name="(the whole graph)"), _refused(reject))]) for _ in targets]

    return guarded(partial(_analysed, gm, leaves, targets, measured), nothing, "reading the graph")


def _analysed(
    gm: GraphModule, leaves: Mapping[Node, torch.Tensor], targets: Sequence[Options], measured: bool
) -> list[Analysis]:
    values, dialects = StaticValues(gm.graph, leaves), default_dialects(targets[0].dialects)
    # A compiler calls this with its fake mode on; constants are computed on real tensors.
    with torch.no_grad(), real_tensors():
        readings = list(counted(find_sites(gm.graph, values, dialects), "quantpass reads"))
        writes = writes_of(gm.graph, values.mutated)
        labels = stream_labels(gm.graph)
        found = [_Target(options, others_of(readings, options)) for options in targets]
        for reading in readings:
            fit = Fit(reading, targets[0].allow, measured)  # held no longer than the site is planned
            for target in found:
                target.plan(reading, writes, labels, fit)
        norms = [plan_norms(gm.graph, f.planned, f.options, writes, labels) for f in found]
    read = frozenset(values.read_leaves)
    return [
        Analysis(with_norms(f.planned, n), read, values.mutated, n, f.left) for f, n in zip(found, norms, strict=True)
    ]


def _planned(
    reading: Reading, options: Options, writes: Writes, labels: dict[Node, str], others: Others, fit: Fit
) -> Planned:
    plan = partial(_plan, reading, options, writes, labels, others, fit)
    return guarded(plan, _refused, f"planning {reading.name}")


def _plan(
    reading: Reading, options: Options, writes: Writes, labels: dict[Node, str], others: Others, fit: Fit
) -> Planned:
    left = options.leaves(reading.name)
    if is_own(reading.node) and (left or not may_be_completed(reading, options)):
        return Planned(None, None)
    if left:
        return _refused(refuse("plan.left", f"leave names {reading.name}"))
    planned = plan_as_allowed(reading, options.chip, options, writes, others, fit)
    reject = stream_reject(planned.plan, labels) if planned.plan is not None else None
    return planned if reject is None else _refused(reject)


def _refused(reject: Reject) -> Planned:
    return Planned(None, None, (reject,))


def _with_unread(
    gm: GraphModule, found: Analysis, leaves: Mapping[Node, torch.Tensor], unread: Mapping[Node, str], options: Options
) -> Analysis:
    """The same, with verdicts that rest on the values of ``unread`` marked."""
    if not unread:
        return found
    fed, known = fed_by_unread(gm.graph, leaves, unread), {r.node for r, _ in found.planned}
    planned = [conditional(r, p) if r.node in fed else (r, p) for r, p in found.planned]
    table = default_dialects(options.dialects).contractions
    for node in sorted(fed - known):
        if (
            not is_own(node)
            and any(made_of_integers(i, fed) for i in node.all_input_nodes)
            and read_contraction(table, node) is not None
        ):
            planned.append(conditional(unreadable(node, UNREAD), _refused(UNREAD)))
    return replace(found, planned=planned)


def explain_graph(
    gm: GraphModule,
    leaves: Mapping[Node, torch.Tensor],
    targets: Sequence[Options],
    unread: Mapping[Node, str] | None = None,
) -> list[Outcome]:
    """The verdict on every site of a graph for each of ``targets``, which differ in nothing but the chip.

    The graph is not touched; the other arguments are those of :func:`fuse_graph`.
    """
    analyses = analyse(gm, leaves, targets, measured=True)
    return [
        _explained(gm, leaves, options, found, unread or {}) for options, found in zip(targets, analyses, strict=True)
    ]


def _explained(
    gm: GraphModule,
    leaves: Mapping[Node, torch.Tensor],
    options: Options,
    found: Analysis,
    unread: Mapping[Node, str],
) -> Outcome:
    found = _with_unread(gm, found, leaves, unread, options)
    calls = _calls_left(gm, found)
    keys = _keys(gm, (*(r.node for r, _ in found.planned), *calls), leaves)
    removed = _removals(gm, found)
    sites = tuple(_site(r, p, options, keys, removed, fused=p.plan is not None) for r, p in found.planned)
    sites = (*sites, *already_fused(calls, options, keys, found.left))
    return Outcome(
        sites, found.leaves, notes=_notes(gm, sites, unread, options), shown=_shown(gm, found, calls, leaves)
    )


def _calls_left(gm: GraphModule, found: Analysis) -> list[Node]:
    """The model's own calls of fused matmuls that no plan completes."""
    planned = {r.node for r, _ in found.planned}
    return [n for n in own_calls(gm.graph) if n not in planned]


def _keys(gm: GraphModule, sites: Sequence[Node], leaves: Mapping[Node, torch.Tensor]) -> dict[Node, Hashable]:
    nameless: dict[Node, Hashable] = dict.fromkeys(sites)
    return guarded(partial(site_keys, gm, sites, leaves), lambda _: nameless, "telling sites apart")


def _shown(
    gm: GraphModule, found: Analysis, calls: Sequence[Node], leaves: Mapping[Node, torch.Tensor]
) -> frozenset[Token]:
    """The weights behind the matmuls of a graph that is not yet rewritten; one that leaves it has none here."""
    matmuls = [r.node for r, p in found.planned if not any(x.rule == "read.weight.returned" for x in p.rejects)]
    return guarded(partial(weights_behind, gm, (*matmuls, *calls), leaves), lambda _: frozenset(), "naming weights")


def fuse_graph(
    gm: GraphModule,
    leaves: Mapping[Node, torch.Tensor],
    options: Options,
    add_constant: Callable[[str, torch.Tensor], Node] | None = None,
    *,
    keep_text: bool = True,
    unread: Mapping[Node, str] | None = None,
) -> Outcome:
    """Rewrite every site of ``gm`` that can be fused, in place.

    Args:
        gm: an ATen graph whose nodes carry ``meta["val"]``.
        leaves: placeholders and attributes whose tensors are known.
        options: target and settings.
        add_constant: where new tensors go; None makes them buffers of ``gm``.
        keep_text: keep the graph's text for diffs.
        unread: parameters and buffers that hold no data, and why.
    """
    (found,) = analyse(gm, leaves, [options])
    found = _with_unread(gm, found, leaves, unread or {}, options)
    before = dump(gm) if keep_text else ""
    sites: list[Site] = []
    calls = _calls_left(gm, found)
    keys = _keys(gm, (*(r.node for r, _ in found.planned), *calls), leaves)
    called = tuple(already_fused(calls, options, keys, found.left))
    shown = _shown(gm, found, calls, leaves)
    removed = _removals(gm, found)
    rewriter = Rewriter(gm, add_constant) if any(p.plan for _, p in found.planned) else None
    for reading, p in found.planned:
        if p.plan is None or rewriter is None:
            sites.append(_site(reading, p, options, keys, removed, fused=False))
            continue
        try:
            old, new = rewriter.apply(p.plan, reading.name, reading.node)
            sites.append(_site(reading, p, options, keys, removed, fused=True, before=old, after=new))
        except RewriteError as error:
            if must_raise():
                raise
            logger.exception("a plan could not be carried out; the site stays as it was")
            reject = failed("rewrite.failed", f"rewriting {reading.name}", error)
            sites.append(_site(reading, _refused(reject), options, keys, removed, fused=False))
    if rewriter is not None:
        for norm in found.norms:
            _apply_norm(rewriter, norm)
        rewriter.finish(found.mutated)
        if is_asked_for():
            verify_graph(gm, options)
    sites.extend(called)
    return Outcome(tuple(sites), found.leaves, before, _notes(gm, sites, unread, options), shown)


def _apply_norm(rewriter: Rewriter, norm: PlannedNorm) -> None:
    try:
        rewriter.apply_norm(norm)
    except RewriteError:
        if must_raise():
            raise
        logger.exception("a norm could not be replaced; it stays as it was")


def _removals(gm: GraphModule, found: Analysis) -> dict[Node, int]:
    """By the matmul of each site that has a plan, how many operators the graph loses."""
    removals = Removals(gm.graph)
    return {r.node: removals.of(p.plan.output, p.plan.value) for r, p in found.planned if p.plan and p.plan.value}


def _notes(
    gm: GraphModule, sites: Sequence[Site], unread: Mapping[Node, str] | None, options: Options
) -> tuple[str, ...]:
    if sites:
        return (unread_note(unread),) if unread else ()
    table = default_dialects(options.dialects)
    names = guarded(lambda: matmuls_named(gm.graph, table), lambda _: [], "naming matmuls")
    return (FLOATS + ", ".join(map(str, folded(names))),) if names else ()


def _site(
    reading: Reading,
    planned: Planned,
    options: Options,
    keys: Mapping[Node, Hashable],
    removed: Mapping[Node, int],
    *,
    fused: bool,
    before: str = "",
    after: str = "",
) -> Site:
    return Site(
        name=reading.name,
        source=reading.source,
        op=matmul_name(reading.node),
        target=options.chip.name,
        fused=fused,
        plan=_without_tensors(planned.plan) if fused else None,
        rejects=planned.rejects,
        offers=planned.offers,
        numerics=planned.numerics if fused else None,
        reading=reading.text,
        proved=isinstance(reading.weight, Weight) and reading.weight.proved,
        before=before,
        after=after,
        weight=weight_use(reading, planned.plan if fused else None),
        operators=removed.get(reading.node, 0) if fused else 0,
        # A body may be called several times in one graph.
        key=(key, reading.body) if (key := keys[reading.node]) is not None and reading.body else key,
    )


def _without_tensors(plan: Plan | None) -> Plan | None:
    """A plan as a report keeps it: weights that were prepared and then cast would stay in memory twice."""
    return None if plan is None else replace(plan, value=None, int8_codes=None)
