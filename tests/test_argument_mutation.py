"""Every argument of every operator that a reader knows, changed: refused, or still right.

Nothing here names an operator. The operators come from the reader tables, their arguments from their schemas, the
changed values from the arguments' types. A reader that is added without a spelling that contains its operator fails
:func:`test_every_operator_is_in_a_spelling`.
"""

import collections
import os
import random

import pytest
import torch
from torch._ops import OpOverload
from torch.fx import Node

torchao = pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
import torch.ao.quantization.fx._decomposed  # the quantized_decomposed operators

from quantpass.graph.decode import decoders
from quantpass.graph.schema import arguments_of, bind, qualified_name
from quantpass.patterns import default_dialects
from tests.oracle import Unsupported, copied, judge
from tests.spellings import all_spellings, with_values

CANNOT_RUN_HERE = {
    "quanto::qbytes_mm": "optimum-quanto is not installed",
    "quark::scaled_fake_quantize": "amd-quark is not installed; tests/test_quark.py has a stand-in",
    "bitsandbytes::int8_vectorwise_dequant": "bitsandbytes is not installed",
    "bitsandbytes::int8_scaled_mm": "bitsandbytes is not installed",
    "bitsandbytes::int8_linear_matmul": "bitsandbytes is not installed",
    "bitsandbytes::gemv_4bit": "bitsandbytes is not installed",
    "aten::mm.dtype": "runs on CUDA only",
    "aten::_weight_int4pack_mm": "runs on CUDA only; its reader always refuses",
    "aten::_dyn_quant_matmul_4bit": "runs on ARM only; its reader always refuses",
}
"""Operators without a spelling, and why."""

TRIES = int(os.environ.get("QUANTPASS_MUTATIONS", "8"))
"""How many changes of each argument of each operator are judged, over all spellings; 0 for all."""

LEAST_FUSED = 0.5
"""Of the mutants of an operator that run, the share that has to be fused (and right)."""

MOST_DROPPED = 0.9
"""Of the mutants of an operator, the share that may be graphs that do not run."""

SPELLINGS = all_spellings()


def known_operators():
    dialects = default_dialects()
    names = set()
    for table in (decoders(), *(getattr(dialects, field) for field in dialects.__slots__)):
        names |= {key if isinstance(key, str) else qualified_name(key) for key in table.readers()}
    return names


def test_every_operator_is_in_a_spelling():
    spelled = set()
    for spelling in SPELLINGS.values():
        nodes = spelling.graph().graph.nodes
        spelled |= {qualified_name(n.target) for n in nodes if isinstance(n.target, OpOverload)}
    missing = known_operators() - spelled - set(CANNOT_RUN_HERE)
    assert not missing, f"add a spelling (tests/spellings.py) that contains {sorted(missing)}"
    stale = set(CANNOT_RUN_HERE) & spelled
    assert not stale, f"no exception is needed for {sorted(stale)}"


# -- values ----------------------------------------------------------------------------------------------------------

