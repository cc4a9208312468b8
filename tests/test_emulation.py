"""torch.ops.npu.* on a CPU, where torch_npu is not installed. Each case runs in a process of its own: operators stay."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from quantpass.operators import EMULATED

ROOT = Path(__file__).resolve().parent.parent


def run(code, *, fails_with=None, path=()):
    preamble = "import torch, quantpass as qp\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if fails_with is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert fails_with in done.stderr, done.stderr
    return done.stdout


CALLS = """
    qp.emulate_npu(); qp.emulate_npu()                       # the second call does nothing
    npu, q = torch.ops.npu, torch.ops.quantpass
    g = torch.Generator().manual_seed(0)
    x1 = torch.randint(-128, 128, (4, 32), dtype=torch.int8, generator=g)
    w = torch.randint(-128, 128, (16, 32), dtype=torch.int8, generator=g)
    s, o = torch.rand(16, generator=g) * 1e-2, torch.full((16,), 3.0)
    packed = npu.npu_trans_quant_param(s, o)
    assert torch.equal(packed, q.trans_quant_param(s, o))
    y = npu.npu_quant_matmul(x1, w.t(), packed, output_dtype=torch.int8)
    assert torch.equal(y, q.quant_matmul(x1, w, s, offset=o, transpose_x2=True)) and y.dtype == torch.int8
    for dtype in (torch.float16, torch.bfloat16, torch.int32):
        assert npu.npu_quant_matmul(x1, w.t(), s, output_dtype=dtype).dtype == dtype
    x = torch.randn(4, 32, generator=g).half()
    ws = (s + 1e-3).half()
    y = npu.npu_weight_quant_batchmatmul(x, w.t(), ws)
    assert torch.equal(y, q.weight_quant_matmul(x, w, ws, transpose_weight=True))
    c4 = torch.randint(-8, 8, (16, 32), dtype=torch.int32, generator=g)
    p = npu.npu_convert_weight_to_int4pack(c4)
    assert p.shape == (16, 4) and p.dtype == torch.int32
    expected = q.weight_quant_matmul(x, c4.to(torch.int8), ws, transpose_weight=True)
    assert torch.equal(npu.npu_weight_quant_batchmatmul(x, p.t(), ws), expected)      # a transposed view, packed along K
    p_kn = npu.npu_convert_weight_to_int4pack(c4.t().contiguous())
    assert torch.equal(npu.npu_weight_quant_batchmatmul(x, p_kn, ws), expected)       # packed along N
    one = torch.ones(1)
    x4 = npu.npu_quantize(torch.randint(-8, 8, (4, 32), generator=g).float(), one, None, torch.quint4x2, -1, False)
    assert torch.equal(npu.npu_quant_matmul(x4, p.t(), s, output_dtype=torch.float16),
                       q.quant_matmul(x4, p, s, transpose_x2=True, output_dtype=torch.float16))
    codes, rows = npu.npu_dynamic_quant(x)
    assert codes.dtype == torch.int8 and rows.shape == (4,)
    assert npu.npu_quantize(x, one * 0.1, None, torch.qint8, -1, True).dtype == torch.int8
    assert npu.npu_anti_quant(w, one).dtype == torch.float16
    assert torch.equal(npu.npu_format_cast(w, 29), w)
    assert torch.equal(npu.npu_format_cast(w, 29, customize_dtype=3), w)              # other tiles, the same numbers
    heads, each = torch.randn(4, 2, 32, generator=g), torch.tensor([10.0, 20.0])
    by_head = npu.npu_quantize(heads, each, None, torch.qint8, -2, False)
    assert torch.equal(by_head, (heads * each[:, None]).round().clamp(-128, 127).to(torch.int8))
    assert torch.equal(by_head, npu.npu_quantize(heads, each.reshape(1, 2, 1), None, torch.qint8, -2, False))
    ends, smooth = torch.tensor([1, 1, 4], dtype=torch.int32), torch.rand(3, 32, generator=g).half()
    codes, rows = npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=ends)
    for i, group in enumerate((0, 2, 2, 2)):                                          # the second group has no rows
        alone = npu.npu_dynamic_quant(x[i : i + 1], smooth_scales=smooth[group])
        assert torch.equal(codes[i : i + 1], alone[0]) and torch.equal(rows[i : i + 1], alone[1])
    many = torch.randint(-128, 128, (2, 1, 32, 16), dtype=torch.int8, generator=g)    # as torch_npu's test of the 310P
    left = torch.randn(1, 3, 4, 32, generator=g).half()
    y = npu.npu_weight_quant_batchmatmul(left, many, ws[None], ws[None])
    assert y.shape == (2, 3, 4, 16)
    assert torch.equal(y[1, 2], npu.npu_weight_quant_batchmatmul(left[0, 2], many[1, 0], ws[None], ws[None]))
