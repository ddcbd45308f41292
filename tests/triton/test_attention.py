"""attention in 8 bit against the formula in float64, on what makes 8 bit hard."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nunchaku_py import ops
from nunchaku_py.backends.triton import device as gpu
from nunchaku_py.errors import NunchakuError
from nunchaku_py.kernels import attention as kernels
from nunchaku_py.kernels.attention_config import CHOICES, CONFIGS, problem_of
from nunchaku_py.kernels.config import Config, Gpu, choose
from nunchaku_py.ops import AttentionSpec

PRODUCTS = ("16bit", "fp8")
# products → relative error at most, cosine at least. A rounding to int8 of what is normally distributed is off by 0.6 %
# of it, one to e4m3 by 2.6 %: q and k make 0.9 % of the result, P and v in FP8 3.5 %.
BOUNDS = {"16bit": (0.02, 0.9995), "fp8": (0.05, 0.998)}
OFFSETS = torch.tensor([30.0, -50.0, 80.0])


def drawn(tokens: int, keys: int, dim: int, device: str, batch: int = 1, heads: int = 2) -> tuple[Tensor, ...]:
    """q, k, v (B,T,H,D) in fp32, normally distributed."""
    return tuple(torch.randn(batch, rows, heads, dim).to(device) for rows in (tokens, keys, keys))


def k_far_from_zero(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[..., [3, 17, -1]] += OFFSETS.to(k.device)


def k_far_and_q_large(q: Tensor, k: Tensor, v: Tensor) -> None:
    k_far_from_zero(q, k, v)
    q[..., [3, 40]] *= 10


def large_in_q(q: Tensor, k: Tensor, v: Tensor) -> None:
    q[..., [1, 9, 40]] *= 15


def large_in_k(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[..., [2, 9, 50]] *= 15


def large_in_both(q: Tensor, k: Tensor, v: Tensor) -> None:
    q[..., [1, 9, 40]] *= 20
    k[..., [2, 11, 50]] *= 20


def large_in_the_same(q: Tensor, k: Tensor, v: Tensor) -> None:
    for tensor in (q, k):
        tensor[..., [1, 9, 40]] *= 10


def large_in_v(q: Tensor, k: Tensor, v: Tensor) -> None:
    v[..., [5, 20]] *= 20


def one_large_key(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Forty times as long as the others, as the first of a text can be, and away from all queries."""
    q[..., 7] = q[..., 7].abs() + 0.5
    k[:, 0], k[:, 0, :, 7] = 0, -40 * k.shape[-1] ** 0.5


HARD = (k_far_from_zero, k_far_and_q_large, large_in_q, large_in_k, large_in_both, large_in_the_same, large_in_v,
        one_large_key)


