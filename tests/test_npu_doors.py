"""register and npugraph_ex_options against configs that look like torchair's; no torch_npu needed."""

import dis
import io
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import quantpass as qp
from quantpass.doors.settings import make_options
from quantpass.graph.torch_internals import compile_with_aot
from quantpass.pipeline import explain_graph
from tests.helpers import CHIPS, IntegerW8A8, StaticW8A8, WeightOnly, assert_close
from tests.test_aclnn import Int4

ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(4, 64).half()


@pytest.fixture(scope="module", autouse=True)
def npu_on_cpu():
    qp.emulate_npu()


class Value:
    def __init__(self, value):
        self.value = value


class Config:
    """The attributes of torchair's CompilerConfig that matter here, with its way of setting options."""

    def __init__(self, mode="reduce-overhead"):
        self.__dict__.update(
            mode=Value(mode),
            post_grad_custom_pre_pass=Value(None),
            post_grad_custom_post_pass=Value(None),
            experimental_config=SimpleNamespace(enable_view_optimize=True),
            dump_config=SimpleNamespace(enable_dump=Value("0"), data_dump_stage=Value("optimized")),
            debug=SimpleNamespace(
                data_dump=SimpleNamespace(enabled=False), fx_summary=SimpleNamespace(enabled=False, skip_compile=True)
            ),
        )

    def __setattr__(self, name, value):
        self.__dict__[name].value = value

    @property
    def hook(self):
        return self.post_grad_custom_pre_pass.value


def text_of(hook):
    text = io.StringIO()
    dis.dis(hook, file=text)
    return text.getvalue()


def run_through(model, hook, config, *args, skip=False):
    """Compile as torchair does: trace, call the hook on the graph with its fake inputs, run what comes out."""
    graphs = []

    def backend(gm, inputs):
        def compiler(aot, weights, fakes):
            if not skip:
                assert hook(aot, fakes, config) is None
            graphs.append(aot)
            return aot.forward

        return compile_with_aot(gm, inputs, compiler)

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(model, backend=backend)(*args)
    return output, [str(n.target) for g in graphs for n in g.graph.nodes]


# -- what the hook does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize(
    "model",
    [
        WeightOnly, lambda: WeightOnly(zero_point=True), lambda: WeightOnly(bias=False), StaticW8A8,
        lambda: StaticW8A8(zero_point=7), lambda: StaticW8A8(zero_point=130, unsigned=True),
        lambda: nn.Sequential(StaticW8A8(), StaticW8A8(k=96, n=32, zero_point=5)),
    ],
)  # fmt: skip
def test_plain_spellings_are_fused_without_seeing_a_weight(model, target):
    config = Config()
    registration = qp.register(config, target=target)
    model = model()
    actual, targets = run_through(model, config.hook, config, X)
    registration.report.require()
    assert registration.report.mode == "eager"
    assert not [t for t in targets if t.startswith("quantpass.") or "format_cast" in t]
    assert sum("npu_quant_matmul" in t or "weight_quant_batchmatmul" in t for t in targets) == registration.report.fused
    assert "get_attr" not in targets
    assert_close(actual, model(X), torch.bfloat16)


def test_an_integer_matmul_keeps_its_bits():
    config, model, x = Config(), IntegerW8A8(), torch.randn(2, 7, 64)
    qp.register(config, target="ascend910b")
    actual, targets = run_through(model, config.hook, config, x)
    assert "npu.npu_quant_matmul.default" in targets
    assert torch.equal(actual, model(x))


def test_a_weight_that_changes_is_read_at_every_call():
    """Nothing was prepared from its values."""
    config, model = Config(), WeightOnly()
    qp.register(config, target="ascend910b")

    def backend(gm, inputs):
        return compile_with_aot(gm, inputs, lambda aot, weights, fakes: config.hook(aot, fakes, config) or aot.forward)

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        run(X)
        model.codes.copy_(torch.randint(-127, 128, model.codes.shape, dtype=torch.int8))
        assert_close(run(X), model(X))


