"""`nunchaku-py bench`: who takes part, what is measured, written and said, and what happens when something fails."""
from __future__ import annotations

import base64
import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py import cli
from nunchaku_py.bench import contenders as sides
from nunchaku_py.bench import report, run
from nunchaku_py.bench.contenders import OVERHEAD, Contender, contenders, groups
from nunchaku_py.bench.held import held_bytes
from nunchaku_py.bench.job import DENSE, MEASURE, OURS, PROBE, Job
from nunchaku_py.bench.known import KNOWN
from nunchaku_py.bench.page import page
from nunchaku_py.bench.peers import PEERS
from nunchaku_py.bench.probe import chosen
from nunchaku_py.bench.process import Failed, Process, result_of, sentence_of
from nunchaku_py.bench.quick import CHOICES
from nunchaku_py.bench.random_models import meta_model, random_model
from nunchaku_py.bench.rows import Row
from nunchaku_py.bench.subject import subject_of
from tests.narrow import config_of
from tests.tiny_pipelines import flux_prompt

ROOT = Path(cli.__file__).parents[1]
QUICK = CHOICES["quick-int4"]
MISSING = [peer for peer in PEERS if peer.missing]


def narrow(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], config=config_of(name)))


def bench(out: Path, *argv: object) -> dict[str, dict[str, str]]:
    """Runs the command; contender → its row of the CSV."""
    assert cli.main(["bench", *map(str, argv), "--out", str(out), "--threads", "1"]) == 0
    with (out / report.TABLE).open(newline="") as file:
        return {f"{row['contender']} {row['mode']}".strip(): row for row in csv.DictReader(file)}


# ---------------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A run on the shipped pipeline, whose folder is not changed by tests."""
    out = tmp_path_factory.mktemp("bench") / "tiny"
    return out, bench(out, "tiny-flux", "--quick", "--no-peers", "--modes", "a8,a16", "--rounds", "2")


def test_a_pipeline_is_measured_in_16_bit_and_in_every_mode(tiny: tuple[Path, dict[str, dict[str, str]]]) -> None:
    out, rows = tiny
    assert list(rows) == [DENSE, f"{OURS} a8", f"{OURS} a16"]
    for row in rows.values():
        assert (row["width"], row["height"], row["steps"], row["rounds"]) == ("64", "64", "2", "2")
        assert 0 < float(row["step_low_s"]) <= float(row["step_s"]) <= float(row["step_high_s"])
        assert float(row["image_s"]) > 2 * float(row["step_low_s"]) and row["image_is"] == "measured"
        assert int(row["peak_bytes"]) > int(row["imports_bytes"]) > 1e8 > int(row["denoiser_bytes"]) > 1e6
        assert row["note"] == "" and "torch" in row["versions"] and row["device"]
    ours = rows[f"{OURS} a8"]
    assert float(ours["times_less"]) > 1.8 and ours["in_turns"] == "yes" and "linear_w4a8" in ours["backends"]
    assert float(rows[DENSE]["load_s"]) > 0 and ours["load_s"] == ""  # --quick writes no checkpoint
    assert sorted(path.name for path in out.iterdir()) == ["bench.png", "index.html", "table.csv"]


