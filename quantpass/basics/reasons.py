"""Every reason for which a site is not fused, or not fused as far as it might be, that is no rule of a chip.

The rules of chips stand in their tables (:mod:`quantpass.chips`, docs/chips.md). What reading, planning and rewriting
refuse by themselves has its id, what it wants, what to do and where that comes from here, once; whoever refuses adds
the fact. docs/reasons.md is made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantpass.basics.reject import Reject

_SEE_WEIGHTS = "use a door that sees the weights (qp.backend, qp.npu_backend)"
_AFFINE = "a weight read as scale * (codes - zero_point)"
_QMM = "docs/semantics.md, 1 (npu_quant_matmul)"
_WQMM = "docs/semantics.md, 2 (npu_weight_quant_batchmatmul)"
_QUANT = "docs/semantics.md, 5 (npu_quantize, npu_dynamic_quant)"
_FINITE = "docs/semantics.md, 8 (values that are not finite)"
_GRAPH = "what the graph computes"
_VERDICTS = "docs/verdicts.md"
_DIALECTS = "docs/adding_a_dialect.md"
_WITHOUT_EXCEPTION = "a site that is read, planned and rewritten without an exception"
_OUR_FAULT = (
    "this is a fault of quantpass: please report it with the traceback in the log (logger 'quantpass'); "
    "QUANTPASS_RAISE=1 raises it"
)
_TWO_MATRICES = "a matmul of two matrices that can be read"
_KNOWN_WEIGHT = "a weight that is known when compiling"
_KNOWN_BIAS = "a finite bias that is known when compiling"
_BIASED_LATER = f"a mask of -inf is added behind the matmul; {_SEE_WEIGHTS}"
_SYMMETRIC = "quantize activations symmetrically"
_TINY_SCALES = "its smallest scales are below the normal range of the dtype: run the model in bfloat16"
_NO_WEIGHT = "the right operand is computed when the graph runs, and the chip wants it in FRACTAL_NZ"
_NO_NZ = f"{_SEE_WEIGHTS}; for attention products choose another chip"
_NZ = "docs/semantics.md, 6 (FRACTAL_NZ)"
_CHECK_ACTIVATION = "check the calibration of this activation"


@dataclass(frozen=True, slots=True)
class Reason:
    """One way to be refused.

    Attributes:
        rule: its id, as reports print it.
        means: when it happens.
        want: what would be accepted.
        hint: what to do; empty where whoever refuses knows better.
        source: why it is so: a document, or the operators' formulas.
    """

    rule: str
    means: str
    want: str
    hint: str = ""
    source: str = _GRAPH


READING = (
    Reason("read.failed", "reading, planning or judging a site raised an exception; the site stays as it was",
           _WITHOUT_EXCEPTION, _OUR_FAULT, _VERDICTS),
    Reason("read.matmul", "a quantized operand meets a matmul in a form that is not read",
           _TWO_MATRICES, "rewrite it as x @ w with 2-D w", _VERDICTS),
    Reason("read.matmul.alpha", "the matmul operator scales its product, and the scale can't be folded",
           "a scale that can be folded: without it the product is rounded to float16, where it may overflow",
           f"{_SEE_WEIGHTS}, or run the model in bfloat16"),
    Reason("read.consumer", "an operator in no table takes a tensor that was dequantized from stored codes",
           _TWO_MATRICES,
           "if it multiplies matrices, write it as F.linear(x, w), or describe it in a dialect (docs: adding a tool)",
           _DIALECTS),
    Reason("read.subgraph", "the matmul lies in a graph that another operator calls (cond, scan, map ...)",
           "a matmul of the graph itself", "", _VERDICTS),
    Reason("read.mutated", "the graph writes in place to what the fused operator would read or give",
           "operands that keep their value: the fused operator runs where its operands are ready",
           "use the functional form (torch.export, torch.compile) or move the write behind the matmul"),
    Reason("read.activation", "the activation is quantized in a way that can't be read",
           "an activation read as scale * (codes - zero_point)"),
    Reason("read.activation.unbounded", "the activation is rounded and scaled, but not clamped to the range of codes",
           "integers of at most 8 bits", "clamp the rounded values to the range of their codes"),
    Reason("read.batched.scale", "both operands are computed at run time and the right one has several scales",
           _AFFINE, "the operator takes one scale for each column of N, the same for all batches", _QMM),
    Reason("read.batched.zero_point", "both operands are computed at run time and the right one has a zero point",
           _AFFINE, "quantize both operands of an attention matmul symmetrically: the operator has no row sums", _QMM),
    Reason("read.weight", "the weight is quantized, but its spelling can't be read as scale * (codes - zero_point)",
           _AFFINE),
    Reason("read.weight.along_k", "the weight's scale or zero point varies along K without regular groups",
           _AFFINE, "the operators take a scale for each column of N, or for each group of rows of K", _WQMM),
    Reason("read.weight.batched", "the weight is a stack of matrices that differ",
           _AFFINE, "a matmul for each matrix can be fused; all at once need a grouped matmul"),
    Reason("read.weight.bits", "the weight's codes span more than 8 bits", _AFFINE, "quantize to 8 bits or fewer",
           _WQMM),
    Reason("read.weight.experts", "one of several matrices is chosen when the graph runs", "one matrix for all rows",
           "a grouped matmul is not among the fused operators yet; experts that are Linear layers of their own, called "
           "in a loop, can be fused", _VERDICTS),
    Reason("read.weight.float", "the activation is quantized and the weight is not", _AFFINE),
    Reason("read.weight.folded", "a tool has folded the weight into floats on a grid of at most 256 steps", _AFFINE,
           "run quantpass before constant folding and freezing (torch._inductor.config.freezing = False), and keep the "
           "tool from storing dequantized weights", _VERDICTS),
    Reason("read.weight.nonlinear", "the weight is no linear function of its codes (a table of levels)", _AFFINE,
           "quantize to evenly spaced levels"),
    Reason("read.weight.opaque", "an operator in no table makes the weight of its codes", _AFFINE,
           "describe the operator in a dialect (docs: adding a tool), or dequantize with (codes - zero_point) * scale",
           _DIALECTS),
    Reason("read.weight.packed", "the weight is made of bits of words whose values are not known", _AFFINE,
           f"{_SEE_WEIGHTS}, with the weights as parameters or buffers of the module and "
           "torch._inductor.config.freezing = False"),
    Reason("read.weight.returned", "the graph dequantizes a weight and returns it: whoever multiplies is elsewhere",
           "the dequantization in one graph with the matmul",
           "a graph break lies between the two: find it with TORCH_LOGS=graph_breaks and take it away, e.g. with "
           "torch._dynamo.config.capture_scalar_outputs and capture_dynamic_output_shape_ops for experts in a loop",
           _VERDICTS),
    Reason("read.weight.runtime", "the dequantized weight is changed by something that only the run knows", _AFFINE,
           "multiply by the dequantized weight itself, and do this to the result"),
    Reason("read.weight.unread", "the weight is computed from integers that hold no data (meta or fake tensors)",
           "a weight whose spelling can be read, or whose values are there", "load the checkpoint and ask again"),
)  # fmt: skip

PLANNING = (
    Reason("plan.left", "the option leave names the site", "a site that leave does not name",
           "take its name out of leave", "leave=(...) of the door that compiled it"),
    Reason("plan.none", "no fused operator takes the activation's dtype", "a floating or int8 activation"),
    Reason("plan.bound", "how far the fused result may be off rests on a value that only the run knows",
           "parameters that are known when compiling", _SEE_WEIGHTS, _FINITE),
    Reason("qmm.activation.scale", "the activation's scale varies along K", "one scale, or one for each row",
           "move the scale into the weight before quantizing it", _QMM),
    Reason("qmm.activation.zero_point", "the activation has several zero points",
           "one zero point for the whole tensor: the operator has no rank-1 term", _SYMMETRIC, _QMM),
    Reason("qmm.activation.zero_point.dtype", "the activation's zero point is a float that only the run knows",
           "an integer: it goes into the int32 bias",
           "quantize activations symmetrically, or keep their zero point in an integer tensor", _QMM),
    Reason("qmm.activation.zero_point.fraction", "the activation's zero point is no integer, and not all is constant",
           "an integer zero point, or constants: what a float32 sum with the rest of it may lose has to be known",
           "round the zero point when calibrating", _QMM),
    Reason("qmm.batched.rows", "both operands are computed at run time and the left one has a scale for each row",
           "one scale for the whole tensor", "quantize both operands of an attention matmul per tensor", _QMM),
    Reason("qmm.bias.range", "the bias in units of the scale does not fit the accumulator beside the product",
           "a sum with the product of at most 2147483647",
           "the scale is very small beside the bias, or a zero point is very large: check the calibration", _QMM),
    Reason("qmm.bias.runtime", "what would go into the int32 bias is known only when the graph runs",
           "constants: round(bias / scale) and the product have to stay within 2147483647, and a bias of -inf is no "
           "integer",
           f"{_SEE_WEIGHTS}; a mask is added behind the matmul, or in bfloat16, where the operator takes a floating "
           "bias", _FINITE),
    Reason("qmm.bias.saturates", "the bias may be infinite, and the chip limits float16 results to 65504",
           _KNOWN_BIAS, _BIASED_LATER, _FINITE),
    Reason("qmm.requantize.pertoken", "the result is quantized and x has a scale for each row",
           "an int8 result without pertoken_scale", "quantize activations with one static scale", _QMM),
    Reason("qmm.requantize.range", "the result is quantized to another range than that of int8 or uint8",
           "[-128, 127] or [0, 255]: the operator saturates there and nowhere else",
           "use the full range for this activation", _QMM),
    Reason("qmm.requantize.relu", "a ReLU stands before a quantize whose zero point is not the lowest code",
           "the lowest code as zero point, where the lower bound is the ReLU",
           "calibrate the activation behind the ReLU, whose values are not negative", _QMM),
    Reason("qmm.requantize.zero_point", "the result is quantized with a zero point outside of its range",
           "a zero point in the range of the codes: the operator clips to 9 bits before it adds it",
           _CHECK_ACTIVATION, _QMM),
    Reason("qmm.scale.value", "the scale is zero, below float32's normal range, or not finite",
           "finite scales in the normal range of float32", "check the calibration of this layer",
           "docs/semantics.md, 3 (npu_trans_quant_param)"),
    Reason("qmm.weight.group", "the weight has a scale for each group of rows of K", "one scale for each column of N",
           "quantize the weight per channel", _QMM),
    Reason("qmm.weight.k_scale", "the weight's scale varies along K", "one scale for each column of N",
           "move the scale along K onto the activation before quantizing it (as SmoothQuant does)", _QMM),
    Reason("qmm.weight.runtime",
           _NO_WEIGHT, _KNOWN_WEIGHT, _NO_NZ, _NZ),
    Reason("qmm.weight.zero_point", "the weight has a zero point",
           "a symmetric weight: the operator has no term for the row sums of x", "quantize the weight symmetrically",
           _QMM),
    Reason("qmmd.reach", "a sum of products of codes may exceed int32", "a K of at most 131072", "", _QUANT),
    Reason("qmmd.weight.runtime", "the weight is not known when compiling, and is not stored as (N, K)",
           "a weight that is known when compiling, or an int8 tensor (N, K)", _SEE_WEIGHTS, _QUANT),
    Reason("requantize.strict", "the graph's own codes are kept, and another contract would have the site fused",
           "numerics='vendor', which lets the operators quantize activations by their own rule", "", _QUANT),
    Reason("requantize.spelling", "how the graph makes the activation's codes is nothing that an operator does",
           "round(x / scale), clamped; the scale known, or the largest magnitude of a row (or of all) over 127",
           "", _QUANT),
    Reason("requantize.divisor", "the activation's scale is the largest magnitude over another number than 127",
           "a divisor of 127 or 127.5: npu_dynamic_quant divides by 127",
           "quantize activations to the full range of int8", _QUANT),
    Reason("requantize.range", "the activation's codes are clamped to another range than that of int8",
           "[-128, 127] or [-127, 127]: the operators saturate at the ends of int8",
           "quantize activations to the full range of int8", _QUANT),
    Reason("requantize.zero_point", "the activation's zero point is none that the operator has",
           "a symmetric scale for each row, or a zero point in [-128, 127] known when compiling",
           _SYMMETRIC, _QUANT),
    Reason("requantize.asymmetric", "the graph finds a zero point of the activation when it runs",
           "a symmetric scale: npu_dynamic_quant has no zero point; npu_dynamic_quant_asymmetric finds a fractional "
           "one for each row, and npu_quant_matmul has no argument for one of x: times the column sums of the weight "
           "it is a number for each element, which neither a bias nor a scale holds", _SYMMETRIC,
           "_op_plugin_docs.py: npu_dynamic_quant_asymmetric; docs/semantics.md, 1 (npu_quant_matmul)"),
    Reason("requantize.rounding", "the graph quantizes in so few bits that codes differ by more than two",
           "a quantization in float32, or with fewer operations in bfloat16", "quantize in float32", _QUANT),
    Reason("requantize.scale", "the inverse of the activation's scale is not a normal float32 number",
           "a scale whose inverse float32 holds", _CHECK_ACTIVATION, _QUANT),
    Reason("requantize.factor", "the scale of the activation's codes is no factor of what the site computes",
           "a result that is multiplied by the scale that its codes were divided by", "", _QUANT),
    Reason("wqmm.bias.runtime",
           "the bias is known only when the graph runs, in a dtype that the operator does not take",
           "a bias in the dtype that the operator takes", "run the model in bfloat16, or keep the bias in that dtype",
           _WQMM),
    Reason("wqmm.bias.saturates", "the bias may be infinite, and the chip limits float16 results to 65504",
           _KNOWN_BIAS, _BIASED_LATER, _FINITE),
    Reason("wqmm.bias.value", "the bias does not fit the dtype that the operator takes", "a bias that fits",
           "leave the sum in float32, or run the model in bfloat16", _WQMM),
    Reason("wqmm.k_scale.value", "the part of the scale that goes onto x would lose too much in x's dtype",
           "a scale along K that the dtype of x holds",
           _TINY_SCALES, _WQMM),
    Reason("wqmm.scale.product", "codes times scale leave the range of the dtype that the kernel multiplies in",
           "products that the dtype holds", "leave the large factor behind the matmul, or run the model in bfloat16",
           _WQMM),
    Reason("wqmm.scale.runtime", "the weight's parameters are known only when the graph runs, and would be rounded",
           "parameters that are known when compiling, or in the dtype of the activation", _SEE_WEIGHTS, _WQMM),
    Reason("wqmm.scale.value", "rounding the weight's scale to the operator's dtype would change it too much",
           "a scale that the dtype of the activation holds",
           _TINY_SCALES, _WQMM),
    Reason("wqmm.weight.batched", "there is a matrix for each batch",
           "a matrix: npu_weight_quant_batchmatmul takes no batches of weights", "multiply batch by batch", _WQMM),
    Reason("wqmm.weight.runtime",
           _NO_WEIGHT, _KNOWN_WEIGHT, _NO_NZ, _NZ),
    Reason("wqmm.x.dtype", "the activation is neither float16, bfloat16 nor float32", "float16, bfloat16 or float32",
           "run the model in float16 or bfloat16", _WQMM),
    Reason("numerics.float16", "the site is computed in bfloat16 or float32, which the chip's operators do not take",
           "float16 or bfloat16",
           "run the model in float16 or bfloat16, or name 'numerics.float16' in allow to compute these sites in "
           "float16", _WQMM),
    Reason("weights.refit", "the chip has no form for the weight; it would have one for a re-fit, symmetric int8 with "
           "one scale for each column, which was not allowed, is worse than the limit, or is not possible",
           "a weight that is known when compiling, and an SQNR of its re-fit of at least 30 dB in each column, or what "
           "allow asks for", "name 'weights.refit' in allow to re-fit such weights", "docs/semantics.md, 9 (re-fitted "
           "weights, and float16)"),
    Reason("torchair.streams", "the site or one of its inputs runs on a stream that the user has chosen",
           "a site that runs on the default stream throughout",
           "move the matmul and what quantizes its input out of npu_stream_switch", "docs/npu.md"),
)  # fmt: skip

REWRITING = (
    Reason("rewrite.failed", "a plan could not be carried out; the graph is as it was",
           _WITHOUT_EXCEPTION, _OUR_FAULT, _VERDICTS),
)  # fmt: skip

_NAMES_IT = "docs/checkpoints.md"

CHECKPOINTS = (
    Reason("checkpoint.experts", "a stack of experts, which a grouped matmul multiplies, and no rules of one for this "
           "chip and scheme are known", "a grouped matmul that the chip's tables speak of",
           "a matmul for each expert by itself is judged beside it", _NAMES_IT),
    Reason("checkpoint.scheme", "the weight is stored as something else than integers times a scale for each column or "
           "group", "codes of at most 8 bits, evenly spaced, with a scale for each column or group of rows",
           "quantize to int8 or int4", _WQMM),
    Reason("checkpoint.shard.group", "a row-parallel shard cuts a group of rows that share a scale",
           "a shard of whole groups", "use fewer ranks, or quantize with smaller groups or per channel", _NAMES_IT),
    Reason("checkpoint.shard.order", "the weight was quantized in order of activation size and is sharded along K: "
           "each rank has some rows of every group", "groups whose rows lie together",
           "quantize with desc_act=False (actorder 'weight' or none), or do not shard this layer along K", _NAMES_IT),
    Reason("checkpoint.shard.packed", "a shard cuts a stored element that holds several codes",
           "a shard of whole elements", "use fewer ranks", _NAMES_IT),
    Reason("checkpoint.shard.size", "the ranks do not divide the size that is sharded",
           "a size that the ranks divide", "use a number of ranks that divides it", _NAMES_IT),
    Reason("checkpoint.tensors", "the files do not say how large the weight is",
           "a bias, or a config.json with the sizes of the model", "load the model and ask quantpass.explain",
           _NAMES_IT),
)  # fmt: skip

REASONS: Mapping[str, Reason] = MappingProxyType({r.rule: r for r in (*READING, *PLANNING, *REWRITING, *CHECKPOINTS)})
"""All of them by id."""


def refuse(rule: str, fact: str, *, want: str = "", hint: str = "") -> Reject:
    """A refusal.

    Args:
        rule: an id of :data:`REASONS`.
        fact: what was found.
        want: what would be accepted, where more can be said than the table does.
        hint: likewise, what to do.

    Raises:
        KeyError: ``rule`` is in no table.
    """
    reason = REASONS[rule]
    return Reject(rule, fact, want or reason.want, hint or reason.hint, reason.source)
