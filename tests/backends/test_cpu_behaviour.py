"""The CPU engine as a guest of the process: threads, the GIL, forks, other libraries; and what it refuses."""
from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nunchaku_py import native
from nunchaku_py.backends import cpu
from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import OPS, ActSpec, backend
from tests.backends import cpu_bounds as bounds
from tests.backends.cpu_cases import Case, linear_args
from tests.ops.helpers import ACTS, op_args
from tests.test_linear import K, linear, site

ROOT = Path(__file__).parents[2]
TASKS = Path("/proc/self/task")
SERVED = sorted(name for name, op in OPS.items() if "cpu" in op.backends)
LINEARS = [name for name in SERVED if name.startswith("linear")]
MANY = (600, 131, 96, 17)  # tokens enough to be split among threads
pytestmark = pytest.mark.skipif(native.module is None, reason="no native module")
on_linux = pytest.mark.skipif(not TASKS.exists(), reason="looks at Linux's list of threads")


@pytest.fixture(autouse=True)
def threads():
    """torch.set_num_threads; what it was comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(value) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def same(a, b) -> bool:
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
               for x, y in zip(results(a), results(b), strict=True) if x.numel() or y.numel())


def on_cpu(name: str, *args):
    with backend("cpu"):
        return OPS[name](*args)


def python(script: str, **environment: str) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ----------------------------------------------------------------------------------------------------- instruction sets
def test_an_instruction_set_that_cannot_be_is_refused_in_a_sentence() -> None:
    """Read when first needed; after a refusal another may be named."""
    said = python("""
        import os
        from nunchaku_py import native
        for name, obstacle in [("sse9", "?"), *native.module.cpu_isas()]:
            if obstacle:
                os.environ["NUNCHAKU_PY_CPU_ISA"] = name
                try:
                    native.module.cpu_isa()
                except RuntimeError as error:
                    print(error)
        os.environ["NUNCHAKU_PY_CPU_ISA"] = "portable"
        print(native.module.cpu_isa())
    """).splitlines()
    every = ", ".join(name for name, _ in native.module.cpu_isas())
    impossible = [(name, why) for name, why in native.module.cpu_isas() if why]
    assert said == [f"NUNCHAKU_PY_CPU_ISA: expected one of {every}, got sse9",
                    *(f"NUNCHAKU_PY_CPU_ISA={name}: {why}" for name, why in impossible), "portable"]


def test_an_op_says_so_too() -> None:
    said = python("""
        import torch
        from nunchaku_py.errors import NunchakuError
        from nunchaku_py.ops import quantize_act, ActSpec
        try:
            quantize_act(torch.ones(1, 8), torch.ones(8), torch.empty(0, 8), ActSpec("int8"))
        except NunchakuError as error:
            print(error)
    """, NUNCHAKU_PY_CPU_ISA="sse9")
    assert said.startswith("NUNCHAKU_PY_CPU_ISA: expected one of ") and said.endswith(", got sse9\n")


# -------------------------------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("name", SERVED)
def test_the_number_of_threads_changes_no_bit(name: str, threads) -> None:
    for shape in (MANY, (3, 131, 96, 17)):
        args = op_args(name, shape)
        wanted = on_cpu(name, *args)
        for count in (2, 4, 2, 1):
            threads(count)
            assert same(on_cpu(name, *args), wanted)


def test_several_callers_at_once_get_the_same_bits(threads) -> None:
    calls = [(name, op_args(name, (70, 131, 96, 17))) for name in SERVED]
    wanted = [on_cpu(name, *args) for name, args in calls]

    def again(seed: int) -> bool:
        torch.set_num_threads(1 + seed % 2)
        turn = [(i + seed) % len(calls) for i in range(2 * len(calls))]
        return all(same(on_cpu(calls[i][0], *calls[i][1]), wanted[i]) for i in turn)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, range(8)))


def long_call(tokens: int = 2048):
    args = op_args("linear_w4a8", (tokens, 1024, 1536, 32))
    on_cpu("linear_w4a8", *args)
    return lambda: on_cpu("linear_w4a8", *args)


def test_other_threads_run_meanwhile() -> None:
    call, stamps, over = long_call(), [], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            stamps.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        spans = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            spans.append((begin, time.perf_counter()))
    finally:
        over.set()
        watcher.join()
    # Holding the lock, a call would leave moments only around what Python does before and after it.
    within = [sum(begin + 0.3 * (end - begin) < stamp < begin + 0.9 * (end - begin) for stamp in stamps)
              for begin, end in spans]
    assert max(within) >= 3, (within, spans)


def on_cpu_seconds() -> dict[str, float]:
    return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in TASKS.iterdir()}


@on_linux
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_threads_work_as_torch_was_told(count: int, threads) -> None:
    call = long_call()
    threads(count)
    call()
    time.sleep(0.05)
    before = on_cpu_seconds()
    for _ in range(3):
        call()
    worked = [seconds - before.get(task, 0) for task, seconds in on_cpu_seconds().items()]
    assert sum(seconds > 0.05 * sum(worked) for seconds in worked) == count, worked


@on_linux
def test_nothing_is_busy_after_a_call(threads) -> None:
    threads(2)
    long_call()()
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.04


@on_linux
def test_one_thread_by_environment() -> None:
    assert python("""
        import os, torch
        from tests.backends.test_cpu_behaviour import long_call
        before = len(os.listdir("/proc/self/task"))
        long_call(512)()
        print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
    """, OMP_NUM_THREADS="1") == "1 0\n"


def test_a_fork_with_one_thread_computes() -> None:
    """Torch's own operations hang in a forked process that uses more, and so do these: it is OpenMP's pool."""
    assert python("""
        import multiprocessing, torch
        from tests.backends.test_cpu_behaviour import on_cpu, op_args, same
        torch.set_num_threads(2)
        args = op_args("linear_w4a8", (70, 131, 96, 17))
        wanted = on_cpu("linear_w4a8", *args)

        def child(answer):
            torch.set_num_threads(1)
            answer.put(same(on_cpu("linear_w4a8", *args), wanted))

        fork = multiprocessing.get_context("fork")
        answer = fork.Queue()
        process = fork.Process(target=child, args=(answer,))
        process.start()
        print(answer.get(timeout=60))
        process.join()
    """, OMP_NUM_THREADS="2") == "True\n"


def test_repeats_give_the_same_bits(threads) -> None:
    threads(2)
    for name in SERVED:
        args = op_args(name, (70, 131, 96, 17))
        first = on_cpu(name, *args)
        assert all(same(on_cpu(name, *args), first) for _ in range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_computes_before_and_after_as_it_did(dtype: torch.dtype) -> None:
    a, b, image = torch.randn(65, 130).to(dtype), torch.randn(130, 67).to(dtype), torch.randn(1, 3, 16, 16).to(dtype)
    kernel, codes, tiny = torch.randn(8, 3, 3, 3).to(dtype), torch.ones(32, 32, dtype=torch.int8), torch.tensor([1e-40])

    def theirs():
        return a @ b, torch.conv2d(image, kernel), a.exp(), torch._int_mm(codes, codes), tiny * 0.5

    wanted = theirs()
    for name in SERVED:
        on_cpu(name, *op_args(name, (70, 131, 96, 17), dtype))
        assert same(theirs(), wanted)
    assert wanted[-1] > 0  # subnormal numbers are not flushed


# --------------------------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize("family, act", [("linear_w4a8", "int8"), ("linear_w4a4", "int4"), ("linear_w4a16", "none")])
def test_more_tokens_than_fit_in_the_cache(family: str, act: str) -> None:
    """They are taken some at a time."""
    dtype = torch.bfloat16 if act == "none" else torch.float32
    args = linear_args(Case(900, 20003, 5, 3, dtype, act, "int4", 64, 0))
    bounds.assert_rounded_once(on_cpu(family, *args), bounds.linear(*args))


@pytest.mark.parametrize("depth", [131, 0])
@pytest.mark.parametrize("name", [name for name in LINEARS if "quantize" in name])
def test_activated_values_some_tokens_at_a_time(name: str, depth: int, monkeypatch) -> None:
    args = op_args(name, (150, depth, 24, 5))
    wanted = on_cpu(name, *args)
    monkeypatch.setattr(cpu, "FUSED_BYTES", 1)
    assert same(on_cpu(name, *args), wanted)


@pytest.mark.parametrize("shape", [(0, 64, 36, 3), (70, 0, 12, 2), (3, 0, 12, 0), (1, 1, 12, 0), (6, 1, 12, 1)])
@pytest.mark.parametrize("name", SERVED)
def test_empty_and_tiny_shapes(name: str, shape: tuple[int, ...]) -> None:
    args = op_args(name, shape)
    for mine, theirs in zip(results(on_cpu(name, *args)), results(OPS[name].reference(*args)), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        step = 1 if mine.dtype == torch.int8 else 2**-6
        if mine.dtype != torch.uint8:  # two codes in a byte have no distance
            assert torch.allclose(mine.double(), theirs.double(), rtol=2**-6, atol=step)


FREE = ("x", "down", "next_down", "gate", "rotary")  # these decide rows, rank, samples, tokens


def mutations(t: torch.Tensor, free: bool):
    """Tensors that are not what t is; `free`: t decides its first dimension."""
    yield "another type", t.to(torch.int32 if t.is_floating_point() else torch.float64)
    yield "elsewhere", t.to("meta")
    yield "a dimension more", t[None]
    for axis, size in enumerate(t.shape):
        if size and not (free and axis == 0):
            yield f"short in dimension {axis}", t.narrow(axis, 0, size - 1)
            yield f"long in dimension {axis}", torch.cat((t, t.narrow(axis, 0, 1)), axis)


@pytest.mark.parametrize("name", SERVED)
def test_what_does_not_fit_is_refused_before_native_code(name: str) -> None:
    op, args = OPS[name], op_args(name, (6, 131, 24, 5))
    for place, parameter in enumerate(op.parameters[:-1]):
        for what, wrong in mutations(args[place], parameter.name in FREE):
            if parameter.name in ("sx", "aux") and not args[place].numel() and what == "another type":
                continue  # of nothing, any type will do
            changed = [*args[:place], wrong, *args[place + 1:]]
            with pytest.raises(NunchakuError) as refusal, backend("cpu"):
                op(*changed)
            assert len(str(refusal.value)) > 20, (parameter.name, what)


# -------------------------------------------------------------------------------------------------------------- refused
def with_groups(weight: int, act: int) -> tuple:
    return linear_args(replace(Case(5, 96, 24, 3, torch.bfloat16, "int4", "int4", act, 0), weight="int4", group=weight))


def refused(name: str, args: tuple, sentence: str) -> None:
    """In explain and when forced; without being forced torch serves."""
    assert OPS[name].explain(*args)["cpu"] == sentence
    with pytest.raises(NunchakuError, match=sentence), backend("cpu"):
        OPS[name](*args)
    assert same(OPS[name](*args), OPS[name].reference(*args))


@pytest.mark.parametrize("group", [8, 24, 1])
def test_groups_that_share_no_vector_are_refused(group: int) -> None:
    x, inv_smooth, down, _ = op_args("quantize_act")
    refused("quantize_act", (x, inv_smooth, down, ActSpec("int4", group)),
            f"it takes groups that are multiples of 16, not {group}")
    args = linear_args(Case(5, 96, 24, 3, torch.bfloat16, "int8", "int4", group, 0))
    refused("linear_w4a8", args, f"it takes weight groups that are multiples of 16, not {group}")


def test_different_groups_of_weight_and_activation_are_refused() -> None:
    *tensors, spec = linear_args(Case(5, 96, 24, 3, torch.bfloat16, "int4", "int4", 32, 0))
    tensors[1] = tensors[1][:, :2].contiguous()
    refused("linear_w4a4", (*tensors, replace(spec, act=ActSpec("int4", 64))),
            "it takes equal groups of weights and activations, not 32 and 64")


def test_refusals_of_what_follows() -> None:
    *args, spec = op_args("linear_w4a8_gelu_quantize")
    refused("linear_w4a8_gelu_quantize", (*args, replace(spec, next=ActSpec("int4", 24))),
            "it takes groups that are multiples of 16, not 24")


@pytest.mark.parametrize("mode", ["a4", "a8", "a16"])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_compiled_and_eager_give_the_same_bits(format: str, mode: str) -> None:
    torch._dynamo.reset()
    module = linear(site(format), mode, torch.bfloat16)
    x = torch.randn(7, K).bfloat16()
    with backend("cpu"), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert same(compiled(x), module(x))


def test_inputs_stay_and_outputs_are_fresh() -> None:
    for name in SERVED:
        args = op_args(name, act=None if name.startswith("linear") else "none")
        kept = [t.clone() for t in args[:-1]]
        out = results(on_cpu(name, *args))
        assert all(same(a, b) for a, b in zip(args[:-1], kept, strict=True))
        inside = {t.untyped_storage().data_ptr() for t in args[:-1] if t.numel()}
        assert not inside & {t.untyped_storage().data_ptr() for t in out if t.numel()}
    assert set(ACTS) == {"int4", "uint4", "nvfp4", "int8", "none"}