class Page(HTMLParser):
    """What a page would fetch, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_page_fetches_nothing_and_explains_every_column(tiny: tuple[Path, dict[str, dict[str, str]]]) -> None:
    text = (tiny[0] / report.PAGE).read_text(encoding="utf-8")
    made = Page(text)
    assert len(made.fetched) == 1 and made.fetched[0].startswith("data:image/png;base64,")
    assert base64.b64decode(made.fetched[0].partition(",")[2]) == (tiny[0] / report.PICTURE).read_bytes()
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)
    said = " ".join(made.said)
    for expected in ("Less is better", "Greater is better", "random", "less by", "peak memory", "How to read them",
                     "With nunchaku-py a8 the denoiser takes", "16 bit from the folder, else random",
                     "Nothing here says how good pictures are"):
        assert expected in said


def test_a_model_by_name_is_written_loaded_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture) -> None:
    narrow(monkeypatch, "qwen-image")
    rows = bench(tmp_path / "out", "qwen-image", "--width", "64", "--height", "128", "--rounds", "2", "--steps", "7")
    assert list(rows) == [DENSE, f"{OURS} a8", *(peer.label for peer in PEERS)]
    for label in (DENSE, f"{OURS} a8"):
        row = rows[label]
        assert float(row["load_s"]) > 0 and len(row["rounds_s"].split()) == 2
        assert row["weights"] == "random" and row["image_is"] == "computed" and row["text_tokens"] == "128"
        assert float(row["image_s"]) == pytest.approx(7 * float(row["step_s"]), rel=1e-4)
    for peer in MISSING:
        assert rows[peer.label]["note"] == "not installed" and rows[peer.label]["step_s"] == ""
    assert not list((tmp_path / "out").glob("checkpoints-*"))
    said = capsys.readouterr().out
    assert "round 2 of 2: 16 bit" in said and "checkpoint written" in said and "contender" in said


def test_16_bit_that_does_not_fit_is_said_and_its_memory_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    """Its step runs all the same, the blocks of a kind sharing one block's weights."""
    narrow(monkeypatch, "flux.1-dev")
    config = {**KNOWN["flux.1-dev"].config, "num_layers": 6, "num_single_layers": 6}
    monkeypatch.setitem(KNOWN, "flux.1-dev", replace(KNOWN["flux.1-dev"], config=config))
    real = result_of

    def tight(job: Job, wanted: str, told: Any) -> dict[str, Any]:
        known = real(job, wanted, told)
        return known | ({"memory_left": OVERHEAD + known["dense"] - 1} if job.task == PROBE else {})

    monkeypatch.setattr(run, "result_of", tight)
    rows = bench(tmp_path / "out", "flux.1-dev", "--quick", "--no-peers")
    dense, ours = rows[DENSE], rows[f"{OURS} a8"]
    whole = held_bytes(random_model(meta_model({"_class_name": KNOWN["flux.1-dev"].cls, **config}, ""), 1))
    assert dense["note"].startswith("does not fit") and dense["memory_is"] == "computed" and not dense["peak_bytes"]
    assert float(dense["step_s"]) > 0 and int(dense["denoiser_bytes"]) == pytest.approx(whole, rel=1e-3)
    assert float(ours["times_less"]) == pytest.approx(whole / int(ours["denoiser_bytes"]), rel=1e-3)
    assert ours["in_turns"] == "no"  # nor do both fit beside each other
    assert "~" in (tmp_path / "out" / report.PAGE).read_text(encoding="utf-8")


def test_a_quantized_pipeline_is_compared_with_random_16_bit(tmp_path: Path) -> None:
    pipe, _ = flux_prompt()
    nq.quantize(pipe, QUICK, progress=False)
    nq.save(pipe, tmp_path / "flux-int4")
    rows = bench(tmp_path / "out", tmp_path / "flux-int4", "--no-peers", "--width", "64", "--height", "64", "--steps",
                 "2", "--rounds", "1", "--no-load")
    assert float(rows[f"{OURS} a8"]["load_s"]) > 0 and rows[DENSE]["load_s"] == ""
    assert rows[DENSE]["weights"] == "4 bit from the folder, else random" and rows[f"{OURS} a8"]["format"] == ""


@pytest.mark.gpu
def test_memory_of_a_gpu_is_that_of_one_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, "flux.1-dev")
    rows = bench(tmp_path / "out", "flux.1-dev", "--quick", "--no-peers", "--device", "cuda", "--modes", "a4,a8,a16")
    for row in rows.values():
        assert float(row["step_s"]) > 0 and int(row["device_peak_bytes"]) > int(row["denoiser_bytes"])
    assert rows[DENSE]["device"] == torch.cuda.get_device_name()


# ------------------------------------------------------------------------------------------------------ who takes part
PROBED = {"memory_left": 10 * 10**9, "dense": 3 * 10**9, "quantized": 10**9, "shared": 5 * 10**8, "mode": "a8",
          "version": "0", "torch": "0"}
COMMON = Job(MEASURE, "", "", {}, 64, 64, "cpu", 1)