def heads_first(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(B,H,T,D) views of (B,T,H,D), as diffusers' are."""
    return tuple(tensor.to(dtype).transpose(1, 2) for tensor in tensors)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ v


def run(q: Tensor, k: Tensor, v: Tensor, products: str, scale: float | None = None) -> Tensor:
    with ops.backend("triton"):
        return ops.attention(q, k, v, AttentionSpec(products, scale))


def errors(o: Tensor, true: Tensor) -> tuple[float, float]:
    """(relative error, cosine)"""
    o, true = o.double(), true.double()
    cosine = F.cosine_similarity(o.flatten(), true.flatten(), 0)
    return ((o - true).norm() / true.norm()).item(), cosine.item()


def assert_near(o: Tensor, true: Tensor, products: str) -> None:
    error, cosine = errors(o, true)
    most, least = BOUNDS[products]
    assert error <= most and cosine >= least, f"relative error {error:.4f}, cosine {cosine:.6f}"


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, keys, dim", [(70, 300, 64), (70, 150, 128), (1, 1, 64), (77, 77, 128), (130, 33, 64)])
def test_normal_data(tokens, keys, dim, dtype, products, device):
    q, k, v = heads_first(drawn(tokens, keys, dim, device), dtype)
    o = run(q, k, v, products)
    assert o.dtype == dtype and o.shape == q.shape and o.transpose(1, 2).is_contiguous()
    assert_near(o, exact(q, k, v), products)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("harden", HARD)
@pytest.mark.parametrize("keys", [77, 200])
def test_outliers(keys, harden, dim, products, device):
    tensors = drawn(60, keys, dim, device)
    harden(*tensors)
    q, k, v = heads_first(tensors, torch.bfloat16)
    assert_near(run(q, k, v, products), exact(q, k, v), products)


def test_a_query_of_zeros_takes_the_mean_of_v(device):
    q, k, v = heads_first(drawn(20, 77, 64, device), torch.bfloat16)
    q[:, :, 3] = 0
    assert_near(run(q, k, v, "16bit"), exact(q, k, v), "16bit")


def test_outliers_in_float16(device):
    tensors = drawn(60, 200, 64, device)
    for harden in (k_far_from_zero, large_in_both, large_in_v):
        harden(*tensors)
    q, k, v = heads_first(tensors, torch.float16)
    assert_near(run(q, k, v, "16bit"), exact(q, k, v), "16bit")


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_channel_in_which_all_keys_are_alike(dtype, products, device):
    """However large q is there, no score differs by it, and nothing may be left of it in a scale of int8."""
    tensors = drawn(60, 200, 64, device)
    tensors[0][..., 3] *= 300
    tensors[1][..., 3] = 100
    q, k, v = heads_first(tensors, dtype)
    assert_near(run(q, k, v, products), exact(q, k, v), products)


def test_what_is_balanced_may_be_more_than_float16_holds(device):
    """A channel of k far from zero that hardly differs, where q is large: k is multiplied by 2^4 there, and is 10^4."""
    tensors = drawn(60, 200, 64, device)
    tensors[0][..., 3] *= 1000
    tensors[1][..., 3] = 10000 + 8 * torch.randint(-1, 2, tensors[1].shape[:-1], device=device)
    q, k, v = heads_first(tensors, torch.float16)
    o = run(q, k, v, "16bit", 1e-3)
    assert_near(o, exact(q, k, v, 1e-3), "16bit")


@pytest.mark.parametrize("products, most", [("16bit", 0.03), ("fp8", 0.05)])
def test_sharp_scores(products, most, device):
    """Some queries are six times as large as others, and so are the errors of their scores: 0.055 of a power of e where
    the scores of those are off by 0.009. What is left of them in o is less, as one key has nearly all of the weight."""
    tensors = drawn(60, 300, 64, device)
    tensors[0][:, ::5] *= 6
    q, k, v = heads_first(tensors, torch.bfloat16)
    error, cosine = errors(run(q, k, v, products), exact(q, k, v))
    assert error < most and cosine > 0.998


@pytest.mark.parametrize("products", PRODUCTS)
def test_each_channel_of_v_by_itself(products, device):
    """A channel twenty times as large as the others takes nothing from them."""
    tensors = drawn(60, 200, 64, device)
    large_in_v(*tensors)
    q, k, v = heads_first(tensors, torch.bfloat16)
    o, true = run(q, k, v, products), exact(q, k, v)
    assert_near(o[..., 30:], true[..., 30:], products)


def test_fp8_keeps_what_all_values_have_in_common(device):
    """P·V of the same v everywhere is v, however P is rounded: its error is not that of the sum of P."""
    q, k, _ = heads_first(drawn(40, 300, 64, device), torch.bfloat16)
    v = torch.ones_like(k) * torch.linspace(-4, 4, 64, device=device).bfloat16()
    error, _ = errors(run(q, k, v, "fp8"), exact(q, k, v))
    assert error < 0.01


@pytest.mark.parametrize("scale", [0.25, 0.02, -0.1, 0.0])
def test_another_scale(scale, device):
    q, k, v = heads_first(drawn(40, 90, 64, device), torch.bfloat16)
    assert_near(run(q, k, v, "16bit", scale), exact(q, k, v, scale), "16bit")


def test_auto_is_fp8_where_the_gpu_has_it(device, monkeypatch):
    q, k, v = heads_first(drawn(33, 40, 64, device), torch.bfloat16)
    assert torch.equal(run(q, k, v, "auto"), run(q, k, v, "fp8"))
    monkeypatch.setattr(gpu, "capability_of", lambda where: (8, 6))
    assert torch.equal(run(q, k, v, "auto"), run(q, k, v, "16bit"))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("config", CONFIGS[::2])
def test_every_configuration(config, products, device):
    """… whether the GPU at hand would take it or not: 16 bit needs most shared memory, with which all fit a GPU."""
    if device == "cuda":
        pytest.skip("what a GPU has no room for cannot run on it")
    q, k, v = heads_first(drawn(70, 130, config.k, device, heads=1), torch.bfloat16)
    o = kernels.attention(q, k, v, AttentionSpec(), products == "fp8", config)
    assert_near(o, exact(q, k, v), products)


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("products", PRODUCTS)
def test_strides(products, device):
    """Heads first, tokens first, slices of one projection, a batch expanded."""
    q, k, v = heads_first(drawn(40, 50, 64, device, batch=2), torch.bfloat16)
    expected = run(q, k, v, products)
    assert torch.equal(run(*(t.contiguous() for t in (q, k, v)), products), expected)
    together = torch.cat([t.transpose(1, 2).flatten(2) for t in (q[:, :, :40], k[:, :, :40], v[:, :, :40])], -1)
    sliced = [part.unflatten(-1, (2, 64)).transpose(1, 2) for part in together.chunk(3, -1)]
    assert torch.equal(run(*sliced, products), run(q, k[:, :, :40], v[:, :, :40], products))
    alike = [t[:1].expand(2, -1, -1, -1) for t in (k, v)]
    assert torch.equal(run(q, *alike, products), run(q, *(t.contiguous() for t in alike), products))


def within(tensor: Tensor, what: float) -> Tensor:
    """The same among numbers that are `what`: before, behind, and between tokens and heads."""
    batch, heads, rows, dim = tensor.shape
    memory = torch.full((batch + 2, rows + 2, heads + 2, dim + 16), what, dtype=tensor.dtype, device=tensor.device)
    view = memory[1:-1, 1:-1, 1:-1, 8:-8].transpose(1, 2)
    return view.copy_(tensor)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("tokens, keys, dim", [(33, 40, 64), (130, 129, 64), (1, 1, 128)])
def test_nothing_else_is_read_or_written(tokens, keys, dim, products, device, monkeypatch):
    """What stands beside q, k, v and o, and what stood where codes and scales are put."""
    q, k, v = heads_first(drawn(tokens, keys, dim, device, batch=2), torch.bfloat16)
    expected, made = run(q, k, v, products), []
    monkeypatch.setattr(kernels, "empty_output", lambda q: made.append(within(q, 7.0)) or made[-1])
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    o = run(*(within(tensor, float("nan")) for tensor in (q, k, v)), products)
    assert o is made[0] and torch.equal(o, expected)
    assert (o._base == 7).sum() >= o._base.numel() - o.numel()


def filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """new_empty, with every byte 127: NaN in e4m3, and large in the other types."""
    def new(*args: object, **more: object) -> Tensor:
        made = empty(*args, **more)
        made.view(torch.uint8).fill_(127)
        return made

    return new


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_nothing_to_do(batch, tokens, device):
    q, k = (torch.zeros(batch, 2, rows, 64, dtype=torch.bfloat16, device=device) for rows in (tokens, 5))
    assert run(q, k, k, "fp8").shape == q.shape


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_same_bits_again(products, device):
    q, k, v = heads_first(drawn(70, 130, 64, device), torch.bfloat16)
    assert torch.equal(run(q, k, v, products), run(q, k, v, products))


# ------------------------------------------------------------------------------------------------------ unusual numbers
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_in_q_stays_in_its_row(what, products, device):
    q, k, v = heads_first(drawn(40, 50, 64, device), torch.bfloat16)
    expected = run(q, k, v, products)
    q[0, 1, 7, 3] = what
    o = run(q, k, v, products)
    assert o[0, 1, 7].isnan().all()
    others = torch.ones(2, 40, dtype=torch.bool, device=device)
    others[1, 7] = False
    assert errors(o[0][others], expected[0][others])[0] < 0.05 and o[0][others].isfinite().all()


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [50, 128])
def test_what_is_no_number_in_k_is_in_all_rows_of_its_head(keys, what, products, device):
    q, k, v = heads_first(drawn(40, keys, 64, device), torch.bfloat16)
    expected = run(q, k, v, products)
    k[0, 1, 7, 3] = what
    o = run(q, k, v, products)
    assert o[0, 1].isnan().all() and torch.equal(o[0, 0], expected[0, 0])


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_in_v_is_in_its_channel(what, products, device):
    q, k, v = heads_first(drawn(40, 50, 64, device), torch.bfloat16)
    expected = run(q, k, v, products)
    v[0, 1, 7, 3] = what
    o = run(q, k, v, products)
    assert not o[0, 1, :, 3].isfinite().any()
    o[0, 1, :, 3] = expected[0, 1, :, 3]
    assert torch.equal(o, expected)


