"""What one rank of a tensor-parallel engine holds of a linear.

By the names that transformers' models give their projections: those that come first in a block are split along N
(column-parallel), those that come last along K (row-parallel), as vLLM, SGLang and transformers' own plans do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantpass.basics.reasons import refuse
from quantpass.basics.reject import Reject
from quantpass.checkpoints.scheme import Quantized

COLUMN, ROW, WHOLE = "column-parallel", "row-parallel", "whole on each rank"

_COLUMN = frozenset(
    (
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "qkv",
            "query",
            "key",
            "value",
            "query_key_value",
            "Wqkv",
            "c_attn",
        ),
        *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "wi", "wi_0", "wi_1", "dense_h_to_4h"),
        *("q_b_proj", "kv_b_proj", "lm_head", "in_proj_qkvz", "in_proj_ba"),
    )
)
_ROW = frozenset(("o_proj", "down_proj", "out_proj", "w2", "fc2", "c_proj", "wo", "dense_4h_to_h"))
_OF_KEYS = frozenset(("k_proj", "v_proj", "key", "value"))


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part.

    Attributes:
        quantized: the linear with the sizes of that part.
        place: :data:`COLUMN`, :data:`ROW` or :data:`WHOLE`.
        parts: into how many parts the weight is cut; there are fewer than ranks where several hold the same.
        problem: why it can't be cut so.
    """

    quantized: Quantized
    place: str = WHOLE
    parts: int = 1
    problem: Reject | None = None


def shard_of(q: Quantized, name: str, ranks: int, kv_heads: int | None) -> Shard:
    """A rank's part of a linear.

    Args:
        q: the linear.
        name: of its module.
        ranks: of the tensor-parallel group.
        kv_heads: the model's heads of keys and values, of which several ranks hold the same where they are more.
    """
    last = name.rpartition(".")[2]
    if ranks == 1 or last not in _COLUMN | _ROW or not q.k:
        return Shard(q)
    if last in _ROW:
        problem = _cut(q.k, ranks, "K", q.packed_k) or _groups(q, ranks)
        return Shard(replace(q, k=q.k // ranks), ROW, ranks, problem)
    parts = ranks
    if last in _OF_KEYS and kv_heads is not None and kv_heads < ranks and ranks % kv_heads == 0:
        parts = kv_heads
    problem = _cut(q.n, parts, "N", q.packed_n)
    return Shard(replace(q, n=q.n // parts), COLUMN, parts, problem)


def _cut(size: int, parts: int, what: str, packed: int) -> Reject | None:
    if size % parts:
        hint = f"use {_fewer(size, parts)} ranks, which divide it"
        return refuse("checkpoint.shard.size", f"{what} is {size}, for {parts} ranks", hint=hint)
    if size // parts % packed and not size % packed:
        fact = f"a shard of {size // parts} of {what}, and a stored element holds {packed}"
        return refuse("checkpoint.shard.packed", fact)
    return None


def _groups(q: Quantized, ranks: int) -> Reject | None:
    if q.weight is None or not q.weight.group:
        return None
    if q.weight.ordered:
        return refuse("checkpoint.shard.order", f"groups of {q.weight.group} rows, for {ranks} ranks")
    if q.k // ranks % q.weight.group:
        groups = -(-q.k // q.weight.group)
        padded = -(-groups // ranks) * ranks * q.weight.group
        hint = (
            f"use {_fewer(groups, ranks)} ranks, which divide its {groups} groups, or quantize per channel, or pad K "
            f"with zeros to {padded} before quantizing"
        )
        fact = f"a shard of {q.k // ranks} rows, in groups of {q.weight.group}"
        return refuse("checkpoint.shard.group", fact, hint=hint)
    return None


def _fewer(size: int, ranks: int) -> int:
    """The most ranks, of no more than there are, that divide ``size``."""
    return next(r for r in range(min(size, ranks), 0, -1) if size % r == 0)