def by_label(left: float, modes: tuple[str, ...] = ("auto",), peers: bool = False) -> dict[str, Contender]:
    subject = subject_of("sdxl", "", None)
    found = contenders(subject, {**PROBED, "memory_left": int(left)}, COMMON, modes, peers)
    return {one.label: one for one in found}


def test_the_default_mode_is_measured_once() -> None:
    assert list(by_label(10e9, ("auto", "a8", "a16"))) == [DENSE, f"{OURS} a8", f"{OURS} a16"]


def test_what_does_not_fit_is_said() -> None:
    tight = by_label(3e9)
    assert tight[DENSE].job.share and tight[DENSE].computed == PROBED["dense"] and not tight[DENSE].out
    assert not tight[f"{OURS} a8"].out
    none = by_label(1.8e9)
    assert none[DENSE].out and none[f"{OURS} a8"].note == "does not fit: needs about 2.50 GB, 1.80 GB are free"


def test_peers_are_looked_for_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(PEERS[0], module="no_such_package.inside")
    monkeypatch.setattr(sides, "PEERS", (absent,))
    found = by_label(10e9, peers=True)
    assert found[absent.label].out and found[absent.label].note == "not installed"
    assert by_label(10e9).keys() == {DENSE, f"{OURS} a8"}


def test_as_many_as_fit_are_in_memory_at_once_beside_16_bit() -> None:
    modes = ("a4", "a8", "a16")

    def labels(left: float) -> list[list[str]]:
        return [[one.label.split()[-1] for one in group] for group in groups(list(by_label(left, modes).values()),
                                                                             int(left))]

    assert labels(20e9) == [["bit", "a4", "a8", "a16"]]
    assert labels(7.5e9) == [["bit", "a4"], ["bit", "a8"], ["bit", "a16"]]
    assert labels(5e9) == [["bit"], ["a4"], ["a8"], ["a16"]]
    assert labels(1e9) == []


# -------------------------------------------------------------------------------------------------------- what can fail
def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize(("error", "said"), [
    ("NunchakuError", "no room"), ("ModuleNotFoundError", "ModuleNotFoundError: no room"),
    ("MemoryError", "out of memory (no room)"), ("OutOfMemoryError", "out of memory (no room)")])
def test_what_a_contender_raises_is_its_answer(error: str, said: str) -> None:
    assert sentence_of({"what": "failed", "sentence": "no room", "error": error}) == said


def test_a_contender_that_is_killed_is_said_to_be() -> None:
    with Process(replace(COMMON, kind=DENSE, config=config_of("flux.1-dev")), quiet) as process:
        os.kill(process.child.pid, signal.SIGKILL)
        with pytest.raises(Failed, match="killed by the system, most likely for lack of memory"):
            process.answer("ready")
        with pytest.raises(Failed, match="killed by the system, most likely for lack of memory"):
            process.turn()


def test_a_contender_that_fails_leaves_the_others_alone() -> None:
    jobs = [replace(COMMON, kind=DENSE, config=config_of("flux.1-dev"), text=8),
            replace(COMMON, kind=OURS, mode="a8", config={"_class_name": "NoSuchModel"})]
    dense, broken = (Contender(job, "", 0, 0) for job in jobs)
    said: list[str] = []
    run.measure([dense, broken], 2, said.append)
    assert len(dense.steps) == 2 and not dense.out and dense.facts["peak_bytes"] > 0
    assert broken.out and "'NoSuchModel' is not one that diffusers" in broken.note and not broken.steps
    assert any(line.startswith(f"{OURS} a8: ") for line in said)


def test_interrupting_ends_everybody_and_leaves_nothing(tmp_path: Path) -> None:
    """While a checkpoint is being written."""
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-m", "nunchaku_py", "bench", "tiny-flux", "--out", str(out)], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith(f"{OURS}: "):
            break
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and errors == "nunchaku-py: interrupted; nothing was written\n"
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not out.exists()


