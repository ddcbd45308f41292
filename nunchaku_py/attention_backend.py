"""8-bit attention as backends that diffusers knows: `model.set_attention_backend("nunchaku_int8")`.

diffusers makes a backend that is set for one model the default of the process, too. So these take any call: what the
kernels do not compute goes to diffusers' native backend, and why is logged once, and counted.
"""
from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from operator import index
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .backends.triton.attention import refuses_kind, refuses_memory
from .ops.registry import forced_backend
from .ops.spec import AttentionSpec, Products

BACKENDS: dict[str, Products] = {"nunchaku_int8": "auto", "nunchaku_int8_16bit": "16bit"}
DISPATCH = "diffusers.models.attention_dispatch"
_LOG = logging.getLogger("nunchaku_py")
_refusals: Counter[str] = Counter()


def refusals() -> dict[str, int]:
    """Sentence → how many calls went to diffusers' native backend for it. A call in a compiled model counts when that
    is compiled."""
    return dict(_refusals)


# --------------------------------------------------------------------------------------------------------- registration
def attach(dispatch: ModuleType) -> None:
    """Enter the backends into diffusers' tables, but for names that diffusers has itself."""
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    native = registry._backends[names.NATIVE]
    for name, products in BACKENDS.items():
        if name in names._value2member_map_ or name.upper() in names.__members__:
            if getattr(registry._backends.get(name), "__module__", None) != __name__:  # is not there from before
                _LOG.warning("attention: diffusers has a backend %s of its own, which is the one that runs", name)
            continue
        member = add_member(names, name.upper(), name)
        registry.register(member, supports_context_parallel=True)(_backend(name, products, native))


def add_member(kind: type[Enum], name: str, value: str) -> Enum:
    """A new member of an enumeration of strings that is there already; to be found as all others are."""
    member = str.__new__(kind, value)
    member._name_, member._value_, member.__objclass__ = name, value, kind
    member._sort_order_ = len(kind._member_names_)
    kind._member_names_.append(name)
    kind._member_map_[name] = kind._value2member_map_[value] = member
    type.__setattr__(kind, name, member)  # Enum's own refuses to
    return member


def _backend(name: str, products: Products, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """query (B,T,H,D), key and value (B,S,H,D) → (B,T,H,D)"""
        why = (_refuses_options(attn_mask, dropout_p, is_causal, enable_gqa, return_lse, _parallel_config)
               or _refuses_tensors(query, key, value, products))
        if why is None:
            q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
            # Its digits: to write them a compiler needs the number, which it would leave open otherwise.
            digits = None if scale is None else float(scale).hex()
            return ops.attention.torch_op(q, k, v, _token(products, digits)).transpose(1, 2)
        _told(name, why)
        return native(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                      enable_gqa=enable_gqa, return_lse=return_lse, _parallel_config=_parallel_config)

    return attention


# ------------------------------------------------------------------------------------------------------ what is refused
def _refuses_options(attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool, return_lse: bool,
                     _parallel_config: Any) -> str | None:
    asked = {"a mask": attn_mask is not None, "dropout": dropout_p != 0.0, "causal order": is_causal,
             "groups of heads that share keys": enable_gqa, "sums of exponentials": return_lse,
             "context parallelism": _parallel_config is not None}
    for what, is_asked in asked.items():
        if is_asked:
            return f"{what} is asked for"
    return None


def _refuses_tensors(query: Tensor, key: Tensor, value: Tensor, products: Products) -> str | None:
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        return "query, key and value are not of (batch, tokens, heads, channels)"
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        return "query and key differ in batch, heads or channels"
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        return "query, key and value differ in dtype or device"
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != query.dtype:
        return "autocast wants another dtype"
    dim = index(query.shape[-1])  # a number, also where a compiler would leave it open
    return (_refuses_kind(query.device, query.dtype, dim, products)
            or refuses_memory(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)))


# These are asked while a model is compiled, and what they say is then part of the graph: a compiler cannot look at
# GPUs, installed packages or logs.
@torch.compiler.assume_constant_result
def _refuses_kind(device: torch.device, dtype: torch.dtype, dim: int, products: Products) -> str | None:
    forced = forced_backend()
    if forced not in (None, "triton"):
        return f"the backend {forced} is asked for, and not triton"
    return refuses_kind(device, dtype, dim, products)


@torch.compiler.assume_constant_result
def _told(name: str, why: str) -> bool:
    if not _refusals[why]:
        _LOG.warning("attention: %s leaves calls to diffusers' native backend, because %s", name, why)
    _refusals[why] += 1
    return True


@torch.compiler.assume_constant_result
def _token(products: Products, scale: str | None) -> str:
    return _spec(products, scale).token


@cache
def _spec(products: Products, scale: str | None) -> AttentionSpec:
    """scale: as float.hex() writes it."""
    return AttentionSpec(products, None if scale is None else float.fromhex(scale))


# -------------------------------------------------------------------------------------------------------------- explain
def attention_lines(model: nn.Module) -> list[str]:
    """For each kind of attention that is set to one of these backends, where it runs, and why not elsewhere; and how
    much of it no backend that is set reaches."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if DISPATCH not in sys.modules or parameter is None:
        return []
    kinds = Counter(_kinds(model))
    found = [_line(name, dim, count, parameter.device, getattr(model, "dtype", parameter.dtype))
             for (name, dim), count in kinds.items()]
    beside = sum(_attends_itself(module) for module in model.modules())
    if beside and (kinds or getattr(_default(), "value", None) in BACKENDS):
        found.append(f"attention of {beside} modules: their processors take no backend, and call torch themselves")
    return found


def _default() -> Enum:
    """Of the process, which diffusers sets with that of a model."""
    return sys.modules[DISPATCH]._AttentionBackendRegistry._active_backend


def _attends_itself(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    return processor is not None and not hasattr(processor, "_attention_backend")


def _kinds(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(backend, channels of a head) of every attention module that runs on one of ours."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if not hasattr(processor, "_attention_backend"):
            continue
        name = getattr(processor._attention_backend or _default(), "value", None)
        if name in BACKENDS:
            yield name, getattr(module, "head_dim", None) or module.inner_dim // module.heads


def _line(name: str, dim: int, count: int, device: torch.device, dtype: torch.dtype) -> str:
    where = f"attention {name}, {count} modules with heads of {dim} channels"
    why = _refuses_kind(device, dtype, dim, BACKENDS[name])
    if why:
        return f"{where}: runs on diffusers' native backend, because {why}"
    return f"{where}: runs on triton; what goes to diffusers' native backend is logged"
