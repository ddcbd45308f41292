"""4-bit diffusion models (SVDQuant) with their LoRAs, as a drop-in for diffusers."""

import sys as _sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

__version__ = "0.1.0"

# A wheel carries kernels/ as nunchaku_py/kernels. In a source tree or an editable install that folder stands beside
# this package instead; with its parent on our path `import nunchaku_py.kernels` finds it there. Appended, so names
# inside the package come first; that nunchaku_py.tests resolves in a checkout as well is harmless: nothing imports it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))
del _here, _Path

# Public names come below (lazily: importing this package stays silent and cheap).
_PUBLIC = {
    "quantize": "quantize", "Report": "report", "Recipe": "recipes", "RECIPES": "recipes",
    "load": "checkpoint", "save": "checkpoint", "export": "checkpoint", "dequantize": "swap",
    "set_mode": "swap", "set_fusion": "swap", "set_weights": "swap",
    "SVDQuantConfig": "diffusers_hook", "QuantLinear": "linear", "NunchakuError": "errors", "explain": "explain",
    "cache_modulation": "tables",
    "backend": "ops.registry", "set_nunchaku_lite": "lite_choice",
    "offload": "offload",
    "reserve_lora": "lora.room", "compress_lora": "lora.room", "refresh_lora": "lora.room",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value  # also replaces a submodule of the same name: nunchaku_py.quantize is the function
    return value


class _Package(_ModuleType):
    """Importing the submodule `quantize` must not hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


from .registration import register as _register  # noqa: E402  (last: it needs nothing above but the package's path)

_register()