def test_interrupting_after_a_round_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture) -> None:
    """16 bit and a8 are alone, as they do not fit beside each other; a8 is never reached."""
    def once(group: list[Contender], rounds: int, told: Any) -> None:
        if not group[0].is_dense:
            raise KeyboardInterrupt
        group[0].steps.append(2.0)
        group[0].facts.update(denoiser_bytes=8, load_s=None, imports_bytes=1, peak_bytes=2)

    monkeypatch.setattr(run, "measure", once)
    monkeypatch.setattr(run, "groups", lambda found, left: [[one] for one in found])
    out = tmp_path / "out"
    assert cli.main(["bench", "tiny-flux", "--quick", "--no-peers", "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert said.err == f"nunchaku-py: interrupted; what was measured by then is in {out}\n"
    assert f"{OURS} a8: {run.INTERRUPTED}" in said.out and (out / report.PAGE).exists()


@pytest.mark.parametrize(("argv", "said"), [
    (["no-such-model"], "no-such-model: neither a folder nor a model known by name; known are flux.1-dev, "),
    (["sdxl", "--width", "500"], "--width 500: images of SDXL have sides that are multiples of 8"),
    (["flux.1-dev", "--height", "1000"], "--height 1000: images of FLUX.1-dev have sides that are multiples of 16"),
    (["z-image", "--end-to-end"], "--end-to-end: what is beside the denoiser of Z-Image is not known; name the folder"),
    (["sdxl", "--device", "cuda:99"], "--device cuda:99: this PyTorch sees "),
    (["sdxl", "--rule", "*.ff"], "--rule: expected GLOB=CHOICE, got '*.ff'"),
])
def test_mistakes_are_sentences(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", *argv, "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"nunchaku-py: {said}") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_devices_that_are_none() -> None:
    with pytest.raises(nq.NunchakuError, match="--device tpu: expected auto, cpu, cuda or cuda:N"):
        chosen("tpu")


def test_models_quantized_by_others_and_models_without_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "quantization_config": '
                                          '{"quant_method": "bitsandbytes"}}')
    with pytest.raises(nq.NunchakuError, match="is quantized by 'bitsandbytes'"):
        subject_of(str(tmp_path), "", None)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    subject = subject_of(str(tmp_path), "", None)
    with pytest.raises(nq.NunchakuError, match="AutoencoderKL"):
        run.run_bench(subject, run.Options(), tmp_path, quiet)


def test_a_folder_comes_before_a_name_where_a_model_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl").mkdir()
    assert subject_of("SDXL", "", None).about == "SDXL"
    (tmp_path / "sdxl" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert subject_of("sdxl", "", None).dense == "sdxl"


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    said: list[str] = []
    found = list(by_label(10e9).values())
    run.write_checkpoints(found, tmp_path, said.append)
    assert len(said) == 2 and "3.15 GB of disk are needed, 1.00 MB are free" in said[0]
    assert not any(one.job.denoiser for one in found)


# --------------------------------------------------------------------------------------------------------- what is said
def row(**values: Any) -> Row:
    plain = dict(date="2026-01-01 00:00", subject="a <model>", weights="random", device="a device", cpu="a CPU",
                 threads=1, kernels="", versions="torch 0", width=64, height=64, text_tokens=8, batch=1, steps=4,
                 contender=DENSE, package="torch 0")
    return Row(**{**plain, **values})


def test_numbers_as_people_read_them() -> None:
    one = row(contender=OURS, mode="a8", denoiser_bytes=6_700_000_000, memory_is="measured", times_less=3.5)
    one.fill_times([2.0, 3.0, 4.0], [])
    one.fill_speedup([1.5], False)
    whole = row(text_s=1.0, decoder_s=2.0)
    whole.fill_times([2.0], [])
    assert whole.image_s == 4 * 2.0 + 1.0 + 2.0
    assert one.cells() == ["nunchaku-py a8", "6.70 GB", "3.50x", "3 s (2.5 s-3.5 s)", "~1.50x (1.50-1.50)", "~12 s",
                           "", ""]
    assert "a &lt;model&gt;" in page([row(), one], None) and "<model>" not in page([row(), one], None)


def test_without_pillow_everything_else_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "nunchaku_py.bench.picture", raising=False)
    said = list(report.write([row()], tmp_path))
    assert "it needs Pillow, pip install 'nunchaku-py[pipelines]'" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "table.csv"]
