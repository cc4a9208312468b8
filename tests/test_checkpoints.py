"""``check_checkpoint`` says of a checkpoint what ``explain`` says of the loaded model, call by call and rule by rule.

torchao and transformers are installed and write their checkpoints themselves. For GPTQModel, auto-round, AutoAWQ,
compressed-tensors, bitsandbytes, quanto and HQQ, which are not, the tensors are those of the graphs that the tools'
own modules gave (``tests/coverage/captures``), written under the names of the tools' state dicts. What no capture holds
(compressed-tensors' int8 schemes, AscendV1) is written out in the layout that the tools document.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.basics.tensor_spec import TensorSpec
from quantpass.chips.legality import HALF_OPT_IN, REFIT_OPT_IN
from quantpass.doors.compiled import copied
from tests.checkpoints import write_folder, write_headers
from tests.coverage import captured
from tests.coverage.here import schemes
from tests.coverage.scheme import K, N

TARGETS = ("ascend310p", "ascend910b", "ascend910_93", "cpu")
HALF, BF16 = "float16", "bfloat16"
CAPTURES = Path(__file__).parent / "coverage" / "captures"


# -- the two answers in one form -----------------------------------------------------------------------------------


def told(name, value):
    """An argument of a call, without the number of rows of x."""
    if not isinstance(value, TensorSpec):
        return str(value).removeprefix("torch.")
    of_rows = name in ("x", "x1", "pertoken_scale")
    shape = value.shape[1:] if of_rows else value.shape
    return f"{value.dtype_name}{shape} {value.format} {value.transposed}"


def verdict(fused, op, call, rules, offers):
    arguments = {k: told(k, v) for k, v in call.items() if v is not None and v != 0} if fused else {}
    kept = sorted(set(rules) - {HALF_OPT_IN, REFIT_OPT_IN}) if not fused else []
    return op if fused else "", arguments, kept, sorted(offers) if not fused else []


def by_explain(report):
    """What ``explain`` found, by target and site."""
    found = {}
    for s in report.sites:
        call, op = (s.plan.call, s.plan.op) if s.plan else ({}, "")
        rules = [r.rule for r in s.rejects]
        offers = [tuple(a.partition(":")[0] for a in o.allow) for o in s.offers]
        found.setdefault(s.target, []).append(verdict(s.fused, op, call, rules, offers))
    return found


def by_headers(report):
    """What ``check_checkpoint`` found, by target and linear."""
    found = {}
    for line in report.lines:
        for target, v in line.verdicts.items():
            call = v.call.args if v.call is not None else {}
            one = verdict(v.fused, v.op, call, [r.rule for r in v.rejects], v.offers)
            found.setdefault(target, []).extend([one] * line.count)
    return found


def assert_same(report, folder, **settings):
    checked = qp.check_checkpoint(folder, targets=TARGETS, **settings)
    assert checked.total, checked
    for target, sites in by_explain(report).items():
        assert sorted(map(str, by_headers(checked)[target])) == sorted(map(str, sites)), (
            f"{target}\n{checked}\n{report}"
        )
    return checked


def explained(model, args, **settings):
    torch._dynamo.reset()
    return qp.explain(model, args, target=TARGETS, numerics="vendor", **settings)


# -- torchao and transformers, which are installed -----------------------------------------------------------------


def torchao_schemes():
    return [s for s in schemes() if s.tool == "torchao"]


@pytest.mark.parametrize("scheme", torchao_schemes(), ids=lambda s: s.name)
def test_torchao_as_it_writes_itself(scheme, tmp_path):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model, args = scheme.build()
    # What a parameter wraps is what it writes.
    state = {n: t.data if isinstance(t, nn.Parameter) else t for n, t in model.state_dict().items()}
    tensors, metadata = flatten_tensor_state_dict(state)
    dtype = str(args[0].dtype).removeprefix("torch.")
    config = {"dtype": dtype, "quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}
    assert_same(explained(model, args), write_folder(tmp_path, tensors, config, metadata=metadata))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["int8", "dynamic", "int4"])
def test_a_model_that_transformers_saves(which, tmp_path):
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

    config = {
        "int8": Int8WeightOnlyConfig,
        "dynamic": Int8DynamicActivationInt8WeightConfig,
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }[which]()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=96, max_position_embeddings=32)
    LlamaForCausalLM(small).half().save_pretrained(tmp_path / "float")
    quantized = TorchAoConfig(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float16, quantization_config=quantized)
    model.save_pretrained(tmp_path / "quantized")
    checked = assert_same(explained(model.eval(), (torch.arange(8)[None],)), tmp_path / "quantized")
    assert checked.total == 7
    assert [text.partition(":")[0] for text in checked.floats] == ["lm_head"]


# -- tools that are not installed: tensors of their own modules, under their own names ------------------------------


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def gptq(t, **more):
    names = dict(zip(("qzeros", "scales", "qweight", "bias"), t, strict=True))
    g_idx = torch.arange(K, dtype=torch.int32) // 32
    return {**{f"up.{n}": x for n, x in names.items()}, "up.g_idx": more.get("g_idx", g_idx)}


def hqq(t, bits, axis=1):
    names = dict(zip(("bias", "W_q", "scale", "zero"), t, strict=True))
    meta = {"nbits": int32(bits), "axis": int32(axis), "group_size": int32(32), "shape": torch.tensor([N, K])}
    return {f"up.{n}": x for n, x in {**names, **meta}.items()}


def quanto(t, packed):
    data = "weight._data._data" if packed else "weight._data"
    names = (data, "weight._scale", *(("weight._shift",) if packed else ()), "bias")
    half = len(names)
    tensors = {f"up.{n}": x for n, x in zip(names, t, strict=False)}
    return tensors | {f"down.{n}": x for n, x in zip(names, t[half:], strict=False)}


def config_of(method, dtype=HALF, **settings):
    return {"dtype": dtype, "quantization_config": {"quant_method": method, **settings}}


def packed_config(strategy, **more):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": strategy, **more}}
    return config_of("compressed-tensors", BF16, format="pack-quantized", config_groups={"group_0": group})


def compressed(t):
    names = {"up.weight_packed": t[0], "up.weight_scale": t[1], "up.weight_shape": torch.tensor([N, K])}
    return names


GPTQ = {"group_size": 32, "desc_act": False, "sym": True}
QMAP = {"weights": "qint8", "activations": "none"}

CAPTURED = {
    "auto_round__qlinear_torch__4_bits": (lambda t: gptq(t[1:]), config_of("auto-round", bits=4, group_size=32), {}),
    "auto_round__qlinear_torch__8_bits": (lambda t: gptq(t[1:]), config_of("auto-round", bits=8, group_size=32), {}),
    "auto_round__qlinear_torch_zp__4_bits": (lambda t: gptq(t[1:]), config_of("gptq", bits=4, **GPTQ), {}),
    "gptqmodel__3_bits": (lambda t: gptq(t[3:], g_idx=t[0]), config_of("gptq", bits=3, **GPTQ), {}),
    "gptqmodel__3_bits__in_order_of_activation_size": (
        lambda t: gptq(t[3:], g_idx=t[0]),
        config_of("gptq", bits=3, group_size=32, desc_act=True),
        {},
    ),
    "awq__gemm_packing__4_bits": (
        lambda t: {f"up.{n}": x for n, x in zip(("qweight", "qzeros", "scales", "bias"), t[:4], strict=True)},
        config_of("awq", bits=4, group_size=32, zero_point=True, version="gemm"),
        {},
    ),
    "bitsandbytes__llm_int8__": (
        lambda t: {"up.weight": t[0], "up.bias": t[1], "up.SCB": t[3]},
        config_of("bitsandbytes", load_in_8bit=True, llm_int8_threshold=0.0),
        {},
    ),
    "compressed_tensors__int4_packed__groups_of_32": (compressed, packed_config("group", group_size=32), {}),
    "compressed_tensors__int4_packed__per_channel": (compressed, packed_config("channel"), {}),
    "hqq__8_bits__groups_of_32_along_k": (lambda t: hqq(t, 8), config_of("hqq"), {}),
    "hqq__4_bits__groups_of_32_along_k": (lambda t: hqq(t, 4), config_of("hqq"), {}),
    "hqq__3_bits__groups_of_32_along_k": (lambda t: hqq(t, 3), config_of("hqq"), {}),
    "hqq__2_bits__groups_of_32_along_k": (lambda t: hqq(t, 2), config_of("hqq"), {}),
    "hqq__4_bits__groups_along_n": (lambda t: hqq(t, 4, axis=0), config_of("hqq"), {}),
    "quanto__qint8_weights": (lambda t: quanto(t, False), {"dtype": HALF}, {"quanto_qmap": {"up": QMAP, "down": QMAP}}),
    "quanto__qint4_weights": (
        lambda t: quanto(t, True),
        {"dtype": HALF},
        {"quanto_qmap": {m: {"weights": "qint4", "activations": "none"} for m in ("up", "down")}},
    ),
    "quanto__qint2_weights": (
        lambda t: quanto(t, True),
        {"dtype": HALF},
        {"quanto_qmap": {m: {"weights": "qint2", "activations": "none"} for m in ("up", "down")}},
    ),
}


SETTINGS = ({"mode": "graph"}, {"mode": "eager"}, {"allow": (HALF_OPT_IN,)}, {"allow": ("wqmm.310p.group",)})


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "".join(map(str, next(iter(s.values())))))
@pytest.mark.parametrize("name", CAPTURED)
def test_tensors_of_a_tools_own_module(name, settings, tmp_path):
    rename, config, files = CAPTURED[name]
    (c,), _ = captured.load(CAPTURES / f"{name}.pt")
    tensors = rename(list(dict(c.graph.named_buffers()).values()))
    report = qp.explain(copied(c.graph), target=TARGETS, numerics="vendor", **settings)
    assert_same(report, write_folder(tmp_path, tensors, config, **files), **settings)


# -- layouts that are documented, written out ----------------------------------------------------------------------


class WrittenOut(nn.Module):
    """A Linear of compressed-tensors' arithmetic: x quantized and dequantized, the weight dequantized."""

    def __init__(self, dtype, x="none", zero=0, weight_zero=False, bias=True):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        of = {"requires_grad": False}
        self.codes = nn.Parameter(torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=g), **of)
        self.scale = nn.Parameter((torch.rand(N, 1, generator=g) * 0.01 + 1e-3).to(dtype), **of)
        self.zeros = (
            nn.Parameter(torch.randint(1, 5, (N, 1), generator=g).to(torch.int8), **of) if weight_zero else None
        )
        self.bias = nn.Parameter(torch.randn(N, generator=g).to(dtype), **of) if bias else None
        self.x, self.zero, self.step = x, zero, 0.03

    def forward(self, x):
        if self.x == "static":
            codes = torch.clamp(torch.round(x / self.step) + self.zero, -128, 127).to(torch.int8)
            x = (codes.to(x.dtype) - self.zero) * self.step
        elif self.x == "dynamic":
            s = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
            x = torch.clamp(torch.round(x / s), -128, 127).to(torch.int8).to(x.dtype) * s
        codes = self.codes.to(x.dtype) if self.zeros is None else self.codes.to(x.dtype) - self.zeros.to(x.dtype)
        return nn.functional.linear(x, codes * self.scale, self.bias)


