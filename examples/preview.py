"""See, without an NPU, the GE graph that torchair compiles for a quantized MLP, before and after fusing, and run it.

Needs torch_npu's wheel and a C compiler (docs/preview.md says how to get them); where one is missing it says so.

    python examples/preview.py
"""

import logging
import sys

import torch
from tabulate import tabulate
from torch import nn

import quantpass as qp

logging.getLogger("quantpass").setLevel(logging.ERROR)

CHIPS = ["ascend310p", "ascend910b", "ascend910_93"]


class WeightOnlyLinear(nn.Module):
    """An int8 weight with a scale for each output channel, dequantized where it is used."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", torch.round(linear.weight / scale).to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.register_buffer("bias", linear.bias)

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def make():
    """A float model, the quantized one, and an input."""
    torch.manual_seed(0)
    layers = [nn.Linear(128, 256).half(), nn.Linear(256, 64).half()]
    for layer in layers:
        layer.requires_grad_(False)
    quantized = nn.Sequential(WeightOnlyLinear(layers[0]), nn.ReLU(), WeightOnlyLinear(layers[1]))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]), quantized, torch.randn(16, 128).half()


def main():
    float_model, model, x = make()
    rows, failures = [], 0
    try:
        with qp.TorchairProcess() as process:
            for chip in CHIPS:
                before = qp.preview_ge(model, (x,), target=chip, fuse=False, process=process)
                after = qp.preview_ge(model, (x,), target=chip, process=process)
                ((computed,),) = after.run()
                same = torch.equal(computed, after.graphs[0].outputs[0])
                error = (computed - float_model(x)).abs().max() / float_model(x).abs().mean()
                failures += not same or after.report.fused != 2
                rows.append([chip, len(before.ops), len(after.ops), "equal" if same else "different", f"{error:.3f}"])
    except qp.StandinError as error:
        print(f"No preview here: {error}")
        return 0
    columns = [
        "chip",
        "GE operators before",
        "after",
        "interpreted against FX",
        "largest error against the float model",
    ]
    print(tabulate(rows, headers=columns, tablefmt="simple"))
    print(f"\nWhat fusing changed on {CHIPS[-1]}:\n{qp.diff(before, after)}")
    print(f"\nWhere the two graphs differ first:\n{before.first_difference(after)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
