"""QuantConv1x1: the module that stands where a 1×1 nn.Conv2d stood."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .division import undivided
from .errors import NunchakuError
from .linear import QuantizedSite
from .module_tools import filled
from .site import Site


class QuantConv1x1(QuantizedSite, nn.Conv2d):
    """A quantized 1×1 nn.Conv2d: a linear over channels."""

    def __init__(self, site: Site, in_channels: int, out_channels: int, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation, self.groups = (1, 1), (1, 1), (1, 1), 1
        self.padding, self.padding_mode, self.transposed, self.output_padding = (0, 0), "zeros", False, (0, 0)
        self._declare(site, out_channels, in_channels, bias, dtype)

    @property
    def weight(self) -> Tensor:
        return self._shim(self.out_channels, self.in_channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-3] != self.in_channels:
            raise NunchakuError(f"input: expected (…, {self.in_channels}, H, W), got {tuple(x.shape)}")
        last = x.movedim(-3, -1)
        y = self.apply_rows(last.reshape(-1, self.in_channels)).reshape(*last.shape[:-1], self.out_channels)
        return y.movedim(-1, -3).contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}, {self.describe()}"

    def dense(self) -> nn.Conv2d:
        bias = self.effective_bias()
        out = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=bias is not None,
                        device=self.codes.device, dtype=self.compute_dtype)
        return filled(out, self.effective_weight()[:, :, None, None], undivided(bias, self))
