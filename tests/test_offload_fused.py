"""Adapters that are fused into linears in 16 bit, which PEFT writes where torch does not count it."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.checkpoint import mapping
from nunchaku_py.checkpoint.mapping import PAGE, drop, map_file
from tests.checks import QUICK, run, same_bits
from tests.lora.toys import toy
from tests.offloading import refused, streamed
from tests.tiny import MODELS

KEPT = ("attn.to_out.0", "ff.net.2")
needs_madvise = pytest.mark.skipif(not mapping.CAN_DROP, reason="this system drops no pages of mapped files")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A file of a model some of whose linears, within blocks, are in 16 bit; inputs."""
    model, inputs = MODELS["flux"]()
    nq.quantize(model, QUICK, rules={f"transformer_blocks.*.{name}": "keep" for name in KEPT})
    return nq.save(model, tmp_path_factory.mktemp("fused") / "model.safetensors"), inputs


def load_adapter(model: nn.Module) -> None:
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and name.endswith(KEPT)]
    assert len(names) == 4
    model.load_lora_adapter(toy(model, names), prefix=None, adapter_name="style")


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("memory", [pytest.param("ram", marks=needs_madvise), "vram"])
def test_what_is_fused_is_computed_with(memory: str, fused_first: bool, stored: tuple[Path, dict]) -> None:
    path, inputs = stored
    plain, model = nq.load(path), nq.load(path, mmap=memory == "ram")

    def offload() -> None:
        nq.offload(model, ram=refused(model, "ram")) if memory == "ram" else streamed(model)

    def agrees() -> bool:
        return all(same_bits(run(model, inputs), run(plain, inputs)) for _ in range(2))

    if not fused_first:
        offload()
    for one in (plain, model):
        load_adapter(one)
    before = run(plain, inputs)
    assert agrees()
    for scale in (1.0, 0.5):  # nothing is called between unfusing and fusing again
        for one in (plain, model):
            one.fuse_lora(scale, adapter_names=["style"])
        if fused_first and scale == 1.0:
            offload()
        assert agrees() and not same_bits(run(plain, inputs), before)
        for one in (plain, model):
            one.unfuse_lora()
    assert agrees()


@needs_madvise
def test_pages_that_were_written_to_stay_and_their_neighbours_go(tmp_path: Path) -> None:
    path = tmp_path / "ones"
    path.write_bytes(b"\x01" * 8 * PAGE)
    file = map_file(path)
    view = torch.frombuffer(file, dtype=torch.uint8)
    assert mapping._unwritten(file.address, file.address + 8 * PAGE) == [(file.address, file.address + 8 * PAGE)]
    view.data[3 * PAGE] = 2
    assert view._version == 0
    drop([(file, 0, 8 * PAGE)])
    parts = [(start - file.address, stop - file.address)
             for start, stop in mapping._unwritten(file.address, file.address + 8 * PAGE)]
    assert parts == [(0, 3 * PAGE), (4 * PAGE, 8 * PAGE)]
    assert view[3 * PAGE] == 2 and view.sum() == 8 * PAGE + 1
