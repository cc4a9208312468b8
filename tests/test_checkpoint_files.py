"""Checkpoints as files: what is not right about one is said in one line, whatever is in it; what is right is read fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantpass as qp
from quantpass.checkpoints import headers
from quantpass.checkpoints.headers import CheckpointError, read_header
from tests.checkpoints import EXPERTS, LAYERS, header_of, write_235b, write_headers

TENSORS = {
    "layers.0.up.weight": ("I8", (96, 64)),
    "layers.0.up.weight_scale": ("F32", (96, 1)),
    "layers.0.norm.weight": ("F16", (64,)),
}
CONFIG = {
    "dtype": "float16",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
        },
    },
}


def folder_of(path, tensors=None, config=None):
    path.mkdir(exist_ok=True)
    write_headers(path / "model.safetensors", TENSORS if tensors is None else tensors)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return path


def changed(**tensors):
    """A header with some of its entries changed; None takes one out."""
    head, size = header_of(TENSORS)
    described = json.loads(head[8:])
    for name, entry in tensors.items():
        described[name] = described.get(name, {}) | entry
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def test_what_a_file_holds(tmp_path):
    write_headers(tmp_path / "x.safetensors", TENSORS, format="pt")
    header = read_header(tmp_path / "x.safetensors")
    found = {n: (t.dtype, t.shape, t.nbytes) for n, t in header.tensors.items()}
    assert found == {
        "layers.0.up.weight": ("int8", (96, 64), 6144),
        "layers.0.up.weight_scale": ("float32", (96, 1), 384),
        "layers.0.norm.weight": ("float16", (64,), 128),
    }
    assert header.metadata == {"format": "pt"}
    assert header.tensors["layers.0.norm.weight"].read() == bytes(128)
    assert qp.check_checkpoint(folder_of(tmp_path / "f"), targets="ascend310p").all_fused


UP = "layers.0.up.weight"
BROKEN = {
    "an empty file": (b"", "announce a header of 0 bytes"),
    "a header beyond the file": ((1 << 62).to_bytes(8, "little") + b"{}", "and the file has 10"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "no JSON": ((4).to_bytes(8, "little") + b"{,,}", "holds no JSON"),
    "no text": ((4).to_bytes(8, "little") + b"\xff\xfe\x00{", "holds no JSON"),
    "no object": ((2).to_bytes(8, "little") + b"[]", "not an object of tensors"),
    "deep JSON": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "nested too deeply"),
    "a number too long": ((9_006).to_bytes(8, "little") + b'{"a":' + b"9" * 9_000 + b"}", "holds no JSON"),
    "a name twice": ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "'a' twice"),
    "an entry that is none": ((7).to_bytes(8, "little") + b'{"a":1}', "not described"),
    "metadata that are none": ((22).to_bytes(8, "little") + b'{"__metadata__":[1,2]}', "__metadata__"),
    "a dtype that is none": (changed(**{UP: {"dtype": "I9"}}), "dtype 'I9'"),
    "a negative size": (changed(**{UP: {"shape": [-96, 64]}}), "shape"),
    "sizes that are none": (changed(**{UP: {"shape": [96.0, True]}}), "shape"),
    "a size beyond everything": (changed(**{UP: {"shape": [2**62, 2**62]}}), "data_offsets hold 6144"),
    "data beyond the file": (changed(**{UP: {"data_offsets": [0, 2**40]}}), "the file is cut off"),
    "data before themselves": (changed(**{UP: {"data_offsets": [6144, 0]}}), "the file is cut off"),
    "sizes that are not the data's": (changed(**{UP: {"shape": [96, 65]}}), "takes 6240 bytes"),
    "tensors that overlap": (changed(b={"dtype": "I8", "shape": [10], "data_offsets": [5, 15]}), "overlap"),
    "a cut-off file": (changed()[:-1], "the file is cut off"),
    "bytes of no tensor": (changed() + b"\x00", "do not fill it"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file(what, tmp_path):
    content, said = BROKEN[what]
    folder = folder_of(tmp_path / "f")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=said.replace("(", r"\(").replace("[", r"\[")) as error:
        qp.check_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_more_values_than_a_checkpoint_has(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "MOST_VALUES", 10)
    with pytest.raises(CheckpointError, match="more than 10 values"):
        qp.check_checkpoint(folder_of(tmp_path / "f"))


def config_with(**settings):
    return CONFIG | {"quantization_config": CONFIG["quantization_config"] | settings}


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "a config that is no object": (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
    "an unknown tool": (
        lambda f: (f / "config.json").write_text(json.dumps(config_with(quant_method="gtpq"))),
        "Did you mean 'gptq'",
    ),
    "no groups": (
        lambda f: (f / "config.json").write_text(json.dumps(config_with(config_groups={}))),
        "config_groups",
    ),
    "an expression that is none": (
        lambda f: (f / "config.json").write_text(json.dumps(config_with(ignore=["re:("]))),
        "no regular expression",
    ),
    "an expression that never ends": (
        lambda f: (f / "config.json").write_text(json.dumps(config_with(ignore=["re:(.*)*(.*)*(.*)*x"]))),
        "may never end",
    ),
    "a module that is ignored and quantized": (
        lambda f: (f / "config.json").write_text(json.dumps(config_with(ignore=["layers.0.up"]))),
        "no group of config_groups targets it",
    ),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no safetensors file"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"are not opened\. Save it as safetensors",
    ),
    "GGUF": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), "GGUF"),
    "a link to itself": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to(f / "model.safetensors")),
        "can't be opened",
    ),
    "links in a circle": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors").symlink_to(f / "other"),
            (f / "other").symlink_to(f / "model.safetensors"),
        ),
        "can't be opened",
    ),
    "a configuration in a link to itself": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to(f / "config.json")),
        "config.json",
    ),
    "a gigantic configuration": (lambda f: os.truncate(f / "config.json", headers.LARGEST_JSON + 1), "bytes"),
    "a gigantic header": (
        lambda f: (
            (f / "model.safetensors").write_bytes((headers.LARGEST_HEADER + 1).to_bytes(8, "little")),
            os.truncate(f / "model.safetensors", 2 * headers.LARGEST_HEADER),
        ),
        "a header of 100000001 bytes; the format allows 100000000",
    ),
    "a link to nothing": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to(f / "gone")),
        "can't be opened: No such file",
    ),
    "a pipe": (
        lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
        "is no regular file",
    ),
    "a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "is no regular file",
    ),
    "the same tensor twice": (
        lambda f: write_headers(f / "more.safetensors", TENSORS),
        "in another file",
    ),
    "an index that leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/x.safetensors"}}'),
        "a safetensors file beside the index is wanted",
    ),
    "an index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "no weight_map",
    ),
    "an index that promises more": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "model.safetensors"}}'),
        "first 'gone' in model.safetensors",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_not_right(what, tmp_path):
    edit, said = FOLDERS[what]
    folder = folder_of(tmp_path / "f")
    edit(folder)
    with pytest.raises(CheckpointError, match=said) as error:
        qp.check_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_name_is_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="nothing is fetched"):
        qp.check_checkpoint("Qwen/Qwen3-8B")
    folder_of(tmp_path / "mine")
    assert qp.check_checkpoint("mine").total == 1
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        qp.check_checkpoint("mine/config.json")


def test_links_of_a_download_cache_are_followed(tmp_path):
    blobs, folder = folder_of(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(blobs / name)
    assert qp.check_checkpoint(folder).total == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp": 0}, "tp is 0"),
        ({"mode": "fast"}, "'graph'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"targets": "ascend310"}, "Did you mean"),
        ({"targets": ()}, "targets is empty"),
        ({"allow": ("qmm.k",)}, "can't be lifted"),
    ],
)
def test_settings_that_are_not_accepted(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        qp.check_checkpoint(folder_of(tmp_path / "f"), **settings)


# -- whatever the bytes are ----------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
SMALL = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def answers(folder):
    """The report, or the clear error in one line; anything else is raised."""
    try:
        return str(qp.check_checkpoint(folder, targets="ascend310p", tp=2, dtype="float16"))
    except CheckpointError as error:
        return "" if "\n" in str(error) else str(error)


@SMALL
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.just(100))
def test_any_bytes(tmp_path, content, length):
    folder = folder_of(tmp_path / "f")
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content)
    assert answers(folder)


@SMALL
@given(st.data())
def test_headers_with_anything_in_them(tmp_path, data):
    described = json.loads(header_of(TENSORS)[0][8:])
    name = data.draw(st.sampled_from(sorted(described)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    described[name][key] = data.draw(VALUES)
    text = json.dumps(described).encode()
    folder = folder_of(tmp_path / "f")
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(header_of(TENSORS)[1]))
    assert answers(folder)


METHODS = ("compressed-tensors", "gptq", "awq", "torchao", "bitsandbytes", "quanto", "hqq", "fp8")
PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "torchao": ("_weight_qdata", "_weight_scale"),
    "bitsandbytes": ("weight", "SCB", "weight.quant_state.bitsandbytes__nf4"),
    "quanto": ("weight._data", "weight._scale", "weight._data._data"),
    "hqq": ("W_q", "nbits", "axis", "shape", "group_size"),
    "fp8": ("weight",),
}
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 12, 64, 96]), max_size=3).map(tuple)
KINDS = st.sampled_from(["I8", "I32", "I64", "F16", "F32", "U8", "F8_E4M3"])
KEYS = (
    "bits",
    "group_size",
    "num_bits",
    "config_groups",
    "ignore",
    "dynamic",
    "version",
    "format",
    "llm_int8_threshold",
)


@SMALL
@given(st.data())
def test_any_configuration_beside_any_tensors(tmp_path, data):
    method = data.draw(st.sampled_from(METHODS))
    parts = data.draw(st.lists(st.sampled_from(PARTS[method]), min_size=1, unique=True))
    tensors = {f"layers.0.o_proj.{part}": (data.draw(KINDS), data.draw(SHAPES)) for part in parts}
    base = config_with()["quantization_config"] if method == "compressed-tensors" else {"bits": 4, "group_size": 32}
    strange = data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2))
    folder = folder_of(tmp_path / "f", tensors, {"quantization_config": {**base, "quant_method": method, **strange}})
    assert answers(folder)


@SMALL
@given(st.dictionaries(st.sampled_from(["layers.0.up.weight", "group_size", "kv_quant_type"]), VALUES))
def test_any_description_of_ascends(tmp_path, description):
    folder = folder_of(tmp_path / "f")
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    assert answers(folder)


# -- large ---------------------------------------------------------------------------------------------------------

LARGE = """
import sys, time
import quantpass as qp
begun = time.process_time()
report = qp.check_checkpoint(sys.argv[1], targets=["ascend310p", "ascend910b"], tp=8)
print(report.to_json())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program alone
taken = time.process_time() - begun
print(int(peak.split()[1]) // 1024, "torch" in sys.modules, taken, file=sys.stderr)
"""


def test_a_checkpoint_of_235_billion_parameters(tmp_path):
    write_235b(tmp_path / "large")
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path / "large")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mebibytes, torch_loaded, seconds = done.stderr.split()
    assert int(mebibytes) < 500
    assert float(seconds) < 10  # 5 on a machine of its own; of processor time, which other programs lengthen
    assert torch_loaded == "False"
    report = json.loads(done.stdout)
    assert report["total"] == LAYERS * (4 + 3 * EXPERTS)
    assert len(report["linears"]) == 7
    by_name = {line["name"]: line for line in report["linears"]}
    experts = by_name["model.layers.{0..93}.mlp.experts.{0..127}.down_proj"]
    assert (experts["count"], experts["k"], experts["n"]) == (LAYERS * EXPERTS, 192, 4096)
    assert experts["verdicts"]["ascend910b"]["op"] == "npu_grouped_matmul"
    keys = by_name["model.layers.{0..93}.self_attn.k_proj"]
    assert (keys["k"], keys["n"]) == (4096, 128)  # 4 heads for 8 ranks: each is held twice
    assert report["floats"][0] == "model.layers.{0..93}.mlp.gate x94: bfloat16 4096 x 128"
