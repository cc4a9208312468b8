"""Legal calls of the operators around the two matmuls, of every form, for ``test_legality`` to make edits of."""

import torch

from quantpass import TensorSpec as T
from quantpass.chips.all_reduce import ALL_REDUCE
from quantpass.chips.expert_matmuls import GMM_SWIGLU, GMM_SWIGLU_V2, QGMMD
from quantpass.chips.expert_routing import ROUTING
from quantpass.chips.grouped_matmul import GMM
from quantpass.chips.neighbours import REDUCE_SUM, TRANSPOSE_QMM
from quantpass.chips.norm_quant import ADD_RMS_NORM_QUANT, RMS_NORM_QUANT
from quantpass.chips.swiglu_quant import DEQUANT_SWIGLU_QUANT, SWIGLU_QUANT

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
    gmm(X8, W4NZ, scale=T(I64, (E, 1, N)), per_token_scale=T(F32, (M, 1)), bias=T(F32, COLUMNS), out=BF16, offset=T(F32, (E, 1, N)), group_list_type=1),
    gmm(XF, _weights(I8)[0], antiquant_scale=HALF, antiquant_offset=HALF, bias=HALF),
    gmm(XF, W4, antiquant_scale=GROUPS, antiquant_offset=GROUPS),
    gmm(XF, W4T, antiquant_scale=HALF, antiquant_offset=HALF),
    *(gmm(XF, w, bias=HALF, scale=None, per_token_scale=None) for w in (*_weights(F16), *_weights(F16, "NZ"))),
    gmm(XB, _weights(BF16)[0], bias=T(F32, COLUMNS), out=BF16),
    gmm((XF,) * E, (T(F16, (K, N)),) * E, group_type=-1, split_item=0, group_list=None),
    gmm(T(F16, (M, K), "ND", True), T(F16, (K, N)), group_type=2, bias=None),
    # Forms of the Ascend 950.
    gmm(X8, _weights(I8)[0], scale=T(I64, COLUMNS), bias=T(I32, COLUMNS), out=F16, act_type=0),
    gmm(X8, _weights(I8)[0], scale=T(F32, (E, 1)), per_token_scale=ROWS, out=F16, act_type=5),
    gmm(X8, W4, scale=T(I64, (E, 1, N)), per_token_scale=ROWS, bias=T(F32, COLUMNS), out=BF16, group_list_type=1),
    gmm(X8, W4NZ, scale=T(I64, (E, 1, N)), offset=T(F32, (E, 1, N)), per_token_scale=ROWS, bias=T(F32, COLUMNS), out=F16, group_list_type=1),
    gmm(X8, W4NZ, scale=T(F32, COLUMNS), antiquant_scale=T(F16, (E, 2, N)), per_token_scale=ROWS, bias=T(F32, COLUMNS), out=F16),
    gmm(XB, W4, antiquant_scale=T(BF16, (E, 4, N)), antiquant_offset=T(BF16, (E, 4, N)), bias=T(BF16, COLUMNS), out=BF16),
    gmm((T(F16, (M, K)),) * 2, (T(I8, (K, N)),) * 2, group_type=-1, split_item=0, group_list=None, antiquant_scale=(T(F16, (N,)),) * 2),
    gmm((XF,), (T(F16, (K, N)),) * 8, bias=(T(F16, (N,)),) * 8),
]  # fmt: skip

NEIGHBOURS = {GMM: GMM_CALLS}

TOKENS = {"x_scale": ROWS, "group_list": T(I64, (E,))}
WEIGHT_NZ, SCALES = T(I8, (E, K, N), "NZ"), T(F32, COLUMNS)
NORM = {"gamma": T(F16, (N,)), "beta": T(F16, (N,)), "scale": T(F16, (1,)), "offset": T(I8, (1,))}
V2 = {"dequant_mode": 0, "quant_mode": 0, "group_list_type": 0, "bias": None, **TOKENS}
NO_MORE = {"smooth_scale": None, "weight_assist_matrix": None}
SWIGLU_CALLS = [
    *({"x": X8, "weight": w, "weight_scale": SCALES, **NO_MORE, **V2} for w in (WEIGHT_NZ, T(I8, (E, K, N)))),
    {"x": X4, "weight": W4, "weight_scale": SCALES, "smooth_scale": T(F32, (E,)), "weight_assist_matrix": None, **V2},
    {"x": X8, "weight": W4, "weight_scale": T(I64, COLUMNS), "smooth_scale": None, "weight_assist_matrix": SCALES, **V2},
]  # fmt: skip

