"""The script that checks everything on a GPU; in place of Python and compute-sanitizer, programs that tell what they
were asked for."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"
GPU = """case "$*" in
  *"-m benchmarks.gpu") echo "NVIDIA Fake (8.9), driver 1" ;;
  *"$FAILS"*) echo "python $*"; exit 3 ;;
  *) echo "python $* on $NUNCHAKU_PY_CUDA_TARGETS" ;;
esac"""
NO_GPU = "echo 'no GPU that torch can use' >&2; exit 1"
SANITIZER = 'echo "sanitizer $* caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"'

pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("timeout"), reason="no bash and coreutils")


class Answer:
    """What the script did; `more`: environment variables."""

    def __init__(self, folder: Path, steps: tuple[str, ...], python: str = GPU, sanitizer: str = "", **more: str
                 ) -> None:
        program(folder / "python", python)
        if sanitizer:
            program(folder / "bin/compute-sanitizer", sanitizer)
        done = subprocess.run(["bash", str(SCRIPT), str(folder / "out"), *steps], capture_output=True, text=True, env={
            **os.environ, "PYTHON": str(folder / "python"), "FAILS": "nothing", "CUDA_HOME": str(folder), **more})
        self.status, self.said, self.errors = done.returncode, done.stdout, done.stderr
        log = folder / "out/log.txt"
        self.log = log.read_text() if log.exists() else ""

    @property
    def begun(self) -> list[str]:
        return [line.split()[1] for line in self.log.splitlines() if line.startswith("== ") and "at most" in line]


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    answer = Answer(tmp_path, (), NO_GPU)
    assert answer.status == 1 and answer.said == answer.log == "no GPU that torch can use\n"


def test_all_steps_in_order_for_the_gpu_found(tmp_path: Path) -> None:
    answer = Answer(tmp_path, (), sanitizer=SANITIZER)
    assert answer.status == 0 and answer.log.startswith("NVIDIA Fake (8.9), driver 1\n")
    assert answer.begun == ["build", "info", "tests", "triton", "tune", "attention", "ops", "lora", "pipeline", "sdxl",
                            "quantize", "bench", "memcheck", "racecheck"]
    assert "setup.py -q build_ext --inplace on native" in answer.log
    assert f"nunchaku_py tune --rows 4608,4096,512 --seconds 100 --out {tmp_path / 'out/tuned.json'}" in answer.log
    for name in ("ops", "attention", "pipeline", "sdxl", "quantize"):
        assert f"--out {tmp_path / f'out/{name}.csv'}" in answer.log
    for tool in ("memcheck", "racecheck"):
        assert f"sanitizer --tool {tool} --error-exitcode 1 --target-processes all" in answer.log
    assert answer.log.count("caching off: 1") == 2


def test_every_step_is_in_one_of_the_calls_named_that_fit_their_time(tmp_path: Path) -> None:
    calls = re.findall(r"^#   benchmarks/gpu_check.sh \w+ ([\w ]+?)  ", SCRIPT.read_text(), re.MULTILINE)
    named = [call.split() for call in calls]
    answer = Answer(tmp_path, (), sanitizer=SANITIZER, SECONDS_IN_ALL="9999")
    told = re.findall(r"^== (\w+) \(at most (\d+) s\)", answer.log, re.MULTILINE)
    limits = {name: int(limit) for name, limit in told}
    assert len(named) == 5 and sorted(sum(named, [])) == sorted(answer.begun) == sorted(limits)
    assert all(sum(limits[name] for name in call) <= 570 for call in named)


def test_only_the_steps_named(tmp_path: Path) -> None:
    assert Answer(tmp_path, ("pipeline", "info")).begun == ["info", "pipeline"]
    wrong = Answer(tmp_path / "wrong", ("speed",))
    assert wrong.status == 2 and "unknown step: speed" in wrong.errors and not wrong.log


def test_what_follows_a_failure_runs_and_the_status_tells(tmp_path: Path) -> None:
    answer = Answer(tmp_path, ("tests", "ops"), FAILS="pytest")
    assert answer.status == 1 and answer.begun == ["tests", "ops"] and "exit status 3" in answer.log


def test_a_step_beyond_the_time_of_all_is_stopped_or_not_begun(tmp_path: Path) -> None:
    sleeping = GPU.replace("exit 3", "exec sleep 60")
    answer = Answer(tmp_path, ("tests", "ops"), sleeping, FAILS="pytest", SECONDS_IN_ALL="1")
    assert answer.status == 1 and "stopped at its limit" in answer.log
    assert "ops: not run, the 1 s of all steps are over" in answer.log


@pytest.mark.skipif(bool(shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")),
                    reason="compute-sanitizer is installed")
def test_a_missing_sanitizer_is_said(tmp_path: Path) -> None:
    answer = Answer(tmp_path, ("memcheck",))
    assert answer.status == 0 and "memcheck: skipped, compute-sanitizer is not installed" in answer.log
