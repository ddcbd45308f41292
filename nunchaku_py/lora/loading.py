"""Loading a LoRA into a pipeline or a model that holds quantized linears: a file of any form is read and checked as a
whole, and handed on to diffusers in PEFT's names. Every key must find its module, or nothing is loaded."""
from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NunchakuError
from ..linear import QuantizedSite
from .branch import at_once
from .delta import Delta, Reading, Target, some
from .formats import read

_FETCH = ("weight_name", "use_safetensors", "local_files_only", "cache_dir", "force_download", "proxies", "token",
          "revision", "subfolder")
_NORMS = ("query_norm.scale", "norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")
MOST_RANKS = 512  # of what is no LoRA, and becomes one
TEXT = ("lora_te", "text_encoder", "te1_", "te2_", "te3_")
_logger = logging.getLogger("nunchaku_py")
inside: ContextVar[bool] = ContextVar("nunchaku_py_loading_lora", default=False)


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file became: format, adapted modules of each model, and what else is worth knowing."""

    adapter: str
    format: str
    modules: dict[str, int]
    ranks: dict[int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = sum(self.modules.values())
        where = ", ".join(f"{number} in {name}" for name, number in self.modules.items())
        ranks = ", ".join(f"{rank} ({number})" for rank, number in sorted(self.ranks.items()))
        text = f"LoRA '{self.adapter}' ({self.format}): {count} of {count} modules ({where}), rank {ranks}"
        return "; ".join([text, *self.notes])


# ------------------------------------------------------------------------------------------------------------ the loads
def load_into_pipeline(original: Callable[..., Any], pipe: Any, source: Any, adapter_name: str | None = None,
                        hotswap: bool = False, allow_partial: bool = False, max_rank: int = MOST_RANKS,
                       tolerance: float = 0.0, **kwargs: Any) -> LoraReport:
    models, limits = _chosen(models_of(pipe), kwargs), {"most": max_rank, "tolerance": tolerance}
    state, adapter_name = _fetched(source, kwargs), adapter_name or _free_name(models)
    if _is_control(state, models):
        return _load_control(original, pipe, state, models, adapter_name, hotswap=hotswap, **kwargs)
    reading = _read(state, models, limits, lambda: _converted(pipe, state, models))
    _check(reading, models, allow_partial)
    tensors, metadata = _as_peft(reading.deltas)
    with _whole_or_not(models, hotswap):
        with _state_dict_of(pipe, tensors, metadata):
            original(pipe, tensors, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
        return _reported(reading, models, adapter_name)


def _chosen(models: dict[str, nn.Module], options: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Wan 2.2 has two transformers, for which files have one name; an option of diffusers' says which is meant."""
    second = models.pop("transformer_2", None)
    return models if second is None or not options.get("load_into_transformer_2") else {"transformer": second}


def _free_name(models: Mapping[str, nn.Module]) -> str:
    """diffusers would find one for each model."""
    taken = {name for model in models.values() for name in getattr(model, "peft_config", {})}
    return next(name for name in (f"default_{i}" for i in count()) if name not in taken)