@pytest.mark.parametrize("products", PRODUCTS)
def test_zeros(products, device):
    """All scores alike: the mean of v. No v: nothing."""
    q, k, v = heads_first(drawn(40, 50, 64, device), torch.bfloat16)
    for some_q, some_k in ((q * 0, k), (q, k * 0), (q, k[:, :, :1].expand_as(k))):
        assert_near(run(some_q, some_k, v, products), exact(some_q, some_k, v), products)
    assert (run(q, k, v * 0, products) == 0).all()


@pytest.mark.parametrize("size", [2.0**-40, 2.0**20])
def test_very_small_and_very_large(size, device):
    """Numbers whose squares bfloat16 still holds."""
    q, k, v = heads_first(drawn(40, 50, 64, device), torch.bfloat16)
    o = run(q * size, k / size, v * size, "fp8")
    assert_near(o / size, exact(q, k, v), "fp8")


# ------------------------------------------------------------------------------------------------------------- refusals
def refusal(q: Tensor, k: Tensor, v: Tensor, products: str = "auto") -> str:
    return ops.attention.explain(q, k, v, AttentionSpec(products))["triton"]


@pytest.mark.parametrize("change, sentence", [
    (lambda t: t.float(), "it computes in bfloat16 or float16, not float32"),
    (lambda t: t[..., :40], "it takes heads of 64 or 128 channels, not 40"),
    (lambda t: t.mT.contiguous().mT, "the channels of q are not side by side in memory"),
    (lambda t: t.requires_grad_(), "it has no gradients"),
    (lambda t: t[:, :, :0], "there are no keys"),
])
def test_refusals(change, sentence, as_gpu):
    q = change(torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16))
    assert refusal(q, q, q) == sentence
    with torch.no_grad():
        assert sentence != "it has no gradients" or refusal(q, q, q) == "can run"


