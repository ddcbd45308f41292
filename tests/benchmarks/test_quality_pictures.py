"""Metrics, rows, bars and the program of benchmarks.quality.pictures."""
from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality import picture_bars, picture_cells, picture_report, picture_subjects, pictures
from benchmarks.quality.picture_bars import Table
from benchmarks.quality.picture_cells import FREE, JUDGED, RANK, RANKS, Build, Extent, builds
from benchmarks.quality.picture_metrics import compare, feature_distance, frechet, pooled
from benchmarks.quality.picture_rows import Row, append, key_of, newest, read
from nunchaku_py.demo import scenes, shipped
from nunchaku_py.demo.checker import load_checker
from nunchaku_py.demo.render import render


def random_set(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- metrics
def test_frechet_distance_of_a_set_to_itself_is_nothing() -> None:
    x = random_set(50, 8)
    assert frechet(x, x) < 1e-9
    assert frechet(x, x.flip(0)) < 1e-9


def test_frechet_distance_of_shifted_sets_is_the_shift_squared() -> None:
    x = random_set(50, 8)
    assert frechet(x, x + 2) == pytest.approx(8 * 2**2)


def test_frechet_distance_by_hand() -> None:
    """Means 1 and 2, variances 2 and 8: (1 − 2)² + 2 + 8 − 2·√16"""
    assert frechet(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])) == pytest.approx(3)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """tr (Σ₁Σ₂)^½ from the eigenvalues of Σ₁Σ₂ itself."""
    x, y = (random_set(200, 5, seed=seed).double() @ random_set(5, 5, seed=seed + 2).double() for seed in (0, 1))
    one, other = torch.cov(x.T), torch.cov(y.T)
    both = torch.linalg.eigvals(one @ other).real.sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + one.trace() + other.trace() - 2 * both
    assert frechet(x, y) == pytest.approx(expected.item())


def test_feature_distance_by_hand() -> None:
    """Across channels at right angles: 2; alike but for the size: 0. The mean over places, then over taps."""
    one, other = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    one[0, 0] = 3
    other[0, 1, 0, 0], other[0, 0, 0, 1] = 5, 7
    assert feature_distance([one], [other]).tolist() == [pytest.approx(1)]
    assert feature_distance([one, one], [other, 9 * one]).tolist() == [pytest.approx(0.5)]


def test_pooled_features_are_the_last_taps_means() -> None:
    assert pooled([torch.zeros(1, 3, 2, 2), torch.arange(8.0).reshape(1, 2, 2, 2)]).tolist() == [[1.5, 5.5]]


def test_pictures_against_themselves_and_against_worse_ones() -> None:
    chance = random.Random(3)
    drawn = [scenes.draw(chance, held_out=True) for _ in range(24)]
    prompts = [scenes.describe(scene, chance) for scene in drawn]
    checker, exact = load_checker(), render(drawn)
    alike = compare(checker, exact, exact, prompts)
    assert (alike.psnr, alike.ssim, alike.feature) == (float("inf"), pytest.approx(1), 0)
    assert alike.frechet < 1e-6 and alike.agreement > 0.9
    found = [compare(checker, (exact + size * random_set(*exact.shape)).clamp(0, 1), exact, prompts)
             for size in (0.02, 0.2)]
    assert alike.feature < found[0].feature < found[1].feature
    assert alike.frechet < found[0].frechet < found[1].frechet
    assert alike.psnr > found[0].psnr > found[1].psnr > 10
    assert compare(checker, random_set(*exact.shape).clamp(0, 1), exact, prompts).agreement == 0


# ------------------------------------------------------------------------------------------------------ rows
def row(**values: Any) -> Row:
    common = {"date": "d", "commit": "c", "cpu": "cpu", "torch": "2", "threads": "1", "model": JUDGED[0],
              "stress": JUDGED[1], "weights": "w", "method": "svdquant", "format": "int4", "rank": RANK, "mode": "a4",
              "bytes": 100, "ssim": 0.9, "feature": 0.1, "frechet": 0.1}
    return Row(**{**common, **values})


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(error=0.125, prompts=4, psnr=float("inf"), note="a, b"), row(seed=1, error=0.25)]
    for one in rows:
        append(tmp_path / "rows.csv", one)
    assert read(tmp_path / "rows.csv") == rows
    assert read(tmp_path / "none.csv") == []


