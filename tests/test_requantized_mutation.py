"""Every argument of every node of an activation's quantization, changed, where the operators quantize by their own rule.

The changes are those of :mod:`tests.test_argument_mutation`: a graph that means something else keeps its own
quantization, is refused, or is right within what the sites state.
"""

import collections
import importlib
import os
import random
from functools import partial

import pytest
import torch
from torch._ops import OpOverload

from quantpass.graph.schema import arguments_of, bind
from tests.oracle import Unsupported, judge
from tests.spellings import F16, F32, Spelling, aten, floats, integers, scalar, scales, to
from tests.test_argument_mutation import changed, changes_of

TRIES = int(os.environ.get("QUANTPASS_MUTATIONS", "1"))
"""How many changes of each argument of each node are judged; 0 for all."""

M, K, N = 20, 32, 24
X = floats(M, K).half()
W, WS = integers(N, K), scales(N)
SMOOTH = scales(K) * 100

judged = partial(judge, target="ascend910b", numerics="vendor")

# -- from x to its codes and their scale -------------------------------------------------------------------------------


def rounded(t, low=-128, high=127):
    return aten.clamp.default(aten.round.default(t), low, high)


def top(x, dims=(-1,)):
    return aten.amax.default(aten.abs.default(x), list(dims), True)


def rows(x):
    s = aten.div.Tensor(aten.clamp_min.default(top(to(x, F32)), 1e-5), 127.0)
    return to(rounded(aten.div.Tensor(x, s)), torch.int8), s


def rows_of_both_ends(x):
    low = aten.neg.default(aten.clamp_max.default(aten.amin.default(x, [1], True), 0))
    high = aten.clamp_min.default(aten.amax.default(x, [1], True), 0)
    s = aten.clamp.default(aten.mul.Tensor(to(aten.maximum.default(low, high), F32), 1 / 127.5), 1e-7)
    return to(rounded(aten.mul.Tensor(to(x, F32), aten.reciprocal.default(s))), torch.int8), s


def rows_unsigned(x):
    s = aten.div.Scalar(top(to(x, F32)), 127.0)
    q = to(aten.clamp.default(aten.add.Tensor(aten.round.default(aten.div.Tensor(x, s)), 128), 0, 255), torch.uint8)
    return to(aten.sub.Tensor(to(q, torch.int32), 128), torch.int8), s


def rows_kept_from_zero(x):
    s = aten.div.Tensor(top(to(x, F32)), 127.0)
    s = aten.where.self(aten.eq.Scalar(s, 0), scalar(1.0), s)
    return to(rounded(aten.div.Tensor(x, s)), torch.int8), s


def whole(x):
    s = aten.div.Tensor(aten.max.default(aten.abs.default(to(x, F32))), 127.0)
    return to(rounded(aten.div.Tensor(x, s)), torch.int8), s


def static(x):
    return to(rounded(aten.mul.Tensor(to(x, F32), 1 / 0.03)), torch.int8), scalar(0.03)


def static_with_a_zero_point(x):
    q = to(rounded(aten.add.Tensor(aten.div.Tensor(to(x, F32), 0.03), 9)), torch.int8)
    return aten.sub.Tensor(to(q, torch.int16), 9), scalar(0.03)


def smoothed(quantize, factor, divide):
    def quantized(x):
        return quantize((aten.div if divide else aten.mul).Tensor(to(x, F32), factor))

    return quantized


def by_name(x):
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # the operators
    qd = torch.ops.quantized_decomposed
    s, z = qd.choose_qparams_symmetric.tensor(x, -127, 127, 1e-5, torch.int8)
    return qd.quantize_per_tensor.tensor(x, s, z, -127, 127, torch.int8), to(s, F32)


def by_torchao(x):
    pytest.importorskip("torchao", reason="torchao is not installed (pip install 'quantpass[test]')")
    ao = torch.ops.torchao
    s, z = ao.choose_qparams_affine.default(x, "SYMMETRIC", [1, K], torch.int8, -127, 127, 1e-5, F32, torch.int32)
    return ao.quantize_affine.default(x, [1, K], s, z, torch.int8, -127, 127), aten.view.default(s, [M, 1])


QUANTIZATIONS = {
    "rows": rows,
    "rows of both ends": rows_of_both_ends,
    "rows, unsigned": rows_unsigned,
    "rows kept from zero": rows_kept_from_zero,
    "whole": whole,
    "static": static,
    "static with a zero point": static_with_a_zero_point,
    "rows, a factor along K": smoothed(rows, SMOOTH, divide=False),
    "static, divided along K": smoothed(static, SMOOTH, divide=True),
    "quantized_decomposed": by_name,
    "torchao": by_torchao,
}

# -- from the codes to the result --------------------------------------------------------------------------------------


def dequantized(q, s, w, ws):
    y = aten.mm.default(aten.mul.Tensor(to(q, F32), s), aten.t.default(aten.mul.Tensor(to(w, F32), ws)))
    return to(y, F16)


def integer(q, s, w, ws):
    y = to(aten._int_mm.default(to(q, torch.int8), aten.t.default(w)), F32)
    return to(aten.mul.Tensor(aten.mul.Tensor(y, s), aten.t.default(ws)), F16)


def spelling(name, form):
    quantize = QUANTIZATIONS[name]

    def build(x, w, ws):
        q, s = quantize(x)
        return form(q, s, w, ws)

    return Spelling(f"{name}, {form.__name__}", build, X, (W, WS.unsqueeze(1)))


def quantized_by_an_operator(report):
    return [s for s in report.sites if s.fused and any(f.startswith("quantized by npu_") for f in s.plan.fixups)]


FORMS = [(name, form) for name in QUANTIZATIONS for form in (dequantized, integer)]
FORMS.remove(("static with a zero point", integer))  # codes less their zero point do not fit int8


@pytest.mark.parametrize(("name", "form"), FORMS, ids=lambda a: getattr(a, "__name__", a))
def test_argument_mutation(name, form):
    made = spelling(name, form)
    gm = made.graph()
    first = judged(gm, made.args)
    assert first.verdict == "fused" and quantized_by_an_operator(first.report)
    counts = collections.Counter()
    for node in gm.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        for argument, _ in arguments_of(node.target):
            mutants = list(changes_of(gm, node, argument))
            random.Random(f"{made.name} {node.name} {argument}").shuffle(mutants)
            tried = 0
            for what, change in mutants:
                if tried == TRIES != 0:
                    break
                verdict = _verdict(made, gm, node, argument, what, change)
                counts[verdict] += 1
                tried += verdict != "dropped"
    print(made.name, dict(counts))
    # Neither is the reader so shy that nothing is put to the test.
    assert counts["by an operator"] >= 0.1 * (counts.total() - counts["dropped"]), counts


def _verdict(made, gm, node, argument, what, change):
    mutant = changed(gm, node.name, argument, bind(node)[argument], change)
    try:
        found = judged(mutant, made.args)
    except Unsupported:
        return "unsupported"
    except Exception as error:
        text = f"{made.name}: {node.name}.{argument} = {what} (was {bind(node)[argument]})"
        raise AssertionError(f"{text}\n{error}") from error
    return "by an operator" if found.verdict == "fused" and quantized_by_an_operator(found.report) else found.verdict
