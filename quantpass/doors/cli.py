"""The command line: ``quantpass explain``, ``preview``, ``check-op``, ``chips``, ``reasons``.

What needs PyTorch is imported by the commands that use it: the others answer at once, also where it is not installed.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantpass.basics.reasons import REASONS
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.basics.torch_types import dtype_name
from quantpass.chips import DOCUMENTED, checking, chip_named, tables
from quantpass.version import __version__

if TYPE_CHECKING:
    from quantpass.doors.preview import GePreview
    from quantpass.planning.options import Mode, NumericsContract

_PATH = click.Path(path_type=Path)


def _writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """``path``, looked at before the work starts: its folder has to be there and to let files be made in it."""
    del context
    if path is None or str(path) == "-":
        return path
    name = parameter.opts[0]
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}", param_hint=name)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.BadParameter(f"{path} can't be written", param_hint=name)
    return path


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantpass")
def main() -> None:
    """Fuse dequantize -> matmul -> (quantize) into Ascend's quantized matmul operators."""
    sys.path.insert(0, str(Path.cwd()))


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "--target", "-t", multiple=True, help=f"Chip or SoC name; repeat for several. Default: {', '.join(DOCUMENTED)}."
)
@click.option("--mode", type=click.Choice(["graph", "eager"]), default="graph", help="Whose rules: GE graphs or aclnn.")
@click.option(
    "--allow", multiple=True, metavar="RULE", help="A permission, or a contradicted rule to lift; repeatable."
)
@click.option(
    "--numerics",
    type=click.Choice(["strict", "vendor"]),
    default="strict",
    show_default=True,
    help="Keep the graph's own codes, or let the operators quantize as the doors to an NPU do.",
)
@click.option("--dynamic", is_flag=True, help="Capture with dynamic shapes.")
@click.option(
    "--json", "json_path", type=_PATH, callback=_writable, help="Also write the report as JSON; - prints it instead."
)
@click.option("--html", "html_path", type=_PATH, callback=_writable, help="Also write the report as an HTML page.")
@click.option(
    "--require-all", is_flag=True, help="Exit with status 1 unless every quantized matmul is fused, and there is one."
)
def explain(
    factory: str,
    target: tuple[str, ...],
    mode: Mode,
    allow: tuple[str, ...],
    numerics: NumericsContract,
    dynamic: bool,
    json_path: Path | None,
    html_path: Path | None,
    require_all: bool,
) -> None:
    """Say for every quantized matmul of a model whether it can be fused, and if not, why.

    FACTORY is a function without arguments in MODULE that returns (model, args).
    """
    from quantpass.doors.explain import explain as explained

    model, args = load_factory(factory)
    targets = list(target) or None
    try:
        report = explained(
            model, args, target=targets, mode=mode, allow=allow, numerics=numerics, dynamic=dynamic or None
        )
    except (TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if json_path is not None and str(json_path) == "-":
        click.echo(report.to_json())
    else:
        click.echo(str(report))
        if json_path is not None:
            report.to_json(json_path)
    if html_path is not None:
        report.to_html(html_path)
    if require_all and (report.fused < report.total or report.hidden or not report.total):
        raise click.exceptions.Exit(1)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("op")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--target", "-t", required=True, help="Chip or SoC name.")
@click.option("--mode", type=click.Choice(["graph", "eager"]), default="graph", help="Whose rules: GE graphs or aclnn.")
@click.option("--allow", multiple=True, help="A contradicted rule to lift; repeat for several.")
def check_op(op: str, arguments: tuple[str, ...], target: str, mode: str, allow: tuple[str, ...]) -> None:
    """Say whether one operator call is legal on a chip, why not, and what would be.

    \b
    A tensor is NAME=DTYPE[SIZES] with :NZ for FRACTAL_NZ and :T for a transposed view, anything else a value:
      quantpass check-op npu_quant_matmul -t ascend310p x1=int8[16,512] x2=int8[512,128]:NZ:T \\
          scale=int64[128] bias=float16[128] output_dtype=float16
    Exit status 1 where the call is not legal.
    """
    try:
        given = dict(parse_argument(a) for a in arguments)
        verdict = checking.check_op(op, target=target, mode=mode, allow=allow, **given)
    except (TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(verdict))
    if not verdict.legal:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--target", "-t", required=True, help="Chip or SoC name, e.g. ascend310p.")
@click.option("--output", "-o", type=_PATH, callback=_writable, help="Write torchair's GraphDef there, as text.")
@click.option("--no-fuse", is_flag=True, help="The graph that the model has without quantpass.")
@click.option("--diff", "show_diff", is_flag=True, help="Show what fusing changed.")
@click.option("--run", "check", is_flag=True, help="Also interpret the graph and compare with the model's FX graph.")
@click.option("--torch-npu", type=click.Path(path_type=Path), help="Folder that holds torch_npu's wheel, unpacked.")
@click.option("--vendor-modules", is_flag=True, help="MODULE imports torch_npu: load it, with stand-ins for CANN.")
def preview(
    factory: str,
    target: str,
    output: Path | None,
    no_fuse: bool,
    show_diff: bool,
    check: bool,
    torch_npu: Path | None,
    vendor_modules: bool,
) -> None:
    """Show the GE graph that torchair compiles for a chip. Needs torch_npu's wheel and gcc; no NPU and no CANN.

    FACTORY is a function without arguments in MODULE that returns (model, args).
    """
    from quantpass.doors.explain import diff
    from quantpass.doors.preview import preview_ge
    from quantpass.lowering import standin_cann, standin_device
    from quantpass.lowering.emulation import emulate_npu
    from quantpass.lowering.standin_process import PreviewError, TorchairProcess

    if vendor_modules and not standin_cann.is_child():
        sys.exit(standin_cann.run_again(torch_npu))
    try:
        if vendor_modules:
            standin_device.install_for(target)
            emulate_npu()
        model, args = load_factory(factory)
        with TorchairProcess(torch_npu) as process:
            made = preview_ge(model, args, target=target, fuse=not no_fuse, process=process)
            before = preview_ge(model, args, target=target, fuse=False, process=process) if show_diff else None
    except (TypeError, ValueError, standin_cann.StandinError, PreviewError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{made.soc_name}: {len(made.graphs)} graph(s), {len(made.ops)} operators")
    if not no_fuse:
        click.echo(f"{made.report.fused} of {made.report.total} quantized matmuls fused")
    click.echo(diff(before, made) if before is not None else str(made))
    if output is not None:
        output.write_text(made.pbtxt)
        click.echo(f"written: {output}")
    if check:
        for line in _differences(made):
            click.echo(line)


def _differences(made: GePreview) -> Iterator[str]:
    import torch

    for number, (graph, computed) in enumerate(zip(made.graphs, made.run(), strict=True)):
        for i, (have, want) in enumerate(zip(computed, graph.outputs, strict=True)):
            if not isinstance(want, torch.Tensor):
                continue
            if torch.equal(have, want):
                verdict = "equal"
            else:
                error = (have.double() - want.double()).abs().max() / want.double().abs().mean()
                verdict = f"differs by at most {float(error):.2g} of the mean size"
            yield f"graph {number}, output {i}: GE interpreted against FX: {verdict}"


@main.command()
@click.argument("target", required=False)
@click.option("--markdown", is_flag=True, help="Every chip, as the documentation's page.")
def chips(target: str | None, markdown: bool) -> None:
    """Show what each chip supports."""
    if markdown:
        click.echo(tables.markdown(), nl=False)
        return
    if target is None:
        click.echo(tables.chip_overview())
        click.echo("\nquantpass chips TARGET shows one chip's tables.")
        return
    try:
        chip = chip_named(target)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for title, table in tables.chip_tables(chip):
        click.echo(f"{title}\n\n{table}\n")


@main.command()
@click.argument("reason", required=False)
@click.option("--markdown", is_flag=True, help="All of them, as the documentation's page.")
def reasons(reason: str | None, markdown: bool) -> None:
    """Say what an id in a report means: all of them, or those that begin with REASON."""
    if markdown:
        click.echo(tables.reasons_markdown(), nl=False)
        return
    found = [r for r in REASONS.values() if r.rule.startswith(reason or "")]
    if not found:
        raise click.ClickException(
            f"no reason begins with {reason!r}. quantpass reasons lists them; rules of chips: quantpass chips TARGET."
        )
    for r in found:
        click.echo(f"{r.rule}\n  when:   {r.means}\n  wanted: {r.want}")
        click.echo(f"  hint:   {r.hint}" if r.hint else "  hint:   the report's own line says what to do")
        click.echo(f"  source: {r.source}")


_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\](?P<marks>(:NZ|:ND|:T)*)$")


def parse_argument(text: str) -> tuple[str, Any]:
    """``x2=int8[512,128]:NZ:T`` as a name and a TensorSpec; other values as dtype, number, truth value or text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not NAME=VALUE, e.g. x1=int8[16,512] or output_dtype=float16")
    match = _TENSOR.match(value)
    if match:
        dtype = dtype_name(match["dtype"])
        if dtype is None:
            raise ValueError(f"{name}: {match['dtype']!r} is no dtype; use names such as int8, float16, int64")
        sizes = tuple(int(s) for s in match["sizes"].split(",") if s.strip())
        marks = match["marks"].split(":")
        return name, TensorSpec(dtype, sizes, "NZ" if "NZ" in marks else "ND", "T" in marks)
    words = {"None": None, "True": True, "False": False}
    if value in words:
        return name, words[value]
    return name, int(value) if re.fullmatch(r"-?\d+", value) else dtype_name(value) or value


def load_factory(text: str) -> tuple[Any, tuple[Any, ...]]:
    """Import ``MODULE:FACTORY`` and call it; it must return ``(model, args)``."""
    module_name, colon, function_name = text.partition(":")
    if not colon or not module_name or not function_name:
        raise click.BadParameter(f"{text!r} is not of the form MODULE:FACTORY, e.g. mymodels.llama:small")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise click.BadParameter(f"can't import {module_name!r} from here: {error}") from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise click.BadParameter(f"{module_name!r} has no function {function_name!r}")
    made = factory()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], tuple | list):
        raise click.BadParameter(f"{text} returned {type(made).__name__}; it must return (model, args), args a tuple")
    return made[0], tuple(made[1])