def test_the_report_says_what_the_other_door_would_gain():
    config = Config()
    registration = qp.register(config, target="ascend910b")
    model = nn.Sequential(StaticW8A8(k=64, n=128, bias=False), Int4(group=32))
    run_through(model, config.hook, config, X)
    assert (registration.report.fused, registration.report.total) == (1, 2)
    text = str(registration.report)
    assert "1 matmul (first: 1) not fused: the weight has to be read by value" in text
    assert "1 int64 scale word" in text, "there is no bias, which would stay a float beside row scales"
    assert "1 weight (first: 0) left in ND; quantpass.npu_backend puts them in FRACTAL_NZ once" in text
    assert json.loads(registration.report.to_json())["notes"] == list(registration.report.notes)


def test_on_report_is_called():
    seen = []
    config = Config()
    qp.register(config, target="ascend910b", on_report=seen.append)
    run_through(WeightOnly(), config.hook, config, X)
    assert [r.fused for r in seen] == [1]


def test_weights_on_a_device_are_read_on_the_cpu():
    """An NPU has no float64, in which weights are evaluated. Any device but the CPU stands for it here."""
    codes, scale = torch.empty(96, 64, dtype=torch.int8, device="meta"), torch.empty(96, 1, device="meta")
    x = torch.empty(4, 64, dtype=torch.float16, device="meta")

    def f(codes, scale, x):
        three = torch.full((1,), 3.0, device="meta")
        return x @ ((codes.to(torch.float32) - three) * scale).half().t()

    gm = make_fx(f)(codes, scale, x)
    assert "device = device(type='meta')" in gm.code, "the graph makes tensors on its device"
    leaves = dict(
        zip(
            gm.graph.find_nodes(op="placeholder"),
            (torch.ones(96, 64, dtype=torch.int8), torch.rand(96, 1)),
            strict=False,
        )
    )
    (outcome,) = explain_graph(gm, leaves, [make_options({"target": "ascend910b"})])
    (site,) = outcome.sites
    assert site.fused
    assert "asymmetric" in site.reading


# -- torchair's contracts ----------------------------------------------------------------------------------------------


def test_the_hook_is_a_plain_function_whose_disassembly_names_the_settings():
    def hook_text(target="ascend910b", **options):
        config = Config()
        qp.register(config, target=target, **options)
        assert type(config.hook) is FunctionType
        return text_of(config.hook)

    same = hook_text()
    assert hook_text() == same
    assert hook_text(on_report=print) == same, "who is told changes nothing in the graph"
    others = [
        hook_text("ascend310p"),
        hook_text(numerics="strict"),
        hook_text(nz="never"),
        hook_text(allow=("qmm.310p.pertoken",)),
    ]
    assert len({same, *others}) == 5


