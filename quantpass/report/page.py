"""A report as one HTML page."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from quantpass.report.text import FORMAT_HEADERS, format_row, verdict
from quantpass.version import __version__

if TYPE_CHECKING:
    from quantpass.report import Report


def page(report: Report) -> str:
    """The page, with nothing outside of it."""
    from jinja2 import Template

    template = Template(files("quantpass.report").joinpath("page.html").read_text(encoding="utf-8"), autoescape=True)
    text: str = template.render(
        report=report, cell=verdict, format_row=format_row, format_headers=FORMAT_HEADERS, version=__version__
    )
    return text
