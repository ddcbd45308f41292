"""A quantization that was stopped leaves the model as it was, and goes on where it stopped."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nunchaku_py as nq
from nunchaku_py.calibrate import State
from nunchaku_py.engine import Engine
from nunchaku_py.resume import fingerprint
from tests.checks import QUICK, differences, files_in, run, state_of
from tests.tiny import MODELS

BOTH = pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
STOP_AFTER = 13  # jobs; the first block has 10


def flux() -> tuple[nn.Module, dict]:
    return MODELS["flux"]()


@pytest.fixture(scope="module")
def expected() -> dict[bool, dict[str, torch.Tensor]]:
    """calibrated → the state of an undisturbed run."""
    states = {}
    for calibrated in (False, True):
        model, inputs = flux()
        nq.quantize(model, QUICK, [inputs] if calibrated else None)
        states[calibrated] = state_of(model)
    return states


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**6) -> list[str]:
    """The names of the jobs as they are done; a KeyboardInterrupt comes in the middle of one."""
    done: list[str] = []
    real: Callable[..., Any] = Engine.run

    def run_counted(self: Engine, job: Any, *args: Any) -> Any:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(job.names[0])
        return real(self, job, *args)

    monkeypatch.setattr(Engine, "run", run_counted)
    return done


def interrupted(folder: Path, calibrated: bool, **options: Any) -> nn.Module:
    model, inputs = flux()
    with pytest.MonkeyPatch.context() as patch:
        counting(patch, STOP_AFTER)
        with pytest.raises(KeyboardInterrupt):
            nq.quantize(model, QUICK, [inputs] if calibrated else None, work_dir=folder, **options)
    return model


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@BOTH
def test_an_interrupted_model_is_untouched(tmp_path, calibrated: bool) -> None:
    model = interrupted(tmp_path / "work", calibrated)
    plain, inputs = flux()
    assert differences(plain.state_dict(), model.state_dict()) == []
    assert not getattr(model, "is_quantized", False) and "quantization_config" not in model.config
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(run(plain, inputs), run(model, inputs))


@BOTH
def test_finished_blocks_are_kept_and_used(tmp_path, monkeypatch, expected, calibrated: bool) -> None:
    folder = tmp_path / "work"
    model = interrupted(folder, calibrated)
    assert len(blocks_in(folder)) == 1 and not list(folder.glob("*.partial"))
    done = counting(monkeypatch)
    inputs = flux()[1]
    report = nq.quantize(model, QUICK, [inputs] if calibrated else None, work_dir=folder)
    assert done and not any(name.startswith("transformer_blocks.0.") for name in done)
    assert differences(expected[calibrated], model.state_dict()) == []
    assert {row.data for row in report.rows} == {"calibrated" if calibrated else "data-free"}
    assert len({row.name for row in report.rows}) + len(report.kept) == sum(
        isinstance(m, nn.Linear) for m in flux()[0].modules())
    assert not folder.exists(), "what is finished leaves nothing behind"


def test_without_an_interruption_work_dir_changes_nothing(tmp_path, expected) -> None:
    model, _ = flux()
    nq.quantize(model, QUICK, work_dir=tmp_path / "a/b")
    assert differences(expected[False], model.state_dict()) == []
    assert not (tmp_path / "a/b").exists()


def test_expanded_tensors_have_a_fingerprint() -> None:
    """Of which some have one element and no stride."""
    prints = {fingerprint([State((), {"timestep": step})]) for step in (
        torch.tensor([5.0]), torch.tensor(5.0).expand(1), torch.tensor([6.0]))}
    assert len(prints) == 2


def test_files_of_others_in_the_folder_survive(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "weights.safetensors").write_bytes(b"mine too")
    nq.quantize(flux()[0], "rtn-int4", work_dir=tmp_path)
    assert files_in(tmp_path) == ["notes.txt", "weights.safetensors"]


@pytest.mark.parametrize("other", [dict(rank=4), dict(seed=1), dict(recipe="rtn-int4"), dict(rules={"*to_q": "keep"}),
                                   dict(data=True), dict(recipe="svdquant-int4")], ids=str)
def test_other_settings_are_refused(tmp_path, other: dict) -> None:
    model = interrupted(tmp_path, False)
    before, files = state_of(model), files_in(tmp_path)
    settings = {"recipe": QUICK, **other}
    if "data" in other:
        settings["data"] = [flux()[1]]
    with pytest.raises(nq.NunchakuError, match="another quantization"):
        nq.quantize(model, work_dir=tmp_path, **settings)
    assert differences(before, model.state_dict()) == [] and files_in(tmp_path) == files


def test_another_model_of_the_same_class_is_refused(tmp_path) -> None:
    from tests.tiny import randomise

    interrupted(tmp_path, False)
    other = randomise(flux()[0], seed=9)
    before = state_of(other)
    with pytest.raises(nq.NunchakuError, match="other weights.*transformer_blocks.0"):
        nq.quantize(other, QUICK, work_dir=tmp_path)
    assert differences(before, other.state_dict()) == []


def test_other_dtype_is_refused(tmp_path) -> None:
    interrupted(tmp_path, False)
    other = flux()[0].half()
    with pytest.raises(nq.NunchakuError):
        nq.quantize(other, QUICK, work_dir=tmp_path)


@pytest.mark.parametrize("damage, calibrated", [("truncated", True), ("truncated", False), ("emptied", False),
                                                ("flipped header", False)])
def test_a_damaged_block_is_done_again(tmp_path, expected, damage: str, calibrated: bool) -> None:
    model = interrupted(tmp_path, calibrated)
    (path,) = blocks_in(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped header":
        data[9] ^= 0xFF
    path.write_bytes({"truncated": data[: len(data) // 2], "emptied": b""}.get(damage, data))
    nq.quantize(model, QUICK, [flux()[1]] if calibrated else None, work_dir=tmp_path)
    assert differences(expected[calibrated], model.state_dict()) == []


def test_other_calibration_data_is_refused(tmp_path) -> None:
    """Blocks of one set of data and blocks of another do not belong together."""
    model = interrupted(tmp_path, True)
    inputs = flux()[1]
    inputs["hidden_states"] = inputs["hidden_states"] * 2
    with pytest.raises(nq.NunchakuError):
        nq.quantize(model, QUICK, [inputs], work_dir=tmp_path)


@BOTH
def test_interrupted_at_the_very_end(monkeypatch, calibrated: bool) -> None:
    """The model is wholly quantized or not at all."""
    import sys

    model, inputs = flux()
    before = state_of(model)
    monkeypatch.setattr(sys.modules["nunchaku_py.quantize"], "attach", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        nq.quantize(model, "rtn-int4", [inputs] if calibrated else None)
    assert differences(before, model.state_dict()) == [] and not getattr(model, "is_quantized", False)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
