"""Modulation tables and offloading on one model."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py import NunchakuError
from nunchaku_py.demo import shipped
from nunchaku_py.tables import modulation_linears
from tests.tabled import quantized_model

CALL = {**shipped.CALLS["tiny-flux"], "prompt": "a red circle", "output_type": "pt"}


def picture(pipe: Any) -> torch.Tensor:
    return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("tables_first", [True, False])
@pytest.mark.parametrize("memory", [{"ram": "3.3MB"}, {"vram": "3.3MB", "device": "cpu"}])
def test_beside_offloading_the_pictures_are_the_same(memory: dict, tables_first: bool, tmp_path: Path) -> None:
    """Streamed weights come with their block in every call, and explain says that tables are not used then."""
    pipe = shipped.pipeline("tiny-flux")
    nq.quantize(pipe, "rtn-int4")
    nq.save(pipe, tmp_path / "flux")
    expected, pipe = picture(pipe), nq.load(tmp_path / "flux", mmap=True)
    steps = [lambda: nq.cache_modulation(pipe), lambda: nq.offload(pipe, **memory)]
    for step in steps if tables_first else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(picture(pipe), expected)
    said = nq.explain(pipe).tables[0]
    assert ("not used: offloading brings" in said) == ("vram" in memory), said
    nq.offload(pipe)
    assert torch.equal(picture(pipe), expected)


def test_weights_on_the_host_of_a_model_on_a_gpu_are_not_streamed() -> None:
    model, _ = quantized_model()
    nq.cache_modulation(model)
    linear = model.transformer_blocks[0].norm1.linear
    linear._apply(lambda tensor: SimpleNamespace(device=torch.device("cuda"), dtype=tensor.dtype))
    with pytest.raises(NunchakuError, match=r"while it is on a GPU; call nq.cache_modulation\(model, False"):
        nq.offload(model, vram="4GB", device="cpu")
    assert not hasattr(model, "nunchaku_offload") and linear.berth is None


@pytest.mark.gpu
def test_tables_of_a_model_that_is_streamed_leave_its_weights_where_streaming_puts_them() -> None:
    model, _ = quantized_model()
    nq.offload(model, vram="1GB")  # everything stays on the GPU
    nq.cache_modulation(model)
    assert all(site.codes.is_cuda for site in modulation_linears(model).values())
    nq.offload(model, None)
    nq.cache_modulation(model, False)
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
