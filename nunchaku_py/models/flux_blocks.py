"""The blocks of FLUX.1: norm, modulation and quantization in one, then linears that end in what follows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import feed_forward
from ..chain import (
    GATE_RESIDUAL,
    GELU,
    Between,
    active_dropout,
    between,
    gate_residual,
    modulated,
    no_ending,
    no_modulation,
    not_plain_norm,
)
from ..fusion import Fusion, class_path, hooked, own_forward, why_not_installed
from ..linear import QuantizedInput, QuantLinear
from ..split_linear import SplitLinear
from ..together import Seen, View, seen, shared_input

FLUX = "diffusers.models.transformers.transformer_flux."
NORMS = "diffusers.models.normalization."
IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
LARGEST = torch.finfo(torch.float16).max


# ---------------------------------------------------------------------------------------------------- reasons to refuse
def _modulation_refuses(name: str, norm: nn.Module) -> str | None:
    if class_path(norm) not in (NORMS + "AdaLayerNormZero", NORMS + "AdaLayerNormZeroSingle"):
        return f"{name} is a {class_path(norm)}"
    if getattr(norm, "emb", None) is not None:
        return f"{name} embeds the timestep itself"
    return hooked(((name, norm), (f"{name}.norm", norm.norm))) or not_plain_norm(f"{name}.norm", norm.norm)


def _attention_refuses(attention: nn.Module) -> str | None:
    """Whether it is FLUX attention with diffusers' plain processor, which reads its inputs by the projections only."""
    if class_path(attention) != FLUX + "FluxAttention":
        return f"attn is a {class_path(attention)}"
    if class_path(attention.processor) != FLUX + "FluxAttnProcessor":
        return f"the attention processor is a {class_path(attention.processor)}"
    if attention.fused_projections:
        return "the projections of attn are fused"
    return hooked((("attn", attention),)) or why_not_installed(attention)


def _projections_refuse(*linears: nn.Module) -> str | None:
    if not shared_input(linears):
        return "q, k, v and what else reads their input are not all quantized linears that quantize it alike"
    return no_modulation(linears[0])


def _output_refuses(name: str, linear: nn.Module, ending: str) -> str | None:
    if type(linear) is not QuantLinear:
        return f"{name} is a {class_path(linear)}"
    return hooked(((name, linear),)) or no_ending(linear, ending)


def _feed_forward_refuses(name: str, module: nn.Module) -> str | None:
    if class_path(module) != feed_forward.FEED_FORWARD:
        return f"{name} is a {class_path(module)}"
    why = feed_forward.refuses(module)
    return hooked(((name, module),)) or (f"{name}: {why}" if why else _around_feed_forward_refuses(name, module))


def _around_feed_forward_refuses(name: str, module: nn.Module) -> str | None:
    (first_name, first), _, (_, second), *_ = feed_forward.members(module)
    if not first.site.has_smooth:
        return f"{name}: {first_name} does not quantize its input"
    return no_modulation(first) or no_ending(second, GATE_RESIDUAL)


def _call_refused(block: nn.Module, *inputs: Tensor) -> bool:
    """Calls that want gradients, mix dtypes, are under autocast or would be broadcast to temb run module by module."""
    x, _, temb = inputs
    if len({tensor.dtype for tensor in inputs}) > 1 or torch.is_autocast_enabled(x.device.type):
        return True
    if temb.shape[0] not in (1, x.shape[0]) or not x.shape[0]:
        return True
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*inputs, *block.parameters()))


# -------------------------------------------------------------------------------------------------- double-stream block
def double_refuses(block: nn.Module) -> str | None:
    attention = block.attn
    return (why_not_installed(block) or _modulation_refuses("norm1", block.norm1)
            or _modulation_refuses("norm1_context", block.norm1_context) or _attention_refuses(attention)
            or _projections_refuse(*(getattr(attention, name) for name in IMAGE))
            or _projections_refuse(*(getattr(attention, name) for name in TEXT))
            or _output_refuses("attn.to_out.0", attention.to_out[0], GATE_RESIDUAL)
            or _output_refuses("attn.to_add_out", attention.to_add_out, GATE_RESIDUAL)
            or _idle("attn.to_out.1", attention.to_out[1])
            or hooked((("norm2", block.norm2), ("norm2_context", block.norm2_context)))
            or not_plain_norm("norm2", block.norm2) or not_plain_norm("norm2_context", block.norm2_context)
            or _feed_forward_refuses("ff", block.ff) or _feed_forward_refuses("ff_context", block.ff_context))


def _idle(name: str, dropout: nn.Module) -> str | None:
    return hooked(((name, dropout),)) or active_dropout(((name, dropout),))


