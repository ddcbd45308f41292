"""Several linears in one launch, and GPUs of compute capability 7.5: every ending through the CUDA backend."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nunchaku_py as nq
from nunchaku_py import ops
from nunchaku_py.backends.cuda import linears
from tests.simt.calls import CODES, PACKED, assert_same_quantized, endings, operands, packed, specs
from tests.simt.layouts import tokens_in_rows
from tests.simt.test_linear_w4a4_endings import assert_near

of_int4 = partial(endings, operands=operands, packed=packed, specs=specs, act=CODES)


def written(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors that came out, scales without what only fills their blocks."""
    if isinstance(result, Tensor) or result[0].dtype != torch.uint8:
        return (result,) if isinstance(result, Tensor) else result
    qx, sx, h = result
    return qx, tokens_in_rows(sx, h.shape[0]), h


def assert_as_the_reference(op: ops.Op, got: object, args: tuple) -> None:
    want = op.reference(*args)
    if op.name.endswith("_quantize"):
        assert_same_quantized(got, want)
    else:
        for one, other in zip(written(got), written(want), strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calls_in_one_launch(device: str, dtype: torch.dtype) -> None:
    """Image and text of a block, of any sizes: the reference's results, and the same bits every time."""
    for op, mma, rows in of_int4(dtype):
        there = [tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args) for args in mma]
        calls = [ops.Call(op, args) for args in there]
        first, again = (tree_map_only(Tensor, Tensor.cpu, ops.together(calls)) for _ in range(2))
        for got, same, args in zip(first, again, rows, strict=True):
            assert_as_the_reference(op, got, args)
            assert all(map(torch.equal, written(got), written(same)))


@pytest.mark.usefixtures("as_gpu")
def test_one_launch_for_what_can_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launched = linears._launch
    monkeypatch.setattr(linears, "_launch", lambda name, calls, ending: launches.append(len(calls)) or
                        launched(name, calls, ending))
    (op, mma, _), *_ = of_int4(torch.bfloat16)
    (_, half, _), *_ = of_int4(torch.float16)
    ys = ops.together([ops.Call(op, args) for args in (*mma, *half, *mma)])
    assert launches == [6, 4, 5]
    assert [y.dtype for y in ys] == [torch.bfloat16] * 5 + [torch.float16] * 5 + [torch.bfloat16] * 5
    assert torch.equal(ys[0], ys[10])


@pytest.mark.usefixtures("as_turing")
def test_an_rtx_20_runs_every_ending_in_float16() -> None:
    for op, mma, rows in of_int4(torch.float16):
        for got, args in zip(ops.together([ops.Call(op, args) for args in mma]), rows, strict=True):
            assert_as_the_reference(op, got, args)
    x, inv_smooth, down = torch.randn(70, 192).half(), 0.5 + torch.rand(192), (torch.randn(40, 192) / 14).half()
    assert_same_quantized(ops.quantize_act(x, inv_smooth, down, PACKED),
                          ops.quantize_act.reference(x, inv_smooth, down, CODES))
    with pytest.raises(nq.NunchakuError, match=r"capability 7.5 multiplies no bfloat16: model.to\(torch.float16"):
        ops.quantize_act(x.bfloat16(), inv_smooth, down.bfloat16(), PACKED)
