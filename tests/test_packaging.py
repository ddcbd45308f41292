"""The package installed three ways, kernels/ in each beside Hugging Face's package `kernels`; and the CUDA build."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_native*.so", "_native*.pyd",
                                    "outputs", "nunchaku_py_demo")
# What is no Python and has to be installed: a checkpoint stands for all of demo/weights, whatever is shipped there.
WEIGHTS = ("nunchaku_py/demo/weights/probe/unet/model.safetensors", "nunchaku_py/demo/checker.safetensors")


def load_setup():
    """setup.py as a module (it calls setup() only when run)."""
    spec = importlib.util.spec_from_file_location("nunchaku_py_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_setup()
needs_nvcc = pytest.mark.skipif(builder.find_nvcc() is None, reason="no nvcc on this machine")


# ---- kernels/ three ways ---------------------------------------------------------------------------------------------


def python(environment: Path, code: str, folder: Path) -> list[str]:
    """The lines that `python -c code` prints, run in that environment and folder."""
    done = subprocess.run([environment / "bin/python", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def pip(environment: Path, *arguments: str, **variables: str) -> str:
    """pip without network, run in that environment; its output."""
    command = [environment / "bin/python", "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty virtual environment that sees this one's packages, but not its editable install of ours."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    # A folder named in a .pth file joins sys.path, its own .pth files (the editable installs) do not run.
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "venv"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree with one more kernel file, so that the test needs no particular kernel."""
    copy = tmp_path_factory.mktemp("copy") / "source"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    (copy / "kernels/probe.py").write_text("HERE = __file__\n")
    (copy / WEIGHTS[0]).parent.mkdir(parents=True)
    (copy / WEIGHTS[0]).write_bytes(b"probe")
    return copy


PROBE = """
import importlib.util, sys
import nunchaku_py, nunchaku_py.kernels.probe
print(nunchaku_py.kernels.probe.HERE)
print(importlib.util.find_spec("kernels").origin)
from kernels import get_kernel
"""
INSTALL = ("install", "--no-index", "--no-deps", "--no-build-isolation", "--verbose")


def hugging_face_kernels() -> str:
    return str(Path(sysconfig.get_path("purelib")) / "kernels/__init__.py")


def test_kernels_in_source_tree(environment: Path, source: Path) -> None:
    # The current folder comes first in sys.path here, and still the installed package is found: a folder without
    # __init__.py is taken as a package only if no real one of that name exists anywhere on the path.
    assert python(environment, PROBE, source) == [str(source / "kernels/probe.py"), hugging_face_kernels()]


def test_kernels_in_editable_install_without_a_compiler(environment: Path, source: Path, tmp_path: Path) -> None:
    said = pip(environment, *INSTALL, "--editable", str(source), CC="false", CXX="false", NUNCHAKU_PY_CUDA="0")
    assert "nunchaku-py: the native module could not be compiled" in said
    assert python(environment, PROBE, tmp_path) == [str(source / "kernels/probe.py"), hugging_face_kernels()]
    status = python(environment, "from nunchaku_py import native; print(native.status())", tmp_path)
    assert status == [
        "native module: absent, it was not built at installation, and `pip install -v` says why; "
        "plain PyTorch and Triton serve instead"
    ]


def test_kernels_in_wheel(environment: Path, source: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    said = pip(environment, "wheel", *INSTALL[1:], "-w", str(wheels), str(source), NUNCHAKU_PY_CUDA="0")
    assert "nunchaku-py: CUDA part not built: switched off by NUNCHAKU_PY_CUDA=0; CPU part only" in said
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"nunchaku_py"}
    assert "nunchaku_py/kernels/probe.py" in names and "nunchaku_py/kernels/__init__.py" not in names
    assert set(WEIGHTS) <= set(names)

    pip(environment, *INSTALL[:3], str(wheel))
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    found = python(environment, PROBE, tmp_path)
    assert found == [str(packages / "nunchaku_py/kernels/probe.py"), hugging_face_kernels()]
    status = python(environment, "from nunchaku_py import native; print(native.status())", tmp_path)
    assert status[0].startswith("native module: CPU part built by ")
    assert status[0].endswith("; CUDA part not built: switched off by NUNCHAKU_PY_CUDA=0")


