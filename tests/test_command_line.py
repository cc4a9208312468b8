"""``quantpass COMMAND``: what is printed, what is written, and how it exits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantpass.doors.cli import main
from tests.test_import import NO_TORCH

FACTORY = """
import torch
from tests.helpers import WeightOnly
def small(): return WeightOnly(), (torch.randn(2, 64).half(),)
def floats(): return torch.nn.Linear(64, 32), (torch.randn(2, 64),)
def wrong(): return WeightOnly()
def tensor(): return WeightOnly(), torch.randn(2, 64).half()
def dynamic():
    codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    def f(x):
        s = x.abs().amax(-1, keepdim=True).float() / 127
        q = (x / s).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q, codes.t()).float() * s * 0.01).half()
    return f, (torch.randn(24, 64).half(),)
def raises(): return WeightOnly(), ({}["a key that is missing"],)
def misfit(): return Misfit(), (torch.randn(2, 63).half(),)
class Misfit(WeightOnly):
    def forward(self, x):
        return super().forward(x @ torch.ones(64, 64))
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("factories")
def test_command_line():
    run = CliRunner().invoke(
        main, ["explain", "factories:small", "-t", "ascend310p", "--json", "r.json", "--html", "r.html"]
    )
    assert run.exit_code == 0, run.output
    assert "ascend310p: 1 of 1" in run.output
    with open("r.json") as f:
        assert json.load(f)["fused"] == 1


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["factories"], "MODULE:FACTORY"),
        (["factories:nothing"], "no function 'nothing'"),
        (["factories:wrong"], "returned WeightOnly; it must return (model, args)"),
        (["factories:tensor"], "returned (WeightOnly, Tensor); it must return (model, args), args a tuple"),
        (["no_such_module:f"], "can't import"),
        (["factories:small", "-t", "ascend999"], "unknown target"),
        (["factories:small", "--allow", "weights.refitt"], "Did you mean 'weights.refit'?"),
        (["missing.pt2"], "there is no file missing.pt2"),
        (["factories.pt2"], "factories.pt2 is no program that torch.export.save wrote"),
    ],
)
def test_bad_input_is_one_line_with_status_2(arguments, message):
    Path("factories.pt2").write_text("no archive")
    run = CliRunner().invoke(main, ["explain", *arguments])
    assert run.exit_code == 2, run.output
    assert message in " ".join(run.output.split())
    assert "Traceback" not in run.output


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("factory", "message", "line"),
    [
        ("raises", "factories:raises() raised", "KeyError: 'a key that is missing'"),
        ("misfit", "without quantpass, raised", "RuntimeError: mat1 and mat2 shapes"),
    ],
)
def test_the_users_own_error_is_shown_with_the_users_frames(factory, message, line):
    run = CliRunner().invoke(main, ["explain", f"factories:{factory}", "-t", "cpu"])
    assert run.exit_code == 2
    assert message in run.output
    assert line in run.output
    files = re.findall(r'File "([^"]*)"', run.output)
    assert files
    assert {Path(f).name for f in files} == {"factories.py"}


@pytest.mark.usefixtures("factories")
def test_a_fault_of_quantpass_has_a_status_and_a_traceback_of_its_own(monkeypatch):
    def broken(*args, **options):
        raise KeyError("inside")

    monkeypatch.delenv("QUANTPASS_RAISE")  # as users run it
    monkeypatch.setattr("quantpass.doors.explain.explain", broken)
    run = CliRunner().invoke(main, ["explain", "factories:small"])
    assert run.exit_code == 3
    assert "KeyError: 'inside'" in run.output
    assert "a fault of quantpass" in run.output


def test_a_command_that_needs_torch_says_so_where_it_is_missing(tmp_path):
    code = NO_TORCH + "from quantpass.doors.cli import main; main()"
    (tmp_path / "mine.py").write_text("def small(): return print, ()")
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", "mine:small"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (2, "Error: explain needs torch, which is not installed here\n")


