"""Checkpoints for tests: folders as tools write them, and files of headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {"I8": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "F8_E4M3": 1}


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]], **metadata: str) -> tuple[bytes, int]:
    """A safetensors header of tensors given by dtype and shape, and how many bytes of data belong to it."""
    described: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start = end
        size = BYTES[dtype]
        for s in shape:
            size *= s
        end = start + size
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text, end


def write_headers(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], **metadata: str) -> None:
    """A file with a header and a hole where its data would be: zeros that take no space on the disk."""
    header, size = header_of(tensors, **metadata)
    path.write_bytes(header)
    os.truncate(path, len(header) + size)


def write_folder(folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any], **files: Any) -> Path:
    """A checkpoint of tensors (PyTorch's) with its configuration; ``files`` are more of JSON, by name without suffix."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    metadata = files.pop("metadata", None)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


EXPERTS, LAYERS, SHARDS, HIDDEN, INNER = 128, 94, 150, 4096, 1536


def write_235b(folder: Path) -> Path:
    """Headers of a W8A8 checkpoint of 235 billion parameters: 94 layers, 128 experts each, 150 files with an index."""
    kinds: dict[str, str] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}

    def plain(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"], kinds[f"{name}.weight"] = ("BF16", shape), "FLOAT"

    def quantized(name: str, n: int, k: int) -> None:
        parts = {"weight": ("I8", (n, k)), "weight_scale": ("F32", (n, 1)), "weight_offset": ("F32", (n, 1))}
        for part, described in parts.items():
            tensors[f"{name}.{part}"], kinds[f"{name}.{part}"] = described, "W8A8_DYNAMIC"

    plain("model.embed_tokens", 151936, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, n, k in (("q", 8192, HIDDEN), ("k", 512, HIDDEN), ("v", 512, HIDDEN), ("o", HIDDEN, 8192)):
            quantized(f"{at}.self_attn.{name}_proj", n, k)
        plain(f"{at}.mlp.gate", EXPERTS, HIDDEN)
        plain(f"{at}.input_layernorm", HIDDEN)
        for expert in range(EXPERTS):
            for name, n, k in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
                quantized(f"{at}.mlp.experts.{expert}.{name}_proj", n, k)
    plain("lm_head", 151936, HIDDEN)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    each = -(-len(names) // SHARDS)
    weight_map = {}
    for i in range(SHARDS):
        file = f"quant_model_weight-{i + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[i * each : (i + 1) * each]
        write_headers(folder / file, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "quant_model_weight.safetensors.index.json").write_text(json.dumps(index))
    description = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0, **kinds}
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    config = {"model_type": "qwen3_moe", "torch_dtype": "bfloat16", "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
