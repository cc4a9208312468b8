"""What tests of users' models take from quantpass: ``assert_fused`` and the fixture ``quantpass_report``."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import quantpass as qp
from quantpass.testing import assert_fused
from tests.helpers import WeightOnly

pytest_plugins = ("pytester",)


def test_assert_fused_returns_the_report_and_raises_with_it():
    x = torch.randn(4, 64).half()
    report = assert_fused(WeightOnly(), (x,), target=["ascend310p", "ascend910b"])
    assert isinstance(report, qp.Report) and report.fused == 2
    with pytest.raises(AssertionError, match=r"(?s)0 of 0 quantized matmuls are fused, 1 were required.*No quantized"):
        assert_fused(torch.nn.Linear(64, 8), (torch.randn(2, 64),), target="ascend310p")
    with pytest.raises(AssertionError, match=r"(?s)1 of 1 .* 2 were required.*wqmm|WQMM"):
        assert_fused(WeightOnly(), (x,), target="ascend310p", fused=2)


TESTS = """
import torch
from tests.helpers import WeightOnly

def test_fused(quantpass_report):
    quantpass_report(WeightOnly(), (torch.randn(4, 64).half(),), target="ascend310p").require(1.0)

def test_slower_chip(quantpass_report):
    report = quantpass_report(WeightOnly(), (torch.randn(4, 64).half(),), target="ascend310p")
    assert report.sites[0].plan.weight_format == "ND"
"""


def test_the_fixture_shows_the_report_where_a_test_fails(pytester):
    pytester.makepyfile(TESTS)
    installed = any(e.value == "quantpass.testing" for e in entry_points(group="pytest11"))
    plugins = [] if installed else ["-p", "quantpass.testing"]
    run = pytester.runpytest_inprocess(*plugins, "-p", "no:cacheprovider")
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["*- Captured quantpass report call -*", "*ascend310p: 1 of 1 quantized matmuls fused*"])
    assert run.stdout.str().count("Captured quantpass report") == 1


def test_pytest_starts_without_torch():
    """The entry point is loaded by every pytest that runs where quantpass is installed."""
    code = "import quantpass.testing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