@pytest.mark.usefixtures("factories")
def test_verify():
    run = CliRunner().invoke(main, ["verify", "factories:small", "-t", "ascend310p"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, ["verify", "factories:floats", "-t", "ascend310p"])
    assert run.exit_code == 1, run.output
    assert "no site was compared: no quantized matmul was found" in run.output


@pytest.mark.usefixtures("factories")
def test_fuse_saves_a_program_that_the_other_commands_take():
    arguments = ["fuse", "factories:small", "-t", "ascend310p", "-o", "fused.pt2"]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert "ascend310p: 1 of 1" in run.output
    fused = torch.export.load("fused.pt2")
    assert "quantpass.weight_quant_matmul" in str(fused.graph)
    import factories

    torch.export.save(torch.export.export(*factories.small()), "plain.pt2")
    for command, status, shown in (
        (["explain", "plain.pt2", "-t", "ascend310p"], 0, "1 of 1"),
        (["verify", "plain.pt2", "-t", "ascend310p"], 0, "1 of 1"),
        (["diff", "plain.pt2", "fused.pt2"], 0, "+"),
        (["diff", "plain.pt2", "-t", "ascend310p"], 0, "quantpass.weight_quant_matmul"),
        (["diff", "plain.pt2", "plain.pt2"], 0, "no difference"),
        (["diff", "plain.pt2", "-t", "ascend310p", "--site", "linaer"], 2, "Did you mean 'linear'?"),
        (["diff", "plain.pt2", "-t", "ascend310p", "--site", "linear"], 0, "-%mul"),
        (["diff", "plain.pt2", "plain.pt2", "--site", "linear"], 2, "--site goes with --target"),
        (["diff", "plain.pt2"], 2, "either another program"),
    ):
        run = CliRunner().invoke(main, command)
        assert run.exit_code == status, (command, run.output)
        assert shown in run.output, command


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("path", ["no/such/dir/x", ".", "r.json/x"])
def test_a_path_that_can_not_be_written_is_found_before_the_work(option, path, monkeypatch):
    from quantpass.doors.cli import explain

    open("r.json", "w").close()
    monkeypatch.setattr(explain, "load_model", lambda text: pytest.fail("the model was built"))
    run = CliRunner().invoke(main, ["explain", "factories:small", option, path])
    assert run.exit_code == 2
    assert run.exception is None or isinstance(run.exception, SystemExit)
    (error,) = [line for line in run.output.splitlines() if line.startswith("Error")]
    assert option in error
    assert path in error


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ([], 0),
        (["--allow", "qmm.310p.pertoken", "--numerics", "strict"], 0),
        (["--allow", "qmm.310p.pertoken", "--allow", "dynamic_quant.310p", "--numerics", "vendor"], 1),
    ],
)
def test_permissions_and_numerics_on_the_command_line(arguments, fused):
    run = CliRunner().invoke(main, ["explain", "factories:dynamic", "-t", "ascend310p", "--json", "-", *arguments])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["fused"] == fused
    assert ("quantized by npu_dynamic_quant" in run.output) == ("vendor" in arguments)


@pytest.mark.usefixtures("factories")
def test_json_to_standard_output():
    run = CliRunner().invoke(main, ["explain", "factories:small", "-t", "ascend310p", "--json", "-"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["fused"] == 1
    assert not os.path.exists("-")


@pytest.mark.usefixtures("factories")
def test_two_targets_in_one_option():
    run = CliRunner().invoke(main, ["explain", "factories:small", "-t", "Ascend910B3,Ascend310P3"])
    assert run.exit_code != 0
    assert "-t repeated on the command line" in run.output


def test_completion_knows_the_commands():
    asked = {"_QUANTPASS_COMPLETE": "bash_complete", "COMP_WORDS": "quantpass expl", "COMP_CWORD": "1"}
    code = "from quantpass.doors.cli import main; main(prog_name='quantpass')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert done.stdout == "plain,explain\nplain,explain-error\n"


def test_the_package_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "quantpass", "reasons", "weights.refit"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("weights.refit\n  when: ")


# -- every command as JSON -----------------------------------------------------------------------------------------

CALL = ["x1=int8[16,512]", "x2=int8[512,128]:NZ:T", "scale=int64[128]", "output_dtype=float16"]


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("arguments", "status", "key", "value"),
    [
        (["check-op", "npu_quant_matmul", "-t", "ascend310p", *CALL], 0, "legal", True),
        (["check-op", "npu_quant_matmul", "-t", "ascend310p", *CALL, "bias=float16[128]"], 1, "legal", False),
        (["chips"], 0, "schema", 1),
        (["chips", "Ascend310P3"], 0, "schema", 1),
        (["reasons", "plan.left"], 0, "schema", 1),
        (["explain", "factories:small", "-t", "ascend310p"], 0, "fused", 1),
        (["explain", "factories:small", "-t", "ascend310p", "--leave", "add*"], 0, "fused", 0),
        (["verify", "factories:small", "-t", "ascend310p", "--bisect", "--histogram"], 0, "missed", []),
        (["diff", "factories:small", "-t", "ascend310p"], 0, "equal", False),
        (["fuse", "factories:small", "-t", "ascend310p", "-o", "fused.pt2"], 0, "fused", 1),
    ],
    ids=lambda v: v[0] if isinstance(v, list) and v else None,
)
def test_json_in_place_of_text(arguments, status, key, value):
    run = CliRunner().invoke(main, [*arguments, "--json", "-"])
    assert run.exit_code == status, run.output
    assert json.loads(run.output)[key] == value


def test_json_has_what_the_text_has():
    data = json.loads(CliRunner().invoke(main, ["chips", "ascend310p", "--json", "-"]).output)
    (chip,) = data["chips"]
    (table,) = [r for r in chip["rules"] if r["id"] == "wqmm.310p.dtypes"]
    assert table["lines"][0]["weight"] == ["int8"]
    run = CliRunner().invoke(
        main, ["check-op", "npu_quant_matmul", "-t", "ascend310p", *CALL, "bias=float16[128]", "--json", "-"]
    )
    data = json.loads(run.output)
    assert data["rejects"][0]["rule"] == "qmm.310p.dtypes.bias"
    assert data["nearest"] == {"bias": "int32(128)"}
    (reason,) = json.loads(CliRunner().invoke(main, ["reasons", "plan.left", "--json", "-"]).output)["reasons"]
    assert reason["hint"] == "take its name out of leave"


def test_every_command_says_how_it_is_used():
    for name in main.commands:
        run = CliRunner().invoke(main, [name, "--help"])
        assert run.exit_code == 0
        assert "--json" in run.output, name
