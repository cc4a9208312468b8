"""``quantpass preview``: the GE graph that torchair compiles, without an NPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantpass.doors.cli.failures import explained, running
from quantpass.doors.cli.inputs import (
    MODEL_HELP,
    PATH,
    as_json,
    factory_argument,
    json_option,
    load_model,
    one_target_option,
    tell,
    writable,
)

if TYPE_CHECKING:
    import torch

    from quantpass.doors.preview import GePreview


@click.command(epilog=MODEL_HELP)
@factory_argument
@one_target_option
@click.option("--output", "-o", type=PATH, callback=writable, help="Write torchair's GraphDef there, as text.")
@json_option
@click.option("--no-fuse", is_flag=True, help="The graph that the model has without quantpass.")
@click.option("--diff", "show_diff", is_flag=True, help="Show what fusing changed.")
@click.option("--run", "check", is_flag=True, help="Also interpret the graph and compare with the model's FX graph.")
@click.option("--torch-npu", type=PATH, help="Folder that holds torch_npu's wheel, unpacked.")
@click.option("--vendor-modules", is_flag=True, help="MODULE imports torch_npu: load it, with stand-ins for CANN.")
def preview(
    factory: str,
    target: str,
    output: Path | None,
    json_path: Path | None,
    no_fuse: bool,
    show_diff: bool,
    check: bool,
    torch_npu: Path | None,
    vendor_modules: bool,
) -> None:
    """Show the GE graph that torchair compiles for a chip.

    Needs torch_npu's wheel and gcc; no NPU and no CANN.
    """
    from quantpass.doors.explain import diff
    from quantpass.doors.preview import preview_ge
    from quantpass.lowering import standin_cann, standin_device
    from quantpass.lowering.emulation import emulate_npu
    from quantpass.lowering.standin_process import PreviewError, TorchairProcess

    if vendor_modules and not standin_cann.is_child():
        sys.exit(standin_cann.run_again(torch_npu))
    with explained(standin_cann.StandinError, PreviewError):
        if vendor_modules:
            standin_device.install_for(target)
            emulate_npu()
        model, args = load_model(factory)
        with TorchairProcess(torch_npu) as process, running(model, args):
            made = preview_ge(model, args, target=target, fuse=not no_fuse, process=process)
            before = preview_ge(model, args, target=target, fuse=False, process=process) if show_diff else None
    lines = [f"{made.soc_name}: {len(made.graphs)} graph(s), {len(made.ops)} operators"]
    if not no_fuse:
        lines.append(f"{made.report.fused} of {made.report.total} quantized matmuls fused")
    lines.append(diff(before, made) if before is not None else str(made))
    if output is not None:
        output.write_text(made.pbtxt)
        lines.append(f"written: {output}")
    found = list(_differences(made)) if check else []
    data = {"soc_name": made.soc_name, "operators": made.ops, "report": made.report.as_dict(), "run": found}
    tell("\n".join([*lines, *found]), as_json(data), json_path)


def _differences(made: GePreview) -> Iterator[str]:
    """One line for each tensor that the graphs return."""
    import torch

    for number, (graph, computed) in enumerate(zip(made.graphs, made.run(), strict=True)):
        exact = made.run(exact_gelu=True)[number] if "Gelu" in graph.graph.op_types else computed
        for i, (have, other, want) in enumerate(zip(computed, exact, graph.outputs, strict=True)):
            if not isinstance(want, torch.Tensor):
                continue
            if torch.equal(have, want):
                verdict = "equal"
            elif torch.equal(other, want):
                verdict = "differs by GE's tanh form of Gelu alone (equal with the erf form of the model)"
            else:
                verdict = f"differs by at most {_of_mean(have, want):.2g} of the mean size"
                if exact is not computed:
                    verdict += f", {_of_mean(other, want):.2g} without GE's tanh form of Gelu"
            yield f"graph {number}, output {i}: GE interpreted against FX: {verdict}"


def _of_mean(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have.double() - want.double()).abs().max() / want.double().abs().mean())