NEIGHBOURS |= {
    GMM_SWIGLU: [
        {"x": X8, "weight": WEIGHT_NZ, "weight_scale": SCALES, "bias": None, "offset": None, **TOKENS},
        {"x": X8, "weight": W4, "weight_scale": T(I64, COLUMNS), "bias": SCALES, "offset": None, **TOKENS},
    ],
    GMM_SWIGLU_V2: SWIGLU_CALLS,
    QGMMD: [
        {
            "x": XF,
            "quantized_weight": T(I8, (E, N, K)),
            "weight_scale": SCALES,
            "group_list": T(I64, (E,)),
            "bias": None,
            "x_offset": None,
            "x_scale": x_scale,
            "smooth_scale": T(F16, (K,)),
            "quant_mode": mode,
        }
        for x_scale, mode in [(None, "pertoken"), (ROWS, "pertoken"), (T(F32, (1,)), "pertensor")]
    ],
    RMS_NORM_QUANT: [{"x": T(F16, (M, N)), **NORM, "dst_dtype": how} for how in (I8, torch.quint4x2)],
    ADD_RMS_NORM_QUANT: [
        {
            **{name: T(F16, (M, N)) for name in ("x1", "x2")},
            **{name: T(F16, (N,)) for name in ("gamma", "beta")},
            **{name: T(F32, (N,)) for name in ("scales1", "scales2")},
            **{name: T(I32, (N,)) for name in ("zero_points1", "zero_points2")},
            "axis": -1,
            "div_mode": True,
        },
        *(
            {
                **{name: T(x, (M, N)) for name in ("x1", "x2")},
                **{name: T(x, (N,)) for name in ("gamma", "beta", "scales1", "zero_points1")},
            }
            for x in (BF16, F32)
        ),
    ],
    TRANSPOSE_QMM: [{"x1": T(I8, (M, E, K)), "x2": T(I8, (E, K, N)), "dtype": F16}],
    SWIGLU_QUANT: [
        {
            "x": XF,
            "smooth_scales": T(F32, (E, K // 2)),
            "offsets": T(F32, (E, K // 2)) if mode == 0 else None,
            "group_index": T(I32, (E,)),
            "quant_mode": mode,
            "group_list_type": 0,
            "dst_type": how,
        }
        for mode, how in [(0, I8), (1, torch.quint4x2)]
    ],
    DEQUANT_SWIGLU_QUANT: [
        {
            "x": T(I32, (M, K)),
            "weight_scale": T(F32, (1, K)),
            "activation_scale": T(F32, (M, 1)),
            "bias": T(I32, (K,)),
            "quant_scale": T(F32, (1,) if mode == 0 else (K // 2,)),
            "quant_offset": T(F32, (1,)) if mode == 0 else None,
            "quant_mode": mode,
            "swiglu_mode": mode,
            "activate_left": True,
        }
        for mode in (0, 1)
    ]
    + [
        {
            "x": T(I32, (M, K)),
            "weight_scale": T(F32, (E, K)),
            "activation_scale": T(F32, (M, 1)),
            "group_index": T(I64, (E,)),
            "bias": None,
            "quant_scale": T(F32, (E, K // 2)),
            "quant_offset": None,
            "quant_mode": 1,
        },
        *({"x": T(d, (M, K)), "weight_scale": None, "activation_scale": None, "bias": None, "quant_mode": 0} for d in (F16, BF16)),
    ],
    REDUCE_SUM: [
        {
            "x1": T(I8, (E, M, K)),
            "x2": T(I8, (E, K, N), "NZ"),
            "x1_scale": T(F32, (E, M)),
            "x2_scale": T(BF16, (N,)),
        }
    ],
}  # fmt: skip

RANKS = {"hcom": "group", "reduce_op": "sum", "comm_turn": 0, "antiquant_group_size": 0}
COMM = ("comm_quant_scale_1", "comm_quant_scale_2")


def _reduced(x1, x2, **arguments):
    """A row-parallel matmul and the sum over its ranks."""
    return {"x1": x1, "x2": x2, **dict.fromkeys(COMM), **RANKS, **arguments}


NEIGHBOURS[ALL_REDUCE] = [
    _reduced(XF, T(F16, (K, N)), bias=T(F16, (N,)), x3=T(F16, (M, N))),
    _reduced(T(F16, (2, 8, K)), T(I8, (K, N)), antiquant_scale=T(F16, (N,)), antiquant_offset=T(F16, (N,)), x3=T(F16, (2, 8, N))),
    _reduced(XB, T(I8, (K, N), "ND", True), antiquant_scale=T(BF16, (4, N)), antiquant_offset=T(BF16, (4, N)), antiquant_group_size=64),
    _reduced(X8, T(I8, (K, N)), bias=T(I32, (N,)), dequant_scale=T(I64, (N,)), **dict.fromkeys(COMM, T(F16, (N,)))),
    _reduced(X8, T(I8, (K, N), "ND", True), dequant_scale=T(BF16, (1, N)), pertoken_scale=ROWS, **dict.fromkeys(COMM, T(BF16, (1, N)))),
]  # fmt: skip


def _routed(x, mode, *, scale=None, offset=None, **arguments):
    """Rows that go to three experts each."""
    how = {"expert_num": E, "active_num": -1, "drop_pad_mode": 0, "expert_capacity": -1, "row_idx_type": 0}
    return {
        "x": x,
        "expert_idx": T(I32, (M, 3)),
        "scale": scale,
        "offset": offset,
        "quant_mode": mode,
        "active_expert_range": [0, E],
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        **how,
        **arguments,
    }


NEIGHBOURS[ROUTING] = [
    _routed(XF, -1, scale=ROWS),
    _routed(XF, -1, expert_tokens_num_type=2),
    _routed(XF, -1, drop_pad_mode=1, expert_capacity=4),
    _routed(XF, 0, scale=T(F32, (1,)), offset=T(F32, (1,))),
    _routed(XB, 1, scale=T(F32, (E, K))),
    _routed(XB, 13, scale=T(F32, (1, K))),
]
