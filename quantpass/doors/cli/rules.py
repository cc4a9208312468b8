"""``quantpass check-op``, ``chips`` and ``reasons``: questions about chips, which need no PyTorch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from quantpass.basics.reasons import REASONS, Reason
from quantpass.chips import CHIPS, checking, chip_named, tables
from quantpass.doors.cli.failures import NO, BadInput, explained
from quantpass.doors.cli.inputs import (
    allow_option,
    as_json,
    json_option,
    mode_option,
    one_target_option,
    parse_argument,
    tell,
)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("op")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@one_target_option
@mode_option
@allow_option
@json_option
def check_op(
    op: str, arguments: tuple[str, ...], target: str, mode: str, allow: tuple[str, ...], json_path: Path | None
) -> None:
    """Say whether an operator call is legal on a chip, and why not.

    \b
    A tensor is NAME=DTYPE[SIZES] with :NZ for FRACTAL_NZ and :T for a transposed view, anything else a value:
      quantpass check-op npu_quant_matmul -t ascend310p x1=int8[16,512] x2=int8[512,128]:NZ:T \\
          scale=int64[128] bias=float16[128] output_dtype=float16
    Exit status 1 where the call is not legal.
    """
    with explained():
        given = dict(parse_argument(a) for a in arguments)
        verdict = checking.check_op(op, target=target, mode=mode, allow=allow, **given)
    tell(str(verdict), as_json(verdict.as_dict()), json_path)
    if not verdict.legal:
        raise click.exceptions.Exit(NO)


@click.command()
@click.argument("target", required=False)
@click.option("--markdown", is_flag=True, help="Every chip, as the documentation's page.")
@json_option
def chips(target: str | None, markdown: bool, json_path: Path | None) -> None:
    """Show what each chip supports."""
    if markdown:
        click.echo(tables.markdown(), nl=False)
        return
    with explained():
        asked = list(CHIPS.values()) if target is None else [chip_named(target)]
    text = f"{tables.chip_overview()}\n\nquantpass chips TARGET shows one chip's tables."
    if target is not None:
        text = "\n\n".join(f"{title}\n\n{table}" for title, table in tables.chip_tables(asked[0]))
    tell(text, as_json({"chips": [tables.chip_data(c) for c in asked]}), json_path)


@click.command()
@click.argument("reason", required=False)
@click.option("--markdown", is_flag=True, help="All of them, as the documentation's page.")
@json_option
def reasons(reason: str | None, markdown: bool, json_path: Path | None) -> None:
    """Say what an id in a report means.

    All of them, or those that begin with REASON.
    """
    if markdown:
        click.echo(tables.reasons_markdown(), nl=False)
        return
    found = [r for r in REASONS.values() if r.rule.startswith(reason or "")]
    if not found:
        raise BadInput(
            f"no reason begins with {reason!r}. quantpass reasons lists them; rules of chips: quantpass chips TARGET."
        )
    tell("\n".join(map(_reason, found)), as_json({"reasons": [asdict(r) for r in found]}), json_path)


def _reason(r: Reason) -> str:
    hint = r.hint or "the report's own line says what to do"
    return f"{r.rule}\n  when:   {r.means}\n  wanted: {r.want}\n  hint:   {hint}\n  source: {r.source}"