def test_its_disassembly_is_the_same_in_every_process():
    code = """
        import dis, quantpass as qp
        options = qp.npugraph_ex_options(target="ascend910b", allow=("qmm.310p.pertoken",))
        dis.dis(options["post_grad_custom_pre_pass"])
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    texts = [subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert " at 0x" not in texts[0], "no addresses"
    assert "quantpass" in texts[0]


def test_a_users_hook_is_kept_and_runs_first():
    config, calls = Config(), []

    def mine(gm, example_inputs, given):
        calls.append((given is config, any("quant_batchmatmul" in str(n.target) for n in gm.graph.nodes)))

    config.post_grad_custom_pre_pass = mine
    registration = qp.register(config, target="ascend910b")
    run_through(WeightOnly(), config.hook, config, X)
    assert calls == [(True, False)]
    assert registration.report.fused == 1


def test_the_cache_key_tells_users_hooks_apart():
    def one(gm, inputs, config):
        gm.one = 1

    def two(gm, inputs, config):
        gm.two = 2

    class Object:
        def __call__(self, gm, inputs, config): ...

    texts = set()
    for hook in (None, one, two, Object()):
        config = Config()
        config.post_grad_custom_pre_pass = hook
        qp.register(config, target="ascend910b")
        texts.add(text_of(config.hook))
    assert len(texts) == 4


def test_registering_again_replaces_the_first():
    config, calls = Config(), []
    config.post_grad_custom_pre_pass = lambda gm, inputs, config: calls.append(1)
    first = qp.register(config, target="ascend310p")
    second = qp.register(config, target="ascend910b")
    run_through(WeightOnly(), config.hook, config, X)
    assert calls == [1]
    assert (first.report.total, second.report.total) == (0, 1)


def test_only_the_one_slot_is_set():
    config = Config()
    before = {k: getattr(v, "value", v) for k, v in vars(config).items() if k != "post_grad_custom_pre_pass"}
    qp.register(config, target="ascend910b")
    assert {k: getattr(v, "value", v) for k, v in vars(config).items() if k != "post_grad_custom_pre_pass"} == before


@pytest.mark.parametrize(("model", "expected"), [(WeightOnly, False), (StaticW8A8, True)])
def test_view_optimize_is_turned_off_for_a_weight_quant_matmul(model, expected):
    config = Config()
    qp.register(config, target="ascend910b")
    run_through(model(), config.hook, config, X)
    assert config.experimental_config.enable_view_optimize is expected


def dump_original(config):
    config.dump_config.enable_dump.value, config.dump_config.data_dump_stage.value = "1", "original"


def dump_data(config):
    config.debug.data_dump.enabled = True


def summary(config):
    config.mode, config.debug.fx_summary.enabled = "max-autotune", True


@pytest.mark.parametrize("turn_on", [dump_original, dump_data, summary])
def test_modes_that_skip_passes_are_told(turn_on, caplog):
    config = Config()
    turn_on(config)
    with caplog.at_level(logging.WARNING, logger="quantpass"):
        registration = qp.register(config, target="ascend910b")
    run_through(WeightOnly(), config.hook, config, X, skip=True)
    assert "no pass runs with" in caplog.text
    assert "no pass runs with" in str(registration.report)


def test_a_mode_that_is_turned_on_later_is_in_the_report():
    config = Config()
    registration = qp.register(config, target="ascend910b")
    assert registration.report.notes == ()
    dump_original(config)
    assert "data_dump_stage='original'" in str(registration.report)


def test_the_mode_may_be_set_after_registering():
    config = Config("max-autotune")
    registration = qp.register(config, target="ascend910b")
    config.mode = "reduce-overhead"
    _, targets = run_through(WeightOnly(), config.hook, config, X)
    assert "npu.npu_weight_quant_batchmatmul.default" in targets
    registration.report.require()


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scopes():
    """torchair's marks: what stands between them runs on the stream that they name."""
    if hasattr(torch.ops.air, "scope_enter"):
        yield
        return
    library = torch.library.Library("air", "FRAGMENT")
    library.define("scope_enter(str[] keys, str[] values) -> ()")
    library.define("scope_exit() -> ()")
    library.impl("scope_enter", lambda keys, values: None, "CompositeExplicitAutograd")
    library.impl("scope_exit", lambda: None, "CompositeExplicitAutograd")
    yield
    library._destroy()


def scoped(model, hook, config, *args, first, last, key="_user_stream_label"):
    """As ``run_through``, with the nodes from ``first`` to ``last`` inside a scope."""

    def with_scope(gm, inputs, config):
        nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        start = next(n for n in nodes if first in str(n.target))
        end = next(n for n in nodes if last in str(n.target))
        with gm.graph.inserting_before(start):
            gm.graph.call_function(torch.ops.air.scope_enter.default, ([key], ["side"]))
        with gm.graph.inserting_after(end):
            gm.graph.call_function(torch.ops.air.scope_exit.default, ())
        gm.recompile()
        hook(gm, inputs, config)

    return run_through(model, with_scope, config, *args)


