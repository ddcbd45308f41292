"""The demonstration end to end, on pipelines of random weights: everything is written, and mistakes are sentences."""

import csv
import re
import sys
from pathlib import Path

import pytest
import torch

from nunchaku_py import cli
from nunchaku_py.demo import run, scenes, shipped

pytestmark = pytest.mark.usefixtures("stand_in")
COLUMNS = 7  # 16 bit, rounding to both formats in a4, SVDQuant in both formats and two modes


@pytest.fixture
def one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RECIPES", {"svdquant-int4": ("a8",)})


def test_everything_is_written(tmp_path: Path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "DIFFER" not in said and "equals the saved one bit for bit" in said and said.count("SVDQuant INT4") == 2
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COLUMNS and rows[0]["recipe"] == ""
    assert all(0 < float(row["error"]) < 1 and 0 < float(row["psnr_db"]) < 100 for row in rows[1:])
    assert all(int(row[name]) < int(rows[0][name]) for row in rows[1:] for name in ("memory_bytes", "disk_bytes"))
    assert (out / "sheet.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "index.html").read_text()
    assert page.count("<img ") == COLUMNS * run.QUICK.shown
    assert {source[:22] for source in re.findall(r'src="([^"]*)"', page)} == {"data:image/png;base64,"}
    assert not re.search(r"https?:|<script|<link|@import|url\(", page), "the page fetches something"


def test_the_other_pipeline(one_variant, tmp_path: Path, capsys):
    assert cli.main(["demo", "--model", "tiny-sdxl", "--quick", "--out", str(tmp_path / "demo")]) == 0
    assert "StableDiffusionXLPipeline" in capsys.readouterr().out
    assert (tmp_path / "demo/svdquant-int4/unet/config.json").exists()


def test_the_same_seed_gives_the_same_pictures(one_variant, tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert cli.main(["demo", "--quick", "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
    one, two, other = (re.findall(r'src="([^"]*)"', (tmp_path / name / "index.html").read_text())
                       for name in ("one", "two", "other"))
    assert one == two != other


def test_its_checkpoints_can_be_used(one_variant, tmp_path: Path):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    made = tmp_path / "circle.png"
    assert cli.main(["generate", str(tmp_path / "svdquant-int4"), "--prompt", "a red circle", "--steps", "1", "--out",
                     str(made)]) == 0
    from PIL import Image

    assert Image.open(made).size == (64, 64)  # as the shipped pipeline is called, not FLUX's 1024


def test_a_model_that_differs_after_reloading_is_an_error(one_variant, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run, "same_bits", lambda *args: False)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "RELOADED MODELS DIFFER: svdquant-int4 in a4, svdquant-int4 in a8, svdquant-int4 in a16" in said


def test_interrupted(one_variant, tmp_path: Path, monkeypatch, capsys):
    def interrupted(*args: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "paint", interrupted)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "nunchaku-py: interrupted\n"


def test_mistakes_are_sentences(tmp_path: Path, stand_in: Path, monkeypatch, capsys):
    assert cli.main(["demo", "--quick", "--out", "/proc/nowhere/demo"]) == 1
    assert "/proc/nowhere/demo: cannot be written" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(shipped, "WEIGHTS", tmp_path)
        assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
        assert "the shipped weights are missing; reinstall nunchaku-py" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "needs Pillow: pip install 'nunchaku-py[pipelines]'" in capsys.readouterr().err


def test_calibration_sees_nothing_of_what_is_painted(monkeypatch):
    asked = []

    def capture(pipe, model, prompts, states, *, seed, **call):
        asked.append((prompts, range(seed, seed + len(prompts))))
        return []

    monkeypatch.setattr(run, "capture_states", capture)
    monkeypatch.setattr(run, "outputs", lambda model, states: None)
    subject = run._subject("tiny-flux", 3, run.FULL)
    (known, noise), (probes, _) = asked
    assert len(known) == run.FULL.calibration and probes == subject.prompts[:run.FULL.probes]
    assert not set(noise) & set(range(3, 3 + len(subject.prompts)))
    assert not any((thing.colour, thing.shape) in scenes.HELD_OUT
                   for caption in known for thing in scenes.read(caption).things)


def test_captions():
    painted, known = (run.captions(40, 0, held_out) for held_out in (True, False))
    assert painted == run.captions(40, 0, True) != run.captions(40, 1, True)
    for captions, expected in ((painted, True), (known, False)):
        for caption in captions:
            pairs = {(thing.colour, thing.shape) for thing in scenes.read(caption).things}
            assert bool(pairs & scenes.HELD_OUT) == expected, caption