def test_a_line_that_was_cut_off_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append(path, row(error=0.1))
    with path.open("a") as file:
        file.write("2026-01-01,abc,cp")
    append(path, row(seed=1, error=0.2))
    assert [one.error for one in read(path)] == [0.1, 0.2]


def test_a_quote_that_a_cut_left_open_takes_no_other_row_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append(path, row(error=0.1, note="a, b"))
    path.write_text(path.read_text()[:-3])
    append(path, row(seed=1, error=0.2))
    append(path, row(seed=2, error=0.3, note="c, d"))
    assert [(one.error, one.note) for one in read(path)][1:] == [(0.2, ""), (0.3, "c, d")]


def test_what_others_say_in_several_lines_is_one_row(tmp_path: Path) -> None:
    append(tmp_path / "rows.csv", row(note="Error: first,\n  second\r\n"))
    assert [one.note for one in read(tmp_path / "rows.csv")] == ["Error: first, second"]


def test_a_second_header_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append(path, row(error=0.1))
    path.write_text(2 * path.read_text())
    assert [one.error for one in read(path)] == [0.1, 0.1]


def test_of_several_weights_the_last_count_and_of_equal_rows_the_last() -> None:
    rows = [row(weights="old", error=1.0), row(error=2.0), row(stress="plain", weights="old", error=3.0),
            row(error=4.0)]
    assert [one.error for one in newest(rows)] == [4.0, 3.0]


# ------------------------------------------------------------------------------------------------------ cells
@pytest.mark.parametrize("extent", [picture_cells.FULL, picture_cells.QUICK])
@pytest.mark.parametrize("where", [JUDGED, ("tiny-sdxl", "plain")])
def test_no_cell_is_measured_twice(extent: Extent, where: tuple[str, str]) -> None:
    cells = [(build.method, build.settings, build.format, build.rank, build.seed, mode)
             for build in builds(extent, *where) for mode in build.modes]
    assert len(cells) == len(set(cells))


def test_the_full_matrix_has_what_the_bars_ask_for() -> None:
    rows = [row(method=build.method, settings=build.settings, format=build.format, rank=build.rank, seed=build.seed,
                mode=mode, bytes=1000 + build.rank, error=0.1, psnr=20.0 if shown else "", agreement=0.9)
            for build in builds(picture_cells.FULL, *JUDGED) for mode, shown in build.modes.items()]
    assert all(bar.met is not None for bar in picture_bars.bars(Table(rows)) if "sdnq" not in bar.asked)


@pytest.mark.parametrize("extent", [picture_cells.FULL, picture_cells.QUICK])
def test_beside_the_peers_stands_ours_without_data(extent: Extent) -> None:
    found = [build for build in builds(extent, *JUDGED) if build.method == FREE]
    assert [(build.format, build.rank, set(build.modes)) for build in found] == [("int4", 32, {"a16", "a8"})]
    assert not any(build.method == FREE for build in builds(replace(extent, peers=0), *JUDGED))


def test_every_method_is_a_recipe() -> None:
    for method in (*picture_cells.METHODS, FREE):
        for fmt in picture_cells.FORMATS:
            assert picture_cells.recipe_of(method, fmt).format == fmt


