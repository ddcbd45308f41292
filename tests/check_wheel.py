"""Installs a wheel into an empty virtual environment, as a user would, and uses it there.

    python tests/check_wheel.py dist/nunchaku_py-….whl [-c constraints.txt]

What the wheel needs comes from PyPI. Ends with a sentence where something is wrong.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import venv
from pathlib import Path

USE = """
import torch, nunchaku_py as nq
from nunchaku_py import native
from diffusers import FluxTransformer2DModel

assert "site-packages" in nq.__file__, nq.__file__
torch.manual_seed(0)
model = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32,
                               num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
                               guidance_embeds=False, axes_dims_rope=(8, 12, 12)).bfloat16().eval()
inputs = dict(hidden_states=torch.randn(1, 16, 16).bfloat16(), encoder_hidden_states=torch.randn(1, 8, 64).bfloat16(),
              pooled_projections=torch.randn(1, 32).bfloat16(), timestep=torch.ones(1).bfloat16(),
              img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3))
with torch.no_grad():
    exact = model(**inputs)[0].float()
    nq.quantize(model, "svdquant-int4", rank=16, progress=False)
    off = (model(**inputs)[0].float() - exact).norm() / exact.norm()
assert off < 0.5, off
print(f"a quantized model ran, {100 * off:.1f} % from bf16")
print("CUDA targets:", ", ".join(native.cuda_targets()) or "none")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("-c", "--constraints", type=Path, help="versions to install, instead of the newest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(arguments.wheel.resolve(), arguments.constraints and arguments.constraints.resolve(), Path(folder))


def check(wheel: Path, constraints: Path | None, folder: Path) -> None:
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    environment = folder / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    pins = ["-c", str(constraints)] if constraints else []
    pip = (environment / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(folder, *pip, *pins, str(wheel))
    print(run(folder, environment / "bin/nunchaku-py", "info"))
    print(run(folder, environment / "bin/python", "-W", "ignore", "-c", USE))


def run(folder: Path, *command: str | Path) -> str:
    """The command's output, run where no source tree is near."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"`{' '.join(map(str, command[:4]))} …` failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
