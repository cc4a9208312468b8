"""What happens to weights after they were compiled: sequences of changes."""

import io

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from tests.fuzz.draw import Draw

N, K = 512, 512

CHANGES = (
    *(
        "new data",
        "new data",
        "new data",
        "new data",
        "new data",
        "data back",
        "write",
        "write a part",
        "write through a view",
        "load",
    ),
    *("load, assign", "new buffer", "empty and refill", "stream", "empty and refill", "float and back", "nothing"),
)


class Streamed(nn.Module):
    """A quantized layer whose weights are read by value, or as they lie there."""

    def __init__(self, d):
        super().__init__()
        self.form = d.one_of("as it is", "by value", "quantized x")
        self.register_buffer("codes", d.codes(N, K, low=-100, high=100))
        self.register_buffer("scale", torch.rand(N, 1, generator=d.rng) * 0.01 + 1e-3)

    def forward(self, x):
        w = self.codes
        if self.form == "by value":  # two codes in a byte
            w = (torch.stack([w & 15, (w >> 4) & 15], dim=-1).view(N, -1)[:, :K]).to(x.dtype) - 8
        if self.form == "quantized x":
            x = torch.clamp(torch.round(x / 0.03), -128, 127).to(torch.int8).to(x.dtype) * 0.03
        return linear(x, w.to(x.dtype) * self.scale)


def change(model, what, kept, seed):
    """Change the weights of ``model`` as a streaming or fine-tuning loop would."""
    g = torch.Generator().manual_seed(seed)

    def codes():
        return torch.randint(-100, 101, (N, K), dtype=torch.int8, generator=g)

    scale = torch.rand(N, 1, generator=g) * 0.01 + 1e-3
    if what == "new data":  # the memory that was there is freed, and may be handed out again
        model.codes.data = codes()
    elif what == "data back":
        model.codes.data, model.scale.data = kept["codes"], kept["scale"]
    elif what == "write":
        model.codes.copy_(codes())
        model.scale.mul_(1.5)
    elif what == "write a part":
        model.codes[seed % N] = 7
    elif what == "write through a view":
        model.scale.view(-1)[seed % N :].mul_(2)
    elif what.startswith("load"):
        model.load_state_dict({"codes": codes(), "scale": scale}, assign="assign" in what)
    elif what == "new buffer":
        model.codes = codes()
    elif what == "empty and refill":  # off-loading: nothing is there between two calls
        model.codes.data = torch.empty(0, dtype=torch.int8)
        model.codes.data = codes()
    elif what == "stream":  # one buffer for all layers
        kept["buffer"].copy_(codes())
        model.codes.data = kept["buffer"]
    elif what == "float and back":
        model.scale.data = (model.scale.double() * 1.25).to(torch.float32)


@st.composite
def lives(draw):
    """A model, what happens to it, and an input."""
    d = Draw(draw)
    d.wild = False
    changes = [(d.one_of(*CHANGES), d.int(0, 2**16)) for _ in range(d.int(3, 12))]
    return Streamed(d), changes, d.floats(3, K)


@st.composite
def reloads(draw):
    """A model, other weights, an input, and the door and the way by which they are loaded."""
    d = Draw(draw)
    d.wild = False
    model = Streamed(d)
    codes, scale = d.codes(N, K, low=-100, high=100), torch.rand(N, 1, generator=d.rng) * 0.01 + 1e-3
    door = d.one_of("program", "program", "graph module", "saved program")
    return model, {"codes": codes, "scale": scale}, d.floats(3, K), door, d.one_of("strict", "not strict", "write")


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)