def written(dtype, x, zero=0, weight_zero=False):
    """Tensors and configuration of ``WrittenOut`` as compressed-tensors' int-quantized format has them."""
    model = WrittenOut(getattr(torch, dtype), x, zero, weight_zero).eval()
    tensors = {"up.weight": model.codes, "up.weight_scale": model.scale, "up.bias": model.bias}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": not weight_zero}
    activations = None
    if weight_zero:
        tensors["up.weight_zero_point"] = model.zeros
    if x == "static":
        activations = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": not zero}
        tensors |= {"up.input_scale": torch.tensor([model.step]), "up.input_zero_point": torch.tensor([zero])}
    elif x == "dynamic":
        activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return (
        model,
        tensors,
        config_of("compressed-tensors", dtype, format="int-quantized", config_groups={"group_0": group}),
    )


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(
    ("x", "zero", "weight_zero"),
    [
        ("none", 0, False),
        ("none", 0, True),
        ("static", 0, False),
        ("static", 5, False),
        ("dynamic", 0, False),
        ("dynamic", 0, True),
    ],
)
def test_int8_of_compressed_tensors(x, zero, weight_zero, dtype, tmp_path):
    model, tensors, config = written(dtype, x, zero, weight_zero)
    folder, args = write_folder(tmp_path, tensors, config), (torch.randn(4, K).to(getattr(torch, dtype)),)
    for settings in SETTINGS[:3]:
        assert_same(explained(model, args, **settings), folder, **settings)


