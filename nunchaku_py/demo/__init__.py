"""The shipped demonstration: a miniature FLUX pipeline, quantized, measured and checked end to end."""
from .models import DEMO, TINY, Size, flux_pipeline, flux_transformer

__all__ = ["DEMO", "TINY", "Size", "flux_pipeline", "flux_transformer"]
