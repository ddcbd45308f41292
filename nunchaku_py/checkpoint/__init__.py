"""Reading and writing checkpoints: our own canonical format."""
from .manifest import Manifest
from .own import load, save

__all__ = ["Manifest", "load", "save"]
