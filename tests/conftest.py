"""What every test runs under: no network, a fixed seed, one thread; GPU tests on a GPU, slow tests when asked for."""

import copy
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: a test that would fetch something fails at once

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run here, in Python

# A shell's background job inherits that Ctrl-C is ignored, and its children from it; some tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # on tensors this small, threads wait for each other far longer than they work


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow (minutes, network)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Form → a good checkpoint of a tiny PixArt."""
    import nunchaku_py as nq
    from tests.checks import QUICK
    from tests.tiny import MODELS

    folder = tmp_path_factory.mktemp("good")
    model, _ = MODELS["pixart"]()
    nq.quantize(model, QUICK)
    paths = {"folder": folder / "model", "single file": folder / "model.safetensors"}
    for path in paths.values():
        nq.save(model, path)
    return paths


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def quantized(request: pytest.FixtureRequest) -> tuple:
    """(tiny FLUX quantized, forward arguments, its state): not to be changed."""
    import nunchaku_py as nq
    from tests.checks import QUICK, QUICK_NVFP4, state_of
    from tests.tiny import MODELS

    model, inputs = MODELS["flux"]()
    nq.quantize(model, {"int4": QUICK, "nvfp4": QUICK_NVFP4}[request.param])
    return model, inputs, state_of(model)


@pytest.fixture
def fresh(quantized: tuple) -> tuple:
    """A copy of `quantized` to do what one likes with."""
    model, inputs, state = quantized
    return copy.deepcopy(model), inputs, state
