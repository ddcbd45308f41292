"""Modulation tables and offloading on one model."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py.demo import shipped

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
