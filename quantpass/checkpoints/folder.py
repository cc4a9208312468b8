"""A folder with a checkpoint: its configurations and the tensors of its modules. Nothing is fetched or executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpass.checkpoints.headers import CheckpointError, StoredTensor, read_header, read_json

_OF_TOOLS = ("quantize_config.json", "quant_config.json", "quanto_qmap.json", "hf_quant_config.json")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Module:
    """A module's own tensors: ``weight_packed`` and ``weight_scale`` of ``model.layers.0.mlp.up_proj``."""

    name: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all tensors but the bias, which is no weight."""
        return sum(t.nbytes for name, t in self.tensors.items() if name != "bias")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        path: the folder.
        config: ``config.json``; empty where there is none.
        files: other configurations that were found, by file name.
        modules: the modules by name, in the order of the files.
        metadata: what the writers of the files put beside the tensors.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Any]
    modules: Mapping[str, Module]
    metadata: Mapping[str, str]

    def setting(self, *names: str) -> Any:
        """The first of ``names`` in ``config.json``, or in the part of it for the language model."""
        inner = [self.config.get(p) for p in ("text_config", "llm_config", "language_config")]
        for part in (self.config, *(p for p in inner if isinstance(p, dict))):
            for name in names:
                if part.get(name) is not None:
                    return part[name]
        return None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the configurations and headers of a folder.

    Raises:
        CheckpointError: no such folder, nothing in it that is read, or files that are broken or contradict each other.
    """
    folder = Path(path)
    names = _names_in(folder)
    described = [n for n in names if n.startswith("quant_model_description") and n.endswith(".json")]
    others = [n for n in (*_OF_TOOLS, *described) if n in names]
    if "config.json" not in names and not others:
        raise CheckpointError(f"{folder} has no config.json: give the folder of a model in Hugging Face's layout")
    config = _object(folder / "config.json") if "config.json" in names else {}
    files = {name: _object(folder / name) for name in others}
    modules: dict[str, Module] = {}
    metadata: dict[str, str] = {}
    for name, tensor in _tensors(folder, names, metadata):
        own, last = split_name(name)
        module = modules.get(own)
        if module is None:
            module = modules[own] = Module(own)
        module.tensors[last] = tensor
    return Checkpoint(folder, config, files, modules, metadata)


def split_name(name: str) -> tuple[str, str]:
    """A tensor's module, and its name there; the parts of a weight (``weight._data``, ``weight.absmax``) stay whole."""
    own, dot, part = name.partition(".weight.")
    if dot:
        return own, f"weight.{part}"
    own, _, last = name.rpartition(".")
    return own, last


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except NotADirectoryError as error:
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and its config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {folder} that can be read; nothing is fetched: download the checkpoint first, e.g. "
            f"with `hf download NAME --local-dir DIR`"
        ) from error


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; an object is wanted")
    return found


def _tensors(folder: Path, names: list[str], metadata: dict[str, str]) -> Iterator[tuple[str, StoredTensor]]:
    index = _index(folder, names)
    shards = list(dict.fromkeys(index.values())) if index is not None else _unindexed(names)
    if not shards:
        raise CheckpointError(_nothing(folder, names))
    seen: set[str] = set()
    for shard in shards:
        header = read_header(folder / shard)
        metadata.update(header.metadata)
        for name, tensor in header.tensors.items():
            if index is not None and index.get(name, shard) != shard:
                continue  # the index has it elsewhere
            if name in seen:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {shard} and in another file, and no index chooses"
                )
            seen.add(name)
            yield name, tensor
    missing = [name for name in index or () if name not in seen]
    if missing:
        assert index is not None
        raise CheckpointError(
            f"{folder}: the index has {len(missing)} tensors that its files do not hold, first {missing[0]!r} in "
            f"{index[missing[0]]}"
        )


def _index(folder: Path, names: list[str]) -> dict[str, str] | None:
    """Tensor to file; None where no index is there."""
    found = [n for n in names if n.endswith(".safetensors.index.json")]
    if not found:
        return None
    preferred = [n for n in found if n.startswith("quant_model_weight")] or [n for n in found if n.startswith("model.")]
    path = folder / (preferred or found)[0]
    weight_map = _object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensors to files")
    plain: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: {name!r} lies in {file!r}, which is no file's name")
        if file not in plain:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path}: {name!r} lies in {file!r}; a safetensors file beside the index is wanted"
                )
            plain.add(file)
    return weight_map


def _unindexed(names: list[str]) -> list[str]:
    found = [n for n in names if n.endswith(".safetensors")]
    return [n for n in found if not n.startswith("consolidated")] or found


def _nothing(folder: Path, names: list[str]) -> str:
    pickled = [n for n in names if n.endswith(_PICKLED)]
    if pickled:
        return (
            f"{folder} holds pickled weights ({pickled[0]}), which are programs and are not opened. Save it as "
            "safetensors: model.save_pretrained(DIR) in transformers writes them."
        )
    if any(n.endswith(".gguf") for n in names):
        return (
            f"{folder} holds GGUF weights, whose block formats no fused operator takes; give a safetensors checkpoint"
        )
    return f"{folder} holds no safetensors file"
