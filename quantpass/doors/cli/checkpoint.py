"""``quantpass check-checkpoint``: the verdict on every linear of a checkpoint, from its files' headers."""

from __future__ import annotations

from pathlib import Path

import click

from quantpass.chips import DOCUMENTED
from quantpass.doors.checkpoint import check_checkpoint as checked
from quantpass.doors.cli.failures import NO, explained
from quantpass.doors.cli.inputs import PATH, allow_option, chip_names, json_option, mode_option, tell, writable

_FLOATS = ["float16", "bfloat16", "float32"]


@click.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--target",
    "-t",
    multiple=True,
    callback=chip_names,
    help=f"Chip or SoC name; repeat for several. Default: {', '.join(DOCUMENTED)}.",
)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Tensor-parallel ranks.")
@mode_option
@allow_option
@click.option("--dtype", type=click.Choice(_FLOATS), help="Of activations and results. Default: the checkpoint's own.")
@click.option(
    "--bias-dtype", type=click.Choice(["int32", *_FLOATS]), help="Of the bias. Default: what the operator takes."
)
@json_option
@click.option("--html", "html_path", type=PATH, callback=writable, help="Also write the report as an HTML page.")
def check_checkpoint(
    folder: Path,
    target: tuple[str, ...],
    tp: int,
    mode: str,
    allow: tuple[str, ...],
    dtype: str | None,
    bias_dtype: str | None,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Say which linears of a checkpoint fuse, from its headers alone.

    DIR holds config.json and safetensors files. Nothing is fetched and no weight is loaded; PyTorch is not needed.
    Exit status 1 unless every quantized linear is fused on every target, and there is one.
    """
    with explained():
        report = checked(
            folder, targets=target or None, tp=tp, mode=mode, dtype=dtype, bias_dtype=bias_dtype, allow=allow
        )
    tell(str(report), report.to_json(), json_path)
    if html_path is not None:
        report.to_html(html_path)
    if not report.all_fused:
        raise click.exceptions.Exit(NO)
