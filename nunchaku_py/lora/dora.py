"""DoRA on a quantized linear: y = (m/‖W + s·BA‖)·(W + s·BA)x + b, with the norm of each row taken of the weight that
the quantized linear stands for."""
from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..split_linear import SplitLinear
from .branch import present


class QuantDora(DoraLinearVariant):
    """PEFT's variant with the layer below; what it says about merging is refused before it is asked."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = QuantDoraLayer(fan_in_fan_out=False)
        layer.update_layer(base_layer=module.get_base_layer(), lora_A=module.lora_A[adapter_name].weight,
                           lora_B=module.lora_B[adapter_name].weight, scaling=module.scaling[adapter_name])
        module.lora_magnitude_vector[adapter_name] = layer


class QuantDoraLayer(DoraLinearLayer):
    """Holds the magnitude m (N) as `weight`."""

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__(fan_in_fan_out)
        self._norm: tuple[tuple, Tensor] | None = None

    def update_layer(self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float,
                     place_on_cpu: bool = False) -> None:
        if lora_A.is_meta:  # to be loaded
            self.weight = nn.Parameter(torch.empty(lora_B.shape[0], device="meta"))
            return
        self.weight = nn.Parameter(_norm_of(base_layer, lora_A, lora_B, scaling).to(lora_A.dtype))

    def forward(self, x: Tensor, *, lora_A: nn.Module, lora_B: nn.Module, scaling: float, base_layer: nn.Module,
                base_result: Tensor | None = None, adapter_name: str = "default") -> Tensor:
        """What is added to base_result, which is the linear's output with its bias."""
        bias = _bias_of(base_layer)
        plain = base_layer(x) if base_result is None else base_result
        plain = plain if bias is None else plain - bias.to(plain.device)
        factor = self.weight / self._cached_norm(lora_A.weight, lora_B.weight, float(scaling), base_layer)
        return (factor - 1) * plain + factor * lora_B(lora_A(x)) * scaling

    def _cached_norm(self, down: Tensor, up: Tensor, scaling: float, base_layer: nn.Module) -> Tensor:
        """Constant for gradients, as the paper has it."""
        versions = [0 if half.is_inference() else half._version for half in (down, up)]
        key = (down.data_ptr(), up.data_ptr(), *versions, scaling)
        if self._norm is None or self._norm[0] != key or self._norm[1].device != self.weight.device:
            self._norm = key, _norm_of(base_layer, down, up, scaling).to(self.weight.device)
        return self._norm[1]


@torch.no_grad()
def _norm_of(base_layer: nn.Module, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """(N) fp32: ‖W + s·BA‖ of each row."""
    parts = list(base_layer.parts) if isinstance(base_layer, SplitLinear) else [base_layer]
    with present(parts):
        weight = torch.cat([part.effective_weight() for part in parts], 1)
    return (weight + scaling * (up.float() @ down.float()).to(weight.device)).norm(dim=1)


def _bias_of(base_layer: nn.Module) -> Tensor | None:
    """The bias as the linear adds it, without what makes up for a shift of its input."""
    if not isinstance(base_layer, SplitLinear):
        return base_layer.effective_bias()
    bias = base_layer.bias
    for part in base_layer.parts:
        bias = bias.float() + part.correction() if part.site.shift else bias
    return bias
