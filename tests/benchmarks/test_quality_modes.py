"""a8 is closer to 16 bit than a4, layer by layer: on the trained miniatures, with inputs of real sampling that no
calibration has seen, and on random layers. Half of the extent of benchmarks.quality.modes, and less."""
from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.quality import modes
from benchmarks.quality.mode_report import write_report
from benchmarks.quality.modes import BARS, FORMATS, SIGNED, Layer, errors_of, random_layer, row_of, trained
from benchmarks.quality.picture_cells import Extent
from benchmarks.quality.picture_subjects import Subject
from benchmarks.rows import RowFile
from nunchaku_py.backends import cpu
from nunchaku_py.formats import INT8, encode
from nunchaku_py.tensor import QTensor

MODELS = ("tiny-flux", "tiny-sdxl")
STATES = 9  # of 16; every second would be those of the empty prompt alone


@cache
def subject(name: str) -> Subject:
    return Subject(name, False, Extent(prompts=4, steps=3))


@cache
def layers(name: str, fmt: str) -> tuple[Layer, ...]:
    return tuple(trained(subject(name), fmt, calibrated=True, states=STATES))


def bar(item: Layer) -> float:
    return BARS.get(item.kind, SIGNED)


def ratio(item: Layer) -> float:
    errors = errors_of(item)
    return errors["a8"] / errors["a4"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_trained_model_meets_the_bar(name: str, fmt: str) -> None:
    found = layers(name, fmt)
    assert {item.kind for item in found} >= {"q, k, v", "attention out", "feed-forward in"}
    missed = {item.name: ratio(item) for item in found if ratio(item) > bar(item)}
    assert not missed, f"a8's error over a4's, of {len(found)} layers: {missed}"


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_random_layers_meet_the_bar(fmt: str, gelu: bool, gaussian: bool) -> None:
    item = random_layer(384, fmt, gelu, gaussian, calibrated=True)
    assert item.site.site.shift == (0.171875 if gelu and fmt == "int4" else 0.0)
    assert ratio(item) <= bar(item)


def test_both_kinds_of_input_are_there() -> None:
    """Shifted sites of INT4 files have the other bar; the K-parts of proj_out are measured apart."""
    shifted = [item for item in layers("tiny-flux", "int4") if item.site.site.shift]
    assert shifted and {item.kind for item in shifted} == {modes.POST_GELU}
    assert any("[" in item.name for item in shifted)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_coarse_fold_would_miss_it(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 4 instead of 8 bit in a8 no layer would pass: the bar measures what it says."""
    def coarse(weight: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = weight.dequantize()
        s_ch = w.abs().amax(1) / 7
        return encode(w, s_ch[:, None], INT8), s_ch

    monkeypatch.setattr(QTensor, "fold_int8", coarse)
    monkeypatch.setattr(cpu, "row_scales", lambda weight: coarse(weight)[1])
    found = [item for item in layers("tiny-flux", fmt) if item.kind == "q, k, v"]
    for item in found:
        item.site.set_mode("a4")
    assert all(ratio(item) > bar(item) for item in found)
    for item in found:
        item.site.set_mode("a4")


@pytest.mark.parametrize("name", MODELS)
def test_folding_adds_less_than_rounding_by_127_would(name: str) -> None:
    """Of an nvfp4 weight at most 65 % of the squared error, in the weight and in the output."""
    wide = sum(row.fold_127**2 for row in rows(name))
    assert sum(row.fold**2 for row in rows(name)) <= 0.65 * wide
    assert sum(row.output_fold**2 for row in rows(name)) <= 0.65 * sum(row.output_fold_127**2 for row in rows(name))
    assert all(row.fold_best <= row.fold * 1.001 for row in rows(name))


@cache
def rows(name: str) -> list[modes.Row]:
    return [row_of(name, "calibrated", item) for item in layers(name, "nvfp4")[::6]]


def test_rows_and_summary_are_written(tmp_path: Path) -> None:
    with RowFile.create(tmp_path / "rows.csv", modes.Row) as file:
        for row in rows("tiny-flux"):
            file.write(row)
    text = write_report(tmp_path / "rows.csv")
    assert (tmp_path / "rows.md").read_text() == text
    assert f"calibrated: {len(rows('tiny-flux'))} of {len(rows('tiny-flux'))} layers meet the bar." in text
    assert "| tiny-flux | calibrated | nvfp4 | q, k, v |" in text
