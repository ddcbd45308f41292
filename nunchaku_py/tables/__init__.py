"""Modulation tables: what modulation linears give at all steps of a schedule, so that their weights may leave a GPU."""
from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import NunchakuError
from ..linear import QuantLinear
from ..models.pattern import matches, pattern_of
from ..module_tools import is_offloaded
from ..swap import quantized_components
from . import silu
from .foresee import tables_of
from .host import send_home
from .store import LinearTable, Tables

WEIGHTS = ("host", "device")
LEAST_LIMIT = 64 * 2**20  # bytes of outputs that are kept at least


def cache_modulation(target: object, enabled: bool = True, weights: str = "host", limit: int | None = None) -> None:
    """Keep what the modulation linears of a model, or of a pipeline's models, give: they read one row per image and
    step, of timestep, guidance and pooled prompt. Given a pipeline all steps of a schedule are computed at its first.

    weights: "host": they leave the GPU, or never go there, and visit it when a row is new; on a CPU, pages of theirs
    that are mapped from a file are given back. "device": they stay with the model.
    limit: bytes of outputs that a model keeps; None: half of what its modulation linears weigh, or 64 MiB.
    enabled=False: as before; the weights go back to the model's device.
    """
    if not isinstance(enabled, bool):
        raise NunchakuError(f"cache_modulation: enabled is True or False, not {enabled!r}")
    if weights not in WEIGHTS:
        raise NunchakuError(f"cache_modulation: weights is 'host' or 'device', not {weights!r}")
    if limit is not None and (type(limit) is not int or limit < 0):
        raise NunchakuError(f"cache_modulation: limit is a number of bytes, or None, not {limit!r}")
    models = quantized_components(target)
    found = {name: modulation_linears(model) for name, model in models.items()}
    if enabled and not any(found.values()):
        raise NunchakuError(f"cache_modulation: {type(target).__name__} holds no quantized modulation linears (w4a16, "
                            "named as adaptive norms are); linears in 16 bit are not cached")
    for name, model in models.items():
        detach(model)
        if enabled and found[name]:
            _attach(model, found[name], weights == "host", limit, None if model is target else weakref.ref(target))


def modulation_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Those that are quantized for weights only, by the names that the model's pattern knows."""
    globs = pattern_of(model).modulation
    return {name: module for name, module in model.named_modules()
            if type(module) is QuantLinear and module.site.kind == "w4a16" and _is_modulation(name, globs)}


def _is_modulation(name: str, globs: tuple[str, ...]) -> bool:
    return matches(name.removesuffix(".base_layer"), globs)  # inside a layer of adapters


def _attach(model: nn.Module, linears: dict[str, QuantLinear], host: bool, limit: int | None,
            pipeline: weakref.ref | None) -> None:
    tables = Tables(host, _limit(linears.values()) if limit is None else limit, pipeline)
    for linear in linears.values():
        streamed = linear.berth is not None  # then its weights are not for us to move
        linear.table = LinearTable(tables, torch.device("cpu") if streamed else linear.codes.device)
        if host and linear.codes.is_cuda and not streamed:
            send_home(linear, "cpu")
    silu.share(model, set(linears.values()))
    model.register_forward_pre_hook(tables.enter, with_kwargs=True)
    model.register_forward_hook(tables.leave, always_call=True)


def _limit(linears: Iterable[QuantLinear]) -> int:
    return max(LEAST_LIMIT, sum(linear.nbytes() for linear in linears) // 2)


def detach(model: nn.Module) -> None:
    """Take the tables off a model, or off a copy of one that has them."""
    for linear, table in list(tables_of(model)):
        if table.is_away(linear):
            send_home(linear, table.home)
        linear.table = None
    silu.unshare(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Tables):
                del hooks[number]
                for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                    flags.pop(number, None)


def table_lines(models: Iterable[nn.Module]) -> list[str]:
    """What of models is in tables, how often it was found there, and what has left the device."""
    return [_line(list(tables_of(model))) for model in models if any(tables_of(model))]


def _line(pairs: list[tuple[Any, LinearTable]]) -> str:
    if all(is_offloaded(site) for site, _ in pairs):
        return (f"modulation tables: {len(pairs)} linears, not used: offloading brings their weights with their "
                "blocks, in every call")
    tables = pairs[0][1].tables
    away = [site for site, table in pairs if table.is_away(site)]
    weights = f"{_mib(sum(site.nbytes() for site, _ in pairs))} of weights on "
    where = f"the host, of {len(away)} linears that run on {pairs[0][1].home}" if away else str(pairs[0][1].home)
    stay = f"{_mib(tables.given_back)} of them in pages given back to their file" if tables.given_back else (
        "they stay there")
    counts = tables.counts
    ahead = f"{counts.foreseen} outputs computed ahead, of {counts.schedules} schedules" if counts.schedules else (
        f"none computed ahead: {tables.foresight.why_not}")
    return (f"modulation tables: {len(pairs)} linears, {len(tables.order)} inputs, {_mib(tables.bytes)} of outputs; "
            f"{counts.hits} calls found theirs, {counts.misses} did not; {ahead}; {weights}{where}"
            + ("" if away else f", {stay}"))


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