"""


def test_the_vendors_operators_run_on_cpu_tensors():
    run(CALLS)


def test_they_can_be_compiled():
    """They stay whole in the graph, at any rank, where the vendor's own shape functions fail."""
    run("""
        qp.emulate_npu()
        npu = torch.ops.npu
        def f(x, w, s):
            w = npu.npu_format_cast(w, 29)
            y = npu.npu_weight_quant_batchmatmul(x, w.t(), s)
            codes, rows = npu.npu_dynamic_quant(y.flatten(0, 1))
            return npu.npu_quant_matmul(codes, w.t()[:16], torch.ones(1), pertoken_scale=rows, output_dtype=torch.float16)
        x, w, s = torch.randn(2, 3, 32).half(), torch.randint(-128, 128, (16, 32), dtype=torch.int8), torch.rand(16).half()
        seen = []
        def backend(gm, inputs):
            from torch._functorch.aot_autograd import aot_module_simplified
            def compiler(g, _):
                seen.extend(str(n.target) for n in g.graph.nodes)
                return g.forward
            return aot_module_simplified(gm, inputs, fw_compiler=compiler, inference_compiler=compiler)
        with torch.no_grad():
            assert torch.equal(torch.compile(f, backend=backend)(x, w, s), f(x, w, s))
        assert {"npu.npu_format_cast.default", "npu.npu_weight_quant_batchmatmul.default", "npu.npu_dynamic_quant.default",
                "npu.npu_quant_matmul.default"} <= set(seen), seen
    """)


def test_opcheck():
    run("""
        qp.emulate_npu()
        npu, check = torch.ops.npu, torch.library.opcheck
        x1, w, s = torch.ones(4, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8), torch.ones(16)
        x = torch.randn(4, 32).half()
        check(npu.npu_quant_matmul.default, (x1, w.t(), s), {"output_dtype": 5})
        check(npu.npu_weight_quant_batchmatmul.default, (x, w.t(), s.half()))
        check(npu.npu_trans_quant_param.default, (s, s))
        check(npu.npu_quantize.default, (x, torch.ones(1), None, 12, -1, True))
        check(npu.npu_quantize.default, (x, torch.ones(1), None, 16, -1, False))
        check(npu.npu_dynamic_quant.default, (x,))
        check(npu.npu_dynamic_quant.default, (x,), {"dst_type": 16})
        check(npu.npu_anti_quant.default, (w, torch.ones(1)))
        check(npu.npu_convert_weight_to_int4pack.default, (torch.ones(16, 32, dtype=torch.int32),))
        check(npu.npu_format_cast.default, (w, 29))
        check(npu.npu_quantize.default, (x[None], torch.ones(4), None, 12, -2, False))
        many = torch.ones(2, 32, 16, dtype=torch.int8)
        check(npu.npu_weight_quant_batchmatmul.default, (x.expand(2, 4, 32), many, torch.ones(1, 16).half()))
        groups = {"smooth_scales": torch.ones(2, 32).half(), "group_index": torch.tensor([1, 4], dtype=torch.int32)}
        check(npu.npu_dynamic_quant.default, (x,), groups)
    """)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("npu.npu_quant_matmul(torch.ones(2, 8), torch.ones(8, 4), torch.ones(4))", "x1 is torch.float32"),
        ("npu.npu_quant_matmul(i, i, torch.ones(4), x1_dtype=1)", "x1_dtype is 1"),
        ("npu.npu_convert_weight_to_int4pack(torch.ones(4, 8, dtype=torch.int8))", "weight is torch.int8"),
        ("npu.npu_convert_weight_to_int4pack(torch.ones(4, 9, dtype=torch.int32))", "[int4pack.last]"),
        ("npu.npu_weight_quant_batchmatmul(torch.ones(2, 8).half(), i, torch.ones(8))", "[wqmm.scale.dtype]"),
        ("npu.npu_trans_quant_param(torch.ones(2).half())", "[tqp.scale.dtype]"),
        (
            "npu.npu_weight_quant_batchmatmul(torch.ones(2, 8).half(), i, torch.ones(8).bfloat16())",
            "[wqmm.scale.dtype]",
        ),
        (
            "npu.npu_dynamic_quant(torch.ones(2, 8).half(), group_index=torch.ones(2).int())",
            "[dynamic_quant.group.scales]",
        ),
        ("npu.npu_quantize(torch.ones(2, 4, 8), torch.ones(8), None, 12, -2, False)", "scales has shape (8,)"),
    ],
)
def test_bad_input_names_argument_value_and_rule(call, message):
    run(f"""
        qp.emulate_npu()
        npu, i = torch.ops.npu, torch.ones(8, 8, dtype=torch.int8)
        {call}
    """, fails_with=message)  # fmt: skip


def test_importing_torch_npu_later_says_why_it_can_not(tmp_path):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("raise RuntimeError('reached')\n")
    run(
        "qp.emulate_npu(); import torch_npu",
        fails_with="Import torch_npu before calling emulate_npu()",
        path=[tmp_path],
    )
    run("import torch_npu", fails_with="reached", path=[tmp_path])


def test_without_torch_npu_the_import_error_is_the_usual_one():
    if __import__("importlib.util").util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed")
    run("qp.emulate_npu(); import torch_npu", fails_with="No module named 'torch_npu'")


def test_half_defined_namespaces_are_refused():
    run("""
        lib = torch.library.Library("npu", "FRAGMENT")
        lib.define("npu_quantize(Tensor x) -> Tensor")
        qp.emulate_npu()
    """, fails_with="another library defined them")  # fmt: skip


def test_schemas_parse():
    for op in EMULATED:
        parsed = torch._C.parse_schema(op.vendor.schema)
        assert parsed.name == op.vendor.name
        assert [a.name for a in parsed.arguments if a.name not in op.vendor.unjudged] == [*op.vendor.arguments]
