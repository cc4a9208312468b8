"""FRACTAL_NZ: cast on the tensors before the graph runs, once, in place, and accounted for in the report."""

import gc
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import quantpass as qp
from quantpass.lowering import format_casts
from quantpass.lowering.fractal_nz import nz_bytes, to_fractal_nz
from tests.helpers import IntegerW8A8, StaticW8A8, WeightOnly, assert_close, compiled

X = torch.randn(4, 64).half()


class FakeNpu:
    """The part of torch_npu that deals with formats, on CPU tensors: a cast is a copy whose format is remembered."""

    def __init__(self, *, name="Ascend910B2", option=None, refuses=False):
        self.formats = {}  # storage -> format
        self.casts = []
        self.originals = []
        self.alive_at_cast = []
        self.refuses = refuses
        self.set_to = []
        fake = self

        class Config:
            def __setattr__(self, attribute, value):
                assert attribute == "allow_internal_format"
                fake.set_to.append(value)
                fake.option = b"enable" if value else b"disable"

        self.option = option
        self.npu = SimpleNamespace(get_device_name=lambda: name, config=Config())
        self._C = SimpleNamespace(_npu_getOption=lambda key: {"ALLOW_INTERNAL_FORMAT": self.option}[key])

    def get_npu_format(self, tensor):
        return self.formats.get(tensor.untyped_storage()._cdata, 2)

    def npu_format_cast(self, tensor, acl_format):
        assert self.option == b"enable", "internal formats are not allowed: the result would be ND"
        self.alive_at_cast.append(sum(not ref.expired() for ref in self.originals))
        self.casts.append((tensor.dtype, tuple(tensor.shape), acl_format))
        result = tensor.clone()
        self.originals.append(StorageWeakRef(tensor.untyped_storage()))
        if not self.refuses:
            self.formats[result.untyped_storage()._cdata] = acl_format
            self.kept = [*getattr(self, "kept", []), result]  # so that no storage number is used twice
        return result

    def npu_convert_weight_to_int4pack(self, weight):
        packed = torch.ops.quantpass.pack_int4(weight)
        self.formats[packed.untyped_storage()._cdata] = self.get_npu_format(weight)
        return packed


@pytest.fixture
def npu(monkeypatch):
    """Every tensor of this test is on a device that knows formats."""

    def install(**settings):
        fake = FakeNpu(**settings)
        monkeypatch.setitem(sys.modules, "torch_npu", fake)
        monkeypatch.setattr(format_casts, "layer_for", lambda device: format_casts.NpuFormats())
        return fake

    return install


def row_of(report):
    (row,) = report.formats
    return row


def test_on_a_cpu_nothing_is_cast_and_the_ledger_says_what_would_be():
    model = WeightOnly(k=64, n=100)
    actual, report = compiled(model, X, target="ascend310p")
    row = row_of(report)
    assert (row.format, row.how, row.dtype, row.shape) == ("NZ", "planned", "int8", (100, 64))
    assert (row.bytes_before, row.bytes_after) == (6400, to_fractal_nz(model.codes.data).numel())
    assert row.bytes_after == nz_bytes((100, 64), torch.int8) == 112 * 64
    assert_close(actual, model(X))


def test_a_parameter_is_cast_in_place(npu):
    fake = npu()
    model = WeightOnly()
    before, address = model.codes, model.codes.data_ptr()
    actual, report = compiled(model, X, target="ascend910b")
    assert row_of(report).how == "in place"
    assert fake.casts == [(torch.int8, (96, 64), 29)]
    assert model.codes is before, "still the same parameter"
    assert fake.get_npu_format(model.codes.data) == 29
    assert model.codes.data_ptr() != address
    assert_close(actual, model(X))


def test_compiling_again_casts_nothing(npu):
    fake = npu()
    model = WeightOnly()
    compiled(model, X, target="ascend910b")
    _, report = compiled(model, X, target="ascend910b")
    assert len(fake.casts) == 1
    assert row_of(report).how == "already"


def test_calling_again_casts_nothing_and_fuses_nothing(npu):
    fake = npu()
    model = WeightOnly()
    torch._dynamo.reset()
    reports = []
    run = torch.compile(model, backend=qp.backend(target="ascend910b", on_report=reports.append))
    with torch.no_grad():
        for _ in range(3):
            run(X)
    assert len(fake.casts) == len(reports) == 1


def test_no_more_than_one_original_is_alive_at_a_time(npu):
    """Parameters in place and prepared tensors alike: when one is cast, those before it are gone."""
    fake = npu()
    layers = [WeightOnly(bias=i % 2 == 0) for i in range(4)]
    turned = [IntegerW8A8(dtype=torch.float16) for _ in range(2)]
    unsigned = [Centred() for _ in range(3)]
    model = Everything(layers, unsigned, turned)
    gc.disable()  # nothing that has read the graph may wait for a collection
    try:
        _, report = compiled(model, X, target="ascend910b")
    finally:
        gc.enable()
    assert {f.how for f in report.formats} == {"in place", "prepared"}
    assert len(fake.casts) == 9
    assert fake.alive_at_cast == [0] * 9, "beside the one that is being cast"
    assert sum(not ref.expired() for ref in fake.originals) == 0


