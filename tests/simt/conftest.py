"""Kernels on the host: the library of a test file, the ways to run each kernel, and the CUDA backend on them."""
from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from types import ModuleType

import pytest

from nunchaku_py import native
from nunchaku_py.backends.cuda import device as gpu
from tests.simt import build


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> build.Library:
    """instructions.cpp for test_instructions.py, and so on."""
    if reason := build.refuses():
        pytest.skip(reason)
    return build.load(request.path.stem.removeprefix("test_"))


@pytest.fixture(params=[{}, {"reverse": True}], ids=["forward", "reverse"])
def order(request: pytest.FixtureRequest) -> dict[str, bool]:
    """In which order threads run."""
    return request.param


@pytest.fixture(params=[{}, {"truncate": True}], ids=["nearest", "truncate"])
def rounding(request: pytest.FixtureRequest) -> dict[str, bool]:
    """How float mma and approximate functions round."""
    return request.param


@pytest.fixture(params=[{}, {"eager": True}], ids=["late", "eager"])
def timing(request: pytest.FixtureRequest) -> dict[str, bool]:
    """When TMA and wgmma do their work."""
    return request.param


# ---- the CUDA backend -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def on_host() -> ModuleType:
    return native_on_host()


@pytest.fixture(scope="session")
def on_turing() -> ModuleType:
    return native_on_host("-DSIMT_TARGET=75")


@pytest.fixture(scope="session")
def on_hopper() -> ModuleType:
    return native_on_host("-DSIMT_TARGET=90")


def native_on_host(*options: str) -> ModuleType:
    """The kernels as of the newest GPU, or of another."""
    if reason := build.refuses():
        pytest.skip(reason)
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [build.compiler(), *build.OPTIONS, *options, *includes, str(build.HERE / "native.cpp")]
    path = build.cached(command, "native", ".so")
    spec = importlib.util.spec_from_file_location("native_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _WithCuda:
    """The native module, if there is one, with the CUDA ops."""

    def __init__(self, ops_on_host: object, target: str) -> None:
        self.cuda, self._module, self.cuda_targets, self.cuda_status = ops_on_host, native.module, target, "on the host"

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)

    def why_not_this_driver(self) -> str:
        return ""


@pytest.fixture
def as_gpu(on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of this machine taken for those of an RTX 40."""
    yield from taken_for_gpu(monkeypatch, on_host, (8, 9))


@pytest.fixture
def as_turing(on_turing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """… of an RTX 20."""
    yield from taken_for_gpu(monkeypatch, on_turing, (7, 5))


@pytest.fixture
def as_hopper(on_hopper: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """… of an H100."""
    yield from taken_for_gpu(monkeypatch, on_hopper, (9, 0))


@pytest.fixture
def as_blackwell(on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """… of an RTX 50."""
    yield from taken_for_gpu(monkeypatch, on_host, (12, 0))


def taken_for_gpu(monkeypatch: pytest.MonkeyPatch, on_host: ModuleType, capability: tuple[int, int]) -> Iterator[None]:
    target = "{}{}".format(*capability) + ("a" if capability >= (9, 0) else "")
    monkeypatch.setattr(native, "module", _WithCuda(on_host.cuda, target))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "capability_of", lambda device: capability)
    asked_once = gpu.refuses_capability, gpu.refuses_driver
    for cached in asked_once:
        cached.cache_clear()
    yield
    for cached in asked_once:
        cached.cache_clear()


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run."""
    if request.param == "gpu":
        return "cuda"
    request.getfixturevalue("as_gpu")
    return "cpu"
