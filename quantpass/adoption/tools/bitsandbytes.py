"""bitsandbytes' Linear8bitLt (LLM.int8()) with its threshold for outliers.

Semantics (0.50.2): ``nn/modules.py``, ``autograd/_functions.py``, ``backends/default/ops.py``: ``CB`` int8 ``(N, K)``
and ``SCB`` float32 ``(N,)`` are attributes of the weight until the first forward, then of ``state``. A row of the
input, in float16, becomes ``round(x * (127 / absmax))``; ``y = (codes @ CB^T) * (absmax * SCB) / 127^2 + bias`` in
float32, then the input's dtype. With ``threshold > 0``, columns of which an element reaches it are multiplied in the
input's dtype instead: what an adopted module leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantpass.adoption.plain import PlainLinear, share
from quantpass.adoption.tables import FLOATS, Allowances, CannotAdopt, Found, Row, Tool, check, copy_of, nothing_else

_PER_SQUARE = 6.200124e-05
"""The tool's ``1 / 127^2``."""


def _read(module: nn.Module, allowed: Allowances) -> Found | None:
    state: Any = getattr(module, "state", None)
    if not hasattr(state, "CB") or not hasattr(state, "threshold") or not isinstance(module, nn.Linear):
        return None
    if getattr(state, "has_fp16_weights", True):
        raise CannotAdopt("its weight is a float (has_fp16_weights): move it to its device first")
    if state.threshold == 0:
        raise CannotAdopt("threshold 0: the tool's own forward is captured as it is")
    nothing_else(module)
    n, k = module.out_features, module.in_features
    codes, scale = _held(module)
    held: Any = nn.Module()
    share(held, "CB", codes)
    share(held, "SCB", scale)
    share(held, "bias", module.bias)
    check(
        held,
        {
            "CB": Row((torch.int8,), ((n, k),)),
            "SCB": Row((torch.float32,), ((n,),)),
            "bias": Row(FLOATS, ((n,),), optional=True),
        },
    )
    if not allowed.drop_outliers:
        raise CannotAdopt(
            f"threshold {state.threshold:g}: columns with outliers are multiplied apart; drop_outliers=True exchanges "
            "it for the int8 product alone"
        )
    words = f"int8 weight, per channel, int8 activation, dynamic per token (threshold {state.threshold:g} dropped)"
    dtype = torch.float16 if module.bias is None or module.bias.dtype == torch.float32 else module.bias.dtype
    plain = _Int8Linear(held, module, words, (k, n))
    return Found(plain, dtype, _Own(module), caveat="outliers dropped: proven against threshold=0")


def _held(module: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Codes and scales, before and after the first forward."""
    codes = module.state.CB if module.state.CB is not None else getattr(module.weight, "CB", None)
    scale = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
    if codes is None and module.weight.dtype == torch.int8:
        codes = module.weight
    return codes.data if codes is not None else None, scale.data if scale is not None else None


class _Int8Linear(PlainLinear):
    CB: torch.Tensor
    SCB: torch.Tensor

    def __init__(self, held: Any, module: nn.Linear, scheme: str, sizes: tuple[int, int]) -> None:
        super().__init__(module, "bitsandbytes", scheme, ("bias",), sizes)
        share(self, "CB", held.CB)
        share(self, "SCB", held.SCB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        half = rows.to(torch.float16)
        largest = torch.amax(torch.abs(half), 1, keepdim=True).float()
        codes = torch.clamp(torch.round(half * (127.0 / largest)), -127, 127).to(torch.int8)
        y = torch._int_mm(codes, self.CB.t()) * (largest * self.SCB) * _PER_SQUARE
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


class _Own:
    """The tool's own output without its outlier path, on a copy: a forward moves what the parameter holds."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = copy_of(self._module)
        state = object.__new__(type(module.state))
        vars(state).update(vars(module.state))
        state.CB, state.SCB = _held(module)
        state.threshold = 0.0
        weight = module.weight
        copied = torch.Tensor._make_subclass(type(weight), weight.data, False)
        vars(copied).update(vars(weight))
        copied.CB = copied.SCB = None
        module._parameters["weight"] = copied
        if module.bias is not None:
            module._parameters["bias"] = nn.Parameter(module.bias.data, requires_grad=False)
        module.state = state
        return module(x)  # type: ignore[no-any-return]


TOOL = Tool("bitsandbytes", _read)
