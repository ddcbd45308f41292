import pytest
import torch
from torch import nn

from nunchaku_py import residence
from nunchaku_py.residence import Residence

META = torch.device("meta")


class Logged(nn.Linear):
    """A block that notes where it is sent instead of going there."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return self


def test_without_a_device_everything_stays():
    model = small(nn.Linear)
    with Residence(model, named(model), None) as there, there.of("blocks.0"):
        assert there.device == torch.device("cpu")
        assert {p.device.type for p in model.parameters()} == {"cpu"}


def small(block):
    return nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": nn.ModuleList(block(4, 4) for _ in range(2))})


def named(model):
    return {f"blocks.{i}": block for i, block in enumerate(model["blocks"])}


@pytest.fixture
def model(monkeypatch):
    """Said to be at home on "meta", so that the CPU is elsewhere."""
    monkeypatch.setattr(residence, "_home", lambda module: META)
    return small(Logged)


def test_a_block_is_there_for_its_turn_only(model):
    first, second = model["blocks"]
    with Residence(model, named(model), "cpu") as there:
        with there.of("blocks.0"):
            assert first.sent == ["cpu"] and second.sent == []
        with pytest.raises(KeyError), there.of("blocks.1"):
            raise KeyError
    assert first.sent == second.sent == ["cpu", "meta", "meta"]


@pytest.mark.gpu
def test_on_a_gpu():
    model = small(nn.Linear)
    first, second = model["blocks"]
    with Residence(model, named(model), "cuda") as there:
        assert model["stem"].weight.is_cuda and not first.weight.is_cuda
        with there.of("blocks.0"):
            assert first.weight.is_cuda and not second.weight.is_cuda
    assert {p.device.type for p in model.parameters()} == {"cpu"}
