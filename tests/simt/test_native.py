"""The CUDA backend with its host functions, packing and bindings, against the references: from the op that a model
calls to the result. On kernels that run on the host, and on a GPU where there is one."""
from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

import nunchaku_py as nq
from nunchaku_py import native, ops
from nunchaku_py.backends import cuda
from nunchaku_py.backends.cuda import device as gpu
from nunchaku_py.commands.op_samples import sample
from nunchaku_py.ops import ActSpec, LinearSpec
from nunchaku_py.ops.spec import MMA
from tests.simt.calls import CODES, PACKED, assert_same_quantized, operands, packed, run, specs
from tests.simt.test_linear_w4a4 import bound
from tests.simt.test_linear_w4a4_endings import assert_near


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, n, k, r", [(1, 16, 64, 0), (70, 208, 192, 24), (200, 400, 128, 32)])
def test_linear(device: str, m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    args, (row, mma) = operands(m, n, k, r, dtype), specs(k)
    got, want = run(ops.linear_w4a4, device, *packed(args), mma), ops.linear_w4a4.reference(*args, row)
    assert ((got.double() - want.double()).abs() <= bound(want, args, row)).all()


def test_gate_residual(device: str) -> None:
    args, (row, mma) = operands(70, 208, 192, 16), specs(192)
    more = torch.randn(2, 208).bfloat16(), torch.randn(70, 208).bfloat16()
    assert_near(run(ops.linear_w4a4_gate_residual, device, *packed(args), *more, mma),
                ops.linear_w4a4_gate_residual.reference(*args, *more, row))


def test_qkv_rope(device: str) -> None:
    args, (row, mma) = operands(70, 3 * 128, 128, 16), specs(128, head_dim=64)
    angles = torch.rand(35, 32) * 6
    more = 1 + torch.rand(64), (1 + torch.rand(64)).bfloat16(), torch.stack([angles.cos(), angles.sin()], -1)
    for got, want in zip(run(ops.linear_w4a4_qkv_rope, device, *packed(args), *more, mma),
                         ops.linear_w4a4_qkv_rope.reference(*args, *more, row), strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.parametrize("ranks", [0, 12, 48])
def test_gelu_quantize(device: str, m: int, ranks: int) -> None:
    n, k = 320, 128
    args, (row, mma) = operands(m, n, k, 16), specs(k, activation="gelu_tanh", next=CODES)
    more = 0.5 + torch.rand(n), (torch.randn(ranks, n) / n**0.5).bfloat16()
    assert_same_quantized(run(ops.linear_w4a4_gelu_quantize, device, *packed(args), *more, mma),
                          ops.linear_w4a4_gelu_quantize.reference(*args, *more, row))


def test_what_is_beyond_the_end_is_no_part_of_h(device: str) -> None:
    """Half a tile of columns does not exist; what stands there may overflow, and 0 times infinity is not 0."""
    n, k = 64, 64
    qx, sx, qw, sw, *rest = operands(4, n, k, 16, torch.float16)
    qw[-8:-1], sw[-8:-1] = 0, 60000.0  # the last channel's codes stand beside these scales, beyond the end
    args, more = (qx, torch.ones_like(sx), qw, sw / 64, *rest), (torch.ones(n), torch.randn(16, n).half())
    row, mma = specs(k, activation="none", next=CODES)
    _, _, h = run(ops.linear_w4a4_gelu_quantize, device, *packed(args), *more, mma)
    want = ops.linear_w4a4_gelu_quantize.reference(*args, *more, row)[2]
    torch.testing.assert_close(h, want, rtol=0.02, atol=0.02 * want.abs().max().item())


@pytest.mark.parametrize("gate_first", [False, True])
def test_glu_quantize(device: str, gate_first: bool) -> None:
    n, k = 384, 128
    args, (row, mma) = operands(70, n, k, 16), specs(k, activation="silu", gate_first=gate_first, next=CODES)
    more = 0.5 + torch.rand(n // 2), (torch.randn(16, n // 2) / n**0.5).bfloat16()
    assert_same_quantized(run(ops.linear_w4a4_glu_quantize, device, *packed(args), *more, mma),
                          ops.linear_w4a4_glu_quantize.reference(*args, *more, row))


@pytest.mark.parametrize("ranks", [16, 40, 150])
def test_quantizing(device: str, ranks: int) -> None:
    torch.manual_seed(0)
    x, inv_smooth = torch.randn(70, 192).bfloat16(), 0.5 + torch.rand(192)
    down = (torch.randn(ranks, 192) / 14).bfloat16()
    assert_same_quantized(run(ops.quantize_act, device, x, inv_smooth, down, PACKED),
                          ops.quantize_act.reference(x, inv_smooth, down, CODES))
    normed = [ActSpec("int4", 64, norm="layer", layout=layout) for layout in (MMA, "row")]
    more = torch.ones(192).bfloat16(), torch.randn(2, 192) / 4, torch.randn(2, 192) / 4
    assert_same_quantized(run(ops.norm_modulate_quantize, device, x, *more, inv_smooth, down, normed[0]),
                          ops.norm_modulate_quantize.reference(x, *more, inv_smooth, down, normed[1]))


@pytest.mark.parametrize("weight", ["int4", "uint4"])
@pytest.mark.parametrize("m, n, k, r, dtype", [(1, 30, 1088, 0, torch.bfloat16), (2, 17, 64, 40, torch.float16),
                                               (9, 24, 2112, 16, torch.bfloat16), (3, 16, 96, 0, torch.bfloat16),
                                               (17, 23, 96, 8, torch.float16), (70, 80, 352, 40, torch.bfloat16)])
def test_decoding(device: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, weight: str) -> None:
    """Rounded as the reference rounds, but for h on the tensor cores; summed in another order."""
    _, _, qw, sw, _, h, up, bias = operands(m, n, k, r, dtype)
    x = torch.randn(m, k).to(dtype)
    aux = (torch.randn(sw.shape) / 4).to(dtype) if weight == "uint4" else torch.empty(0, dtype=dtype)
    args = (x, torch.empty(0), qw, sw * 0.05, aux, h, up, bias, LinearSpec(weight, 64, k, ActSpec("none", 64)))
    got, want = run(ops.linear_w4a16, device, *args), ops.linear_w4a16.reference(*args)
    eps, branch = torch.finfo(dtype).eps, h.double().abs() @ up.double().abs().T
    assert ((got.double() - want.double()).abs() <= eps * (want.double().abs() + branch) + 1e-4 * k**0.5).all()
    assert ops.linear_w4a16.explain(*(t.to(device) if isinstance(t, Tensor) else t for t in args))["cuda"] == "can run"


def test_no_rows(device: str) -> None:
    args, (_, mma) = operands(0, 128, 64, 16), specs(64)
    assert run(ops.linear_w4a4, device, *packed(args), mma).shape == (0, 128)
    none = torch.empty(0, 128).bfloat16()
    assert run(ops.linear_w4a4_gate_residual, device, *packed(args), torch.ones(1, 128), none, mma).shape == (0, 128)
    nothing, down = torch.empty(0, 64).bfloat16(), torch.ones(16, 64).bfloat16()
    empty = run(ops.quantize_act, device, nothing, torch.ones(64), down, PACKED)
    assert [tuple(tensor.shape) for tensor in empty] == [(0, 32), (1, 0), (0, 16)]


@pytest.mark.parametrize(("change", "said"), [
    (dict(k=96), "whole groups of 64, not 96"), (dict(n=24), "multiples of 16, not 24"),
    (dict(dtype=torch.float32), "bfloat16 or float16, not float32"),
])
def test_what_the_kernels_do_not_take_is_a_sentence(device: str, change: dict, said: str) -> None:
    sizes = {"m": 4, "n": 32, "k": 64, "r": 16, "dtype": torch.bfloat16, **change}
    qx, sx, qw, sw, *rest = operands(**sizes)
    _, mma = specs(sizes["k"])
    with pytest.raises(nq.NunchakuError, match=said):
        run(ops.linear_w4a4, device, qx, sx.T.contiguous(), qw, sw.T.contiguous(), *rest, mma)


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(sx=(1, 4)), r"sx: expected \(in/64, padded rows\) = \(1, 64\) bfloat16, got \(1, 4\)"),
    (dict(sw=(1, 32)), r"sw: expected \(in/64, padded out\) = \(1, 64\)"),
    (dict(h=(3, 16)), r"h: expected \(rows, rank\) = \(4, 16\)"),
])
def test_wrong_shapes_are_sentences(device: str, wrong: dict, said: str) -> None:
    args = dict(zip(("qx", "sx", "qw", "sw", "aux", "h", "up", "bias"), packed(operands(4, 32, 64, 16)), strict=True))
    args |= {name: torch.zeros(shape, dtype=args[name].dtype) for name, shape in wrong.items()}
    with pytest.raises(nq.NunchakuError, match=said):
        run(ops.linear_w4a4, device, *args.values(), specs(64)[1])


