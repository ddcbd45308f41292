"""The Triton kernels run by its interpreter on tensors of this machine, taken for those of a GPU."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nunchaku_py.backends.triton import device as gpu

pytest.importorskip("triton")

from tests.triton import compiling, interpreter  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.teach()


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """… of an RTX 40."""
    taken_for_gpu(monkeypatch, (8, 9))


@pytest.fixture
def as_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """… of an RTX 30."""
    taken_for_gpu(monkeypatch, (8, 6))


@pytest.fixture
def as_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """… of an RTX 50."""
    taken_for_gpu(monkeypatch, (12, 0))


def taken_for_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run there (pytest -m gpu)")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "capability_of", lambda device: capability)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks for compiled kernels comes last: they are compiled while the others run."""
    items.sort(key=lambda item: "compiled" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def _compiling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Target → the future of what tests/triton/calls.py launches, compiled for it; begun at the first of these tests,
    if any asks for it."""
    if not any("compiled" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield {}
        return
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {target: pool.submit(compiling.compiled_for, target, folder / f"{target}.json")
               for target in compiling.TARGETS}


@pytest.fixture(scope="session")
def compiled(_compiling: dict) -> Callable[[int], list[compiling.Compiled]]:
    """Target → all that tests/triton/calls.py launches, compiled for it once a session."""
    return lambda target: _compiling[target].result()


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where kernels run."""
    if request.param == "gpu":
        yield "cuda"
        return
    request.getfixturevalue("as_gpu")
    with np.errstate(all="ignore"):  # NaN and infinities are asked for
        yield "cpu"
