"""For tests of your own models: ``assert_fused``, and a pytest fixture, ``quantpass_report``.

The fixture comes with the package (entry point ``pytest11``). PyTorch is imported when something is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

__all__ = ["assert_fused", "quantpass_report"]

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from typing_extensions import Unpack

    from quantpass.doors.settings import CaptureOptions
    from quantpass.report import Report


def assert_fused(
    model: torch.nn.Module | Callable[..., Any] | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    fused: int | float | None = None,
    **options: Unpack[CaptureOptions],
) -> Report:
    """Assert that a model's quantized matmuls are fused on a chip, or on each of several.

    Args:
        model: as for :func:`quantpass.explain`.
        args: its positional inputs.
        kwargs: its keyword inputs.
        target: as for :func:`quantpass.explain`.
        fused: of each target, as for :meth:`quantpass.Report.require`: a share as a float, a number of sites as an
            integer, None for all of them and at least one.
        options: as for :func:`quantpass.explain`.

    Returns:
        The report, for more assertions.

    Raises:
        AssertionError: fewer are fused; the message holds the report.
    """
    from quantpass.doors.explain import explain

    report = explain(model, args, kwargs, target=target, **options)
    for name in report.targets:
        report[name].require(fused)
    return report


@pytest.fixture
def quantpass_report(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """:func:`quantpass.explain`, whose reports are shown where the test fails.

    ``report = quantpass_report(model, (x,), target="ascend310p")``, then ``report.require(1.0)`` or any assertion.
    """
    from quantpass.doors.explain import explain

    def reported(*args: Any, **options: Any) -> Report:
        report = explain(*args, **options)
        request.node.add_report_section("call", "quantpass report", str(report))
        return report

    return reported
