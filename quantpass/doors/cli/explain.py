"""``quantpass explain``: the verdict on every quantized matmul of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantpass.chips import DOCUMENTED
from quantpass.doors.cli.failures import NO, explained, running
from quantpass.doors.cli.inputs import (
    MODEL_HELP,
    PATH,
    chip_names,
    factory_argument,
    in_colour,
    json_option,
    load_model,
    pass_options,
    tell,
    writable,
)

if TYPE_CHECKING:
    from quantpass.planning.options import Mode, NumericsContract


@click.command(epilog=MODEL_HELP)
@factory_argument
@click.option(
    "--target",
    "-t",
    multiple=True,
    callback=chip_names,
    help=f"Chip or SoC name; repeat for several. Default: {', '.join(DOCUMENTED)}.",
)
@pass_options
@click.option("--dynamic", is_flag=True, help="Capture with dynamic shapes.")
@json_option
@click.option("--html", "html_path", type=PATH, callback=writable, help="Also write the report as an HTML page.")
@click.option("--sites", is_flag=True, help="A row for each site, also where those of all layers are alike.")
@click.option(
    "--require-all", is_flag=True, help="Exit with status 1 unless every quantized matmul is fused, and there is one."
)
def explain(
    factory: str,
    target: tuple[str, ...],
    mode: Mode,
    allow: tuple[str, ...],
    leave: tuple[str, ...],
    numerics: NumericsContract,
    dynamic: bool,
    json_path: Path | None,
    html_path: Path | None,
    sites: bool,
    require_all: bool,
) -> None:
    """Say of every quantized matmul whether it fuses, and why not."""
    from quantpass.doors.explain import explain as explained_by

    model, args = load_model(factory)
    with explained(), running(model, args):
        report = explained_by(
            model,
            args,
            target=list(target) or None,
            dynamic=dynamic or None,
            mode=mode,
            allow=allow,
            leave=leave,
            numerics=numerics,
        )
    tell(report.text(sites=sites, color=in_colour()), report.to_json(), json_path)
    if html_path is not None:
        report.to_html(html_path)
    if require_all and (report.fused < report.total or report.hidden or not report.total):
        raise click.exceptions.Exit(NO)