def test_nothing_is_calibrated_on_what_is_measured() -> None:
    subject = object.__new__(picture_subjects.Subject)
    subject.extent, subject._calibrations = picture_cells.FULL, {}
    for caption in subject.prompts:
        assert {(thing.colour, thing.shape) for thing in scenes.read(caption).things} & scenes.HELD_OUT
    asked: list[tuple[str, int]] = []  # what pipelines are run on, with the seed of its noise
    subject.trajectory = lambda prompts, seed, steps: asked.extend((one, seed + i) for i, one in enumerate(prompts))
    for seed in range(picture_cells.FULL.seeds):
        subject.calibration(seed)
    assert len(asked) == len(set(asked)) == picture_cells.FULL.seeds * picture_subjects.CALIBRATION
    painted = range(picture_subjects.HELD_OUT_SEED, picture_subjects.HELD_OUT_SEED + picture_cells.FULL.prompts)
    for caption, seed in asked:
        assert not {(thing.colour, thing.shape) for thing in scenes.read(caption).things} & scenes.HELD_OUT
        assert seed not in painted


# ------------------------------------------------------------------------------------------------------- bars
def measured(**errors: float) -> Iterator[Row]:
    """A table in which every bar is met, but for the methods named."""
    base = {"rtn": 0.4, "smooth": 0.2, "smooth+lowrank": 0.15, "+rounds": 0.14, "+fit": 0.13, "+gptq": 0.12, **errors}
    for method, error in base.items():
        for seed in range(1 if method == "rtn" else 3):
            yield row(method=method, rank=0 if method in ("rtn", "smooth") else RANK, seed=seed, error=error,
                      psnr=20.0, agreement=0.9, prompts=256)
    for rank, error in zip(RANKS, (0.15, 0.12, 0.1, 0.09), strict=True):
        for seed in range(3):
            for mode, part in (("a4", 1.0), ("a8", 0.6), ("a16", 0.5)):
                same = {"rank": rank, "seed": seed, "mode": mode, "bytes": 100 + rank}
                yield row(**same, error=part * error, psnr=25.0, agreement=0.89)
                yield row(**same, format="nvfp4", error=0.9 * part * error)
    yield row(method="16 bit", format="", rank=0, mode="a16", error=0.0, psnr=float("inf"), agreement=0.9)
    for mode, error in (("a16", 0.18), ("a8", 0.19)):
        yield row(method=FREE, rank=32, mode=mode, error=error, bytes=120)
    yield row(method="sdnq uint4", settings="svd", format="", rank=0, mode="a16", error=0.2, psnr=22.0, bytes=120,
              agreement=0.8)


def missed(rows: list[Row]) -> list[str]:
    return [bar.asked for bar in picture_bars.bars(Table(rows)) if bar.met is not True]


def test_bars_are_met_missed_or_not_measured() -> None:
    assert missed(list(measured())) == []
    assert missed(list(measured(rtn=0.28))) == ["SVDQuant rank 8 ≤ 0.4 × rtn"]
    assert missed(list(measured(**{"+gptq": 0.135}))) == ["GPTQ lowers it"]
    assert missed(list(measured(**{"+gptq": 0.13}))) == ["GPTQ lowers it"]  # a step that does nothing
    worse = [replace(one, error=0.2) if (one.method, one.seed, one.mode, one.rank) == ("svdquant", 2, "a4", 32) else one
             for one in measured()]
    assert missed(worse) == ["rank 32 below rank 16"]
    assert picture_bars.bars(Table([]))[0].met is None


@pytest.mark.parametrize(("bar", "where", "spoilt"), [
    ("a8 ≤ 0.75 × a4", {"mode": "a8", "format": "int4"}, {"error": 0.076}),
    ("agreement within 2 points of 16 bit", {"mode": "a4", "format": "int4"}, {"agreement": 0.87}),
    ("PSNR ≥ rounding's + 3 dB", {"mode": "a4", "format": "int4"}, {"psnr": 22.9}),
    ("NVFP4 ≤ INT4", {"mode": "a4", "format": "nvfp4"}, {"error": 0.101}),
])
def test_each_bar_has_its_limit(bar: str, where: dict[str, str], spoilt: dict[str, float]) -> None:
    where = {**where, "method": "svdquant", "rank": RANK}
    rows = [replace(one, **spoilt) if vars(one).items() >= where.items() else one for one in measured()]
    assert missed(rows) == [bar]


