"""Legal calls of the operators around the two matmuls, of every form, for ``test_legality`` to make edits of."""

import torch

from quantpass import TensorSpec as T
from quantpass.chips.grouped_matmul import GMM

I8, I32, I64, F16, BF16, F32 = torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32

# Tokens, K, N and experts of the calls below.
M, K, N, E = 16, 256, 128, 8


def gmm(x, weight, *, out=None, **arguments):
    """A call with the rows of x shared out among experts."""
    rest = dict.fromkeys(("offset", "activation_input", "activation_quant_scale", "activation_quant_offset"))
    how = {"group_type": 0, "split_item": 2, "group_list_type": 0, "act_type": 0, "group_list": T(I64, (E,))}
    return {"x": x, "weight": weight, "output_dtype": out, **rest, **how, **arguments}


def _weights(dtype, *marks):
    """A weight for all experts, stored straight and transposed."""
    return [T(dtype, (E, K, N), *marks), T(dtype, (E, K, N), *(marks or ("ND",)), True)]


X8, XF, XB = T(I8, (M, K)), T(F16, (M, K)), T(BF16, (M, K))
X4, W4, W4T = T(I32, (M, K // 8)), T(I32, (E, K, N // 8)), T(I32, (E, K // 8, N), "ND", True)
W4NZ, W4TNZ = T(I32, (E, K, N // 8), "NZ"), T(I32, (E, K // 8, N), "NZ", True)
ROWS, COLUMNS = T(F32, (M,)), (E, N)
HALF, GROUPS = T(F16, COLUMNS), T(F16, (E, 4, N))

GMM_CALLS = [
    gmm(X8, _weights(I8)[0], scale=T(BF16, COLUMNS), per_token_scale=ROWS, bias=T(I32, COLUMNS), out=BF16),
    gmm(X8, _weights(I8)[0], scale=T(I64, COLUMNS)),
    gmm(X8, _weights(I8)[0], scale=T(F32, COLUMNS), per_token_scale=ROWS, out=F16, group_list=T(I64, (E, 2)), group_list_type=2),
    *(gmm(X8, w, scale=T(F32, COLUMNS), per_token_scale=ROWS, out=F16, act_type=5) for w in _weights(I8, "NZ")),
    gmm(X8, (T(I8, (K, N)),) * E, scale=(T(F32, (N,)),) * E, bias=(T(I32, (N,)),) * E, per_token_scale=None, out=F16),
    *(gmm(X4, w, scale=T(I64, COLUMNS), per_token_scale=ROWS, out=BF16) for w in (W4, W4NZ, W4TNZ)),
    gmm(X4, W4NZ, scale=T(I64, (E, 4, N)), per_token_scale=ROWS, out=BF16),
    gmm(X8, W4NZ, scale=T(I64, (E, 1, N)), per_token_scale=T(F32, (M, 1)), bias=T(F32, COLUMNS), out=BF16, offset=T(F32, (E, 1, N))),
    gmm(XF, _weights(I8)[0], antiquant_scale=HALF, antiquant_offset=HALF, bias=HALF),
    gmm(XF, W4, antiquant_scale=GROUPS, antiquant_offset=GROUPS),
    gmm(XF, W4T, antiquant_scale=HALF, antiquant_offset=HALF),
    *(gmm(XF, w, bias=HALF, scale=None, per_token_scale=None) for w in (*_weights(F16), *_weights(F16, "NZ"))),
    gmm(XB, _weights(BF16)[0], bias=T(F32, COLUMNS), out=BF16),
    gmm((XF,) * E, (T(F16, (K, N)),) * E, group_type=-1, split_item=0, group_list=None),
    gmm(T(F16, (M, K), "ND", True), T(F16, (K, N)), group_type=2, bias=None),
]  # fmt: skip

NEIGHBOURS = {GMM: GMM_CALLS}
