"""What every test runs under: no network, a fixed seed, one thread; GPU tests on a GPU, slow tests when asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: a test that would fetch something fails at once

import pytest
import torch

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