def double_forward(block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
                   image_rotary_emb: Any = None, joint_attention_kwargs: dict[str, Any] | None = None
                   ) -> tuple[Tensor, Tensor]:
    image, text, attention = hidden_states, encoder_hidden_states, block.attn
    if joint_attention_kwargs or double_refuses(block) or _call_refused(block, image, text, temb):
        return own_forward(block)(block, image, text, temb, image_rotary_emb, joint_attention_kwargs)
    shift, scale, gate, *image_mlp = _modulation(block.norm1, temb, 6)
    text_shift, text_scale, text_gate, *text_mlp = _modulation(block.norm1_context, temb, 6)
    text = text.view_as(text)  # the view knows inputs by identity, and one tensor may be given as both
    view = View(attention, (_seen(image, block.norm1.norm, scale, shift, attention.to_q),
                            _seen(text, block.norm1_context.norm, text_scale, text_shift, attention.add_q_proj)),
                to_out=(_Gated(attention.to_out[0], gate, image), _unchanged),
                to_add_out=_Gated(attention.to_add_out, text_gate, text))
    image, text = own_forward(attention)(view, image, text, None, image_rotary_emb)
    image = _feed_forward(block.ff, block.norm2, image, *image_mlp)
    text = _feed_forward(block.ff_context, block.norm2_context, text, *text_mlp)
    return _in_range(text), image


def _modulation(norm: nn.Module, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(temb)).chunk(count, dim=1)


def _seen(x: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor, site: QuantLinear) -> Seen:
    """What a view is given instead of the modulated x: x itself stands for it, the processor hands it on unread."""
    return seen(x, site.input_key, modulated(x, norm, scale, shift, site))


class _Gated:
    """An output projection that adds its gated result to the residual."""

    def __init__(self, linear: QuantLinear, gate: Tensor, residual: Tensor) -> None:
        self.linear, self.gate, self.residual = linear, gate, residual

    def __call__(self, x: Tensor) -> Tensor:
        quantized = self.linear.quantize_input(x.reshape(-1, x.shape[-1]))
        return gate_residual(self.linear, quantized, self.gate, self.residual)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _feed_forward(module: nn.Module, norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
                  ) -> Tensor:
    first = feed_forward.members(module).first[1]
    second, hidden = feed_forward.to_second(module, modulated(x, norm, scale, shift, first), x.dtype)
    return gate_residual(second, hidden, gate, x)


def _in_range(x: Tensor) -> Tensor:
    return x.clip(-LARGEST, LARGEST) if x.dtype == torch.float16 else x


# -------------------------------------------------------------------------------------------------- single-stream block
def single_refuses(block: nn.Module) -> str | None:
    attention = block.attn
    return (why_not_installed(block) or _modulation_refuses("norm", block.norm) or _attention_refuses(attention)
            or _projections_refuse(*(getattr(attention, name) for name in IMAGE), block.proj_mlp)
            or _split_refuses(block.proj_out, block.proj_mlp)
            or _gelu_refuses(block.act_mlp) or no_ending(block.proj_mlp, GELU, block.proj_out.parts[1]))


def _split_refuses(linear: nn.Module, mlp: nn.Module) -> str | None:
    if type(linear) is not SplitLinear or len(linear.parts) != 2:
        return f"proj_out is a {class_path(linear)}, not two quantized parts for attention and MLP"
    if linear.parts[1].in_features != mlp.out_features or not linear.parts[1].site.has_smooth:
        return "the second part of proj_out is not what reads the MLP"
    return hooked((("proj_out", linear), *((f"proj_out.parts.{i}", part) for i, part in enumerate(linear.parts))))


def _gelu_refuses(activation: nn.Module) -> str | None:
    if type(activation) is not nn.GELU:
        return f"act_mlp is a {class_path(activation)}"
    return hooked((("act_mlp", activation),))


def single_forward(block: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
                   image_rotary_emb: Any = None, joint_attention_kwargs: dict[str, Any] | None = None
                   ) -> tuple[Tensor, Tensor]:
    if joint_attention_kwargs or single_refuses(block) or _call_refused(
            block, hidden_states, encoder_hidden_states, temb):
        return own_forward(block)(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
                                  joint_attention_kwargs)
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _modulation(block.norm, temb, 3)
    normed = _seen(x, block.norm.norm, scale, shift, block.attn.to_q)
    attention = own_forward(block.attn)(View(block.attn, (normed,)), x, None, None, image_rotary_emb)
    y = _in_range(_gated_sum(block.proj_out, attention, _mlp(block, normed.quantized, x.dtype), gate, x))
    return y.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)


def _mlp(block: nn.Module, x: QuantizedInput, dtype: torch.dtype) -> QuantizedInput:
    tanh = block.act_mlp.approximate == "tanh"
    return between(block.proj_mlp, x, Between("gelu_tanh" if tanh else "gelu"), block.proj_out.parts[1], dtype)


def _gated_sum(linear: SplitLinear, attention: Tensor, mlp: QuantizedInput, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate·linear(cat(attention, mlp)). In fp32, with one rounding at the end: an ending of each part would
    round at the size of the residual twice, where the modules one by one do it once."""
    first, second = linear.parts
    quantized = first.quantize_input(attention.reshape(-1, first.in_features))
    total = linear.total([first.multiply(quantized, residual.dtype), second.multiply(mlp, residual.dtype)])
    gated = total.view(residual.shape).mul_(gate.float().unsqueeze(1))
    return gated.add_(residual).to(residual.dtype)


DOUBLE_BLOCKS = Fusion("FLUX double-stream block", lambda block: class_path(block) == FLUX + "FluxTransformerBlock",
                       double_refuses, double_forward)
SINGLE_BLOCKS = Fusion("FLUX single-stream block", lambda block: class_path(block) == FLUX +
                       "FluxSingleTransformerBlock", single_refuses, single_forward)
