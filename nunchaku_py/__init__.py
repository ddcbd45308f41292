"""4-bit diffusion models (SVDQuant) with their LoRAs, as a drop-in for diffusers."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# A wheel carries kernels/ as nunchaku_py/kernels. In a source tree or an editable install that folder stands beside
# this package instead; with its parent on our path `import nunchaku_py.kernels` finds it there. Appended, so names
# inside the package come first; that nunchaku_py.tests resolves in a checkout as well is harmless: nothing imports it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))
del _here, _Path

# Public names come below (lazily: importing this package stays silent and cheap).