@pytest.mark.parametrize(
    ("first", "last"), [("addmm", "addmm"), ("aten.round", "aten._to_copy"), ("aten.div", "addmm")]
)
@pytest.mark.usefixtures("scopes")
def test_sites_that_touch_another_stream_are_left_alone(first, last):
    config, model = Config(), StaticW8A8()
    registration = qp.register(config, target="ascend910b")
    actual, targets = scoped(model, config.hook, config, X, first=first, last=last)
    assert registration.report.fused == 0
    assert {r.rule for s in registration.report.sites for r in s.rejects} == {"torchair.streams"}
    assert "aten.addmm.default" in targets
    assert torch.equal(actual, model(X))


@pytest.mark.usefixtures("scopes")
def test_other_scopes_and_other_sites_are_fused():
    config, model = Config(), nn.Sequential(WeightOnly(), nn.Tanh(), WeightOnly(k=96, n=32))
    registration = qp.register(config, target="ascend910b")
    scoped(model, config.hook, config, X, first="tanh", last="tanh", key="_super_kernel_scope")
    assert registration.report.fused == 2
    registration = qp.register(config, target="ascend910b")
    scoped(model, config.hook, config, X, first="addmm", last="addmm")
    assert [s.fused for s in registration.report.sites] == [False, True]


# -- npugraph_ex -------------------------------------------------------------------------------------------------------


def test_npugraph_ex_options():
    calls = []
    mine = {"static_kernel_compile": True, "post_grad_custom_pre_pass": lambda gm, inputs, config: calls.append(1)}
    options = qp.npugraph_ex_options(target="ascend310p", npugraph_ex=mine)
    assert set(options) == {"static_kernel_compile", "post_grad_custom_pre_pass"}
    model = nn.Sequential(WeightOnly(), StaticW8A8(k=96, n=32))
    actual, targets = run_through(model, options["post_grad_custom_pre_pass"], SimpleNamespace(), X)
    assert calls == [1]
    assert {"npu.npu_weight_quant_batchmatmul.default", "npu.npu_quant_matmul.default"} <= set(targets)
    assert not [t for t in targets if "format_cast" in t]
    options.report.require()
    assert options.report.mode == "eager"
    assert_close(actual, model(X), torch.bfloat16)


@pytest.mark.parametrize(
    "given",
    [{"dump_tensor_data": True, "data_dump_stage": "original"}, {"dump_tensor_data": True, "force_eager": True}],
)
def test_npugraph_ex_modes_that_skip_passes_are_told(given, caplog):
    with caplog.at_level(logging.WARNING, logger="quantpass"):
        options = qp.npugraph_ex_options(target="ascend910b", npugraph_ex=given)
    assert "no pass runs with dump_tensor_data" in caplog.text
    assert "no pass runs with dump_tensor_data" in str(options.report)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "error", "message"),
    [
        (lambda: qp.register({}, target="ascend910b"), TypeError, "give a torchair.CompilerConfig"),
        (lambda: qp.register(Config(), target="ascend"), ValueError, "unknown target 'ascend'"),
        (lambda: qp.register(Config(), target="ascend910b", numeric="x"), TypeError, "Did you mean 'numerics'"),
        (
            lambda: qp.register(Config(), target="ascend910b", lowering="aclnn"),
            TypeError,
            "register sets lowering itself",
        ),
        (lambda: qp.register(Config()), ValueError, "Name one: target="),
        (lambda: qp.npugraph_ex_options(), ValueError, "Name one: target="),
        (lambda: qp.npugraph_ex_options("cpu"), ValueError, "target 'cpu'"),
        (lambda: qp.npu_backend(target="ascend910b", inner="eager"), TypeError, "sets inner itself"),
    ],
)
def test_bad_input(door, error, message):
    with pytest.raises(error, match=message):
        door()


def test_without_torch_npu_the_error_says_what_to_install():
    code = """
        import sys, quantpass as qp
        assert not {"torch_npu", "torchair"} & set(sys.modules), "importing quantpass does not load them"
        sys.modules["torch_npu"] = None
        qp.npu_backend(target="ascend910b")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert "ImportError: quantpass.npu_backend needs torch_npu and torchair" in done.stderr
    assert f"pip install torch_npu=={torch.__version__[:4]}" in done.stderr
    assert "quantpass.preview_ge" in done.stderr
