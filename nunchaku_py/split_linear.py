"""SplitLinear: a linear stored in K-parts, each a quantized site of its own."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NunchakuError
from .linear import QuantPart
from .module_tools import dtype_name, filled, move_only
from .precision import as_autocast
from .site import Site


class SplitLinear(nn.Linear):
    """y = Σ_i part_i(x[…, k0_i:k1_i]) + bias: a linear whose input concatenates parts of different nature."""

    is_nunchaku_quantized = True
    _is_hf_initialized = True

    def __init__(self, sites: Sequence[Site], ranges: Sequence[tuple[int, int]], out_features: int, bias: bool,
                 dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.ranges = tuple((int(k0), int(k1)) for k0, k1 in ranges)
        _check_ranges(self.ranges)
        if any(site.divided == "output" for site in sites):
            raise NunchakuError("parts: each of them gives all outputs, so that only its input may be divided")
        self.in_features, self.out_features = self.ranges[-1][1], out_features
        self.parts = nn.ModuleList(QuantPart(site, k1 - k0, out_features, False, dtype)
                                   for site, (k0, k1) in zip(sites, self.ranges, strict=True))
        wide = torch.float32 if any(site.shift for site in sites) else dtype
        meta = nn.Parameter(torch.empty(out_features, dtype=wide, device="meta"), requires_grad=False)
        self.register_parameter("bias", meta if bias else None)

    def set_tensor(self, name: str, tensor: Tensor, label: str | None = None) -> None:
        """Only the bias is its own."""
        if name != "bias" or tuple(tensor.shape) != (self.out_features,) or not tensor.is_floating_point():
            raise NunchakuError(f"{label or name}: expected bias ({self.out_features},) floating point, "
                                f"got {tuple(tensor.shape)} {dtype_name(tensor.dtype)}")
        self.bias = nn.Parameter(tensor.contiguous(), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves follow, casts do not: as for every stored tensor."""
        if recurse:
            for part in self.parts:
                part._apply(fn)
        return super()._apply(lambda tensor: move_only(fn, tensor), recurse=False)

    @property
    def weight(self) -> Tensor:
        return self.parts[0]._shim(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise NunchakuError(f"input: expected (…, {self.in_features}), got {tuple(x.shape)}")
        outputs = [part(x[..., k0:k1]) for part, (k0, k1) in zip(self.parts, self.ranges, strict=True)]
        return self.total(outputs).to(as_autocast(x).dtype)

    def total(self, outputs: Sequence[Tensor]) -> Tensor:
        """fp32: the sum of what the parts gave, with the bias."""
        y = outputs[0].float()
        for output in outputs[1:]:
            y = y + output  # fp32, as y is
        vectors = [term.float() for term in (self.bias, *(part.unshift for part in self.parts)) if term is not None]
        return y + sum(vectors[1:], vectors[0]) if vectors else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, parts={list(self.ranges)}"

    def dense(self) -> nn.Linear:
        weight = torch.cat([part.effective_weight() for part in self.parts], 1)
        bias = None if self.bias is None else self.bias.data
        for part in self.parts:
            if part.site.shift:
                bias = bias.float() + part.correction()
        out = nn.Linear(self.in_features, self.out_features, bias is not None, weight.device,
                        self.parts[0].compute_dtype)
        return filled(out, weight, bias)


def _check_ranges(ranges: tuple[tuple[int, int], ...]) -> None:
    edges = [0, *(k1 for _, k1 in ranges)]
    if not ranges or [k0 for k0, _ in ranges] != edges[:-1] or any(k1 <= k0 for k0, k1 in ranges):
        raise NunchakuError(f"parts: k_range must tile the input from 0 without gaps, got {list(ranges)}")
