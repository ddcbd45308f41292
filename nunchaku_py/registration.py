"""Tell diffusers and transformers of our quantizer once they are imported, so that importing us stays cheap."""
from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Loader(importlib.abc.Loader):
    """The module's own loader, plus a call once the module is there."""

    def __init__(self, inner: importlib.abc.Loader, then: Callable[[ModuleType], None]) -> None:
        self._inner, self._then = inner, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._then(module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Watches one module name; steps aside for every other."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then(module)` now if `name` is imported already, else right after its import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


def register() -> None:
    """The hook modules enter themselves into the libraries' tables; here they are only imported in time.

    A hook that is imported first imports its library itself and comes by here half-made: importing it again is no harm.
    """
    after_import("diffusers.quantizers.auto", lambda _: importlib.import_module("nunchaku_py.diffusers_hook"))
    after_import("transformers.quantizers.auto", lambda _: importlib.import_module("nunchaku_py.transformers_hook"))
    after_import("peft.tuners.lora.model", lambda module: _lora("dispatch").attach(module))
    after_import("peft.utils.hotswap", lambda module: _lora("dispatch").attach_hotswap(module))
    after_import("diffusers.loaders.peft", lambda module: _lora("patches").attach_models(module))
    after_import("diffusers.loaders.lora_pipeline", lambda module: _lora("patches").attach_pipelines(module))
    after_import("diffusers.models.attention_dispatch",
                 lambda module: importlib.import_module("nunchaku_py.attention_backend").attach(module))
    after_import("diffusers.models.transformers.pixart_transformer_2d",
                 lambda module: _lora("lending").lend_to_model(module))
    for version in ("alpha", "sigma"):
        after_import(f"diffusers.pipelines.pixart_alpha.pipeline_pixart_{version}",
                     lambda module: _lora("lending").lend_to_pipeline(module))


def _lora(name: str) -> ModuleType:
    return importlib.import_module(f"nunchaku_py.lora.{name}")
