"""What `tune` measures: the launches of the quantized linears of checkpoints, known from their headers, and of their
attention, known from their configuration; or FLUX.1's."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.headers import Header, read_header
from ..errors import NunchakuError
from ..folders import read_json
from .sources import check_there, quantization_of
from .stored_sites import OURS, config_in, merged, stored_sites

if TYPE_CHECKING:  # both import torch, which `--help` does without
    import torch

    from ..ops import ActSpec
    from ..site import Site

FORMATS = {"int4": 64, "nvfp4": 16}
RANK = 32
# N, K of FLUX.1's linears, as diffusers names them; the last two are products that other engines make of several.
FLUX = {"attn.to_q": (3072, 3072), "proj_mlp": (12288, 3072), "ff.net.0.proj": (12288, 3072),
        "ff.net.2": (3072, 12288), "proj_out.parts.0": (3072, 3072), "proj_out.parts.1": (3072, 12288),
        "norm1.linear": (18432, 3072), "norm.linear": (9216, 3072), "qkv": (9216, 3072), "single": (3072, 15360)}
HEADS_OF = (64, 128)  # channels, that the kernels take
LEAST_TOKENS = 256  # below, attention is no matter of time
SAMPLES = (1, 2)  # of a call: with guidance two
WEIGHT_ONLY_ROWS = 1  # of modulation: one a sample
# By their names: what reads the output of a norm, which is quantized as it is made; and the first linears of
# feed-forwards, whose ending quantizes for the second.
NORMED = ("*to_q", "*add_q_proj", "*net.0.proj", "*linear_in")
FIRST = {"net.0.proj": "net.2", "proj_mlp": "proj_out", "linear_in": "linear_out"}


class Linear(NamedTuple):
    """A quantized linear. dtype: what its model computes in."""

    name: str
    site: Site
    n: int
    k: int
    dtype: str = "bfloat16"


class Attention(NamedTuple):
    """Of all tokens to all, heads of dim channels."""

    heads: int
    dim: int
    dtype: str = "bfloat16"


class Request(NamedTuple):
    """A family of kernels/tuning_cases.py and its arguments."""

    family: str
    args: tuple[Any, ...]


# -------------------------------------------------------------------------------------------------------- which linears
def flux_linears() -> list[Linear]:
    from ..site import Site

    def site(name: str, format: str) -> Site:
        if name.endswith("norm.linear") or "norm1" in name:
            return Site("w4a16", "int4", 64)
        after_gelu = format == "int4" and name in ("ff.net.2", "proj_out.parts.1")
        return Site("w4a4", format, FORMATS[format], RANK, 0.171875 if after_gelu else 0.0, after_gelu)

    return [Linear(name, site(name, format), n, k) for format in FORMATS for name, (n, k) in FLUX.items()]


def stored_linears(path: Path) -> list[Linear]:
    """Of a model, a pipeline or a file; only headers are read."""
    check_there(path)
    found = [linear for label, config, header in _models(path) for linear in _linears(label, config, header)]
    if not found:
        raise NunchakuError(f"{path}: holds no linears that this package has quantized")
    return found


def flux_attention() -> list[Attention]:
    return [Attention(24, 128)]


def stored_attention(path: Path) -> list[Attention]:
    """Of the models whose configuration tells their heads."""
    found = []
    for _, config, _ in _models(path):
        heads, dim = config.get("num_attention_heads"), config.get("attention_head_dim")
        if isinstance(heads, int) and dim in HEADS_OF:
            found.append(Attention(heads, dim, quantization_of(config).get("compute_dtype", "bfloat16")))
    return list(dict.fromkeys(found))


def _models(path: Path) -> Iterator[tuple[str, dict[str, Any], Header]]:
    if path.is_file():
        header = read_header(path)
        yield str(path), config_in(header), header
        return
    for folder in (path, *sorted(entry for entry in path.iterdir() if entry.is_dir())):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if quantization_of(config).get("quant_method") == OURS:
                yield str(folder), config, merged(folder)


def _linears(label: str, config: dict[str, Any], header: Header) -> list[Linear]:
    from ..site import Site

    quantization = quantization_of(config)
    if quantization.get("quant_method") != OURS:
        return []
    dtype = quantization.get("compute_dtype", "bfloat16")
    made = []
    for stored in stored_sites(label, quantization.get("sites") or {}, header):
        entry = {key: value for key, value in stored.entry.items() if key != "k_range"}
        made.append(Linear(stored.name, Site.from_json(entry), stored.n, stored.k, dtype))
    return made


# ------------------------------------------------------------------------------------------------------- which launches
def attention_requests(kinds: Iterable[Attention], rows: Sequence[int], device: torch.device) -> list[Request]:
    import torch

    from ..backends.triton.attention import multiplies_fp8

    fp8 = multiplies_fp8(device)
    return [Request("attention", (samples * kind.heads, m, kind.dim, fp8, getattr(torch, kind.dtype)))
            for kind in kinds for m in rows if m >= LEAST_TOKENS for samples in SAMPLES]


def requests(linears: Sequence[Linear], rows: Sequence[int], modes: Sequence[str], device: torch.device
             ) -> list[Request]:
    """Each once. modes: of linears with 4-bit activations; none: the one that the device runs them in unasked."""
    from ..site import auto_mode

    found: dict[Request, None] = {}
    for m in rows:
        for linear in linears:
            if linear.site.kind == "w4a4":
                for mode in modes or (auto_mode(linear.site, device),):
                    found |= dict.fromkeys(_launches(linear, linears, m, mode, device))
    for linear in linears:
        if linear.site.kind == "w4a16":
            found |= dict.fromkeys(_launches(linear, linears, WEIGHT_ONLY_ROWS, "a16", device))
    return list(found)


def _launches(linear: Linear, linears: Sequence[Linear], m: int, mode: str, device: torch.device
              ) -> Iterator[Request]:
    import torch

    site, dtype = linear.site, getattr(torch, linear.dtype)
    act, spec = site.act_spec(mode), site.linear_spec(mode, linear.k, _residency(site, mode, device))
    yield Request("linear", ("", m, linear.n, site.rank, spec, dtype))
    for suffix, following in _endings(linear, linears, mode):
        ended = replace(spec, activation="gelu_tanh", next=following)
        yield Request("linear", (suffix, m, linear.n, site.rank, ended, dtype))
    if site.has_smooth:
        yield Request("quantize", (m, linear.k, site.rank, act, dtype))
        if any(fnmatchcase(linear.name, glob) for glob in NORMED):
            yield Request("quantize", (m, linear.k, site.rank, replace(act, norm="layer"), dtype))


def _residency(site: Site, mode: str, device: torch.device) -> str:
    """What a8 multiplies: INT8 that is there, or made of the codes in every call."""
    from ..site import auto_weights

    if mode != "a8":
        return "codes"
    return "folded" if auto_weights(device) == "int8" or site.format == "uint4" else "scaled"


def _endings(linear: Linear, linears: Iterable[Linear], mode: str) -> Iterator[tuple[str, ActSpec]]:
    """(suffix, how the next linear takes its input) of a feed-forward's first linear."""
    leaf = next((leaf for leaf in FIRST if linear.name.endswith(leaf)), None)
    if leaf is None:
        return
    second = linear.name[: -len(leaf)] + FIRST[leaf]
    for other in linears:
        if other.name.partition(".parts.")[0] == second and other.site.format == linear.site.format:
            if linear.n in (other.k, 2 * other.k):
                suffix = "_gelu_quantize" if linear.n == other.k else "_glu_quantize"
                yield suffix, other.site.act_spec(mode)
