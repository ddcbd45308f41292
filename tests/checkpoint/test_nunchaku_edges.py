"""Nunchaku's files that other tools changed, and what its own loader asks of those we write."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from tests.checkpoint.test_nunchaku import contents, flux, quantized, rewritten  # noqa: F401  (flux: a fixture)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_dtype_reaches_tensors_that_have_another_name_in_the_file(name: str, tmp_path: Path):
    model, _ = quantized(name)
    nq.export(model, tmp_path / "svdq.safetensors", "nunchaku")
    back = nq.load(tmp_path / "svdq.safetensors", dtype=torch.float16)
    sites = {name for name, module in back.named_modules() if getattr(module, "is_nunchaku_quantized", False)}
    others = {name: parameter.dtype for name, parameter in back.named_parameters()
              if not any(name.startswith(f"{site}.") for site in sites)}
    assert set(others.values()) == {torch.float16}, others