class Centred(nn.Module):
    """uint8 codes: the operator needs int8 ones, which the pass prepares."""

    def __init__(self, k=64, n=96):
        super().__init__()
        self.codes = nn.Parameter(torch.randint(0, 256, (n, k), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(n, 1).half() * 0.01, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.codes.half() - 128) * self.scale)


class Everything(nn.Module):
    def __init__(self, *groups):
        super().__init__()
        self.layers = nn.ModuleList([layer for group in groups for layer in group])

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class Tied(nn.Module):
    """Two parameters that share memory, and optionally a third reader that is no matmul."""

    def __init__(self, lookup=False):
        super().__init__()
        self.a, self.b, self.lookup = WeightOnly(), WeightOnly(), lookup
        self.b.codes.data = self.a.codes.data

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return (y, self.a.codes[0].half()) if self.lookup else y


def test_tied_weights_are_cast_once_and_stay_tied(npu):
    fake = npu()
    model = Tied()
    actual, report = compiled(model, X, target="ascend910b")
    assert len(fake.casts) == 1
    assert model.a.codes.data_ptr() == model.b.codes.data_ptr()
    (row,) = report.formats
    assert (row.how, set(row.sites)) == ("in place", {"a", "b"}), "one tensor, one line"
    assert row.aliases
    assert "same tensor as" in str(report)
    assert_close(actual, model(X), torch.bfloat16)


def test_a_weight_that_something_else_reads_is_copied(npu):
    fake = npu()
    model = Tied(lookup=True)
    address = model.a.codes.data_ptr()
    (actual, row), report = compiled(model, X, target="ascend910b")
    assert {f.how for f in report.formats} == {"copied"}
    assert len(fake.casts) == 1, "one copy for both names"
    assert model.a.codes.data_ptr() == address
    assert torch.equal(row, model.a.codes[0].half())
    assert_close(actual, model(X)[0], torch.bfloat16)
    assert "reads it as well" in str(report)


def test_int4_is_packed_from_a_cast_weight(npu):
    """The vendor's cast of int32 has tiles of 16 columns; int4 in int32 needs 8, which its packing gives."""
    fake = npu()
    codes = torch.randint(-8, 8, (128, 64), dtype=torch.int8)
    model = WeightOnly(k=64, n=128)
    model.codes.data = codes
    actual, report = compiled(model, X, target="ascend910b")
    row = row_of(report)
    assert (row.dtype, row.format, row.how) == ("int32", "NZ", "prepared")
    assert fake.casts == [(torch.int32, (128, 64), 29)]
    assert_close(actual, model(X))


@pytest.mark.parametrize(
    ("settings", "set_to"),
    [
        ({"option": b"disable"}, [True, False]),
        ({"option": b"enable"}, [True, True]),
        ({"name": "Ascend910B2", "option": None}, [True, False]),
        ({"name": "Ascend310P3", "option": None}, [True, True]),
    ],
)
def test_internal_formats_are_allowed_only_meanwhile(npu, settings, set_to):
    fake = npu(**settings)
    compiled(WeightOnly(), X, target="ascend910b")
    assert fake.set_to == set_to


def test_a_cast_that_leaves_nd_is_an_error(npu):
    npu(refuses=True)
    with pytest.raises(Exception, match=r"allow_internal_format = True before the first use.*nz='never'"):
        compiled(WeightOnly(), X, target="ascend910b")


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (lambda: WeightOnly(), {"nz": "never"}, "nz='never'"),
        (lambda: WeightOnly(), {"mode": "eager"}, "takes this operator's weight in ND in eager mode"),
        (lambda: StaticW8A8(k=64, n=1), {}, "qmm.nz.n: n is 1"),
    ],
)
def test_what_stays_nd_says_why(npu, model, options, why):
    fake = npu()
    _, report = compiled(model(), X, target="ascend910b", **options)
    row = row_of(report)
    assert (row.format, row.how) == ("ND", "")
    assert why in row.why
    assert row.bytes_before == row.bytes_after
    assert not fake.casts


def test_ledger_in_text_json_and_html(tmp_path):
    model = nn.Sequential(WeightOnly(), WeightOnly(k=96, n=100))
    _, report = compiled(model, X, target="ascend310p")
    text = str(report)
    assert "read by" in text and "in ND" in text and "total" in text
    rows = json.loads(report.to_json())["formats"]
    assert [(r["format"], r["how"], r["shape"]) for r in rows] == [
        ("NZ", "planned", [96, 64]),
        ("NZ", "planned", [100, 96]),
    ]
    assert sum(r["bytes_after"] for r in rows) == 96 * 64 + 112 * 96
    report.to_html(tmp_path / "report.html")
    assert "<td>int8[100, 96]</td>" in (tmp_path / "report.html").read_text()


def test_explain_has_no_ledger():
    assert qp.explain(WeightOnly(), (X,), target="ascend310p").formats == ()