def test_source_archive_has_what_is_built_installed_and_tested(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True,
                          env=os.environ | {"NUNCHAKU_PY_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # tests/benchmarks imports benchmarks
    assert {*WEIGHTS, "csrc/module.cpp", "kernels/probe.py", "tests/conftest.py", "benchmarks/machine.py"} <= names


def test_import_is_silent() -> None:
    done = subprocess.run([sys.executable, "-c", "import nunchaku_py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- the CUDA build --------------------------------------------------------------------------------------------------


@needs_nvcc
def test_cuda_sources_compile_for_every_target() -> None:
    folder = ROOT / "build/cuda"  # where an installation from here has compiled them already
    objects = builder.compile_cuda(builder.find_nvcc(), builder.CUDA_TARGETS, folder)
    assert len(objects) == len(builder.CUDA_SOURCES)
    # A second build with the same sources and flags compiles nothing again.
    times = [item.stat().st_mtime_ns for item in objects]
    again = builder.compile_cuda(builder.find_nvcc(), builder.CUDA_TARGETS, folder)
    assert (again, [item.stat().st_mtime_ns for item in again]) == (objects, times)


@needs_nvcc
def test_what_includes_a_changed_header_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"a.cu": '#include "a.h"\nint a() { return A; }\n', "a.h": "#define A 1\n", "b.cu": ""}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(builder, "CUDA_SOURCES", (str(tmp_path / "a.cu"), str(tmp_path / "b.cu")))

    def times() -> list[int]:
        objects = builder.compile_cuda(builder.find_nvcc(), ("80",), tmp_path / "objects of this")
        return [item.stat().st_mtime_ns for item in objects]

    first = times()
    assert times() == first
    (tmp_path / "a.h").write_text("#define A 2\n")
    changed, same = (new != old for new, old in zip(times(), first, strict=True))
    assert changed and not same


def test_without_ninja_the_reason_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(builder.CudaBuildError, match="no ninja was found"):
        builder.find_ninja()


def test_the_build_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert builder.build_jobs() == builder.MOST_JOBS
    monkeypatch.setenv("MAX_JOBS", "3")
    assert builder.build_jobs() == 3


@needs_nvcc
def test_broken_cuda_source_is_an_error_with_the_compilers_words(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("int f() { return misspelt; }\n")
    source, output = (str(tmp_path / f"broken{suffix}") for suffix in (".cu", ".o"))
    command = builder.nvcc_command(builder.find_nvcc(), source, output, ("80",))
    with pytest.raises(builder.CudaBuildError, match=r'failed: .*"misspelt" is undefined'):
        builder.run(command)


@needs_nvcc
def test_targets_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = builder.find_nvcc()
    assert builder.cuda_targets(nvcc) == builder.CUDA_TARGETS
    monkeypatch.setenv("NUNCHAKU_PY_CUDA_TARGETS", "80; 90a")
    assert builder.cuda_targets(nvcc) == ("80", "90a")
    monkeypatch.setenv("NUNCHAKU_PY_CUDA_TARGETS", "90;120")  # which would lack wgmma, and products of NVFP4
    assert builder.cuda_targets(nvcc) == ("90a", "120f")
    monkeypatch.setenv("NUNCHAKU_PY_CUDA_TARGETS", "80;35")
    with pytest.raises(builder.CudaBuildError, match="cannot compile for 35"):
        builder.cuda_targets(nvcc)


@needs_nvcc
def test_an_old_nvcc_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "nvcc_version", lambda nvcc: "12.8")
    with pytest.raises(builder.CudaBuildError, match="is of CUDA 12.8, and 12.9 is the oldest"):
        builder.cuda_targets(builder.find_nvcc())


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, says: str) -> None:
    """First in PATH, a program of this name that says this."""
    if os.name == "nt":
        pytest.skip("it is a shell script")
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("listed", "targets"), [("8.9\n8.9", ("89",)), ("12.0\n8.6", ("86", "120a")), ("9.0", ("90a",))]
)
def test_native_targets_are_those_of_this_machines_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, targets: tuple[str, ...]
) -> None:
    nvidia_smi(monkeypatch, tmp_path, listed)
    assert builder.native_targets() == targets


def test_native_targets_without_a_gpu_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(monkeypatch, tmp_path, "No devices were found")
    with pytest.raises(builder.CudaBuildError, match="lists no GPU, but says: No devices were found"):
        builder.native_targets()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(builder.CudaBuildError, match="there is no nvidia-smi to ask"):
        builder.native_targets()


@pytest.mark.parametrize(
    ("switch", "nvcc", "driver", "fetched"),
    [
        ("auto", None, False, False),
        ("auto", None, True, True),
        ("auto", "nvcc", True, False),
        ("1", None, False, True),
        ("1", "nvcc", False, False),
        ("0", None, True, False),
    ],
)
def test_nvcc_is_a_requirement_only_where_wanted_and_missing(
    monkeypatch: pytest.MonkeyPatch, switch: str, nvcc: str | None, driver: bool, fetched: bool
) -> None:
    monkeypatch.setenv("NUNCHAKU_PY_CUDA", switch)
    monkeypatch.setattr(builder, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(builder, "has_nvidia_driver", lambda: driver)
    assert builder.cuda_requirements() == (list(builder.CUDA_PACKAGES) if fetched else [])


def test_without_nvcc_the_reason_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builder, "find_nvcc", lambda: None)
    monkeypatch.delenv("NUNCHAKU_PY_CUDA", raising=False)
    with pytest.raises(builder.CudaBuildError, match="no nvcc was found"):
        builder.build_cuda(None, tmp_path)


def test_unknown_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUNCHAKU_PY_CUDA", "yes")
    with pytest.raises(SystemExit, match="NUNCHAKU_PY_CUDA: expected auto, 0 or 1, got 'yes'"):
        builder.cuda_switch()


@pytest.mark.slow
def test_nvcc_from_pypi_builds_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(Path(sys.prefix), "install", "--no-deps", "--target", str(tmp_path / "packages"), *builder.CUDA_PACKAGES)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "packages/nvidia/cu13"))
    nvcc = builder.find_nvcc()
    assert nvcc.startswith(str(tmp_path))
    assert builder.compile_cuda(nvcc, builder.cuda_targets(nvcc), tmp_path / "objects")
    assert builder.cudart_static_folder(nvcc).is_relative_to(tmp_path)
