"""One model through the doors for an Ascend machine.

On a machine with an NPU it is compiled by torchair and runs there. On a laptop everything up to that point is done: the
verdicts for each chip, the numbers that the fused operators compute, and, where torch_npu's wheel and a C compiler are
there, the GE graph that torchair would compile.

    python examples/npu_door.py
"""

import torch
from torch import nn

import quantpass as qp

CHIPS = ("ascend310p", "ascend910b", "ascend910_93")


class Linear8(nn.Module):
    """A Linear with int8 weights, dequantized in its forward; ``static`` quantizes the activation as well."""

    def __init__(self, linear, static=None):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.half(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)
        self.static = static

    def forward(self, x):
        if self.static is not None:
            x = torch.clamp(torch.round(x / self.static), -128, 127).to(torch.int8).to(x.dtype) * self.static
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def make_model():
    """Weight-only, then float16, then static W8A8."""
    torch.manual_seed(0)
    up, down = nn.Linear(256, 512), nn.Linear(512, 256)
    return nn.Sequential(Linear8(up), nn.GELU(), Linear8(down, static=0.02)).eval(), torch.randn(8, 256).half()


def npu_is_there():
    """Whether this machine can run what torchair compiles."""
    try:
        import torch_npu

        return bool(torch_npu.npu.is_available())
    except (ImportError, OSError, RuntimeError):
        return False


def on_an_npu():
    """The three doors; each is one changed line."""
    import torchair

    model, x = make_model()
    expected = model(x)
    model, x = model.npu(), x.npu()

    backend = qp.npu_backend()  # instead of torchair.get_npu_backend(): sees the weights, prepares them once
    y = torch.compile(model, backend=backend, dynamic=False)(x)
    print(backend.report)

    config = torchair.CompilerConfig()
    registration = qp.register(config)  # the rest stays as it was
    torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config), dynamic=False)(x)
    print(registration.report)

    options = qp.npugraph_ex_options()
    torch.compile(model, backend="npugraph_ex", options=options, dynamic=False)(x)
    print(options.report)
    return expected, y.cpu()


def on_a_laptop():
    """What can be known without the device."""
    model, x = make_model()
    print(qp.explain(model, (x,), target=CHIPS), "\n")

    expected = model(x)
    backend = qp.backend(target="ascend310p")
    y = torch.compile(model, backend=backend, dynamic=False)(x)
    difference = float((y.float() - expected.float()).abs().max())
    print(f"310P, computed as its fused operators compute: within {difference:.3g} of the unfused model\n")

    try:
        with qp.TorchairProcess() as process:
            for chip in CHIPS:
                before = qp.preview_ge(model, (x,), target=chip, fuse=False, process=process)
                after = qp.preview_ge(model, (x,), target=chip, process=process)
                assert len(after.ops) < len(before.ops)
                print(f"{chip}: {len(before.ops)} GE operators become {len(after.ops)}: {', '.join(after.ops)}")
    except qp.StandinError as error:
        print(f"No preview of the GE graph: {error}")
    print("\nFrom here on an NPU is needed: run this file on an Ascend machine with CANN and torch_npu.")
    return expected, y


if __name__ == "__main__":
    with torch.no_grad():
        expected, y = on_an_npu() if npu_is_there() else on_a_laptop()
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