@pytest.mark.parametrize(("target", "capability", "runs"), [
    ("80", (8, 0), True), ("80", (8, 9), True), ("86", (8, 0), False), ("89", (9, 0), False), ("90a", (9, 0), True),
    ("120a", (12, 1), False), ("120f", (12, 1), True), ("75", (8, 0), False)])
def test_which_code_runs_where(target: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(target, capability) == runs


@pytest.mark.usefixtures("as_gpu")
def test_a_gpu_without_its_code_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, said in (((7, 0), "compute capability 7.5, this GPU has 7.0"), ((12, 0), "12.0, but for 89")):
        monkeypatch.setattr(gpu, "capability_of", lambda device, found=capability: found)
        with pytest.raises(nq.NunchakuError, match=said):
            ops.linear_w4a4(*packed(operands(4, 32, 64, 16)), specs(64)[1])


@pytest.mark.usefixtures("as_gpu")
def test_an_older_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "the NVIDIA driver knows CUDA up to 12.4, this was built with 13.0"
    monkeypatch.setattr(native, "why_not_this_driver", lambda: said)
    with pytest.raises(nq.NunchakuError, match=f"cuda: {said}"):
        ops.linear_w4a4(*packed(operands(4, 32, 64, 16)), specs(64)[1])


@pytest.mark.usefixtures("as_gpu")
def test_info_asks_with_what_a_gpu_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op that there is a kernel for says so, for samples that it has checked."""
    made = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **more: made(*args, **more))  # the GPU is this machine
    able = [name for name, op in ops.OPS.items() if op.explain(*sample(op, "int4", "cuda"))["cuda"] == "can run"]
    built = [name for name, op in ops.OPS.items() if "cuda" in op.backends]
    assert able == built
    linear_w4a4 = sample(ops.linear_w4a4, "int4", "cuda")
    assert ops.linear_w4a4(*linear_w4a4).shape == (128, 384)
    monkeypatch.setattr(gpu, "refuses_gpu", lambda capability: "it was not built")
    assert sample(ops.linear_w4a4, "int4", "cuda")[-1].layout == "row"


def test_tiles(on_host: ModuleType) -> None:
    """Large problems take large tiles; small ones tiles that keep the machine busy."""
    large, medium, small = range(3)
    places = 128  # an RTX 4090

    def chosen(*sizes: tuple[int, int], capability: int = 89) -> int:
        return on_host.choose(list(sizes), places, capability)

    assert chosen((4096, 3072)) == large == chosen((16384, 12288))
    assert chosen((256, 3072)) == medium  # 48 large ones would leave 80 places idle
    assert chosen((1, 3072)) == small
    assert chosen((4096, 3072), (256, 3072)) == large  # the text of a block beside its image
    assert chosen((4096, 3072), capability=75) == medium  # there are no large ones
    for rows, columns in ((1, 96), (32, 96), (4, 24), (128, 24)):
        tiles = on_host.tiles_of_block(rows, columns, places)
        assert 1 <= tiles <= columns
        assert rows * -(-columns // tiles) >= min(places, rows * columns) * 0.6


@pytest.mark.gpu
def test_the_same_bits_in_a_graph_and_compiled() -> None:
    """No synchronization and no allocation outside torch's, or capturing would fail."""
    args = tuple(tensor.cuda() for tensor in packed(operands(200, 400, 128, 32)))
    x, mma = torch.randn(200, 128, device="cuda").bfloat16(), specs(128)[1]
    inv_smooth, down = torch.ones(128, device="cuda"), torch.randn(32, 128, device="cuda").bfloat16()

    def both() -> Tensor:
        qx, sx, h = ops.quantize_act(x, inv_smooth, down, PACKED)
        return ops.linear_w4a4(qx, sx, *args[2:5], h, *args[6:], mma)

    want = both()
    assert torch.equal(both(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    assert torch.equal(captured, want)
    assert torch.equal(torch.compile(both, fullgraph=True)(), want)