DTYPES = (
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def others(value, kind, optional):
    """Other values for an argument of type ``kind``."""
    found = [None] if optional and value is not None else []
    if "Tensor" in kind and "[]" not in kind and not isinstance(value, Node | type(None)):
        kind = "number"  # a number where a tensor is expected
    if kind in ("int", "SymInt"):
        found += [0, 1, -1, 2, 3, 127, -128, 255]
        found += [value + 1, value - 1, -value] if isinstance(value, int) else []
    elif kind == "float":
        found += [0.0, 1.0, -1.0, 0.5]
        found += [value * 2, -value, value / 3, value + 0.25] if isinstance(value, int | float) else []
    elif kind in ("number", "Scalar"):
        found += [0, 1, -1, 2, 0.5, -1.5, 128, 300]
        found += [value + 1, value * 2, -value, value + 0.25] if isinstance(value, int | float) else []
    elif kind == "bool":
        found += [not value]
    elif kind in ("ScalarType", "Optional[ScalarType]"):
        found += DTYPES
    elif "int" in kind.lower() and ("[]" in kind or "List" in kind):
        found += list(_lists(value)) if isinstance(value, list | tuple) else [[0], [-1], [1, 1]]
    elif "Layout" in kind:
        found += [torch.strided]
    elif "MemoryFormat" in kind:
        found += [torch.contiguous_format, torch.preserve_format, torch.channels_last]
    elif "Device" in kind:
        found += [torch.device("cpu"), torch.device("meta")]
    elif kind == "str":
        found += ["", "same"]
    return [v for v in found if not (type(v) is type(value) and v == value)]


def _lists(value):
    value = list(value)
    yield value[::-1]
    yield value[1:] + value[:1]
    yield sorted(range(len(value)))
    yield [-1] * min(1, len(value)) + value[1:]
    for i in range(len(value)):
        for other in (0, 1, 2, -1):
            yield [*value[:i], other, *value[i + 1 :]]
        if isinstance(value[i], int):
            yield [*value[:i], value[i] * 2, *value[i + 1 :]]
    yield [*value, 1]
    yield [1, *value]
    yield value[:-1]


def tensor_mutants(graph, node, source):
    """Ways to put something else in the place of the tensor ``source`` of ``node``."""
    fake = source.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return
    earlier = [n for n in graph.nodes if n < node and n is not source and isinstance(n.meta.get("val"), torch.Tensor)]
    same = [n for n in earlier if n.meta["val"].shape == fake.shape]
    for other in [*same[-3:], *random.Random(0).sample(earlier, min(3, len(earlier)))]:
        yield f"{other.name} instead", lambda g, s, other=other: other
    aten = torch.ops.aten

    def through(target, *args, **kwargs):
        return lambda g, s: g.call_function(target, (s, *args), kwargs)

    yield "negated", through(aten.neg.default)
    yield "doubled", through(aten.mul.Tensor, 2)
    yield "plus one", through(aten.add.Tensor, 1)
    yield "plus a quarter", through(aten.add.Tensor, 0.25)
    for dtype in DTYPES:
        if dtype != fake.dtype:
            yield f"as {dtype}", through(aten._to_copy.default, dtype=dtype)
    for d, size in enumerate(fake.shape):
        if size > 1:
            yield f"flipped along {d}", through(aten.flip.default, [d])
            yield f"first of {d}", through(aten.slice.Tensor, d, 0, 1)
    if fake.dim() == 2:
        yield "transposed", through(aten.t.default)
    if fake.dim() == 1:
        yield "as a column", through(aten.unsqueeze.default, 1)
    yield "with a leading dimension", through(aten.unsqueeze.default, 0)


def changes_of(gm, node, argument):
    """``(description, change)`` for one argument of one node."""
    (schema,) = (a for a in node.target._schema.arguments if a.name == argument)
    value, kind = bind(node)[argument], str(schema.real_type)
    optional = kind.startswith("Optional") or (schema.has_default_value() and schema.default_value is None)
    found = [(f"{v!r}", lambda g, s, v=v: v) for v in others(value, _inner(kind), optional)]
    if isinstance(value, Node):
        found += list(tensor_mutants(gm.graph, node, value))
    elif value is None and "Tensor" in kind:
        earlier = [n for n in gm.graph.nodes if n < node and isinstance(n.meta.get("val"), torch.Tensor)]
        found += [(o.name, lambda g, s, o=o: o) for o in earlier]
    return found


def _inner(kind):
    return kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind


def changed(gm, name, argument, value, change):
    fresh = copied(gm)
    twin = dict(zip(gm.graph.nodes, fresh.graph.nodes, strict=True))
    node = next(n for n in fresh.graph.nodes if n.name == name)
    with fresh.graph.inserting_before(node):
        new = change(fresh.graph, twin[value] if isinstance(value, Node) else value)
    new = twin.get(new, new) if isinstance(new, Node) else new
    bound = bind(node) | {argument: new}
    schema = node.target._schema.arguments
    node.args = tuple(bound[a.name] for a in schema if not a.kwarg_only)
    node.kwargs = {a.name: bound[a.name] for a in schema if a.kwarg_only}
    return with_values(fresh)


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places():
    """Operator to the ``(spelling, graph, node)`` that contain it."""
    found = collections.defaultdict(list)
    for spelling in SPELLINGS.values():
        gm = spelling.graph()
        for node in gm.graph.nodes:
            if isinstance(node.target, OpOverload):
                found[qualified_name(node.target)].append((spelling, gm, node))
    return found


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_fuses(name):
    spelling = SPELLINGS[name]
    assert judge(spelling.graph(), spelling.args).verdict == "fused"


@pytest.mark.parametrize("operator", sorted(known_operators() - set(CANNOT_RUN_HERE)))
def test_argument_mutation(operator, places):
    counts = collections.Counter()
    for argument, _ in arguments_of(places[operator][0][2].target):
        mutants = [
            (spelling, gm, node, what, change)
            for spelling, gm, node in places[operator]
            for what, change in changes_of(gm, node, argument)
        ]
        random.Random(f"{operator} {argument}").shuffle(mutants)
        judged = 0
        for spelling, gm, node, what, change in mutants[: 4 * TRIES or None]:
            verdict = _verdict(spelling, gm, node, argument, what, change)
            counts[verdict] += 1
            judged += verdict != "dropped"
            if judged == TRIES:
                break
    print(operator, dict(counts))
    assert counts["dropped"] <= MOST_DROPPED * counts.total(), f"{operator}: hardly a mutant runs: {counts}"
    assert counts["fused"] >= LEAST_FUSED * (counts.total() - counts["dropped"]), f"{operator}: {counts}"


def _verdict(spelling, gm, node, argument, what, change):
    mutant = changed(gm, node.name, argument, bind(node)[argument], change)
    try:
        return judge(mutant, spelling.args).verdict
    except Unsupported:
        return "unsupported"
    except Exception as error:
        text = f"{spelling.name}: {node.name}.{argument} = {what} (was {bind(node)[argument]})"
        raise AssertionError(f"{text}\n{error}") from error