def _is_control(state: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> bool:
    """FLUX's control LoRAs widen x_embedder and replace weights of norms, which diffusers knows how to do and undo."""
    embedder = getattr(models.get("transformer"), "x_embedder", None)
    if not isinstance(embedder, nn.Module) or "Flux" not in type(models["transformer"]).__name__:
        return False
    width = embedder.weight.shape[1]
    wider = any(key.endswith(("x_embedder.lora_A.weight", "img_in.lora_A.weight")) and tensor.shape[-1] > width
                for key, tensor in state.items())
    return wider or any(key.endswith(_NORMS) for key in state) and any("lora" in key for key in state)


def _load_control(original: Callable[..., Any], pipe: Any, state: dict[str, Tensor], models: Mapping[str, nn.Module],
                  name: str, **kwargs: Any) -> LoraReport:
    """By diffusers alone."""
    with _whole_or_not(models, kwargs["hotswap"]):
        original(pipe, state, adapter_name=name, **kwargs)
        layers = _adapted(models["transformer"], name)
    ranks = Counter(layer.r[name] for layer in layers.values())
    return LoraReport(name, "FLUX control LoRA, by diffusers", {"transformer": len(layers)}, dict(ranks))


def load_into_model(original: Callable[..., Any], model: nn.Module, source: Any, prefix: str | None = "transformer",
                    hotswap: bool = False, allow_partial: bool = False, max_rank: int = MOST_RANKS,
                    tolerance: float = 0.0, **kwargs: Any) -> LoraReport:
    models = {prefix or "transformer": model}
    state = _fetched(source, kwargs)
    state |= {key: torch.as_tensor(alpha) for key, alpha in (kwargs.get("network_alphas") or {}).items()}
    reading = _read(state, models, {"most": max_rank, "tolerance": tolerance}, None)
    _check(reading, models, allow_partial)
    tensors, metadata = _as_peft({"": next(iter(reading.deltas.values()))})
    for name in (*_FETCH, "network_alphas", "metadata"):
        kwargs.pop(name, None)
    adapter_name = kwargs.pop("adapter_name", None) or _free_name(models)
    with _whole_or_not(models, hotswap):
        original(model, tensors, prefix=None, hotswap=hotswap, metadata=metadata, adapter_name=adapter_name, **kwargs)
        return _reported(reading, models, adapter_name)


def _fetched(source: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, of a repository, or of a dictionary."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    if isinstance(source, Mapping):
        _check_no_model(source, "these tensors")
        return with_metadata_alphas(dict(source), kwargs.get("metadata"))
    options = {name: kwargs.get(name) for name in _FETCH}
    options["use_safetensors"] = True if options["use_safetensors"] is None else options["use_safetensors"]
    try:
        found = _fetch_state_dict(source, user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
                                  allow_pickle=False, **options)
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise NunchakuError(f"{source}: not a readable safetensors file: {error}") from error
        raise
    _check_no_model(found[0], str(source))
    return with_metadata_alphas(dict(found[0]), found[1])


def _check_no_model(state: Mapping[str, Tensor], label: str) -> None:
    """A whole model has branches and norms, which look like those of a LoRA."""
    if any(str(key).endswith((".qweight", ".codes")) for key in state):
        raise NunchakuError(f"{label}: a quantized model, no LoRA; nq.load reads it")


def with_metadata_alphas(state: dict[str, Tensor], metadata: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Alphas that a file of diffusers' keeps in its metadata, as keys of their own."""
    return state if not metadata else {**state, **_alphas_of(state, metadata)}


def _alphas_of(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, leaf, _ = key.partition(".lora_A.")
        component, _, name = module.partition(".")
        scope, name = (f"{component}.", name) if f"{component}.lora_alpha" in metadata else ("", module)
        alpha = metadata.get(f"{scope}lora_alpha")
        if not leaf or alpha is None or f"{module}.alpha" in state:
            continue
        patterns = metadata.get(f"{scope}alpha_pattern") or {}
        alpha = next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), alpha)
        rank_stabilized = metadata.get(f"{scope}use_rslora")
        found[f"{module}.alpha"] = torch.tensor(alpha * (tensor.shape[0] ** 0.5 if rank_stabilized else 1.0))
    return found


def read_for(state: Mapping[str, Tensor], models: Mapping[str, nn.Module], **limits: Any) -> Reading:
    """By our reader alone."""
    return read(state, {name: target_of(model) for name, model in models.items()}, **limits)


def _read(state: dict[str, Tensor], models: Mapping[str, nn.Module], limits: dict[str, Any],
          convert: Callable[[], dict] | None) -> Reading:
    """By our reader; where it leaves keys, by diffusers' converter first, if that leaves fewer."""
    reading = read_for(state, models, **limits)
    if reading.unread and convert is not None:
        try:
            second = read_for(convert(), models, **limits)
        except Exception as error:  # whatever a converter trips over in a file that is not for it
            _logger.info("diffusers' converter does not read this LoRA either: %s", error)
            return reading
        if len(second.unread) < len(reading.unread) and second.deltas:
            return Reading(f"{reading.format}, converted by diffusers", second.deltas, second.unread, second.notes)
    return reading


def _converted(pipe: Any, state: Mapping[str, Tensor], models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """By diffusers' own converter of this pipeline: tensors, and alphas as keys beside them."""
    config = {"unet_config": models["unet"].config} if "unet" in models else {}
    found = type(pipe).lora_state_dict(dict(state), **config)
    tensors, *alphas = found if isinstance(found, tuple) else (found,)
    more = alphas[0] if alphas and alphas[0] else {}
    return {**tensors, **{name: torch.as_tensor(value) for name, value in more.items()}}


def target_of(model: nn.Module) -> Target:
    """The linears and convolutions of a model, by the names that they have without adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name and ".parts." not in name:
            shapes[name.removesuffix(".base_layer")] = tuple(module.weight.shape)
    return Target(type(model).__name__, shapes)


def _check(reading: Reading, models: Mapping[str, nn.Module], allow_partial: bool) -> None:
    """Every key must have found its module; keys for text encoders that are not there are only mentioned."""
    if not any(reading.deltas.values()):
        raise NunchakuError(f"this LoRA ({reading.format}) changes no module of {_classes(models)}: it is for another "
                            f"model. Its keys: {some(reading.unread)}")
    absent = [key for key in reading.unread if key.startswith(TEXT)]
    others = [key for key in reading.unread if key not in absent]
    if others and not allow_partial:
        found = sum(map(len, reading.deltas.values()))
        raise NunchakuError(f"this LoRA ({reading.format}) has {len(others)} keys for which {_classes(models)} has no "
                            f"module: {some(others)}. The other {found} modules can be loaded with allow_partial=True")
    if absent:
        reading.notes.append(f"{len(absent)} keys are for text encoders that are not there: {some(absent)}")
    if others:
        reading.notes.append(f"{len(others)} keys found no module: {some(others)}")


def _classes(models: Mapping[str, nn.Module]) -> str:
    return ", ".join(type(model).__name__ for model in models.values())


# --------------------------------------------------------------------------------------------------- what PEFT is given
def _as_peft(deltas: Mapping[str, Mapping[str, Delta]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and metadata of LoraConfigs, in diffusers' names."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, modules in deltas.items():
        if not modules:
            continue
        prefix = f"{component}." if component else ""
        for name, delta in modules.items():
            tensors |= {f"{prefix}{name}.{leaf}": tensor for leaf, tensor in _leaves(delta, modules).items()}
        metadata |= {f"{prefix}{key}": value for key, value in _config_of(modules).items()}
    return tensors, metadata


def _leaves(delta: Delta, modules: Mapping[str, Delta]) -> dict[str, Tensor]:
    leaves = {"lora_A.weight": delta.down, "lora_B.weight": delta.up}
    if any(other.bias is not None for other in modules.values()):  # PEFT has them for all or for none
        leaves["lora_B.bias"] = delta.up.new_zeros(delta.up.shape[0]) if delta.bias is None else delta.bias
    if delta.magnitude is not None:
        leaves["lora_magnitude_vector"] = delta.magnitude
    return leaves


def _config_of(modules: Mapping[str, Delta]) -> dict[str, Any]:
    rank = Counter(delta.rank for delta in modules.values()).most_common(1)[0][0]
    alpha = Counter(delta.alpha for delta in modules.values()).most_common(1)[0][0]
    dora = [name for name, delta in modules.items() if delta.magnitude is not None]
    if dora and len(dora) < len(modules):
        raise NunchakuError(f"this LoRA is a DoRA in {len(dora)} of {len(modules)} modules; PEFT has it in all or none")
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted(modules), "use_dora": bool(dora),
            "lora_bias": any(delta.bias is not None for delta in modules.values()),
            "rank_pattern": {f"^{name}": delta.rank for name, delta in modules.items() if delta.rank != rank},
            "alpha_pattern": {f"^{name}": delta.alpha for name, delta in modules.items() if delta.alpha != alpha}}


@contextmanager
def _state_dict_of(pipe: Any, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Iterator[None]:
    """Within it the pipeline's converter gives these; it is asked how many things it gives."""

    def given(*args: Any, **kwargs: Any) -> Any:
        shape = type(pipe).lora_state_dict(tensors, *args[1:], **kwargs)
        if not isinstance(shape, tuple):
            return dict(tensors)
        return dict(tensors), *(None for _ in shape[2:]), metadata

    vars(pipe)["lora_state_dict"] = given
    try:
        yield
    finally:
        vars(pipe).pop("lora_state_dict", None)


@contextmanager
def _whole_or_not(models: Mapping[str, nn.Module], hotswap: bool) -> Iterator[None]:
    """What was attached before something went wrong is taken off again, and the other adapters are as they were. A hot
    swap that fails is PEFT's to leave."""
    before = {name: set(getattr(model, "peft_config", {})) for name, model in models.items()}
    states = [_state_of(layer) for model in models.values() for layer in tuner_layers(model)]
    token = inside.set(True)
    try:
        with at_once():
            yield
    except BaseException:
        if not hotswap and "peft" in sys.modules:
            for name, model in models.items():
                _take_off(model, before[name])
            for restore in states:
                restore()
        raise
    finally:
        inside.reset(token)


def tuner_layers(model: nn.Module) -> list[Any]:
    """PEFT's, with no need of PEFT."""
    return [layer for layer in model.modules() if hasattr(layer, "lora_A")]


def _state_of(layer: Any) -> Callable[[], None]:
    """What puts a layer's active adapters and their strengths back."""
    active, disabled, scales = layer.active_adapters, layer.disable_adapters, dict(layer.scaling)
    trained = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]

    def restore() -> None:
        layer._active_adapter, layer._disable_adapters = active, disabled
        layer.scaling.update(scales)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        if hasattr(layer, "refresh"):
            layer.refresh()

    return restore


def _take_off(model: nn.Module, before: set[str]) -> None:
    from diffusers.utils import recurse_remove_peft_layers
    from diffusers.utils.peft_utils import delete_adapter_layers

    held = {name for layer in tuner_layers(model) for name in layer._get_available_adapters()}
    for name in (set(getattr(model, "peft_config", {})) | held) - before:
        delete_adapter_layers(model, name)
        getattr(model, "peft_config", {}).pop(name, None)  # diffusers forgets it only once it was loaded as a whole
    if not before:
        recurse_remove_peft_layers(model)
        vars(model).pop("peft_config", None)


def _reported(reading: Reading, models: Mapping[str, nn.Module], name: str) -> LoraReport:
    """Checked by what the models hold now."""
    modules: dict[str, int] = {}
    for component, deltas in reading.deltas.items():
        if deltas:
            missing = sorted(set(deltas) - set(_adapted(models[component], name)))
            if missing:
                raise NunchakuError(f"{len(missing)} modules did not take the LoRA: {some(missing)}")
            modules[component] = len(deltas)
    ranks = Counter(delta.rank for deltas in reading.deltas.values() for delta in deltas.values())
    report = LoraReport(name, reading.format, modules, dict(ranks), tuple(reading.notes))
    _logger.info("%s", report)
    for note in reading.notes:
        _logger.warning("LoRA '%s': %s", name, note)
    return report


def _adapted(model: nn.Module, name: str) -> dict[str, Any]:
    """The layers that hold weights of the adapter, by the names of their modules."""
    from peft.tuners.lora import LoraLayer

    from .layers import has_weights

    return {where: layer for where, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.lora_A and has_weights(layer, name)}


def models_of(target: Any) -> dict[str, nn.Module]:
    """The model itself, or those of a pipeline's that LoRAs are for."""
    if isinstance(target, nn.Module):
        return {"model": target}
    found = {name: getattr(target, name, None) for name in getattr(target, "_lora_loadable_modules", ())}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedSite) for module in model.modules())
