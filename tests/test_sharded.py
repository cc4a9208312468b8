"""A Llama whose Linears are sharded by ``torch.distributed.tensor.parallel``, in two processes.

Each rank sees its own shards and fuses the same matmuls as one process does; what PyTorch communicates stays where it
is, and the results are the same.
"""

import pytest

from tests.ranks import outputs_of_two_ranks

pytest.importorskip("transformers")

WORKER = """
import re
import sys
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import quantpass as qp

rank, meeting_point = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
GROUP = 16


class Quantized(nn.Linear):  # PyTorch shards no other class
    low, high = -127, 128

    def __init__(self, linear):
        nn.Module.__init__(self)
        n, k = linear.weight.shape
        generator = torch.Generator().manual_seed(1000 * n + k)
        codes = torch.randint(self.low, self.high, (n, k), dtype=torch.int8, generator=generator)
        self.codes = nn.Parameter(codes, requires_grad=False)
        scale = torch.rand(self.scales(n, k), generator=generator) * self.largest + 1e-3
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(n, generator=generator), requires_grad=False)


class W8A8(Quantized):
    "Rows of x quantized as they come."

    largest = 2e-3

    def scales(self, n, k):
        return n, 1

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        x = (x / scale).round().clamp(-128, 127).to(torch.int8).to(x.dtype) * scale
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


class W4A16(Quantized):
    "Groups along K."

    low, high, largest = -8, 8, 2e-2

    def scales(self, n, k):
        return n, k // GROUP

    def forward(self, x):
        codes = self.codes.unflatten(1, (-1, GROUP)).to(x.dtype)
        return nn.functional.linear(x, (codes * self.scale.unsqueeze(-1)).flatten(1), self.bias)


def sharded(module, placements):
    for name, tensor in list(module.named_parameters()):
        placed = distribute_tensor(tensor, mesh, [placements(name, tensor)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=False))


class Columns(ColwiseParallel):
    def _partition_linear_fn(self, name, module, mesh):
        sharded(module, lambda name, tensor: Shard(0))


class Rows(RowwiseParallel):
    def _partition_linear_fn(self, name, module, mesh):
        sharded(module, lambda name, tensor: Shard(1) if tensor.dim() == 2 and tensor.shape[1] > 1 else Replicate())


def llama(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, kind(linear))
    return model


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


PLAN = {f"self_attn.{p}_proj": Columns() for p in "qkv"} | {"self_attn.o_proj": Rows()}
PLAN |= {"mlp.gate_proj": Columns(), "mlp.up_proj": Columns(), "mlp.down_proj": Rows()}
tokens = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def run(kind, parallel):
    torch._dynamo.reset()
    model = Logits(llama(kind))
    for layer in model.model.model.layers if parallel else ():
        parallelize_module(layer, mesh, PLAN)
    backend = qp.backend(target="cpu")
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)(tokens)
    return compiled, backend.report


def collectives(text):
    return re.findall(r"_c10d_functional.(\\w+)\\(", text)


def held(text):
    "Bytes of the matrices that the graph's fused operators take beside x: codes, scales of groups."
    sizes = {"i8": 1, "i32": 4, "f32": 4}
    inputs = re.findall(r"%(\\w+): (i8|i32|f32)\\[([\\d, ]*)\\] = input", text)
    prepared = set(re.findall(r"%(\\w+)", " ".join(re.findall(r"quantpass\\.\\w*matmul\\((.*)", text))))
    shapes = {name: (dtype, [int(s) for s in shape.split(",")]) for name, dtype, shape in inputs if name in prepared}
    return sum(sizes[dtype] * torch.Size(shape).numel() for dtype, shape in shapes.values() if len(shape) == 2)


for kind in (W8A8, W4A16):
    alone, whole = run(kind, False)
    together, shard = run(kind, True)
    assert (shard.fused, shard.total) == (whole.fused, whole.total) == (14, 14), shard
    assert [s.name for s in shard.sites] == [s.name for s in whole.sites]
    for s, w in zip(shard.sites, whole.sites):
        rows = s.name.endswith(("o_proj", "down_proj"))
        assert (s.weight.k, s.weight.n) == ((w.weight.k // 2, w.weight.n) if rows else (w.weight.k, w.weight.n // 2))
        assert s.weight.stored * 2 == w.weight.stored
        assert s.proved
    ((before, after),) = shard.graphs
    assert collectives(after) == collectives(before)
    assert collectives(after).count("all_reduce") >= 4
    ((_, of_one),) = whole.graphs
    matrices = [held(text) for text in (after, of_one)]
    assert matrices[0] * 2 == matrices[1] > 0, matrices
    largest = float((together - alone).abs().max() / alone.abs().max())
    assert largest < 1e-5, largest
    print(f"{kind.__name__}: {matrices[0]} bytes of weights in place of {matrices[1]}, {largest:.1e} off")
print("fused and equal")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_llama(tmp_path):
    for out in outputs_of_two_ranks(WORKER, tmp_path, timeout=400):
        assert "fused and equal" in out
