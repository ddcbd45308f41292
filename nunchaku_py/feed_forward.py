"""Feed-forwards of diffusers': linear → activation → linear as two calls. The first linear's ending applies the
activation and quantizes what the second reads."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .chain import GLU, Between, active_dropout, between, no_ending
from .fusion import Fusion, class_path, hooked, own_forward, why_not_installed
from .linear import QuantizedInput, QuantLinear, wants_gradient
from .precision import as_autocast

FEED_FORWARD = "diffusers.models.attention.FeedForward"
FLUX2 = "diffusers.models.transformers.transformer_flux2."
ACTIVATIONS = "diffusers.models.activations."


def _gelu(module: nn.Module) -> Between:
    return Between("gelu_tanh" if module.approximate == "tanh" else "gelu")


def _linear_activation(module: nn.Module) -> Between | None:
    return Between("silu") if type(module.activation) is nn.SiLU else None


BETWEEN: dict[str, Callable[[nn.Module], Between | None]] = {
    ACTIVATIONS + "GELU": _gelu,
    ACTIVATIONS + "GEGLU": lambda module: Between("gelu", GLU),
    ACTIVATIONS + "SwiGLU": lambda module: Between("silu", GLU),
    ACTIVATIONS + "LinearActivation": _linear_activation,
    FLUX2 + "Flux2SwiGLU": lambda module: Between("silu", GLU, gate_first=True),
}


class Members(NamedTuple):
    """The modules of a feed-forward, with their names in it."""

    first: tuple[str, nn.Module | None]
    activation: tuple[str, nn.Module]
    second: tuple[str, nn.Module]
    dropouts: tuple[tuple[str, nn.Module], ...] = ()


def members(module: nn.Module) -> Members:
    if class_path(module) != FEED_FORWARD:
        return Members(("linear_in", module.linear_in), ("act_fn", module.act_fn), ("linear_out", module.linear_out))
    activation, dropout, second, *last = module.net
    dropouts = (("net.1", dropout), *(("net.3", final) for final in last))
    first = getattr(activation, "proj", None)
    return Members(("net.0.proj", first), ("net.0", activation), ("net.2", second), dropouts)


def concerns(module: nn.Module) -> bool:
    if class_path(module) not in (FEED_FORWARD, FLUX2 + "Flux2FeedForward") or _incomplete(module):
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
    if not second.site.has_smooth:
        return f"{second_name} does not quantize its input"
    return hooked((*parts[:3], *parts.dropouts)) or active_dropout(parts.dropouts) or no_ending(
        first, what_between(activation).ending)


def what_between(activation: nn.Module) -> Between | None:
    known = BETWEEN.get(class_path(activation))
    return None if known is None else known(activation)


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    inputs = (*args, *kwargs.values())
    if len(inputs) != 1 or refuses(module) or wants_gradient(inputs[0]):
        return own_forward(module)(module, *args, **kwargs)
    x, (_, first) = as_autocast(inputs[0]), members(module).first
    if x.shape[-1] != first.in_features:
        return own_forward(module)(module, *args, **kwargs)  # which says so
    second, hidden = to_second(module, first.quantize_input(x.reshape(-1, first.in_features)), x.dtype)
    return second.multiply(hidden, x.dtype).reshape(*x.shape[:-1], second.out_features)


def to_second(module: nn.Module, x: QuantizedInput, dtype: Any) -> tuple[QuantLinear, QuantizedInput]:
    """(second linear, its quantized input) from the quantized input of the first."""
    parts = members(module)
    second = parts.second[1]
    return second, between(parts.first[1], x, what_between(parts.activation[1]), second, dtype)


FEED_FORWARDS = Fusion("feed-forward without a 16-bit tensor between its linears", concerns, refuses, forward)
