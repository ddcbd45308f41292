"""Tiny random models, text encoders and pipelines for tests: `MODELS["flux"]()` gives (model, forward arguments)."""

from tests.tiny_models import MODELS, randomise
from tests.tiny_pipelines import PIPELINES
from tests.tiny_text import TEXT_ENCODERS

__all__ = ["MODELS", "PIPELINES", "TEXT_ENCODERS", "randomise"]
