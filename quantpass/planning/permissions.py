"""What the user allows: a site that is refused otherwise computed in float16, or with a re-fitted weight.

Neither is done where the chip takes the site as it is, and neither without the user's word. What it would gain is
found out for every refused site, so that reports can say it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.chips import NPUS
from quantpass.chips.legality import HALF_OPT_IN, REFIT_OPT_IN, REFIT_SQNR, refit_limit
from quantpass.chips.rules import Chip
from quantpass.graph.expr import dtype_of
from quantpass.graph.records import Offer, Refit, Weight
from quantpass.graph.writes import Writes
from quantpass.patterns.affine import Affine, NotAffine
from quantpass.patterns.sites import Reading
from quantpass.planning.choose import Others, Planned, plan_site
from quantpass.planning.options import Options
from quantpass.planning.refit import can_be_refitted, refit, refit_of_sample


@dataclass(slots=True)
class Fit:
    """The re-fit of one site's weight, made when somebody first asks for it: it is the same for all targets.

    Attributes:
        reading: the site.
        allow: what is allowed; a re-fit that is not is fitted in one step.
        measured: what it costs is measured on the whole weight in any case; else what is only an offer is fitted from
            a sample of its columns.
    """

    reading: Reading
    allow: tuple[str, ...]
    measured: bool = False
    _made: list[Reading | None] = field(default_factory=list)

    def site(self) -> Reading | None:
        """The site with the re-fitted weight; None where that holds values that are not finite."""
        if not self._made:
            source = self.reading.own_value or self.reading.weight
            assert not isinstance(source, NotAffine)
            asked = refit_limit(self.allow) is not None
            weight = refit(source, thorough=asked) if asked or self.measured else refit_of_sample(source)
            self._made.append(None if weight is None else replace(self.reading, weight=weight, rejects=()))
        return self._made[0]

    def is_sampled(self) -> bool:
        """True where it was made, of some columns only."""
        (fitted,) = self._made or [None]
        return fitted is not None and isinstance(fitted.weight, Weight) and bool(_cost(fitted.weight).columns)


def plan_as_allowed(
    reading: Reading, chip: Chip, options: Options, writes: Writes, others: Others, fit: Fit | None = None
) -> Planned:
    """The best legal fused call for one site; arguments as for :func:`plan_site`.

    ``fit``: of this site, where other targets share it.
    """
    own = plan_site(reading, chip, options, writes, others)
    if own.plan is not None or chip.name not in NPUS:
        return own
    site = _Refused(reading, chip, options, writes, others, fit or Fit(reading, options.allow))
    limit = refit_limit(options.allow)
    if limit is not None:
        found = site.refitted(options.allow, limit)
        if isinstance(found, Planned) and found.plan is not None:
            return found
        more = (found,) if isinstance(found, Reject) else () if found is None else found.rejects
        own = replace(own, rejects=tuple(dict.fromkeys((*own.rejects, *more))))
    own = replace(own, rejects=(*own.rejects, *site.vendors()))
    offers = tuple(site.offers())
    told = {r.rule for r in own.rejects}
    rejects = [r for r in map(site.offered, offers) if r.rule not in told]
    good = tuple(o for o in offers if o.sqnr >= (REFIT_SQNR if limit is None else limit))
    return replace(own, rejects=tuple(dict.fromkeys((*own.rejects, *rejects))), offers=good)


@dataclass(slots=True)
class _Refused:
    """A site that is not legal as it is."""

    reading: Reading
    chip: Chip
    options: Options
    writes: Writes
    others: Others
    fit: Fit

    def refitted(self, allow: tuple[str, ...], limit: float) -> Planned | Reject | None:
        """The outcome with a re-fitted weight; None where the weight has its form already."""
        weight = self.reading.weight
        if self.reading.own_value is None and not isinstance(weight, Weight):
            return None
        if isinstance(weight, Weight) and not can_be_refitted(weight):
            plain = not weight.group_size and weight.zero_point is None
            return None if plain else refuse(REFIT_OPT_IN, "the weight is known only when the graph runs")
        fitted = self.fit.site()
        if fitted is None:
            return refuse(REFIT_OPT_IN, "the weight holds values that are not finite")
        assert isinstance(fitted.weight, Weight)
        cost = _cost(fitted.weight)
        if cost.sqnr < limit:
            lower = f"{REFIT_OPT_IN}:{math.floor(cost.sqnr)}"
            return refuse(
                REFIT_OPT_IN,
                f"the re-fitted weight: {cost}",
                want=f"an SQNR of at least {limit:g} dB in each column",
                hint=f"{lower!r} in allow would accept it",
            )
        return plan_site(fitted, self.chip, replace(self.options, allow=allow), self.writes, self.others)

    def vendors(self) -> Iterator[Reject]:
        """That the operators' own quantization would make the site legal, where the graph's is asked for."""
        if self.options.numerics == "vendor" or not isinstance(self.reading.activation, Affine):
            return
        options = replace(self.options, numerics="vendor")
        found = plan_site(self.reading, self.chip, options, self.writes, self.others).plan
        if found is not None:
            how = f"{found.op} would take it with codes of its own"
            yield refuse("requantize.strict", how, hint="numerics='vendor' would have it fused")

    def offers(self) -> Iterator[Offer]:
        """The fewest permissions, beyond those given, with which the site is legal; re-fits of any SQNR among them."""
        given = self.options.allow
        missing = [HALF_OPT_IN] if HALF_OPT_IN not in given and self._may_gain_by_half() else []
        missing += [REFIT_OPT_IN] if refit_limit(given) is None else []
        sets = [(m,) for m in missing] + ([tuple(missing)] if len(missing) > 1 else [])
        found: list[tuple[str, ...]] = []
        for more in sets:
            if any(set(less) <= set(more) for less in found):
                continue
            sqnr = self._legal_with((*given, *more))
            if sqnr is not None:
                found.append(more)
                yield Offer((*given, *more), sqnr, sampled=REFIT_OPT_IN in more and self.fit.is_sampled())

    def _may_gain_by_half(self) -> bool:
        """False where all is in float16 already: planning it once more would lay the weight out in vain."""
        x, epilogue = self.reading.x, self.reading.epilogue
        if x is None or epilogue is None or isinstance(self.reading.activation, Affine):
            return True
        return {dtype_of(x), *(step.dtype for step in epilogue.steps)} != {torch.float16}

    def _legal_with(self, allow: tuple[str, ...]) -> float | None:
        """The SQNR of the re-fit with which the site is legal, infinite for none; None where it is not legal."""
        options = replace(self.options, allow=allow)
        in_half = HALF_OPT_IN in allow and HALF_OPT_IN not in self.options.allow  # else it was refused already
        if in_half and plan_site(self.reading, self.chip, options, self.writes, self.others).plan is not None:
            return math.inf
        if refit_limit(allow) is None:
            return None
        found = self.refitted(allow, -math.inf)
        if not isinstance(found, Planned) or found.plan is None:
            return None
        fitted = self.fit.site()
        assert fitted is not None
        assert isinstance(fitted.weight, Weight)
        return _cost(fitted.weight).sqnr

    def offered(self, offer: Offer) -> Reject:
        """An offer as a reason why the site is not fused."""
        if offer.sqnr < REFIT_SQNR:
            sampled = "; not all columns were looked at, explain looks at all" if offer.sampled else ""
            return refuse(
                REFIT_OPT_IN,
                f"the chip has no form for the weight, and a re-fit has an SQNR of {offer.sqnr:.1f} dB in one column",
                hint=f"'{REFIT_OPT_IN}:{math.floor(offer.sqnr)}' in allow would accept it{sampled}",
            )
        hint = f"allow={offer.allow!r} would have it fused"
        if REFIT_OPT_IN not in offer.allow or refit_limit(self.options.allow) is not None:
            return refuse(HALF_OPT_IN, self._why_half(), hint=hint)
        return refuse(REFIT_OPT_IN, "the chip has no form for the weight", hint=hint)

    def _why_half(self) -> str:
        assert self.reading.x is not None
        dtype = dtype_of(self.reading.x)
        if dtype.is_floating_point:
            return f"the activation is {str(dtype).removeprefix('torch.')}"
        return "the integer product is scaled in a way that the chip's operator does not take"


def _cost(fitted: Weight) -> Refit:
    assert fitted.refit is not None
    return fitted.refit