def test_weight_only_of_ascends_own(tmp_path):
    model = WrittenOut(torch.float16).eval()
    offset = torch.zeros(N, 1).half()
    tensors = {
        "up.weight": model.codes,
        "up.weight_scale": model.scale,
        "up.weight_offset": offset,
        "up.bias": model.bias,
    }
    kinds = dict.fromkeys((f"{n}" for n in tensors), "W8A16")
    folder = write_folder(
        tmp_path, tensors, {"torch_dtype": HALF}, quant_model_description={"version": "1.0.0", **kinds}
    )
    assert_same(explained(model, (torch.randn(4, K).half(),)), folder)


# -- models, settings, the command line ----------------------------------------------------------------------------


def test_a_model_on_the_meta_device():
    model, x = WrittenOut(torch.float16).to("meta"), torch.randn(4, K, device="meta").half()
    report = qp.check_checkpoint(model, args=(x,), targets=["ascend310p", "ascend910b"])
    assert (report.fused, report.total) == (2, 2)
    with pytest.raises(TypeError, match="needs its inputs"):
        qp.check_checkpoint(model)
    with pytest.raises(ValueError, match="judged as it is"):
        qp.check_checkpoint(model, args=(x,), tp=2)
    with pytest.raises(TypeError, match="neither the path of a folder nor a model"):
        qp.check_checkpoint(3)


