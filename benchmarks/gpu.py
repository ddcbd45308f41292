"""What every row measured on a GPU says of where and with what; `python -m benchmarks.gpu` prints it in one line."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache

import torch

from benchmarks.machine import output, setup_module
from benchmarks.machine import provenance as of_the_code
from nunchaku_py.bench.machine import cpu_name, installed

NO_GPU = "no GPU that torch can use"
# What torch calls a GPU → dense INT8 TOPS by its datasheet, at boost clock. Others are left open, not guessed.
INT8_PEAK = {"NVIDIA H100 80GB HBM3": 1979.0, "NVIDIA H200": 1979.0, "NVIDIA H100 PCIe": 1513.0,
             "NVIDIA A100-SXM4-80GB": 624.0, "NVIDIA GeForce RTX 4090": 660.6}


@dataclass
class GpuRow:
    """The columns that rows of GPUs begin with. `cuda` is torch's own, `nvcc` the compiler found on this machine."""

    date: str
    commit: str
    device: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    nvcc: str
    diffusers: str

    def line(self) -> str:
        """What is this row's alone, for people: without every single round."""
        known = {"rounds_ms", *(field.name for field in fields(GpuRow))}
        return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in asdict(self).items() if name not in known and value != "")


def provenance(device: str = "cuda") -> dict[str, str]:
    """The columns of GpuRow. Of the CPU, where a benchmark of GPUs has a dry run: its name, and no driver."""
    code = of_the_code()
    on_gpu = torch.device(device).type == "cuda"
    return {"date": code["date"], "commit": code["commit"], "torch": code["torch"],
            "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if on_gpu else "",
            "driver": driver() if on_gpu else "", "cuda": torch.version.cuda or "none", "nvcc": nvcc(),
            "triton": installed("triton"), "diffusers": installed("diffusers")}


@cache
def driver() -> str:
    """The version of NVIDIA's driver."""
    said = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else "unknown"


@cache
def nvcc() -> str:
    """The version of the nvcc that setup.py builds with, or "none"."""
    try:
        found = setup_module().find_nvcc()
    except ImportError:  # setuptools: rows of what is built elsewhere need none
        return "unknown"
    return version_in(output(found, "--version")) if found else "none"


def version_in(said: str) -> str:
    """13.0.88 in what `nvcc --version` says."""
    match = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    return match.group(1) if match else "unknown"


def headline(columns: dict[str, str]) -> str:
    """The columns of a row in one line."""
    names: Sequence[str] = ("driver", "torch", "cuda", "triton", "nvcc", "diffusers", "commit", "date")
    device = f"{columns['device']} ({columns['capability']})"
    return ", ".join([device, *(f"{name} {columns[name]}" for name in names)])


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    print(headline(provenance()))


if __name__ == "__main__":
    main()
