"""PEFT's layers for quantized linears. They are PEFT's own, with their adapters folded into the linear's branch, so
that a call is one call of the linear whatever adapters are active. While adapters are trained, or are of a kind that is
no low-rank term (DoRA), PEFT's own way is taken: the linear without them, and their terms beside it.

`dispatch` makes PEFT use these layers.
"""
from __future__ import annotations

import threading
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..conv import QuantConv1x1
from ..errors import NunchakuError
from ..fusion import is_hooked
from ..linear import QuantizedSite, QuantLinear
from ..split_linear import SplitLinear
from .beside import run_beside
from .branch import Adapter, fold, looks_later, rescale
from .dora import QuantDora
from .keep import keep

Seen = tuple[Any, ...]  # what a fold was made of
_READS_WEIGHTS = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")  # ways to initialize adapters
_NOT_COMPILED = ("adapters of quantized linears are not trained in compiled graphs, through which no gradient flows; "
                 "call the model under torch.no_grad(), or train it without compiling")
_LOCK = threading.RLock()


class _Folding:
    """What the two layers share. `folded`: whether the linear holds all that is active, so that it can be called by
    itself."""

    folded = True
    is_off = False  # taken off its linear, which is none of its business from then on
    _seen: tuple[Seen, ...] = ()
    _scales: tuple[float, ...] = ()
    _pinned: dict[str, float]

    # ---------------------------------------------------------------------------------------------- what PEFT calls
    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        way = getattr(kwargs.get("config"), "init_lora_weights", None)
        if isinstance(way, str) and way.lower().startswith(_READS_WEIGHTS):
            raise NunchakuError(f"init_lora_weights={way!r} changes the weight of the layer, which is quantized; use "
                                "True or 'gaussian'")
        super().update_layer(adapter_name, *args, **kwargs)
        self._divide()
        if not self._load_state_dict_post_hooks:
            self.register_load_state_dict_post_hook(_loaded)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def set_scale(self, adapter: str, scale: float) -> None:
        super().set_scale(adapter, scale)
        self.refresh()

    def scale_layer(self, scale: float) -> None:
        super().scale_layer(scale)
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        super().unscale_layer(scale)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise NunchakuError(f"adapter {adapter_name!r} is fused: unfuse before deleting it, or unload all, which "
                                "leaves it in the model")
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Pin adapters to the branch at their present strength. No stored tensor changes: unmerging is exact."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        self.check_fusable(names, safe_merge)
        for name in names:
            self._pinned = {**self._pins(), name: float(self.scaling[name])}
            self.merged_adapters.append(name)
        self.refresh()

    def check_fusable(self, names: list[str] | None = None, finite: bool = False) -> None:
        """Refuse what `merge` could not do with these, or with those that are active."""
        for name in self.active_adapters if names is None else names:
            if name in self.lora_variant or self.lora_bias.get(name):
                raise NunchakuError(f"fuse: adapter {name!r} is more than a low-rank term (DoRA, or a bias), which "
                                    "cannot be fused into a quantized linear; leave it active instead")
            if finite and not all(torch.isfinite(_weight(self._modules[half], name)).all()
                                  for half in ("lora_A", "lora_B") if name in self._modules[half]):
                raise NunchakuError(f"fuse: adapter {name!r} holds NaN or infinite values")

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._pinned = {}
        self.refresh()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
                                           ) -> nn.Module:
        """What stands for the linear when PEFT takes its layers off."""
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.taken_off()

    # -------------------------------------------------------------------------------------------------------- folding
    def refresh(self, anew: bool = False) -> None:
        """Fold what is active now, as far as it can be; anew: also what seems to be folded already. Compiled graphs
        read what was folded before."""
        if torch.compiler.is_compiling() or self.is_off or self.base_layer is not self.get_base_layer():
            return
        if anew:
            self._divide()
            self.forget()
        if not looks_later(self):
            self.look()

    def _divide(self) -> None:
        """Of modules that PEFT has made, also anew where it pads them for hot swaps."""
        for name, down in self.lora_A.items():
            run_beside(self.base_layer, down, self.lora_B[name])

    def look(self) -> None:
        if self.is_off:
            return
        with _LOCK:  # layers of a group write each other's branches
            names = self.active()
            self.folded = self._why_beside(names) is None
            self._hold(names if self.folded else [])

    def why_beside(self) -> str | None:
        """Why what is active does not run in the linear, or None."""
        return self._why_beside(self.active())

    def _why_beside(self, names: list[str]) -> str | None:
        for name in names:
            if name in self.lora_variant:
                return f"{name} is a DoRA, which scales what the linear gives"
            if self.lora_bias.get(name):
                return f"{name} has a bias"
        return None

    def active(self) -> list[str]:
        """The adapters that a call heeds, and that have been loaded."""
        if self._disable_adapters:
            return []
        names, loaded = self.merged_adapters or self.active_adapters, self._modules["lora_A"]._modules
        return [name for name in names if name in loaded and has_weights(self, name)]

    def _pins(self) -> dict[str, float]:
        return vars(self).get("_pinned", {})

    def _hold(self, names: list[str]) -> None:
        """Let the linear hold these adapters; nothing is written that it holds already."""
        pins = self._pins()
        seen = tuple(self._weights(name) for name in names)
        scales = tuple(float(pins.get(name, self.scaling[name])) for name in names)
        same_weights = _same(seen, self._seen)
        if same_weights and scales == self._scales:
            return
        for site, first, last in _sites(self.base_layer):
            site.adapters = tuple(Adapter(self.lora_A[name], self.lora_B[name], scale, first, last)
                                  for name, scale in zip(names, scales, strict=True))
            rescale(site) if same_weights and seen and site.adapter_up is not None else fold(site)
        self._seen, self._scales = seen, scales

    def _weights(self, name: str) -> Seen:
        """The two weights, and by what a change in place is noticed; offloading puts others there, to no effect."""
        down, up = (_weight(self._modules[half], name) for half in ("lora_A", "lora_B"))
        if down.is_meta or up.is_meta:
            return next((one for one in self._seen if one[0] == name), (name, down, up, 0, 0))
        return name, down, up, _version(down), _version(up)

    def taken_off(self) -> nn.Module:
        """The linear without this layer; adapters that were fused stay in it."""
        if self.merged_adapters:
            keep([site for site in self.sites() if site.adapters])
        self._hold([])
        self.is_off = True
        return self.base_layer

    def sites(self) -> list[QuantizedSite]:
        return [site for site, _, _ in _sites(self.base_layer)]

    def forget(self) -> None:
        """Take nothing for written."""
        self._seen = self._scales = ()

    def folded_base(self) -> nn.Module:
        """The linear, where calling it is calling this layer; else the layer itself."""
        if is_hooked(self) or self._takes_peft_way():
            return self
        return self.base_layer

    def _takes_peft_way(self) -> bool:
        if self.is_off:
            return True
        trains = torch.is_grad_enabled() and self._trains()
        if torch.compiler.is_compiling():
            if trains:
                raise NunchakuError(_NOT_COMPILED)
            return not self.folded
        if trains:
            return True
        self.refresh()
        return not self.folded

    def _trains(self) -> bool:
        if self.disable_adapters or self.merged_adapters:
            return False
        halves = self._modules["lora_A"], self._modules["lora_B"]
        return any(_weight(half, name).requires_grad
                   for name in self.active_adapters for half in halves if name in half)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs and not self._takes_peft_way():
            return self.base_layer(x)
        if not torch.compiler.is_compiling() and not self.is_off:
            self._hold([])
            self.folded = False
        return super().forward(x, *args, **kwargs)


