"""What users search the web for, answered before the device is even booked.

Each case is a call that Ascend's operators refuse at run time with an error code, or take and compute something else.
`quantpass.check_op` names every rule that the call breaks, what it wants, and the nearest legal call.

    python examples/legality.py
"""

import sys

import torch

from quantpass import TensorSpec, check_op

T = TensorSpec
int8, int32, int64 = torch.int8, torch.int32, torch.int64
f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32


def w8a8(**changes):
    """A legal W8A8 call on every chip in eager mode: x1 (16, 512), a weight stored (128, 512)."""
    call = {
        "x1": T(int8, (16, 512)),
        "x2": T(int8, (512, 128), transposed=True),
        "scale": T(int64, (128,)),
        "output_dtype": f16,
        "mode": "eager",
    }
    return {**call, **changes}


def w8a16(**changes):
    """A legal W8A16 call on every chip in eager mode."""
    call = {
        "x": T(f16, (16, 512)),
        "weight": T(int8, (512, 128), transposed=True),
        "antiquant_scale": T(f16, (128,)),
        "mode": "eager",
    }
    return {**call, **changes}


def w4a16_nz(group):
    """An int4 weight in FRACTAL_NZ with a scale for each group of K."""
    return {
        "x": T(bf16, (16, 4096)),
        "weight": T(int32, (4096, 512), format="FRACTAL_NZ"),
        "antiquant_scale": T(bf16, (4096 // group, 4096)),
        "antiquant_group_size": group,
    }


QMM, WQMM = "npu_quant_matmul", "npu_weight_quant_batchmatmul"
CASES = [
    # (what the user sees or does, operator, target, call, the rule that says so; None: the call is legal)
    ("161002: scale not implemented for DT_FLOAT16", QMM, "Ascend910B3",
     w8a8(scale=T(f16, (128,))), "qmm.a2.dtypes.scale"),
    ("310P: bias dtype should be INT32, actual FLOAT16", QMM, "Ascend310P3",
     w8a8(bias=T(f16, (128,))), "qmm.310p.dtypes.bias"),
    ("310P: pertoken_scale", QMM, "Ascend310P3",
     w8a8(scale=T(f32, (128,)), pertoken_scale=T(f32, (16,))), "qmm.310p.pertoken"),
    ("310P: only transpose_x2=true", QMM, "Ascend310P3",
     w8a8(x2=T(int8, (512, 128), format="FRACTAL_NZ"), mode="graph"), "qmm.310p.nz.graph"),
    ("float32 scale in graph mode, float16 out", QMM, "Ascend910B3",
     w8a8(scale=T(f32, (128,)), mode="graph"), "qmm.a2.dtypes.scale"),
    ("FRACTAL_NZ weight with N = 1", QMM, "Ascend910B3",
     w8a8(x2=T(int8, (512, 1), format="FRACTAL_NZ"), scale=T(int64, (1,))), "qmm.nz.n"),
    ("bfloat16 x with a bfloat16 bias", WQMM, "Ascend910B3",
     w8a16(x=T(bf16, (16, 512)), antiquant_scale=T(bf16, (128,)), bias=T(bf16, (128,))), "wqmm.a2.dtypes.bias"),
    ("x of rank 3", WQMM, "Ascend910B3", w8a16(x=T(f16, (2, 16, 512))), "wqmm.x.rank"),
    ("int4 in FRACTAL_NZ with groups of 256", WQMM, "Ascend910B3", w4a16_nz(256), "wqmm.nz.int4.group.size"),
    ("the same with groups of 128", WQMM, "Ascend910B3", w4a16_nz(128), None),
    ("W4A16 on a 310P", WQMM, "Ascend310P3",
     w8a16(weight=T(int32, (512, 16))), "wqmm.310p.dtypes.weight"),
]  # fmt: skip


def main() -> int:
    """Ask all of them; 1 if an answer is not the expected one."""
    wrong = 0
    for seen, op, target, call, rule in CASES:
        verdict = check_op(op, target=target, **call)
        print(f"* {seen}\n{verdict}\n")
        rules = [r.rule for r in verdict.rejects]
        if verdict.legal != (rule is None) or (rule is not None and rule not in rules):
            print(f"  expected {rule or 'a legal call'}, got {rules or 'a legal call'}\n")
            wrong += 1
    print(f"{len(CASES) - wrong} of {len(CASES)} answered as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
