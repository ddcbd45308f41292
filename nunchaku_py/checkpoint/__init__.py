"""Reading and writing checkpoints: our own canonical format. Names come when asked for: headers are read without torch.
"""
from __future__ import annotations

_PUBLIC = {"Manifest": "manifest", "load": "own", "save": "own", "export": "forms"}
__all__ = ["Manifest", "export", "load", "save"]  # noqa: F822


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
