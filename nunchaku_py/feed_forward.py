"""Feed-forwards of diffusers': linear → activation → linear as two calls. The first linear's ending applies the
activation and quantizes what the second reads."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .chain import GLU, Between, active_dropout, between, no_ending
from .fusion import Fusion, class_path, hooked, own_forward, why_not_installed
from .gradient import wants_gradient
from .linear import QuantizedInput, QuantLinear
from .module_tools import seen_through
from .precision import as_autocast

FEED_FORWARD = "diffusers.models.attention.FeedForward"
FLUX2 = "diffusers.models.transformers.transformer_flux2."
PARAMETER = {FEED_FORWARD: "hidden_states", FLUX2 + "Flux2FeedForward": "x"}  # what forward calls its input
ACTIVATIONS = "diffusers.models.activations."


def _gelu(module: nn.Module) -> Between:
    return Between("gelu_tanh" if module.approximate == "tanh" else "gelu")


BETWEEN: dict[str, Callable[[nn.Module], Between]] = {
    ACTIVATIONS + "GELU": _gelu,
    ACTIVATIONS + "GEGLU": lambda module: Between("gelu", GLU),
    ACTIVATIONS + "SwiGLU": lambda module: Between("silu", GLU),
    ACTIVATIONS + "LinearActivation": lambda module: Between("silu"),
    FLUX2 + "Flux2SwiGLU": lambda module: Between("silu", GLU, gate_first=True),
}
SILU = {ACTIVATIONS + "SwiGLU": "activation", ACTIVATIONS + "LinearActivation": "activation",
        FLUX2 + "Flux2SwiGLU": "gate_fn"}  # which child applies it, where a child does


class Members(NamedTuple):
    """The modules of a feed-forward, with their names in it."""

    first: tuple[str, nn.Module | None]
    activation: tuple[str, nn.Module]
    second: tuple[str, nn.Module]
    silu: tuple[tuple[str, nn.Module | None], ...]
    dropouts: tuple[tuple[str, nn.Module], ...] = ()


def members(module: nn.Module) -> Members:
    if class_path(module) != FEED_FORWARD:
        first, second = seen_through(module.linear_in), seen_through(module.linear_out)
        return Members(("linear_in", first), ("act_fn", module.act_fn), ("linear_out", second),
                       _silu("act_fn", module.act_fn))
    activation, dropout, second, *last = module.net
    dropouts = (("net.1", dropout), *(("net.3", final) for final in last))
    first = seen_through(getattr(activation, "proj", None))
    return Members(("net.0.proj", first), ("net.0", activation), ("net.2", seen_through(second)),
                   _silu("net.0", activation), dropouts)


def _silu(name: str, activation: nn.Module) -> tuple[tuple[str, nn.Module | None], ...]:
    child = SILU.get(class_path(activation))
    return () if child is None else ((f"{name}.{child}", getattr(activation, child, None)),)


def concerns(module: nn.Module) -> bool:
    if class_path(module) not in PARAMETER or _incomplete(module):
        return False
    parts = members(module)
    return isinstance(parts.first[1], QuantLinear) or isinstance(parts.second[1], QuantLinear)


def refuses(module: nn.Module) -> str | None:
    """Why the two linears of this feed-forward run one by one, or None."""
    return why_not_installed(module) or _incomplete(module) or _unfit(members(module))


def _incomplete(module: nn.Module) -> str | None:
    if class_path(module) == FEED_FORWARD and len(module.net) not in (3, 4):
        return f"net holds {len(module.net)} modules, not an activation, a dropout, a linear and perhaps a dropout"
    return None


def _unfit(parts: Members) -> str | None:
    for name, linear in (parts.first, parts.second):
        if type(linear) is not QuantLinear:
            return f"{name} is not a quantized linear, but {class_path(linear)}"
    (_, first), (name, activation), (second_name, second) = parts[:3]
    if what_between(activation) is None:
        return f"no op computes what {name} does ({class_path(activation)})"
    for child_name, child in parts.silu:
        if type(child) is not nn.SiLU:
            return f"{child_name} is not a SiLU, but {class_path(child)}"
    if not second.site.has_smooth:
        return f"{second_name} does not quantize its input"
    return hooked((*parts[:3], *parts.silu, *parts.dropouts)) or active_dropout(parts.dropouts) or no_ending(
        first, what_between(activation).ending, second)


def what_between(activation: nn.Module) -> Between | None:
    known = BETWEEN.get(class_path(activation))
    return None if known is None else known(activation)


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    x = _input(module, args, kwargs)
    if x is None or refuses(module) or wants_gradient(x):
        return own_forward(module)(module, *args, **kwargs)
    x, (_, first) = as_autocast(x), members(module).first
    if x.shape[-1] != first.in_features:
        return own_forward(module)(module, *args, **kwargs)  # which says so
    quantized = first.quantize_input(x.reshape(-1, first.in_features))
    hidden, second = QuantizedInput(*to_second(module, quantized, x.dtype).run()), members(module).second[1]
    return second.multiply(hidden, x.dtype).reshape(*x.shape[:-1], second.out_features)


def _input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a call that gives nothing else; None of a call that the own forward may warn of or refuse."""
    if len(args) + len(kwargs) != 1:
        return None
    return args[0] if args else kwargs.get(PARAMETER.get(class_path(module)))


def to_second(module: nn.Module, x: QuantizedInput, dtype: torch.dtype) -> ops.Call:
    """The quantized input of the second linear from that of the first."""
    parts = members(module)
    return between(parts.first[1], x, what_between(parts.activation[1]), parts.second[1], dtype)


FEED_FORWARDS = Fusion("feed-forward without a 16-bit tensor between its linears", concerns, refuses, forward)