@pytest.mark.parametrize(("plain", "met"), [(0.91, True), (0.95, False)])
def test_a_stressed_model_has_to_be_as_good_in_16_bit(plain: float, met: bool) -> None:
    rows = [row(method="16 bit", stress=stress, error=0.0, psnr=float("inf"), agreement=agreement)
            for stress, agreement in (("plain", plain), ("stressed", 0.9))]
    assert [bar.met for bar in picture_bars.bars(Table(rows)) if "when stressed" in bar.asked] == [met]


@pytest.mark.parametrize(("sixteen", "quantized", "met"), [
    (0.02, 0.02, None), (0.499, 0.1, None), (0.5, 0.48, True), (0.5, 0.47, False)])
def test_agreement_is_judged_only_where_16_bit_draws(sixteen: float, quantized: float, met: bool | None) -> None:
    rows = [replace(one, agreement=sixteen if one.method == "16 bit" else quantized) for one in measured()]
    rows += [replace(one, stress="plain") for one in rows if one.method == "16 bit"]
    found = {bar.asked: bar for bar in picture_bars.bars(Table(rows)) if "agreement" in bar.asked}
    assert found["agreement within 2 points of 16 bit"].met is met
    assert found["tiny-flux, 16 bit: agreement within 2 points when stressed"].met is (None if sixteen < 0.5 else True)
    assert "1 not decided" in picture_bars.verdict([picture_bars.Bar("", "", None)])


def test_sdnq_is_compared_at_no_more_bytes() -> None:
    table = Table(measured())
    peer = table.peers(*JUDGED)[0]
    assert table.fitting(peer, "int4", "a8").rank == RANK  # 116 bytes fit into 120, 132 do not
    assert table.fitting(peer, "int4", "a8", FREE).error == 0.19
    assert picture_bars.against(table, peer).met
    assert picture_bars.against(table, replace(peer, error=0.055)).met is False
    assert picture_bars.against(table, replace(peer, psnr=30.0)).met is False
    assert picture_bars.against(table, replace(peer, bytes=99)).met is None


def test_the_summary_says_every_bar_and_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for one in measured(rtn=0.28):
        append(path, one)
    said = picture_report.write_report(path)
    page = path.with_suffix(".md").read_text()
    assert "1 missed" in said and "**missed**" in page and "sdnq" in page and "nvfp4" in page
    assert "| svd | 0 | 20.00 | 22.00 | svdquant, data-free, int4, rank 32 | 0 | 18.00 | 19.00 | – | – |" in page
    assert path.with_suffix(".png").exists() or "is not installed" in said


# ---------------------------------------------------------------------------------------------------- program
@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-flux with random weights, where the trained one is looked for."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    from benchmarks.training import flux, text_models

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    transformer = flux.transformer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=transformer.config.in_channels // 4, norm_num_groups=2,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, shift_factor=0.0)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer,
        text_encoder=text_models.clip_encoder(), tokenizer=text_models.clip_tokenizer(),
        text_encoder_2=text_models.t5_encoder(), tokenizer_2=text_models.t5_tokenizer(),
    ).to(torch.bfloat16).save_pretrained(folder / "tiny-flux")
    return folder