def test_channels_of_k_and_v_lie_side_by_side(as_gpu):
    q = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    apart = q.mT.contiguous().mT
    assert refusal(q, apart, q) == "the channels of k are not side by side in memory"
    assert refusal(q, q, apart) == "the channels of v are not side by side in memory"


def test_fp8_needs_a_gpu_that_has_it(as_ampere):
    q = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    assert refusal(q, q, q, "fp8") == "FP8 needs compute capability 8.9, this GPU has 8.6"
    assert refusal(q, q, q) == refusal(q, q, q, "16bit") == "can run"
    with ops.backend("triton"), pytest.raises(NunchakuError, match="triton: FP8 needs compute capability 8.9"):
        ops.attention(q, q, q, AttentionSpec("fp8"))


def test_without_a_gpu_the_formula_runs():
    q = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    assert refusal(q, q, q) == "the tensors are on cpu" and not ops.attention(q, q, q, AttentionSpec()).any()


# ------------------------------------------------------------------------------------------------------- configurations
GPUS = {"A100": Gpu("A100", (8, 0), 108, 163 << 10), "RTX 3090": Gpu("RTX 3090", (8, 6), 82, 99 << 10),
        "RTX 4090": Gpu("RTX 4090", (8, 9), 128, 99 << 10), "H200": Gpu("H200", (9, 0), 132, 227 << 10),
        "B200": Gpu("B200", (10, 0), 148, 227 << 10), "RTX 5090": Gpu("RTX 5090", (12, 0), 170, 99 << 10)}


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("fp8", [False, True])
def test_a_configuration_for_every_size_on_every_gpu(name, fp8):
    if fp8 and GPUS[name].capability < gpu.OLDEST_FP8:
        pytest.skip("has no FP8")
    for heads, tokens, keys, dim in ((24, 4608, 4608, 128), (24, 4096, 77, 64), (1, 1, 1, 64), (2, 1, 75600, 128)):
        config = choose(CHOICES, problem_of(heads, tokens, keys, dim, fp8), GPUS[name])
        assert config in CONFIGS and config.k == dim


def test_hopper_takes_large_tiles_for_pictures():
    for fp8 in (False, True):
        problem = problem_of(24, 4608, 4608, 128, fp8)
        assert choose(CHOICES, problem, GPUS["H200"])[:4] == Config(128, 128, 128, 8, 2)[:4]
