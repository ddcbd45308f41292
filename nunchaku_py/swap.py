"""Replacing modules in a model, and finding those that were replaced. Modules are swapped, the model stays itself."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from . import fusion
from .conv import QuantConv1x1
from .errors import NunchakuError
from .linear import QuantizedSite, QuantLinear
from .lora.branch import InputGroup
from .models.discover import shared_children
from .models.pattern import pattern_of
from .module_tools import adapted_layers
from .site import WEIGHTS, Site
from .split_linear import SplitLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")
Part = tuple[tuple[int, int], Site]  # (k_range, site)
Entry = Site | tuple[Part, ...]  # what a file says of one module: a site, or its K-parts
Quantized = QuantLinear | QuantConv1x1 | SplitLinear


def module_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear or 1×1 convolution."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels


def empty_module(old: nn.Module, entry: Entry, bias: bool, dtype: torch.dtype) -> Quantized:
    """The quantized module for `entry` with the shape of `old`, its tensors on the meta device."""
    n, k = module_shape(old)
    if isinstance(entry, Site):
        build = QuantLinear if isinstance(old, nn.Linear) else QuantConv1x1
        return build(entry, k, n, bias, dtype)
    if not isinstance(old, nn.Linear):
        raise NunchakuError(f"only linears have K-parts, this is {type(old).__name__}")
    module = SplitLinear([site for _, site in entry], [k_range for k_range, _ in entry], n, bias, dtype)
    if module.in_features != k:
        raise NunchakuError(f"k_range of the parts ends at {module.in_features}, the linear has {k} inputs")
    return module


def fill_module(module: Quantized, tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Put stored tensors (by their name inside the module) into an empty quantized module."""
    expected = set(module.state_dict())
    if expected != set(tensors):
        raise NunchakuError(f"{label}: expected tensors {sorted(expected)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).set_tensor(leaf, tensor, f"{label}.{name}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where `name` is; returns what stood there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent._modules[leaf]
    module.train(old.training)
    for hooks in _HOOKS:  # the same tables, so that a handle of the user's still removes its hook
        setattr(module, hooks, getattr(old, hooks))
    parent._modules[leaf] = module
    return old


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace many; returns the old ones by name, so that the caller can undo it."""
    return {name: replace_module(model, name, module) for name, module in modules.items()}


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """Name → quantized module; the parts of a split linear are inside it, not beside it."""
    found = {name: module for name, module in model.named_modules() if getattr(module, "is_nunchaku_quantized", False)}
    inner = {f"{name}.parts.{i}" for name, module in found.items() if isinstance(module, SplitLinear)
             for i in range(len(module.parts))}
    return {name: module for name, module in found.items() if name not in inner}


def quantized_sites(model: nn.Module) -> Iterator[QuantizedSite]:
    """Every module that holds codes, parts included."""
    return (module for module in model.modules() if isinstance(module, QuantizedSite))


def entry_of(module: Quantized) -> Entry:
    if isinstance(module, SplitLinear):
        return tuple(zip(module.ranges, (part.site for part in module.parts), strict=True))
    return module.site


def set_mode(target: object, mode: str) -> None:
    """Change the activation mode of every quantized site of a model, or of a pipeline's models, in place."""
    for model in quantized_models(target):
        for site in quantized_sites(model):
            site.set_mode(mode)


def set_weights(target: object, weights: str) -> None:
    """How linears in mode a8 hold their weights on a GPU: "int8", folded once (12 bits a weight with the codes, which
    stay), "int4" (4 bits, expanded in every call), or "auto". In place; the CPU's kernels always take 4 bits."""
    if weights not in ("auto", *WEIGHTS):
        raise NunchakuError(f"weights: expected 'auto', 'int8' or 'int4', got {weights!r}")
    for model in quantized_models(target):
        for site in quantized_sites(model):
            site.set_weights(weights)


def set_fusion(target: object, enabled: bool) -> None:
    """Let the linears of a model, or of a pipeline's models, run together where patterns know how, or one by one."""
    if not isinstance(enabled, bool):
        raise NunchakuError(f"set_fusion: enabled is True or False, not {enabled!r}")
    for model in quantized_models(target):
        fusion.set_enabled(model, enabled)


def quantized_components(target: object) -> dict[str, nn.Module]:
    """The model itself, called "", or those of a pipeline's that hold quantized linears."""
    parts = {"": target} if isinstance(target, nn.Module) else dict(getattr(target, "components", {}))
    found = {name: part for name, part in parts.items()
             if isinstance(part, nn.Module) and next(quantized_sites(part), None) is not None}
    if not found:
        raise NunchakuError(f"{type(target).__name__} holds no quantized linears")
    return found


def quantized_models(target: object) -> list[nn.Module]:
    return list(quantized_components(target).values())


def prepare(model: nn.Module) -> None:
    """Give a model whose linears were replaced what else its architecture provides: patterns that run together."""
    fusion.install(model, pattern_of(model).fusions)
    for sites in sharing_candidates(model):
        InputGroup.of(sites)
    for module in model.modules():
        if callable(getattr(module, "fuse_projections", None)):
            module.fuse_projections = refuse_fusing


def sharing_candidates(model: nn.Module) -> list[list[QuantLinear]]:
    """Linears that may read one input: those that the pattern of the model names together. Each in one list only."""
    found: list[list[QuantLinear]] = []
    taken: set[nn.Module] = set()
    for together in pattern_of(model).groups:
        found += [_quantized(map(module.get_submodule, together), taken) for module in model.modules()
                  if all(map(partial(_has, module), together))]
    found += [_quantized(map(model.get_submodule, names), taken)
              for names in shared_children(model, pattern_of(model).shared, _reads_quantized)]
    return [sites for sites in found if len(sites) > 1]


def _reads_quantized(module: nn.Module | None) -> bool:
    return type(module) is QuantLinear and module.site.has_smooth


def _has(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_submodule(name), QuantLinear)
    except AttributeError:
        return False


def _quantized(modules: Iterable[nn.Module], taken: set[nn.Module]) -> list[QuantLinear]:
    """Those of them that quantize their input, and are in no list yet."""
    sites = [module for module in modules if _reads_quantized(module)]
    sites = [site for site in sites if site not in taken]
    taken.update(sites)
    return sites


def refuse_fusing(*args: object, **kwargs: object) -> None:
    """Stands where an attention module would concatenate the weights of its projections."""
    raise NunchakuError("fuse_qkv_projections: quantized projections stay separate modules, which LoRA and offload "
                        "address by name; what they share is shared at execution")


def dequantize(model: nn.Module) -> nn.Module:
    """A copy of the model with 16-bit linears of the same weights, or of those that divided ones had before."""
    import copy

    from .quantize import unattach
    from .tables import detach

    if not isinstance(model, nn.Module):
        raise NunchakuError(f"dequantize takes a model, not {type(model).__name__}: name the pipeline's component")
    quantized_models(model)
    if adapted_layers(model):
        raise NunchakuError("dequantize: the model carries an adapter (LoRA); unload it before")
    if any(not site.has_data() for site in quantized_sites(model)):
        raise NunchakuError("dequantize: tensors have no data here (meta device); remove the offloading first")
    out = copy.deepcopy(model)
    detach(out)
    for name, module in quantized_modules(out).items():
        replace_module(out, name, module.dense())
    for module in out.modules():
        vars(module).pop("fuse_projections", None)
    fusion.remove(out)
    unattach(out)
    return out
