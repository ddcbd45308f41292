"""The ops, by name. Each is callable with its reference's parameters by position; `OPS` holds them all."""
from .attention import attention
from .linear_w4a4 import (
    linear_w4a4,
    linear_w4a4_gate_residual,
    linear_w4a4_gelu_quantize,
    linear_w4a4_glu_quantize,
    linear_w4a4_qkv_rope,
)
from .linear_w4a8 import (
    linear_w4a8,
    linear_w4a8_gate_residual,
    linear_w4a8_gelu_quantize,
    linear_w4a8_glu_quantize,
    linear_w4a8_qkv_rope,
)
from .linear_w4a16 import (
    linear_w4a16,
    linear_w4a16_gate_residual,
    linear_w4a16_gelu_quantize,
    linear_w4a16_glu_quantize,
    linear_w4a16_qkv_rope,
)
from .norm_modulate_quantize import norm_modulate_quantize
from .quantize_act import quantize_act
from .registry import OPS, Call, Op, backend, together
from .spec import ActSpec, AttentionSpec, LinearSpec

__all__ = [
    "OPS", "ActSpec", "AttentionSpec", "Call", "LinearSpec", "Op", "attention", "backend", "together",
    "linear_w4a16", "linear_w4a16_gate_residual", "linear_w4a16_gelu_quantize", "linear_w4a16_glu_quantize",
    "linear_w4a16_qkv_rope",
    "linear_w4a4", "linear_w4a4_gate_residual", "linear_w4a4_gelu_quantize", "linear_w4a4_glu_quantize",
    "linear_w4a4_qkv_rope",
    "linear_w4a8", "linear_w4a8_gate_residual", "linear_w4a8_gelu_quantize", "linear_w4a8_glu_quantize",
    "linear_w4a8_qkv_rope",
    "norm_modulate_quantize", "quantize_act",
]

from ..backends import cpu as _cpu  # noqa: E402, F401  (last: they register themselves with the ops above)
from ..backends import cuda as _cuda  # noqa: E402, F401
from ..backends import triton as _triton  # noqa: E402, F401
