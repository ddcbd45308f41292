"""Builds nunchaku_py._native from csrc/: the CPU part always, the CUDA part where it can be built and is wanted.

NUNCHAKU_PY_CUDA          auto  (default) with an nvcc of this machine; without one, where an NVIDIA driver is
                                installed, with nvcc from PyPI (a build requirement); otherwise, or if that fails,
                                the CPU part only
                          0     the CPU part only
                          1     the CUDA part, with nvcc from PyPI if need be, or an error
NUNCHAKU_PY_CUDA_TARGETS  compute capabilities to build for, "80;89", or native: the GPUs of this machine
                          (default: all of CUDA_TARGETS)
CUDA_HOME                 the CUDA toolkit to use, before the one in PATH
MAX_JOBS                  how many compilers run at once (default: one per CPU, within 8 GB of memory)

What was built, or why not, is printed (pip shows it with -v) and kept in the module: `python -m nunchaku_py.native`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
# Code for a whole generation lacks instructions that kernels are made of: wgmma, and products of NVFP4.
SPECIFIC = {"90": "90a", "120": "120f", "121": "120f"}
OLDEST_NVCC = (12, 9)
CUDA_TARGETS = ("75", "80", "86", "89", "90a", "100", "120f")
CUDA_SOURCES = (
    "csrc/cuda/device_info.cu",
    "csrc/cuda/linear_w4a8/expand.cu",
    *(f"csrc/cuda/{op}/{op}.cu" for op in ("linear_w4a16", "norm_modulate_quantize", "quantize_act")),
    *(f"csrc/cuda/{op}/{ending}.cu" for op in ("linear_w4a4", "linear_w4a8")
      for ending in (op, "gate_residual", "gelu_quantize", "glu_quantize", "qkv_rope")),
)
# A compiler of CUDA code takes up to 0.3 GB of memory: with so many at once the build stays within 8 GB.
MOST_JOBS = 24
CPU_SOURCES = ("csrc/module.cpp", *sorted(f"csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.cpp")))
# Contracted or reordered arithmetic would round otherwise than the references. Each instruction set's file switches
# it on by itself: nothing here may depend on the machine that builds.
CPU_OPTIONS = ("/O2",) if os.name == "nt" else ("-O3", "-ffp-contract=off", "-fno-strict-aliasing")
# One minor version, so that compiler, headers and runtime belong together, and any driver of CUDA 13 runs the result.
CUDA_PACKAGES = tuple(
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "cuda-cccl", "nvvm")
)


class CudaBuildError(Exception):
    """Why there is no CUDA part, in a sentence."""


# ---- what is wanted, what is there -----------------------------------------------------------------------------------


def cuda_switch() -> str:
    value = os.environ.get("NUNCHAKU_PY_CUDA") or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"NUNCHAKU_PY_CUDA: expected auto, 0 or 1, got {value!r}")
    return value


def cuda_targets(nvcc: str) -> tuple[str, ...]:
    """The targets to build for. What was asked for by name must be possible; of the default list, what nvcc knows."""
    if tuple(map(int, re.findall(r"\d+", nvcc_version(nvcc)) or [0])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CudaBuildError(f"{nvcc} is of CUDA {nvcc_version(nvcc)}, and {oldest} is the oldest that knows all "
                             "instructions")
    known = set(re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"])))
    asked = tuple(filter(None, re.split(r"[;, ]+", os.environ.get("NUNCHAKU_PY_CUDA_TARGETS", ""))))
    asked = native_targets() if asked == ("native",) else tuple(SPECIFIC.get(target, target) for target in asked)
    unknown = [target for target in asked or CUDA_TARGETS if target.rstrip("af") not in known]
    if asked and unknown:
        raise CudaBuildError(f"NUNCHAKU_PY_CUDA_TARGETS: {nvcc} cannot compile for {', '.join(unknown)}")
    if unknown:
        say(f"{nvcc} is too old or too new for {', '.join(unknown)}: left out")
    return asked or tuple(target for target in CUDA_TARGETS if target not in unknown)


def native_targets() -> tuple[str, ...]:
    """Those of this machine's GPUs: exactly them where there is more to a GPU than to its generation, from 9.0 on."""
    if not shutil.which("nvidia-smi"):
        raise CudaBuildError("NUNCHAKU_PY_CUDA_TARGETS=native: there is no nvidia-smi to ask for this machine's GPUs")
    listed = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    capabilities = sorted({(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", listed, re.M)})
    if not capabilities:
        raise CudaBuildError(f"NUNCHAKU_PY_CUDA_TARGETS=native: nvidia-smi lists no GPU, but says: {listed}")
    return tuple(f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in capabilities)


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, of the usual place, or of the PyPI packages, in this order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += map(Path, filter(None, os.environ.get("PATH", "").split(os.pathsep)))
    folders += [Path("/usr/local/cuda/bin")]
    folders += [Path(entry) / "nvidia/cu13/bin" for entry in sys.path if entry]
    found = (shutil.which("nvcc", path=str(folder)) for folder in folders)
    return next(filter(None, found), None)


def has_nvidia_driver() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()


def cuda_requirements() -> list[str]:
    """The PyPI packages that this build needs for CUDA; none where nvcc is there or CUDA is not wanted."""
    wanted = cuda_switch() == "1" or cuda_switch() == "auto" and has_nvidia_driver()
    return list(CUDA_PACKAGES) if wanted and not find_nvcc() else []


# ---- compiling -------------------------------------------------------------------------------------------------------


def say(sentence: str) -> None:
    print(f"nunchaku-py: {sentence}", file=sys.stderr, flush=True)


def run(command: list[str], show: bool = False) -> str:
    """The command's output, stderr included, also shown as it comes; if it fails a CudaBuildError with its errors, or
    else with its end."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as process:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if show:
                say(lines[-1])
    if process.returncode:
        errors = [line for line in lines if re.search(r"\berror\b", line, re.I)] or lines[-4:]
        raise CudaBuildError(f"`{' '.join(command)}` failed: {' | '.join(errors[:4])}")
    return "\n".join(lines)


def nvcc_command(nvcc: str, source: str, output: str, targets: tuple[str, ...], threads: int = 0) -> list[str]:
    host = ["/MD", "/EHsc"] if os.name == "nt" else ["-fPIC", "-fvisibility=hidden"]
    return [
        *(nvcc, "-c", source, "-o", output, f"-I{ROOT / 'csrc'}", f"--threads={threads}"),
        *("-std=c++20", "-O3", "-fmad=false"),  # kernels write fmaf where they mean it: hosts round the same then
        *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets),
        *(part for option in host for part in ("-Xcompiler", option)),
    ]


def cudart_static_folder(nvcc: str) -> Path:
    # Asked of nvcc itself, because the nvcc in PATH can be a script that calls the real one elsewhere.
    dryrun = run([nvcc, "--dryrun", "-c", str(ROOT / CUDA_SOURCES[0])])
    top = re.search(r"^#\$ TOP=(.+?)\s*$", dryrun, re.M)
    top = Path(top[1]) if top else Path(nvcc).resolve().parent.parent
    for folder in (top / "lib64", top / "lib", top / "lib/x64"):
        if any(folder.glob("*cudart_static.*")):
            return folder
    raise CudaBuildError(f"no static CUDA runtime library under {top}")


def find_ninja() -> str:
    """Of the PyPI package, which pip installs for the build, or of PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise CudaBuildError("no ninja was found (in PATH, or as the package of that name from PyPI)")
    return found


def build_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or 0) or min(os.cpu_count() or 1, MOST_JOBS)


def ninja_file(nvcc: str, targets: tuple[str, ...]) -> str:
    """What ninja is to do: an object for each file, made anew when the command or a file that it read has changed."""
    def escaped(text: str) -> str:
        return re.sub(r"([$ :])", r"$\1", text)

    threads = max(1, build_jobs() // len(CUDA_SOURCES))
    command = subprocess.list2cmdline(nvcc_command(nvcc, "IN", "OUT", targets, threads)).replace("$", "$$")
    rule = command.replace("IN", "$in", 1).replace("OUT", "$out", 1)
    lines = ["rule nvcc", f"  command = {rule} -MMD -MF $out.d", "  depfile = $out.d", "  deps = gcc",
             "  description = compiling $out for " + ", ".join(targets)]
    for source in CUDA_SOURCES:
        lines.append(f"build {object_name(source)}: nvcc {escaped(str(ROOT / source))}")
    return "\n".join(lines) + "\n"


def object_name(source: str) -> str:
    op, name = Path(source).parent.name, Path(source).stem
    return (name if name == op else f"{op}-{name}") + (".obj" if os.name == "nt" else ".o")


def compile_cuda(nvcc: str, targets: tuple[str, ...], folder: Path) -> list[Path]:
    """One object per file of CUDA_SOURCES, for all of the targets. Compilers and sets of targets have a folder each."""
    folder = folder / "-".join(("cuda", nvcc_version(nvcc), *targets))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(nvcc, targets), encoding="utf-8")
    run([find_ninja(), "-C", str(folder), "-j", str(build_jobs())], show=True)
    return [folder / object_name(source) for source in CUDA_SOURCES]


def nvcc_version(nvcc: str) -> str:
    version = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
    return version[1] if version else "of unknown version"


def build_cuda(extension, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Adds the CUDA part to the extension. Returns the status sentence and the targets."""
    if cuda_switch() == "0":
        raise CudaBuildError("switched off by NUNCHAKU_PY_CUDA=0")
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaBuildError(
            "no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda, PyPI packages); NUNCHAKU_PY_CUDA=1 makes pip fetch"
            " one from PyPI, but with --no-build-isolation nvidia-cuda-nvcc and nvidia-cuda-cccl 13.0 must be installed"
        )
    targets = cuda_targets(nvcc)
    libraries = cudart_static_folder(nvcc)
    extension.extra_objects += map(str, compile_cuda(nvcc, targets, folder))
    extension.library_dirs.append(str(libraries))
    extension.libraries += ["cudart_static"] if os.name == "nt" else ["cudart_static", "dl", "rt", "pthread"]
    extension.define_macros.append(("NUNCHAKU_PY_WITH_CUDA", "1"))
    return f"built by nvcc {nvcc_version(nvcc)}", targets


def build_info(cuda_status: str, targets: tuple[str, ...]) -> str:
    def quoted(text: str) -> str:  # a JSON string of plain ASCII is a C string too
        return json.dumps(text.encode("ascii", "replace").decode())

    return (
        f"#define NUNCHAKU_PY_CUDA_STATUS {quoted(cuda_status)}\n"
        f"#define NUNCHAKU_PY_CUDA_TARGETS {quoted(';'.join(targets))}\n"
    )


def native_build() -> dict:
    """ext_modules and cmdclass. Only a build needs pybind11; tests import this file for its other parts."""
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext

    class BuildNative(build_ext):
        def build_extension(self, ext) -> None:
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                status, targets = build_cuda(ext, ROOT / "build/cuda")
            except CudaBuildError as error:
                if cuda_switch() == "1":
                    raise SystemExit(f"nunchaku-py: NUNCHAKU_PY_CUDA=1, but {error}") from None
                status, targets = f"not built: {error}", ()
            info, text = folder / "build_info.h", build_info(status, targets)
            if not info.exists() or info.read_text() != text:
                info.write_text(text)
            ext.include_dirs.append(str(folder))
            ext.depends += [str(info), *ext.extra_objects]  # else other switches would leave the module as it is
            say(f"CUDA part {status}" + (f", for targets {', '.join(targets)}" if targets else "; CPU part only"))
            try:
                super().build_extension(ext)
            except Exception as error:
                say(f"the native module could not be compiled: {error}")
                raise

    ParallelCompile("MAX_JOBS", default=0).install()
    extension = Pybind11Extension("nunchaku_py._native", list(CPU_SOURCES), include_dirs=["csrc"], cxx_std=20)
    extension.extra_compile_args += CPU_OPTIONS
    extension.libraries += ["dl", "pthread"] if sys.platform == "linux" else []
    # Without a C++ compiler the package still installs: plain PyTorch and Triton serve, and native.status() says so.
    extension.optional = cuda_switch() != "1"
    extension.depends = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


if __name__ == "__main__":
    packages = find_namespace_packages(  # the shipped weights are nunchaku_py.demo's data, not packages of their own
        include=["nunchaku_py", "nunchaku_py.*"], exclude=["*.__pycache__", "nunchaku_py.demo.weights*"])
    kernels = ["nunchaku_py.kernels"] + [
        f"nunchaku_py.kernels.{name}" for name in find_namespace_packages("kernels", exclude=["*__pycache__"])
    ]
    setup(
        packages=packages + kernels,
        package_dir={"nunchaku_py.kernels": "kernels"},
        setup_requires=cuda_requirements(),
        **native_build(),
    )
