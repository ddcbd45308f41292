"""Fused patterns: modules of diffusers' that run their quantized linears together, so that 16-bit tensors between them
are never made. Class, signature, state and tree of a module stay; its forward is set on the instance, asks at every
call whether the pattern holds, and hands over to the class's own forward where it does not.
"""
from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .errors import NunchakuError

ENVIRONMENT = "NUNCHAKU_PY_FUSION"
SWITCHED_OFF = f"switched off, by nq.set_fusion or {ENVIRONMENT}=0"
_ATTRIBUTE = "nunchaku_fused"
_REPLICATE = "_replicate_for_data_parallel"
_ORPHANED = ("this module is a shallow copy of one that is gone, whose forward it still has: copy with copy.deepcopy, "
             "or call nq.set_fusion(copy, True), which gives the copy a forward of its own")
_WATCHED = "a hook on all modules (torch.nn.modules.module.register_module_forward_hook) must see every call"


@dataclass(frozen=True)
class Fusion:
    """A pattern. forward(module, *args, **kwargs) calls `own_forward(module)` where `refuses(module)` has a reason."""

    name: str
    concerns: Callable[[nn.Module], bool]
    refuses: Callable[[nn.Module], str | None]
    forward: Callable[..., Any]


class FusedForward:
    """`forward` of one instance. It knows its module weakly, so that a model is freed when it is let go of, and is
    rebuilt around the copy when a model is deepcopied or pickled. A shallow copy shares it, and it cannot tell which of
    the two was called: it runs the original until `set_enabled` is called on the copy."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], enabled: bool) -> None:
        self._module, self.function, self.enabled = weakref.ref(module), function, enabled
        self.own = type(module).forward

    @property
    def forward(self) -> MethodType:
        """What stands in the module. Of a bound method torch.compile compares the code; of anything else that is called
        the identity, and every module would have a graph of its own."""
        return MethodType(_entrance(type(self.module())), self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if vars(module).get(_ATTRIBUTE) is not self:  # removed under a hook, which still calls it
            return self.own(module, *args, **kwargs)
        return self.function(module, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return FusedForward, (self.module(), self.function, self.enabled)

    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise NunchakuError(_ORPHANED)
        return module

    def replicate(self) -> nn.Module:
        """The shallow copy that DataParallel makes for a device. Without the pattern: its tensors are no parameters,
        and of parameters patterns ask whether they are trained."""
        module = self.module()
        replica = type(module)._replicate_for_data_parallel(module)
        _detach(replica)
        return replica


def install(model: nn.Module, fusions: Iterable[Fusion]) -> None:
    """Set the forwards of the patterns, except where another (offloading, caching) has replaced a forward before."""
    enabled = enabled_by_default()
    for fusion, module in modules_of(model, fusions):
        if "forward" not in vars(module):
            _attach(module, FusedForward(module, fusion.forward, enabled))


@cache
def _entrance(cls: type[nn.Module]) -> Callable[..., Any]:
    """A method of a FusedForward that looks like the class's own."""
    def forward(fused: FusedForward, *args: Any, **kwargs: Any) -> Any:
        return fused(*args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)
    return forward


def _is_forward_of(module: nn.Module, fused: FusedForward) -> bool:
    return getattr(vars(module).get("forward"), "__self__", None) is fused


def _attach(module: nn.Module, fused: FusedForward) -> None:
    vars(module).update({"forward": fused.forward, _ATTRIBUTE: fused, _REPLICATE: fused.replicate})


def _detach(module: nn.Module) -> None:
    fused = vars(module).pop(_ATTRIBUTE, None)
    if fused is not None:
        vars(module).pop(_REPLICATE, None)
        if _is_forward_of(module, fused):
            del module.forward


def modules_of(model: nn.Module, fusions: Iterable[Fusion]) -> Iterator[tuple[Fusion, nn.Module]]:
    """Every pattern with every module that it concerns; a module has one pattern."""
    fusions = tuple(fusions)
    for module in model.modules():
        fusion = next((fusion for fusion in fusions if fusion.concerns(module)), None)
        if fusion is not None:
            yield fusion, module


def remove(model: nn.Module) -> None:
    """Undo `install`. Where a hook came on top its reference stays, to a forward that then always steps aside."""
    for module in model.modules():
        _detach(module)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch the patterns. A shallow copy, which shares the forward of its original, first gets one of its own."""
    for module in model.modules():
        fused = vars(module).get(_ATTRIBUTE)
        if fused is None:
            continue
        if fused._module() is not module and _is_forward_of(module, fused):
            _attach(module, FusedForward(module, fused.function, enabled))
        else:
            fused.enabled = enabled


def enabled_by_default() -> bool:
    value = os.environ.get(ENVIRONMENT, "1")
    if value not in ("0", "1"):
        raise NunchakuError(f"{ENVIRONMENT}: expected 0 or 1, got {value!r}")
    return value == "1"


def why_not_installed(module: nn.Module) -> str | None:
    """What every pattern refuses for."""
    fused = vars(module).get(_ATTRIBUTE)
    if fused is None:
        return "it held no quantized linears, or its forward was not its class's, when the model was prepared"
    if not fused.enabled:
        return SWITCHED_OFF
    # Not those for backward: calls that want gradients go to the modules anyway.
    return _WATCHED if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks else None


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, which calls what is in the module (its first argument) one by one. From where
    it was kept: of classes that diffusers allows in graphs as a whole, a compiler does not give it."""
    return vars(module)[_ATTRIBUTE].own


def class_path(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# ------------------------------------------------------------------------------------------------ reasons to step aside
def is_hooked(module: nn.Module) -> bool:
    """Whether something wants to see this module's call: hooks, offloading, caching, or a forward of the user's."""
    if module._forward_pre_hooks or module._forward_hooks:
        return True
    forward = vars(module).get("forward")  # removing a hook leaves the class's own forward there, bound
    return not (forward is None or type(getattr(forward, "__self__", None)) is FusedForward
                or getattr(forward, "__func__", None) is type(module).forward)


def hooked(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    name = next((name for name, module in modules if is_hooked(module)), None)
    return None if name is None else f"{name} has a hook (offloading, caching, or the user's), which must see its call"
