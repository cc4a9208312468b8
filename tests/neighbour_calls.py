"""Legal calls of the operators around the two matmuls, of every form, for ``test_legality`` to make edits of."""

import torch

from quantpass import TensorSpec as T
from quantpass.chips.grouped_matmul import GMM
from quantpass.chips.neighbours import (
    ADD_RMS_NORM_QUANT,
    DEQUANT_SWIGLU_QUANT,
    GMM_SWIGLU,
    GMM_SWIGLU_V2,
    QGMMD,
    REDUCE_SUM,
    RMS_NORM_QUANT,
    SWIGLU_QUANT,
    TRANSPOSE_QMM,
)

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

TOKENS = {"x_scale": ROWS, "group_list": T(I64, (E,))}
WEIGHT_NZ, SCALES = T(I8, (E, K, N), "NZ"), T(F32, COLUMNS)
NORM = {"gamma": T(F16, (N,)), "beta": T(F16, (N,)), "scale": T(F16, (1,)), "offset": T(I8, (1,))}
SWIGLU_CALLS = [
    {"x": X8, "weight": WEIGHT_NZ, "weight_scale": SCALES, "bias": None, "dequant_mode": 0, "quant_mode": 0, **rest, **TOKENS}
    for rest in [{"smooth_scale": None, "weight_assist_matrix": None, "group_list_type": 0}]
] + [
    {"x": X4, "weight": W4, "weight_scale": SCALES, "smooth_scale": T(F32, (E,)), **TOKENS},
]  # fmt: skip

NEIGHBOURS |= {
    GMM_SWIGLU: [{"x": X8, "weight": WEIGHT_NZ, "weight_scale": SCALES, "bias": None, "offset": None, **TOKENS}],
    GMM_SWIGLU_V2: SWIGLU_CALLS,
    QGMMD: [
        {
            "x": XF,
            "quantized_weight": T(I8, (E, N, K)),
            "weight_scale": SCALES,
            "group_list": T(I64, (E,)),
            "smooth_scale": T(F16, (K,)),
            "quant_mode": "pertoken",
        }
    ],
    RMS_NORM_QUANT: [{"x": T(F16, (M, N)), **NORM}],
    ADD_RMS_NORM_QUANT: [
        {
            "x1": T(F16, (M, N)),
            "x2": T(F16, (M, N)),
            "gamma": T(F16, (N,)),
            "beta": T(F16, (N,)),
            "axis": -1,
            "scales1": T(F32, (N,)),
            "zero_points1": T(I32, (N,)),
            "scales2": T(F32, (N,)),
            "zero_points2": T(I32, (N,)),
        }
    ],
    TRANSPOSE_QMM: [{"x1": T(I8, (M, E, K)), "x2": T(I8, (E, K, N)), "dtype": F16}],
    SWIGLU_QUANT: [
        {
            "x": XF,
            "smooth_scales": T(F32, (E, K // 2)),
            "group_index": T(I32, (E,)),
            "quant_mode": 1,
            "group_list_type": 0,
        }
    ],
    DEQUANT_SWIGLU_QUANT: [
        {
            "x": T(I32, (M, K)),
            "weight_scale": T(F32, (1, K)),
            "activation_scale": T(F32, (M, 1)),
            "bias": T(I32, (K,)),
            "quant_scale": T(F32, (1, K // 2)),
            "quant_offset": T(F32, (1, K // 2)),
            "quant_mode": 1,
            "swiglu_mode": 0,
        },
        {
            "x": T(I32, (M, K)),
            "activation_scale": T(F32, (M, 1)),
            "group_index": T(I64, (E,)),
            "bias": None,
            "quant_scale": T(F32, (E, K // 2)),
            "quant_offset": None,
            "quant_mode": 1,
        },
        *({"x": T(d, (M, K)), "activation_scale": None, "bias": None, "quant_mode": 0} for d in (F16, BF16)),
    ],
    REDUCE_SUM: [
        {
            "x1": T(I8, (E, M, K)),
            "x2": T(I8, (E, K, N), "NZ"),
            "x1_scale": T(F32, (E, M)),
            "x2_scale": T(BF16, (N,)),
        }
    ],
}
