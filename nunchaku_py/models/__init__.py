"""What is quantized in a model: found by rule, refined by one file of data per architecture."""

from .discover import blocks_of
from .pattern import GENERIC, Pattern, pattern_of
from .plan import Plan, Unit, plan

__all__ = ["GENERIC", "Pattern", "Plan", "Unit", "blocks_of", "pattern_of", "plan"]
