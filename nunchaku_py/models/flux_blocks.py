"""The blocks of FLUX.1: norm, modulation and quantization in one, then linears that end in what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import feed_forward, ops
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
from ..module_tools import seen_through
from ..split_linear import SplitLinear
from ..together import View, shared_input

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


def _projections_refuse(dtype: torch.dtype | None, *linears: nn.Module) -> str | None:
    if not shared_input(linears, dtype):
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
def double_refuses(block: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Why this block runs module by module, or None; for rows of this dtype, if they are known."""
    attention = block.attn
    return (why_not_installed(block) or _modulation_refuses("norm1", block.norm1)
            or _modulation_refuses("norm1_context", block.norm1_context) or _attention_refuses(attention)
            or _projections_refuse(dtype, *_named(attention, IMAGE))
            or _projections_refuse(dtype, *_named(attention, TEXT))
            or _output_refuses("attn.to_out.0", seen_through(attention.to_out[0]), GATE_RESIDUAL)
            or _output_refuses("attn.to_add_out", seen_through(attention.to_add_out), GATE_RESIDUAL)
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
    if joint_attention_kwargs or double_refuses(block, image.dtype) or _call_refused(block, image, text, temb):
        return own_forward(block)(block, image, text, temb, image_rotary_emb, joint_attention_kwargs)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(block.norm1, temb, 6)
    text_shift, text_scale, text_gate, *text_mlp = _modulation(block.norm1_context, temb, 6)
    text_mlp_shift, text_mlp_scale, text_mlp_gate = text_mlp
    projections = _projected(attention, image.dtype, {
        IMAGE: (image, modulated(image, block.norm1.norm, scale, shift, seen_through(attention.to_q))),
        TEXT: (text, modulated(text, block.norm1_context.norm, text_scale, text_shift,
                               seen_through(attention.add_q_proj)))})
    view = View(attention, **projections, to_out=(_unchanged, _unchanged), to_add_out=_unchanged)
    image, text = _gated((seen_through(attention.to_out[0]), seen_through(attention.to_add_out)),
                         own_forward(attention)(view, image, text, None, image_rotary_emb),
                         (gate, text_gate), (image, text))
    image, text = _feed_forwards((block.ff, block.ff_context), (image, text), (
        modulated(image, block.norm2, mlp_scale, mlp_shift, _first(block.ff)),
        modulated(text, block.norm2_context, text_mlp_scale, text_mlp_shift, _first(block.ff_context))),
        (mlp_gate, text_mlp_gate))
    return _in_range(text), image


def _modulation(norm: nn.Module, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(temb)).chunk(count, dim=1)


def _projected(attention: nn.Module, dtype: torch.dtype, of: dict[tuple[str, ...], tuple[Tensor, QuantizedInput]]
               ) -> dict[str, _Given]:
    """What the processor finds by the names of projections: all of both streams, computed together."""
    linears = {name: (linear, x, quantized) for names, (x, quantized) in of.items()
               for name, linear in zip(names, _named(attention, names), strict=True)}
    found = ops.together([linear.product(quantized, dtype) for linear, _, quantized in linears.values()])
    return {name: _Given(y.view(*x.shape[:-1], y.shape[-1]))
            for (name, (_, x, _)), y in zip(linears.items(), found, strict=True)}


def _named(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [seen_through(getattr(module, name)) for name in names]


class _Given:
    """A projection whose output is there already; the processor hands its input on unread, and has the output from
    then on: it would take memory to the end of the block."""

    def __init__(self, output: Tensor) -> None:
        self.output: Tensor | None = output

    def __call__(self, x: Tensor) -> Tensor:
        output, self.output = self.output, None
        return output


def _gated(linears: Sequence[QuantLinear], inputs: Sequence[Tensor], gates: Sequence[Tensor],
           residuals: Sequence[Tensor]) -> list[Tensor]:
    """residual + gate·linear(input) of both streams."""
    quantized = [linear.quantize_input(x.reshape(-1, x.shape[-1])) for linear, x in zip(linears, inputs, strict=True)]
    return _add_gated(linears, quantized, gates, residuals)


def _add_gated(linears: Sequence[QuantLinear], quantized: Sequence[QuantizedInput], gates: Sequence[Tensor],
               residuals: Sequence[Tensor]) -> list[Tensor]:
    found = ops.together([gate_residual(*one) for one in zip(linears, quantized, gates, residuals, strict=True)])
    return [y.view(x.shape) for y, x in zip(found, residuals, strict=True)]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _first(module: nn.Module) -> QuantLinear:
    return feed_forward.members(module).first[1]


def _feed_forwards(modules: Sequence[nn.Module], inputs: Sequence[Tensor], quantized: Sequence[QuantizedInput],
                   gates: Sequence[Tensor]) -> list[Tensor]:
    """x + gate·module(…) of both streams, from what the modules' first linears read."""
    calls = [feed_forward.to_second(module, one, x.dtype)
             for module, one, x in zip(modules, quantized, inputs, strict=True)]
    hidden = [QuantizedInput(*found) for found in ops.together(calls)]
    return _add_gated([feed_forward.members(module).second[1] for module in modules], hidden, gates, inputs)


def _in_range(x: Tensor) -> Tensor:
    return x.clip(-LARGEST, LARGEST) if x.dtype == torch.float16 else x


# -------------------------------------------------------------------------------------------------- single-stream block
def single_refuses(block: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """As double_refuses."""
    attention = block.attn
    return (why_not_installed(block) or _modulation_refuses("norm", block.norm) or _attention_refuses(attention)
            or _projections_refuse(dtype, *_named(attention, IMAGE), seen_through(block.proj_mlp))
            or _split_refuses(*_named(block, ("proj_out", "proj_mlp")))
            or _gelu_refuses(block.act_mlp)
            or no_ending(seen_through(block.proj_mlp), GELU, seen_through(block.proj_out).parts[1]))


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
    if joint_attention_kwargs or single_refuses(block, hidden_states.dtype) or _call_refused(
            block, hidden_states, encoder_hidden_states, temb):
        return own_forward(block)(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
                                  joint_attention_kwargs)
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _modulation(block.norm, temb, 3)
    quantized = modulated(x, block.norm.norm, scale, shift, seen_through(block.attn.to_q))
    view = View(block.attn, **_projected(block.attn, x.dtype, {IMAGE: (x, quantized)}))
    attention = own_forward(block.attn)(view, x, None, None, image_rotary_emb)
    y = _in_range(_gated_sum(seen_through(block.proj_out), attention, _mlp(block, quantized, x.dtype), gate, x))
    return y.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)


def _mlp(block: nn.Module, x: QuantizedInput, dtype: torch.dtype) -> QuantizedInput:
    tanh = block.act_mlp.approximate == "tanh"
    mlp, out = _named(block, ("proj_mlp", "proj_out"))
    call = between(mlp, x, Between("gelu_tanh" if tanh else "gelu"), out.parts[1], dtype)
    return QuantizedInput(*call.run())


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
