"""Random models behind their doors: weights that change, sizes that are not known, branches, depth.

As :mod:`tests.test_fuzz`; here a result is compared with the model's own in float32, since nothing that is drawn is
near a rounding that matters: twice the FP19 step of a scale word is the most that a site may be off.
"""

import inspect
import sys

import pytest
import torch
from hypothesis import strategies as st

import quantpass as qp
from tests.fuzz import lifetimes, structure
from tests.fuzz.running import judged

SOME = st.sampled_from(("cpu", "cpu", "ascend910b", "ascend310p"))


def agrees(actual, expected, what):
    assert actual.shape == expected.shape, what
    worst = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    size = float(expected.double().abs().max()) if expected.numel() else 0.0
    assert worst <= 2e-3 * size + 1e-5, f"{what}: off by {worst:.3g} where the largest is {size:.3g}"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- weights that change -------------------------------------------------------------------------------------------


def live(case, target):
    """Through ``torch.compile``: after every change the right result."""
    model, changes, x = case
    kept = {"codes": model.codes.clone(), "scale": model.scale.clone(), "buffer": torch.zeros_like(model.codes)}
    torch._dynamo.reset()
    backend = qp.backend(target=target)
    run = torch.compile(model, backend=backend)
    agrees(run(x), model(x), "before any change")
    for i, (what, seed) in enumerate(changes):
        lifetimes.change(model, what, kept, seed)
        agrees(run(x), model(x), f"change {i} of {[c for c, _ in changes]}")
    return "fused" if backend.report.fused else "refused"


def test_lifetimes(fuzz):
    fuzz("lifetimes", lifetimes.lives(), live, few=24, least=0.3, targets=SOME, weight=0.05)


def reload(case, target):
    """Into a fused program: the right result, or an error."""
    model, state, x, door, how = case
    program = torch.export.export(model, (x,))
    if door == "graph module":
        program = program.module()
    report = qp.fuse(program, target=target)
    run = program
    if door == "saved program":
        run = lifetimes.saved_and_loaded(program)
    run = run if door == "graph module" else run.module()
    agrees(run(x), model(x), "fused")
    try:
        if how == "write":
            own = {**dict(run.named_parameters()), **dict(run.named_buffers())}
            for name, value in state.items():
                own[name].copy_(value)
        else:
            told = run.load_state_dict(state, strict=how == "strict")
            if door == "saved program" and told.unexpected_keys:
                return "refused"  # who asks not to be stopped is told by name what was not loaded
        actual = run(x)
    except Exception:
        return "fused" if report.fused else "refused"
    model.load_state_dict(state)
    agrees(actual, model(x), f"{door}, {how}")
    return "fused" if report.fused else "refused"


def test_reloads(fuzz):
    fuzz("reloads", lifetimes.reloads(), reload, few=30, least=0.3, targets=SOME, weight=0.05)


# -- structure -----------------------------------------------------------------------------------------------------


def with_an_ordinary_stack(case, target):
    """Hypothesis raises Python's recursion limit; a user's process does not."""
    before, used = sys.getrecursionlimit(), len(inspect.stack(0))
    sys.setrecursionlimit(used + 1000)
    try:
        return judged(case, target)
    finally:
        sys.setrecursionlimit(before)


def test_deep_graphs(fuzz):
    fuzz("deep graphs", structure.deep(), with_an_ordinary_stack, few=10, least=0.1, targets=SOME, weight=0.02)


def through(door, model, xs, target):
    """``(runs, report)``: the model fused behind one door."""
    dynamic = {0: torch.export.Dim.AUTO}
    if door == "explain":
        return [], qp.explain(model, (xs[0],), target=target)
    if door == "export":
        program = torch.export.export(model, (xs[0],), dynamic_shapes=(dynamic,))
        report = qp.fuse(program, target=target)
        run = program.module()
        return [run(x) for x in xs], report
    torch._dynamo.reset()
    backend = qp.backend(target=target)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        run = torch.compile(model, backend=backend, dynamic=True)
        return [run(x) for x in xs], backend.report


def behind_a_door(case, target):
    model, xs, matmuls, door = case
    actual, report = through(door, model, xs, target)
    for a, x in zip(actual, xs, strict=False):
        agrees(a, model(x), f"{door} of {tuple(x.shape)}")
    assert report.total >= matmuls, f"{matmuls} quantized matmuls, {report.total} verdicts\n{report}"
    return "fused" if report.fused else "refused"


def test_branches_and_loops(fuzz):
    fuzz("branches", structure.models(structure.Branches), behind_a_door, few=16, least=0.3, targets=SOME, weight=0.03)


def test_unknown_sizes(fuzz):
    fuzz(
        "unknown sizes", structure.models(structure.Routed), behind_a_door, few=16, least=0.3, targets=SOME, weight=0.05
    )
