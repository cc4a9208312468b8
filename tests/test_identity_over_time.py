"""Weights that change after compiling: the answer is that of today's weights."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.graph import identity
from quantpass.graph.torch_internals import FakeTensorMode, StorageWeakRef, no_data_reason
from tests.helpers import WeightOnly, assert_close

CODES = (96, 64)


class ByValue(nn.Module):
    """Spelled so that the weight is read by value and prepared anew: nothing of it is read at run time."""

    def __init__(self, shape=CODES):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.full((shape[0], 1), 0.01).half(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.codes.to(torch.int16) + 1).half() * self.scale)


def codes(shape=CODES):
    return torch.randint(-127, 127, shape, dtype=torch.int8)


def run_of(model, target="ascend910b", **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=qp.backend(target=target, **options))


def assign_data(p):
    p.data = codes()


def copy_through_data(p):
    p.data.copy_(codes())


def write_through_numpy(p):
    p.numpy()[:] = codes().numpy()


def write_through_dlpack(p):
    torch.from_dlpack(p.data).copy_(codes())


def write_in_place(p):
    p.copy_(codes())


def permute_in_place(p):
    """A sum of the contents would not change."""
    p.data.copy_(torch.roll(p.data, 1, 0))


def offload_and_stream(p):
    p.data = torch.empty(0, dtype=p.dtype)
    gc.collect()
    p.data = codes()


def one_code(p):
    p.data.view(-1)[1234] += 1


CHANGES = [
    assign_data,
    copy_through_data,
    write_through_numpy,
    write_through_dlpack,
    write_in_place,
    permute_in_place,
    offload_and_stream,
    one_code,
]


@pytest.mark.parametrize("target", ["cpu", "ascend910b"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("module", [ByValue, WeightOnly])
def test_a_changed_weight_is_seen(module, change, target):
    model, x = module(), torch.randn(4, 64).half()
    with torch.no_grad():
        model.codes.copy_(codes())
        run = run_of(model, target)
        run(x)
        for _ in range(8):  # long enough for the allocator to hand an address out again
            change(model.codes)
            assert_close(run(x), model(x))


@pytest.mark.parametrize("change", [assign_data, copy_through_data, write_in_place])
def test_a_changed_weight_is_seen_under_inductor(change):
    model, x = ByValue(), torch.randn(4, 64).half()
    with torch.no_grad():
        run = run_of(model, inner="inductor")
        for _ in range(3):
            change(model.codes)
            assert_close(run(x), model(x))


@pytest.mark.parametrize("change", [copy_through_data, write_in_place, write_through_numpy, assign_data])
def test_a_weight_made_in_inference_mode(change):
    """Such tensors have no version."""
    with torch.inference_mode():
        model, x = ByValue(), torch.randn(4, 64).half()
        run = run_of(model)
        for _ in range(4):
            change(model.codes)
            assert_close(run(x), model(x))


def test_a_weight_of_another_size_or_type():
    model, x = ByValue(), torch.randn(4, 64).half()
    with torch.no_grad():
        run = run_of(model)
        run(x)
        model.codes.data, model.scale.data = codes((32, 64)), torch.rand(32, 1).half()
        assert_close(run(x), model(x))
        model.codes.data = model.codes.data.short() * 3
        assert_close(run(x), model(x))
        model.scale.data = model.scale.data.expand(32, 64).contiguous() * torch.rand(32, 64).half()
        assert_close(run(x), model(x))


def test_a_streaming_loop_keeps_neither_old_weights_nor_what_was_made_of_them():
    model, x = ByValue((256, 64)), torch.randn(4, 64).half()
    streamed, prepared = [], []

    def inner(gm, inputs):
        def run(*args):
            prepared.extend(StorageWeakRef(t.untyped_storage()) for t in args if t.dtype == torch.int8)
            return gm(*args)

        return run

    with torch.no_grad():
        run = run_of(model, inner=inner)
        for _ in range(12):
            model.codes.data = codes((256, 64))
            streamed.append(StorageWeakRef(model.codes.untyped_storage()))
            assert_close(run(x), model(x))
    gc.collect()
    assert sum(not s.expired() for s in streamed) == 1
    assert len({s.cdata for s in prepared}) >= 12
    assert sum(not s.expired() for s in prepared) <= 4


def test_swapped_tensors():
    """PyTorch refuses to swap what something refers to weakly, as a fake mode does."""
    model, x = ByValue(), torch.randn(4, 64).half()
    with torch.no_grad():
        run = run_of(model)
        run(x)
        with contextlib.suppress(RuntimeError):  # then nothing has changed
            torch.utils.swap_tensors(model.codes, nn.Parameter(codes(), requires_grad=False))
        assert_close(run(x), model(x))


def test_weights_that_come_back_need_no_second_compilation():
    model, x = ByValue(), torch.randn(4, 64).half()
    a, b, reports = codes(), codes(), []
    with torch.no_grad():
        run = run_of(model, on_report=reports.append)
        for _ in range(3):
            for weight in (a, b):
                model.codes.data = weight
                assert_close(run(x), model(x))
    assert len(reports) == 2


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_checkpoint_loaded_into_a_compiled_model(assign, inner):
    model, other, x = WeightOnly(zero_point=True), WeightOnly(zero_point=True), torch.randn(4, 64).half()
    with torch.no_grad():
        other.codes.copy_(codes())
        other.scale.mul_(3)
        run = run_of(model, inner=inner)
        run(x)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_close(run(x), other(x))


def test_a_model_converted_after_compiling():
    model, x = WeightOnly(), torch.randn(4, 64)
    with torch.no_grad():
        run = run_of(model, "cpu")
        assert_close(run(x.half()), model(x.half()))
        model.to(torch.bfloat16)
        assert_close(run(x.bfloat16()), model(x.bfloat16()))
        model.to("meta")
        assert run(x.bfloat16().to("meta")).device.type == "meta"
        model.to_empty(device="cpu")
        model.load_state_dict(WeightOnly(dtype=torch.bfloat16).state_dict())
        assert_close(run(x.bfloat16()), model(x.bfloat16()))


def test_one_of_two_names_of_a_tied_weight_is_swapped():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ByValue(), ByValue()
            self.b.codes = self.a.codes

        def forward(self, x):
            return self.a(x), self.b(x)

    model, x = Tied(), torch.randn(4, 64).half()
    with torch.no_grad():
        run = run_of(model)
        for change in (lambda: assign_data(model.b.codes), lambda: setattr(model.b, "codes", ByValue().codes)):
            change()
            for ours, theirs in zip(run(x), model(x), strict=True):
                assert_close(ours, theirs)


def test_other_weights_for_one_call():
    model, x = ByValue(), torch.randn(4, 64).half()

    def call(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    with torch.no_grad():
        run = run_of(call)
        for _ in range(3):
            weights = {"codes": nn.Parameter(codes(), requires_grad=False), "scale": torch.rand(96, 1).half()}
            assert_close(run(weights, x), call(weights, x))


def test_a_weight_that_is_computed_from_another_at_each_call():
    class Doubled(nn.Module):
        def forward(self, codes):
            return codes * 2

    model, x = ByValue(), torch.randn(4, 64).half()
    nn.utils.parametrize.register_parametrization(model, "codes", Doubled(), unsafe=True)
    original = model.parametrizations.codes.original
    with torch.no_grad():
        run = run_of(model)
        for _ in range(3):
            original.data = torch.randint(-60, 60, CODES, dtype=torch.int8)
            assert_close(run(x), model(x))


def test_a_base_written_to_through_another_view():
    base = torch.zeros(2, *CODES, dtype=torch.int8)
    model, x = ByValue(), torch.randn(4, 64).half()
    model.codes = nn.Parameter(base[1], requires_grad=False)
    with torch.no_grad():
        run = run_of(model)
        for i in range(3):
            base.view(-1).fill_(i)
            assert_close(run(x), model(x))


def test_a_weight_that_the_graph_itself_writes_to():
    class Counting(ByValue):
        def forward(self, x):
            y = super().forward(x)
            self.codes.add_(1)
            return y

    model, x = Counting(), torch.randn(4, 64).half()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        run = run_of(model)
        for _ in range(4):
            assert_close(run(x), expected(x))


def test_two_threads_with_weights_of_their_own():
    """Two models of one structure share one compiled graph."""
    models, x = [ByValue() for _ in range(2)], torch.randn(4, 64).half()
    torch._dynamo.reset()
    with torch.no_grad():
        for m in models:
            m.codes.copy_(codes())
        compiled = [torch.compile(m, backend=qp.backend(target="ascend910b")) for m in models]
        for run in compiled:
            run(x)
        wrong = []

        def work(run, model):
            with torch.no_grad():
                expected = model(x)
                for _ in range(50):
                    if not torch.allclose(run(x), expected, rtol=0.02, atol=0.02):
                        wrong.append(1)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(compiled, models, strict=True)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


@pytest.mark.parametrize(("compare", "seen"), [("contents", True), ("identity", False)])
def test_what_a_cpu_looks_at_is_the_user_s_choice(compare, seen):
    """By identity a write that no version counts goes unnoticed; one that is counted, and another tensor, do not."""
    model, x = ByValue(), torch.randn(4, 64).half()
    small = torch.randint(-7, 7, CODES, dtype=torch.int8)  # int4 codes: the weight is packed anew

    def is_right():
        return float((run(x) - model(x)).abs().max()) <= 4e-3 * float(model(x).abs().mean())

    with torch.no_grad():
        run = torch.compile(model, backend=qp.backend(target="cpu", compare_weights=compare))
        assert is_right()
        model.codes.copy_(small)
        assert is_right()
        model.codes.data = small.neg()
        assert is_right()
        model.codes.data.copy_(small)
        assert is_right() == seen


# -- what a device goes by -----------------------------------------------------------------------------------------


def still(seen, t):
    return seen.is_still(t)


def test_identity_on_a_device_is_the_tensor_its_memory_and_its_version(monkeypatch):
    monkeypatch.setattr(identity, "_contents_count", lambda t, contents: False)
    t = codes()
    seen = identity.Seen.now(t)
    assert still(seen, t)
    assert not still(seen, t.clone()), "equal values, another tensor"
    assert not still(seen, t.data), "the same memory, whose writes another counter counts"
    t.add_(0)
    assert not still(seen, t), "written to"
    seen = identity.Seen.now(t)
    assert not seen.is_freed
    for _ in range(50):  # the address that was freed may come back
        t.data = codes()
        assert seen.is_freed
        assert not still(seen, t)


@pytest.mark.parametrize("change", [assign_data, write_in_place])
def test_a_changed_weight_is_seen_on_a_device(change, monkeypatch):
    monkeypatch.setattr(identity, "_contents_count", lambda t, contents: False)
    model, x = ByValue(), torch.randn(4, 64).half()
    with torch.no_grad():
        run = run_of(model)
        for _ in range(8):
            change(model.codes)
            assert_close(run(x), model(x))


def test_a_tensor_without_data_has_no_values_to_be_the_same():
    t = torch.arange(64).to(torch.int8)[:]
    seen = identity.Seen.now(t)
    t.untyped_storage().resize_(0)  # as FSDP frees a weight
    assert no_data_reason(t) == "freed"
    assert not still(seen, t)
    assert no_data_reason(t.to("meta")) == "on the meta device"
    assert no_data_reason(FakeTensorMode().from_tensor(codes())) == "a fake tensor"
    with torch.inference_mode():
        assert not no_data_reason(codes())
