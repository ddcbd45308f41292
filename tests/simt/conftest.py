"""Kernels on the host: the library of a test file, and the ways to run each kernel."""
import pytest

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
