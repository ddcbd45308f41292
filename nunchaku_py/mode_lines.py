"""In which modes the sites of models run, and how they hold their weights there, in a sentence for each device."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from .module_tools import used_on
from .site import auto_mode
from .swap import QuantizedSite, quantized_sites

A8_WEIGHTS = {"folded": "INT8 weights, folded at load", "scaled": "4-bit weights, folded to INT8 as they are read",
              "codes": "4-bit weights, folded to INT8 in every call"}
WEIGHTS = {"a4": "4-bit weights", "a16": "4-bit weights, decoded as they are read"}


def mode_lines(models: Iterable[nn.Module]) -> list[str]:
    """Of models whose sites are packed: "cpu: 40 sites in a8 (INT8 …), 10 sites in a16 (…); …"."""
    counts: dict[str, Counter[str]] = {}
    asked: dict[str, set[str]] = {}
    for site in (site for model in models for site in quantized_sites(model)):
        device = str(used_on(site))
        counts.setdefault(device, Counter())[f"{site.mode} ({_weights(site)})"] += 1
        if site.site.kind == "w4a4":
            asked.setdefault(device, set()).add(site.requested_mode)
    return [f"{device}: {', '.join(f'{count} sites in {text}' for text, count in found.most_common())}; "
            f"{_choice(asked.get(device, set()))}" for device, found in counts.items()]


def expected_modes(model: nn.Module, device: torch.device) -> list[str]:
    """The same of a model that is not in memory, as it would run on `device`; how it holds its weights is not known."""
    sites = list(quantized_sites(model))
    counts = Counter(auto_mode(site.site, device) if site.requested_mode == "auto" else site.mode for site in sites)
    asked = {site.requested_mode for site in sites if site.site.kind == "w4a4"}
    return [f"{device}: {', '.join(f'{count} sites in {mode}' for mode, count in counts.most_common())}; "
            f"{_choice(asked)}"]


def _weights(site: QuantizedSite) -> str:
    if site.mode != "a8" or site.packed is None:
        return WEIGHTS.get(site.mode, "INT8 weights")
    return A8_WEIGHTS.get(site.packed.residency, "INT8 weights")


def _choice(requested: set[str]) -> str:
    """Modulation has one mode only."""
    if not requested:
        return "there is no other"
    if requested == {"auto"}:
        return "the default here, mode= or set_mode() changes it"
    return "in part as asked for by mode=" if "auto" in requested else "as asked for by mode="