def layer(folder, groups=0, k=4096, n=11008, **more):
    """A GPTQ checkpoint of two layers: a column-parallel and a row-parallel linear each, headers alone."""
    g = groups or k
    tensors = {}
    for i in range(2):
        for name, rows, columns in (("up_proj", k, n), ("down_proj", n, k)):
            of = g if groups else rows
            tensors[f"model.layers.{i}.mlp.{name}.qweight"] = ("I32", (rows // 8, columns))
            tensors[f"model.layers.{i}.mlp.{name}.qzeros"] = ("I32", (-(-rows // of), columns // 8))
            tensors[f"model.layers.{i}.mlp.{name}.scales"] = ("F16", (-(-rows // of), columns))
    folder.mkdir(exist_ok=True)
    write_headers(folder / "model.safetensors", tensors)
    config = config_of("gptq", bits=4, group_size=groups or -1, desc_act=False)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lines_of(report):
    return {line.name.rpartition(".")[2]: line for line in report.lines}


def test_each_rank_has_its_part(tmp_path):
    lines = lines_of(qp.check_checkpoint(layer(tmp_path / "x", 128), targets="ascend910b", tp=2))
    up, down = lines["up_proj"], lines["down_proj"]
    assert (up.name, up.count, up.place, up.k, up.n) == (
        "model.layers.{0,1}.mlp.up_proj", 2, "column-parallel", 4096, 5504,
    )  # fmt: skip
    assert (down.place, down.k, down.n) == ("row-parallel", 5504, 4096)
    assert up.verdicts["ascend910b"].fused and down.verdicts["ascend910b"].fused
    assert up.bytes_on("ascend910b") == 4096 * 5504 // 2


def test_a_shard_that_cuts_a_group(tmp_path):
    lines = lines_of(qp.check_checkpoint(layer(tmp_path / "x", 128), targets="ascend910b", tp=8))
    assert [r.rule for r in lines["down_proj"].verdicts["ascend910b"].rejects] == ["checkpoint.shard.group"]
    assert "1376 rows, in groups of 128" in lines["down_proj"].verdicts["ascend910b"].rejects[0].fact
    assert lines["up_proj"].verdicts["ascend910b"].fused  # N has no groups


def test_a_size_that_ranks_do_not_divide(tmp_path):
    lines = lines_of(qp.check_checkpoint(layer(tmp_path / "x", 128), targets="ascend910b", tp=3))
    assert [r.rule for r in lines["up_proj"].verdicts["ascend910b"].rejects] == ["checkpoint.shard.size"]


def test_a_shard_that_cuts_a_word(tmp_path):
    lines = lines_of(qp.check_checkpoint(layer(tmp_path / "x", 0, n=11008 + 8), targets="ascend910b", tp=2))
    assert [r.rule for r in lines["down_proj"].verdicts["ascend910b"].rejects] == ["checkpoint.shard.packed"]


def test_a_projection_wider_than_the_operators_take_fits_in_shards(tmp_path):
    wide = layer(tmp_path / "x", 0, n=73728)
    whole = lines_of(qp.check_checkpoint(wide, targets="ascend910b"))["up_proj"].verdicts["ascend910b"]
    assert [r.rule for r in whole.rejects] == ["wqmm.n.range"]
    assert lines_of(qp.check_checkpoint(wide, targets="ascend910b", tp=2))["up_proj"].verdicts["ascend910b"].fused


def test_what_another_dtype_would_gain(tmp_path):
    report = qp.check_checkpoint(layer(tmp_path / "x"), targets="ascend310p", dtype="bfloat16")
    assert report.fused("ascend310p") == 0
    assert report.gains["ascend310p"][0] == "4 of 4 in a model of float16 (dtype)"
    assert qp.check_checkpoint(layer(tmp_path / "x"), targets="ascend310p", dtype=torch.float16).all_fused


def test_a_bias_as_an_engine_gives_it(tmp_path):
    """Static W8A8 on the 310P with a float16 bias: the layers with a bias fail, the others do not."""
    _, tensors, config = written(HALF, "static")
    tensors |= {f"down.{n.partition('.')[2]}": t.clone() for n, t in tensors.items() if not n.endswith("bias")}
    folder = write_folder(tmp_path, tensors, config)
    assert qp.check_checkpoint(folder, targets="ascend310p").all_fused
    given = qp.check_checkpoint(folder, targets="ascend310p", bias_dtype="float16")
    ops = {line.name: line.verdicts["ascend310p"].op for line in given.lines}
    assert ops == {"up": "npu_weight_quant_batchmatmul", "down": "npu_quant_matmul"}
    assert "qmm.310p.dtypes.bias: bias is float16" in str(given)


@pytest.mark.parametrize(("target", "status"), [("ascend910b", 0), ("ascend310p", 1), ("ascend999", 2)])
def test_the_command_line(target, status, tmp_path):
    from click.testing import CliRunner

    from quantpass.doors.cli import main

    folder, page = layer(tmp_path / "x", 128), tmp_path / "p.html"
    done = CliRunner().invoke(main, ["check-checkpoint", str(folder), "-t", target, "--html", str(page), "--json", "-"])
    assert done.exit_code == status, done.output
    if status < 2:
        report = json.loads(done.stdout)
        assert report["version"] == 1
        assert report["targets"][target] == {"fused": 4 if status == 0 else 0, "uncovered": 0}
        assert "mlp.up_proj" in page.read_text()


def test_the_command_line_on_bad_input(tmp_path):
    from click.testing import CliRunner

    from quantpass.doors.cli import main

    done = CliRunner().invoke(main, ["check-checkpoint", str(tmp_path / "gone")])
    assert done.exit_code == 2
    assert "nothing is fetched" in done.output


def test_the_output_in_the_documentation_is_the_real_one(tmp_path):
    """The page's Python block makes the checkpoint; the command on the page prints what the page says."""
    from quantpass.version import __version__

    root = Path(__file__).parent.parent
    page = (root / "docs" / "checkpoints.md").read_text()
    (shown,) = re.findall(r"^```text\n\$ quantpass (.*?)\n(.*?)^```", page, flags=re.M | re.S)
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    code = f"{block}\nprint('-- now the command')\nfrom quantpass.doors.cli import main\nmain({shown[0].split()!r})"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # not all fused
    assert done.stdout.partition("-- now the command\n")[2] == shown[1].replace(
        "quantpass 0.1.0", f"quantpass {__version__}"
    )


# -- experts, and what users ask -----------------------------------------------------------------------------------


def experts(folder, inner, kind="W8A8_DYNAMIC", hidden=2048, dtype="bfloat16", count=4):
    """AscendV1's checkpoint of one layer of experts, headers alone."""
    tensors = {}
    for e in range(count):
        for name, n, k in (("gate_proj", inner, hidden), ("down_proj", hidden, inner)):
            at = f"model.layers.0.mlp.experts.{e}.{name}"
            tensors |= {f"{at}.weight": ("I8", (n, k)), f"{at}.weight_scale": ("F32", (n, 1))}
    folder.mkdir(exist_ok=True)
    write_headers(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": dtype}))
    (folder / "quant_model_description.json").write_text(json.dumps(dict.fromkeys(tensors, kind)))
    return folder


def test_experts_are_one_grouped_matmul(tmp_path):
    (gate, down) = qp.check_checkpoint(experts(tmp_path / "x", 1536), targets="ascend910b").lines
    verdict = gate.verdicts["ascend910b"]
    assert (gate.count, gate.experts, verdict.op, verdict.format) == (4, 4, "npu_grouped_matmul", "NZ")
    assert str(verdict.weight) == "int8(4, 2048, 1536) NZ"
    assert gate.bytes_on("ascend910b") == down.bytes_on("ascend910b") == 2048 * 1536


def test_shards_of_experts_that_fractal_nz_does_not_take(tmp_path):
    """1000 / 8 columns are no multiple of 16: the weight stays in ND."""
    lines = lines_of(qp.check_checkpoint(experts(tmp_path / "x", 1000), targets="ascend910b", tp=8))
    assert lines["gate_proj"].verdicts["ascend910b"].format == "ND"


def test_experts_where_no_rule_speaks_of_them(tmp_path):
    report = qp.check_checkpoint(experts(tmp_path / "x", 1536), targets="cpu")
    assert not report.all_fused
    assert report.uncovered("cpu") == 8
    assert "checkpoint.experts on cpu" in str(report)


def test_quantized_experts_on_the_310p(tmp_path):
    """The operator that quantizes the rows itself; in float16, where n and k are multiples of 16."""
    (gate, down) = qp.check_checkpoint(experts(tmp_path / "x", 1536, dtype="float16"), targets="ascend310p").lines
    verdict = gate.verdicts["ascend310p"]
    assert (verdict.op, verdict.format) == ("npu_quant_grouped_matmul_dequant", "ND")
    assert str(verdict.weight) == "int8(4, 1536, 2048)"
    assert verdict.notes == ("the operator quantizes x itself",)
    assert gate.bytes_on("ascend310p") == down.bytes_on("ascend310p") == 2048 * 1536
    shards = qp.check_checkpoint(experts(tmp_path / "x", 1000, dtype="float16"), targets="ascend310p", tp=8)
    assert shards.fused("ascend310p") == 0 and "qgmmd.n.multiple" in str(shards)
    bfloat = qp.check_checkpoint(experts(tmp_path / "x", 1536), targets="ascend310p")
    assert bfloat.fused("ascend310p") == 0 and "gmm.310p.dtypes.x" in str(bfloat)
    with_half = qp.check_checkpoint(experts(tmp_path / "x", 1536), targets="ascend310p", allow=(HALF_OPT_IN,))
    assert with_half.all_fused


def test_static_and_int4_experts_on_the_310p(tmp_path):
    static = experts(tmp_path / "static", 1536, kind="W8A8", dtype="float16")
    (gate, _) = qp.check_checkpoint(static, targets="ascend310p").lines
    assert str(gate.verdicts["ascend310p"].call.args["x_scale"]) == "float32(1)"
    int4 = experts(tmp_path / "int4", 1536, kind="W4A8_DYNAMIC", dtype="float16")
    assert qp.check_checkpoint(int4, targets="ascend310p").fused("ascend310p") == 0


@pytest.mark.parametrize(
    ("kind", "on_310p", "on_a2"), [("W4A4_DYNAMIC", 0, 1), ("W8A8_DYNAMIC", 1, 1), ("W8A8S", 0, 0)]
)
def test_which_of_ascends_types_a_chip_runs(kind, on_310p, on_a2, tmp_path):
    """One linear of Qwen3-14B's sizes, float16: does the 310P run W4A4?"""
    tensors = {"q_proj.weight": ("I8", (5120, 5120)), "q_proj.weight_scale": ("F16", (5120, 1))}
    write_headers(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": HALF}))
    (tmp_path / "quant_model_description.json").write_text(json.dumps({"q_proj.weight": kind}))
    report = qp.check_checkpoint(tmp_path, targets=["ascend310p", "ascend910b"])
    assert [report.fused(t) for t in report.targets] == [on_310p, on_a2]


def test_int4_experts_of_compressed_tensors(tmp_path):
    """Groups of 32 in bfloat16, packed along K, as large open models come."""
    tensors = {}
    for e in range(4):
        at = f"model.layers.0.mlp.experts.{e}.up_proj"
        tensors[f"{at}.weight_packed"] = ("I32", (2048, 7168 // 8))
        tensors[f"{at}.weight_scale"] = ("BF16", (2048, 7168 // 32))
    write_headers(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(packed_config("group", group_size=32)))
    (line,) = qp.check_checkpoint(tmp_path, targets=["ascend910b", "ascend310p"]).lines
    assert line.scheme == "int4 weight, groups of 32; float activation; 4 experts"
    assert str(line.verdicts["ascend910b"].weight) == "int32(4, 896, 2048) transposed"
    assert not line.verdicts["ascend310p"].fused


def test_a_quantized_embedding_is_no_matmul(tmp_path):
    _, tensors, config = written(HALF, "none")
    tensors |= {f"model.embed_tokens.{n.partition('.')[2]}": t.clone() for n, t in tensors.items() if n[-4:] != "bias"}
    assert qp.check_checkpoint(write_folder(tmp_path, tensors, config), targets="ascend310p").total == 1


def test_weights_that_a_tool_has_not_compressed(tmp_path):
    _, tensors, config = written(HALF, "none")
    tensors["up.weight"] = tensors["up.weight"].half()
    report = qp.check_checkpoint(write_folder(tmp_path, tensors, config), targets="ascend310p")
    assert "the checkpoint is not compressed" in str(report)
    assert not report.all_fused


def test_formats_of_floats_are_named(tmp_path):
    write_headers(tmp_path / "model.safetensors", {"up.weight": ("F8_E4M3", (96, 64)), "norm.weight": ("BF16", (64,))})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    report = qp.check_checkpoint(tmp_path, targets="ascend910b")
    assert [r.rule for r in report.lines[0].verdicts["ascend910b"].rejects] == ["checkpoint.scheme"]
    assert "float8_e4m3fn" in str(report)


def test_a_float_checkpoint_has_nothing_to_fuse(tmp_path):
    write_headers(tmp_path / "model.safetensors", {"up.weight": ("BF16", (96, 64)), "norm.weight": ("BF16", (64,))})
    (tmp_path / "config.json").write_text("{}")
    report = qp.check_checkpoint(tmp_path)
    assert not report.all_fused
    assert "No quantized linear was found." in str(report)
    assert report.floats == ("up: bfloat16 64 x 96",)
