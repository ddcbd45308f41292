"""diffusers has no LoRA calls on PixArt: it is given those that other models and pipelines of diffusers have."""
from __future__ import annotations

from types import ModuleType

MODEL = "diffusers.models.transformers.pixart_transformer_2d"
PIPELINES = {"diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha": "PixArtAlphaPipeline",
             "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma": "PixArtSigmaPipeline"}


def lend_to_model(module: ModuleType) -> None:
    from diffusers.loaders import peft

    model = module.PixArtTransformer2DModel
    if not hasattr(model, "load_lora_adapter"):
        model.__bases__ += (peft.PeftAdapterMixin,)
        peft._SET_ADAPTER_SCALE_FN_MAPPING.setdefault(model.__name__, lambda model, weights: weights)


def lend_to_pipeline(module: ModuleType) -> None:
    from diffusers.loaders.lora_pipeline import AuraFlowLoraLoaderMixin

    pipeline = getattr(module, PIPELINES[module.__name__])
    if not hasattr(pipeline, "load_lora_weights"):
        pipeline.__bases__ += (AuraFlowLoraLoaderMixin,)