def test_a_run_goes_on_where_it_stopped(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    tiny = Extent(prompts=2, steps=1, seeds=1, formats=("int4",), ranks=(RANK,), methods=("rtn", "smooth"), peers=0)
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    monkeypatch.setitem(shipped.CALLS, "tiny-flux", {**shipped.CALLS["tiny-flux"], "num_inference_steps": 2})
    monkeypatch.setattr(picture_subjects, "CALIBRATION", 2)
    monkeypatch.setattr(picture_subjects, "CALIBRATION_STEPS", 1)
    path = tmp_path / "rows.csv"
    pictures.measure_all(path, ["tiny-flux"], ["stressed"], tiny)
    rows = read(path)
    assert [(one.method, one.mode) for one in rows] == [
        ("16 bit", "a16"), ("fp32", "a16"), *((method, mode) for method in ("rtn", "smooth")
                                             for mode in ("a4", "a8", "a16"))]
    assert rows[0].error == 0 and rows[0].psnr == float("inf")
    least, most = map(float, re.search(r"channels ([\d.]+) to ([\d.]+), tokens", rows[0].note).groups())
    assert 10 < least <= most  # on other inputs than the stress was set on; there it is 20 to 30
    assert all(0 < one.error < 1 for one in rows[1:]) and rows[2].psnr > 10 and rows[3].psnr == ""
    assert all(one.bytes for one in rows[2:])
    assert all(len({one.error for one in rows[start:start + 3]}) == 3 for start in (2, 5))  # each mode is measured

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    pictures.measure_all(path, ["tiny-flux"], ["stressed"], tiny)
    again = read(path)
    assert list(map(key_of, again)) == list(map(key_of, rows)) and again[:-1] == rows[:-1]
    assert again[-1].error == rows[-1].error
    assert "100 %" in capsys.readouterr().out


@pytest.mark.parametrize(("quick", "states", "prompts"), [(True, 10, 256), (True, 10, 0), (False, 3, 16)])
def test_rows_of_another_extent_are_not_mixed_in(quick: bool, states: int, prompts: int, tmp_path: Path) -> None:
    path = tmp_path / "quality_pictures.csv"
    append(path, row(error=0.1, states=states, prompts=prompts))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=rf"rows of {states} steps and {prompts} prompts, not of .* another folder"):
        pictures.main(["--out", str(tmp_path), "--threads", "1", *["--quick"] * quick])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_ours_without_data_asks_for_none(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    monkeypatch.setitem(shipped.CALLS, "tiny-flux", {**shipped.CALLS["tiny-flux"], "num_inference_steps": 1})
    subject = picture_subjects.Subject("tiny-flux", False, Extent(prompts=2, steps=1))
    monkeypatch.setattr(subject, "calibration", lambda seed: pytest.fail("calibrated"))
    build = next(build for build in builds(picture_cells.QUICK, "tiny-flux", "plain") if build.method == FREE)
    found = list(pictures.Bench(subject, set()).rows(build))
    assert [(one.mode, one.psnr != "") for one in found] == [("a16", True), ("a8", False)]
    assert all(0 < one.error < 0.3 and one.bytes > 0 for one in found) and found[0].error != found[1].error


def test_a_peer_that_refuses_gives_a_row_that_says_so(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    peer = replace(picture_cells.PEERS[0], build=lambda linear: 1 / 0)
    subject = picture_subjects.Subject("tiny-flux", False, Extent(prompts=1, steps=1))
    found = list(pictures.Bench(subject, set()).rows(Build(peer.method, peer=peer)))
    assert [one.note for one in found] == ["ZeroDivisionError: division by zero"] and found[0].error == ""
    assert found[0].settings == peer.settings


def test_a_peer_that_refused_is_tried_again(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(linear: nn.Linear) -> nn.Module:
        raise ModuleNotFoundError("No module named 'sdnq'")
    monkeypatch.setattr(shipped, "WEIGHTS", weights)
    monkeypatch.setitem(shipped.CALLS, "tiny-flux", {**shipped.CALLS["tiny-flux"], "num_inference_steps": 1})
    path, tiny = tmp_path / "rows.csv", Extent(prompts=8, steps=1)
    for build in (refused, lambda linear: linear, refused):
        peer = replace(picture_cells.PEERS[0], build=build)
        build = Build(peer.method, modes={"a16": False}, peer=peer)
        monkeypatch.setattr(pictures, "builds", lambda *_, build=build: [build])
        pictures.measure_all(path, ["tiny-flux"], ["plain"], tiny)
    first, second = read(path)  # what was measured is not tried a third time
    assert "No module named 'sdnq'" in first.note and (first.error, second.error) == ("", 0)
    assert newest([first, second]) == [second]
