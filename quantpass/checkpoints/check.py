"""From a folder to the verdict on every linear in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from quantpass.basics.folding import folded
from quantpass.basics.torch_types import BF16, F16, F32, dtype_name
from quantpass.checkpoints.calls import Engine
from quantpass.checkpoints.folder import Checkpoint, Module, open_checkpoint
from quantpass.checkpoints.formats import format_of
from quantpass.checkpoints.headers import CheckpointError
from quantpass.checkpoints.report import CheckpointReport, Line
from quantpass.checkpoints.shards import Shard, shard_of
from quantpass.checkpoints.verdicts import Verdict, verdict_on, verdict_on_experts
from quantpass.chips import chip_named
from quantpass.chips.legality import REFIT_OPT_IN, checked_allow
from quantpass.chips.rules import Chip

_FLOATS = (F16, BF16, F32)
_EMBEDDINGS = frozenset(("wte", "wpe", "shared", "tok_embeddings"))


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked, validated.

    Attributes:
        targets: chip or SoC names.
        ranks: of the tensor-parallel group.
        mode: ``"graph"`` or ``"eager"``.
        dtype: of activations and results; None for the checkpoint's own.
        bias: of the bias; None for what the operator takes.
        allow: rules to lift.
    """

    targets: tuple[str, ...]
    ranks: int = 1
    mode: str = "graph"
    dtype: str | None = None
    bias: str | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets is empty; give one or several chips, e.g. targets=('ascend310p',)")
        for target in self.targets:
            chip_named(target)
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 1:
            raise ValueError(f"tp is {self.ranks!r}; give the number of tensor-parallel ranks, 1 or more")
        if self.mode not in ("graph", "eager"):
            raise ValueError(f"mode is {self.mode!r}; accepted: 'graph' (GE), 'eager' (aclnn)")
        if self.dtype is not None and dtype_name(self.dtype) not in _FLOATS:
            raise ValueError(f"dtype is {self.dtype!r}; accepted: {', '.join(map(repr, _FLOATS))}")
        if self.bias is not None and dtype_name(self.bias) not in (*_FLOATS, "int32"):
            raise ValueError(f"bias_dtype is {self.bias!r}; accepted: 'int32', {', '.join(map(repr, _FLOATS))}")
        object.__setattr__(self, "dtype", None if self.dtype is None else dtype_name(self.dtype))
        object.__setattr__(self, "bias", None if self.bias is None else dtype_name(self.bias))
        object.__setattr__(self, "allow", checked_allow(self.allow))


@dataclass(frozen=True, slots=True)
class _Found:
    """Modules of one scheme, size and split."""

    shard: Shard
    experts: int
    stored: int
    names: list[str] = field(default_factory=list)


def check_folder(path: str | Path, settings: Settings) -> CheckpointReport:
    """The verdict on every quantized linear of a checkpoint in a folder.

    Raises:
        CheckpointError: it can't be read.
    """
    checkpoint = open_checkpoint(path)
    tool = format_of(checkpoint)
    kv_heads = checkpoint.setting("num_key_value_heads", "num_attention_heads")
    kv_heads = kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else None
    of_layer = Counter(map(_before_expert, checkpoint.modules))
    del of_layer[""]
    found: dict[object, _Found] = {}
    floats: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for module in checkpoint.modules.values():
        q = None if _is_embedding(module.name) else tool.read(module)
        if q is None:
            _note_float(module, floats)
            continue
        experts = q.experts or of_layer.get(_before_expert(module.name), 0)
        shard = shard_of(q, module.name, settings.ranks, kv_heads)
        key = (module.name.rpartition(".")[2], shard, experts, module.nbytes)
        found.setdefault(key, _Found(shard, experts, module.nbytes)).names.append(module.name)
    dtype = settings.dtype or _own_dtype(checkpoint)
    engine = Engine(dtype, settings.bias, settings.mode, settings.allow)
    chips = {t: chip_named(t) for t in settings.targets}
    lines = tuple(line for f in found.values() for line in _lines(f, chips, engine))
    return CheckpointReport(
        str(checkpoint.path),
        tool.title,
        settings.targets,
        settings.mode,
        settings.ranks,
        dtype,
        lines,
        tuple(f"{fold}: {d} {k} x {n}" for (d, (k, n)), names in floats.items() for fold in folded(names)),
        tuple(_assumed(settings, dtype, kv_heads)),
        _gains(lines, found.values(), chips, engine),
        tool.notes,
    )


