"""The Triton kernels run by its interpreter on tensors of this machine, taken for those of a GPU."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch

from nunchaku_py.backends.triton import device as gpu

pytest.importorskip("triton")

from tests.triton import interpreter  # noqa: E402
from tests.triton.compiling import Compiled, compiled_for  # noqa: E402

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
def as_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """… of an H100."""
    taken_for_gpu(monkeypatch, (9, 0))


@pytest.fixture
def as_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """… of an RTX 50."""
    taken_for_gpu(monkeypatch, (12, 0))


def taken_for_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run there (pytest -m gpu)")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "capability_of", lambda device: capability)


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where kernels run."""
    if request.param == "gpu":
        yield "cuda"
        return
    request.getfixturevalue("as_gpu")
    with np.errstate(all="ignore"):  # NaN and infinities are asked for
        yield "cpu"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Compiled]]:
    """target → all that tests/triton/calls.py launches, compiled for it once a session."""
    folder = tmp_path_factory.mktemp("compiled")
    return cache(lambda target: compiled_for(target, folder / f"{target}.json"))
