"""What is known of a message or a code where no rule says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Note:
    """What the operator wanted, and what to do.

    ``passing``: the message only passes another one on, which is worth more where both are there.
    """

    want: str
    hint: str
    passing: bool = False


_NZ = "cast the whole matrix with npu_format_cast(weight, 29), and take views of it afterwards"

NOTES: Mapping[str, Note] = MappingProxyType(
    {
        "inner": Note(
            "a step of the operator's own code to succeed",
            "a consequence: the reason is in another line of the same failure, often the first of its E or EZ lines",
            passing=True,
        ),
        "newer_chip": Note(
            "a form for chips newer than A3: float8, float4, hifloat8, MX scales, blocks or look-up tables",
            "quantpass has no rules for these forms; on A2, A3 and 310P give int8 or int4 operands and no block scales",
        ),
        "float_matmul": Note(
            "a matmul of floats that the operator can carry out",
            "this is about a float matmul, none of the quantized operators: a layer that is not quantized, or a weight in "
            "FRACTAL_NZ with a dimension of 1 (leave such a weight in ND)",
        ),
        "out": Note(
            "a result whose shape and dtype follow from the inputs",
            "torch_npu makes the result itself, so the shapes of the inputs don't fit together; a caller of aclnn has to "
            "make it as the operator's document says",
        ),
        "platform": Note(
            "a chip, or a version of CANN, that has this form of the operator",
            "the operator or its form is not there on this chip: see `quantpass chips`, and the release notes of CANN",
        ),
        "cann": Note(
            "a newer version of CANN", "torch_npu calls a form that the installed CANN does not have: update CANN"
        ),
        "reserved": Note("nothing for an argument that is reserved", "leave the argument out"),
        "dtypes": Note(
            "dtypes that go together",
            "no line of the operator's table has this combination: compare all dtypes with `quantpass chips`",
        ),
        "a8w4": Note(
            "the form of int8 activations with int4 weights: x1 not transposed, a scale word for each group of 256 rows or for "
            "each column, row scales and an offset, no bias",
            "npu_quant_matmul with int8 x1 and int32-packed x2 has a recipe of its own: group_sizes [0, 0, 256], scale int64 "
            "(k/256, n), offset float32 (n,), pertoken_scale float32 (m, 1)",
        ),
        "a8w4.shapes": Note(
            "scales shaped for int4 weights: scale (k/256, n) and pertoken_scale (m, 1) with groups, (n,) and (m,) without",
            "compare with `quantpass check-op npu_quant_matmul` and group_sizes=[0, 0, 256]",
        ),
        "a8w4.k": Note(
            "a K that int8 activations with int4 weights can take: a multiple of the group, below the kernel's limit",
            "pad K, or use int8 weights for this layer",
        ),
        "a8w4.n": Note("an N that is a multiple of what int4 weights ask for (8; 256 in groups)", "pad N"),
        "w4a8": Note(
            "the form of experts with int8 activations and int4 weights: bias float32 (experts, n), scale int64 "
            "(experts, 1, n), offset float32 (experts, 1, n), per_token_scale float32 (m, 1), a float16 result",
            "quantpass knows this form as the contradicted rule gmm.a2.w4a8",
        ),
        "perblock": Note(
            "int8 operands in blocks of 128: x1 straight, x2 transposed, float32 scales for each block, a bfloat16 result",
            "quantpass has no rules for blocks; group_sizes [0, 0, 0] or none asks for scales for each column",
        ),
        "int4.even": Note(
            "an even number of int4 along the dimension that is packed",
            "pad that dimension; packed in int32 it is a multiple of 8",
        ),
        "format": Note("ND, or FRACTAL_NZ where the operator takes it", "cast it with npu_format_cast(t, 2)"),
        "format.x1": Note("x1 in ND", "only weights go to FRACTAL_NZ: cast it with npu_format_cast(x1, 2)"),
        "format.x2": Note("x2 in the format that its dtype has: int4 in ND, int8 in ND or FRACTAL_NZ", _NZ),
        "nz.storage": Note("storage of FRACTAL_NZ that fits the matrix", _NZ),
        "gmm.nz": Note(
            "a weight in FRACTAL_NZ whose K and N are multiples: int8 16 and 32, int4 16 and 64, floats 16 and 16, the other "
            "way round where it is transposed",
            "leave this weight in ND, or pad it; tensor parallelism may have cut it to such a size",
        ),
        "contiguous": Note(
            "tensors that are contiguous, or a transposed view of one that is",
            "call .contiguous(); scales of a transposed weight are transposed with it",
        ),
        "scales.shapes": Note(
            "scales whose shapes go together: scale (n,) or (1,), pertoken_scale (m,) or (1,)",
            "flatten x1 to (m, k) and the row scales to (m,)",
        ),
        "y_scale": Note("y_scale only where the form of the call has it", "leave y_scale out: quantpass knows no form that has it"),
        "m.range": Note("a number of rows that fits int32", "split the rows into several calls"),
        "ranges": Note("m, k and n from 1 to 65535", "`quantpass check-op` names the size that is outside"),
        "weight_only.ranks": Note("x and weight of two dimensions (x up to 6 on the Atlas inference series)", "flatten x to (m, k)"),
        "weight_only.batch": Note("batch dimensions that are equal or 1", "flatten x to (m, k), and give one weight a call"),
        "weight_only.nz": Note(
            "a weight in FRACTAL_NZ in a form that has it: per channel for int8, no int8 result, x not transposed",
            "leave this weight in ND",
        ),
        "weight_only.y": Note(
            "the dtype of x without quant_scale, int8 with it", "torch_npu makes the result: look at quant_scale and x"
        ),
        "int4pack.out": Note(
            "a packed result of the shape that follows from the weight",
            "torch_npu makes the result itself: pack a contiguous int32 matrix whose last dimension is a multiple of 8",
        ),
        "group_values": Note(
            "a group_list whose numbers fit the rows of x: sums that end in m (group_list_type 0), or counts that add up to m (1)",
            "with expert parallelism it holds the rank's own experts, and x the rows that were sent to them",
        ),
        "gmm.mixed": Note(
            "arguments of one form: floats, scale (and per_token_scale), or antiquant_scale and antiquant_offset",
            "leave out the arguments of the other form; an empty list is not the same as None in old versions",
        ),
        "gmm.ranks": Note(
            "x of 2 dimensions and one weight of 3, or a list of weights of 2",
            "stack the experts: weight [(experts, k, n)], scale [(experts, n)]",
        ),
        "gmm.transpose": Note("weights that are all transposed or none", "lay all weights out alike; x is never transposed"),
        "gmm.forms": Note(
            "one of the forms: x and weight one tensor each, or one x and a list of weights, with split_item 2 or 3 and one "
            "result; or lists of all, with split_item 0 or 1 and group_type -1",
            "stack the experts: x=[x], weight=[(experts, k, n)], split_item=2, group_type=0",
        ),
        "gmm.shapes": Note(
            "x, weight, scales and bias whose K, N and number of experts agree",
            "`quantpass check-op npu_grouped_matmul` names the argument that differs; with expert or tensor parallelism look at "
            "the shard's sizes",
        ),
        "tuning": Note("tuning_config [rows an expert has], from 0 to the rows of x", "leave tuning_config out"),
        "empty": Note("a tensor with elements", "no dimension may be 0"),
        "scalar": Note("a tensor with dimensions where int4 is packed in int32", "give a tensor, not a scalar"),
        "src_dtype": Note("src_dtype as x is: int8, or int4 for int32", "leave src_dtype out for int8"),
        "quantize.ranks": Note("scales and zero_points of one dimension", "flatten them; a single scale is (1,)"),
        "axis": Note("an axis that the tensor has", "give axis=-1 for scales along the last dimension"),
    }
)  # fmt: skip

CODES: Mapping[str, Note] = MappingProxyType(
    {
        "161001": Note("no null where the operator needs a tensor", "aclnn: a null pointer; its EZ1001 line names the argument"),
        "161002": Note("arguments that the operator takes", "aclnn: an argument is not accepted; its EZ1001 line says which and why"),
        "361001": Note("the runtime to carry the call out", "aclnn: the runtime failed; look at the lines before, and at the plog"),
        "561000": Note("an inner step of aclnn to succeed", "aclnn: inner error; the first EZ9999 or E69999 line says which step"),
        "561001": Note("shapes that can be inferred", "aclnn: inferring shapes failed; the EZ lines say which input"),
        "561002": Note("a tiling for these shapes", "aclnn: tiling failed; its op[...] lines say which shape or dtype"),
        "561003": Note("a kernel for these dtypes on this chip", "aclnn: no kernel found: the dtypes, or the operator, are not there on the chip"),
        "561103": Note("no null inside of aclnn", "aclnn: an inner null pointer; the lines before say where"),
        "561107": Note("the operator package", "aclnn: ASCEND_OPP_PATH is not set or wrong: source CANN's set_env.sh"),
        "561112": Note("the package of kernels", "aclnn: the kernels of this chip are not installed"),
        "507014": Note("a kernel that ends in time", "runtime: an AI core timed out; the plog names the kernel"),
        "507015": Note("a kernel that runs through", "runtime: an exception on an AI core, often an address out of range: "
                       "sizes that the arguments belie, or a fault of the kernel; the plog names it"),
        "507018": Note("an AI CPU kernel that runs through", "runtime: an exception on an AI CPU; the plog names the kernel"),
        "EZ1001": Note("arguments that the operator takes", "aclnn's text about an argument follows the code"),
        "EZ9999": Note("an inner step to succeed", "an inner error of the operators' host code; its op[...] lines say which"),
        "E69999": Note("an inner step to succeed", "an inner error; its op[...] lines say which"),
        "E89999": Note("an inner step to succeed", "an inner error of the operators' host code; its op[...] lines say which"),
    }
)  # fmt: skip
"""The codes that come with messages; each only passes on what its text says."""

TORCH_NPU: Mapping[str, str] = MappingProxyType(
    {
        "001": "a parameter is not accepted",
        "002": "a type is not accepted",
        "003": "a value is not accepted",
        "004": "a pointer is null",
        "005": "an inner error",
        "006": "no memory",
        "007": "a feature is not there",
        "008": "a resource is not found",
        "009": "a resource is not available",
        "010": "a system call failed",
        "011": "time ran out",
        "012": "no permission",
        "100": "a call of acl or aclnn failed: its own code and text follow",
        "200": "a call of HCCL failed",
        "300": "a call of GE failed: its own code and text follow",
        "999": "an exception",
    }
)
"""The last three digits of torch_npu's ``ERRssccc``; the two before name the part: 00 PTA, 01 OPS, 02 DIST, 03 GRAPH, 04 PROF."""


def note_of(answer: str) -> Note | None:
    """The note that an answer names; None where it names a rule."""
    kind, colon, name = answer.partition(":")
    return NOTES[name] if colon and kind == "note" else NOTES.get(answer)


def code_note(code: str) -> Note | None:
    """What a code says: of aclnn (161002), of CANN (EZ1001), of torch_npu (ERR01002)."""
    if code in CODES:
        return CODES[code]
    if len(code) == 8 and code.startswith("ERR") and code[5:] in TORCH_NPU:
        return Note("the call to succeed", f"torch_npu: {TORCH_NPU[code[5:]]}", passing=True)
    return None
