"""The native module that this environment was installed with."""

import platform
import shutil
from pathlib import Path

import pytest

from nunchaku_py import native

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler, so no native module")
def test_module_is_there_and_says_what_it_was_built_with() -> None:
    assert native.module is not None, native.status()
    assert native.status().startswith("native module: CPU part built by ")
    assert bool(native.cuda_targets()) == ("CUDA part built by nvcc" in native.status())


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="compares with x86 Linux's own list")
@pytest.mark.skipif(native.module is None, reason="no native module")
def test_cpu_features_agree_with_the_kernel() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split(":")[1].split()
    features = native.cpu_features()
    assert {"avx2", "avx512_vnni", "amx_int8"} <= set(features)
    for name, state in features.items():
        assert (state == "yes") == (name in flags), (name, state)


def test_gpus_are_listed_or_their_absence_has_a_reason() -> None:
    try:
        devices = native.cuda_devices()
    except RuntimeError as error:
        assert str(error).startswith(("no usable GPU: ", "no GPU can be looked at: "))
    else:
        assert all(device["target"] or device["problem"] for device in devices)


@pytest.mark.gpu
@pytest.mark.skipif(not native.cuda_targets(), reason="no CUDA part")
def test_a_compiled_target_runs_on_each_gpu() -> None:
    for device in native.cuda_devices():
        assert device["target"] // 10 == device["capability"][0], device


def test_report_has_a_line_each(capsys: pytest.CaptureFixture) -> None:
    lines = native.report()
    beginnings = ["native", "CPU", "CPU", "GPU"] if native.module else ["native", "CPU", "GPU"]
    assert [line.split(":")[0].split(" ")[0] for line in lines[:len(beginnings)]] == beginnings