def _before_expert(name: str) -> str:
    """The layer and the projection of a routed expert, without its number; empty for other modules."""
    parts = name.split(".")
    at = next((i for i, (a, b) in enumerate(pairwise(parts)) if a in ("experts", "expert") and b.isdigit()), None)
    return "" if at is None else ".".join((*parts[: at + 1], *parts[at + 2 :]))


def _own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that the model runs in: what ``config.json`` says, or that of its norms."""
    named = dtype_name(checkpoint.setting("dtype", "torch_dtype"))
    if named in _FLOATS:
        return str(named)
    counts: dict[str, int] = {}
    for module in checkpoint.modules.values():
        weight = module.tensors.get("weight")
        if weight is not None and len(weight.shape) == 1 and weight.dtype in _FLOATS:
            counts[weight.dtype] = counts.get(weight.dtype, 0) + 1
    if not counts:
        raise CheckpointError(
            f"{checkpoint.path}: nothing says in which dtype the model runs: give dtype='float16' or so"
        )
    return max(counts, key=lambda d: counts[d])


def _note_float(module: Module, floats: dict[tuple[str, tuple[int, ...]], list[str]]) -> None:
    weight = module.tensors.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype not in _FLOATS or _is_embedding(module.name):
        return
    n, k = weight.shape
    floats.setdefault((weight.dtype, (k, n)), []).append(module.name)


def _is_embedding(name: str) -> bool:
    """True for a table of rows, which nothing multiplies."""
    last = name.rpartition(".")[2]
    return "embed" in last or last in _EMBEDDINGS


def _lines(found: _Found, chips: Mapping[str, Chip], engine: Engine) -> Iterable[Line]:
    q = found.shard.quantized
    verdicts = {t: _verdict(found, chip, engine) for t, chip in chips.items()}
    each, parts = max(1, q.experts), found.shard.parts
    size = 4 if engine.dtype == F32 else 2
    for fold in folded(found.names):
        yield Line(
            fold.text,
            fold.count * each,
            found.experts,
            f"{q.scheme}; {found.experts} experts" if found.experts else q.scheme,
            q.k,
            q.n,
            found.shard.place if parts > 1 else "",
            q.k * q.n * size,
            -(-found.stored // (parts * each)),
            verdicts,
            q.notes,
        )


def _verdict(found: _Found, chip: Chip, engine: Engine) -> Verdict:
    if found.experts:
        return verdict_on_experts(found.shard, found.experts, chip, engine)
    return verdict_on(found.shard, chip, engine)


def _assumed(settings: Settings, dtype: str, kv_heads: int | None) -> Iterable[str]:
    yield f"x and the results are {dtype}{'' if settings.dtype else ', as the checkpoint says'} (dtype)"
    bias = settings.bias or "int32 beside an int64 scale word, else a float that the operator takes"
    yield f"a bias is {bias} (bias_dtype)"
    yield "scales and biases hold no value that no operator takes (zero, infinite): `quantpass explain` looks at values"
    yield "each projection is a matmul by itself; an engine that merges some (q, k, v; gate, up) has the sum of their N"
    if settings.ranks > 1:
        heads = f", keys and values by {kv_heads} heads" if kv_heads else ""
        yield f"names say how a weight is split: q, k, v, gate, up along N, o, down along K{heads}; others are not (tp)"


def _gains(
    lines: Sequence[Line], found: Iterable[_Found], chips: Mapping[str, Chip], engine: Engine
) -> dict[str, tuple[str, ...]]:
    total, found = sum(line.count for line in lines), list(found)
    gains: dict[str, tuple[str, ...]] = {}
    for target, chip in chips.items():
        fused = sum(line.count for line in lines if line.verdicts[target].fused)
        said = []
        if engine.dtype != F16 and fused < total:
            half = replace(engine, dtype=F16)
            more = sum(len(f.names) * max(1, f.shard.quantized.experts) for f in found if _verdict(f, chip, half).fused)
            said += [f"{more} of {total} in a model of float16 (dtype)"] if more > fused else []
        asked = {o for line in lines for o in line.verdicts[target].offers}
        for allow in sorted(asked, key=lambda a: (len(a), a)):
            gained = sum(x.count for x in lines if any({*o} <= {*allow} for o in x.verdicts[target].offers))
            refit = any(a.partition(":")[0] == REFIT_OPT_IN for a in allow)
            condition = ", where the re-fitted weights are near enough: known when they are read" if refit else ""
            said.append(f"{fused + gained} of {total} with allow={allow!r}{condition}")
        gains[target] = tuple(said)
    return gains