class QuantLoraLinear(_Folding, Linear):
    """Of a quantized linear, also one in parts."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """Others would read the weight, of which there is only the shape."""
        return {(): None, ("use_dora",): QuantDora}


class QuantLoraConv(_Folding, Conv2d):
    """Of a quantized 1×1 convolution."""

    _plain: nn.Conv2d | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        return {(): None}

    def get_base_layer(self) -> nn.Module:
        return self._plain or super().get_base_layer()

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT makes the factors of the class of the convolution that it finds: here a plain one must stand in."""
        if getattr(kwargs.get("config"), "use_dora", False):
            raise NunchakuError("DoRA is not known on quantized 1x1 convolutions")
        base = super().get_base_layer()
        plain = nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(base.weight, requires_grad=False), base.bias
        vars(self)["_plain"] = plain
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        finally:
            del vars(self)["_plain"]
        self.refresh()


LAYERS: dict[type, type] = {QuantLinear: QuantLoraLinear, SplitLinear: QuantLoraLinear, QuantConv1x1: QuantLoraConv}


def has_weights(layer: Any, name: str) -> bool:
    """Whether an adapter has been loaded; offloaded ones have."""
    for half in ("lora_A", "lora_B"):  # by way of the tables, as this is looked at in every call
        halves = layer._modules[half]
        if _weight(halves, name).is_meta and not hasattr(halves[name], "_hf_hook"):
            return False
    return True


def _weight(halves: nn.ModuleDict, name: str) -> nn.Parameter:
    """halves[name].weight, several times as fast: hundreds are looked at in every forward."""
    return halves._modules[name]._parameters["weight"]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _loaded(layer: Any, _: Any) -> None:
    layer.refresh()


def _sites(module: nn.Module) -> list[tuple[QuantizedSite, int, int | None]]:
    """The sites of a quantized linear, each with its input columns."""
    if isinstance(module, SplitLinear):
        return [(part, *columns) for part, columns in zip(module.parts, module.ranges, strict=True)]
    return [(module, 0, None)]


def _same(some: tuple[Seen, ...], others: tuple[Seen, ...]) -> bool:
    """Names, weights (the very same objects) and versions."""
    return len(some) == len(others) and all(
        one[0] == other[0] and one[1] is other[1] and one[2] is other[2] and one[3:] == other[3:]
        for one, other in zip(some, others, strict=True))
