"""8-bit attention as diffusers' backends: found by name, taken by models, leaving what it cannot do to diffusers."""
from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

import nunchaku_py as nq
from nunchaku_py import attention_backend
from nunchaku_py.attention_backend import BACKENDS, add_member, attach, refusals
from tests.checks import QUICK, relative, run
from tests.tiny import MODELS

NAMES = tuple(BACKENDS)


@pytest.fixture(autouse=True)
def nothing_said_nor_set() -> Iterator[None]:
    """diffusers keeps the backend of a model as the default of the process."""
    attention_backend._refusals.clear()
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter on this machine's tensors, taken for those of an RTX 40."""
    pytest.importorskip("triton")
    from tests.triton.conftest import taken_for_gpu

    taken_for_gpu(monkeypatch, (8, 9))


@pytest.fixture
def flux() -> tuple:
    return MODELS["flux"]()


def attend(name: str, *tensors: Tensor, **more: object) -> Tensor:
    return dispatch_attention_fn(*tensors, backend=AttentionBackendName(name), **more)


def tensors(dim: int = 64, dtype: torch.dtype = torch.bfloat16, keys: int = 7, heads: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, rows, heads, dim).to(dtype) for rows in (5, keys, keys))


# ---------------------------------------------------------------------------------------------------------- enumeration
@pytest.mark.parametrize("name", NAMES)
def test_the_enumeration_knows_it_as_any_other(name):
    member = AttentionBackendName(name)
    assert member is AttentionBackendName[name.upper()] is getattr(AttentionBackendName, name.upper())
    assert isinstance(member, AttentionBackendName) and member == name and member.value == name
    assert (member.name, repr(member)) == (name.upper(), f"<AttentionBackendName.{name.upper()}: '{name}'>")
    assert list(AttentionBackendName).count(member) == 1 and member in AttentionBackendName
    assert AttentionBackendName.__members__[name.upper()] is member
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
    assert member in _AttentionBackendRegistry.list_backends() and {member: 1}[AttentionBackendName(name)] == 1
    assert len({*AttentionBackendName}) == len(AttentionBackendName) == len(AttentionBackendName.__members__)


def test_unknown_names_are_still_refused(flux):
    with pytest.raises(ValueError, match="'nunchaku_int9' is not a valid AttentionBackendName"):
        AttentionBackendName("nunchaku_int9")
    with pytest.raises(ValueError, match="must be one of the following: .*nunchaku_int8"):
        flux[0].set_attention_backend("nunchaku_int9")


def test_a_name_that_diffusers_has_itself_stays_its_own(caplog):
    class Names(str, Enum):
        NATIVE = "native"
        NUNCHAKU_INT8 = "nunchaku_int8"

    class Registry(_AttentionBackendRegistry):
        _backends, _constraints, _supported_arg_names = {Names.NATIVE: 1, Names.NUNCHAKU_INT8: 2}, {}, {}
        _supports_context_parallel = set()

    attach(SimpleNamespace(AttentionBackendName=Names, _AttentionBackendRegistry=Registry))
    assert Registry._backends[Names.NUNCHAKU_INT8] == 2 and callable(Registry._backends[Names("nunchaku_int8_16bit")])
    assert "diffusers has a backend nunchaku_int8 of its own" in caplog.text


def test_importing_us_anew_is_silent(caplog):
    """… as in a notebook: what is there is ours."""
    there = dict(_AttentionBackendRegistry._backends)
    attach(dispatch)
    assert _AttentionBackendRegistry._backends == there and not caplog.records


def test_members_are_added_to_no_other_enumeration():
    class One(str, Enum):
        A = "a"

    assert add_member(One, "B", "b") is One("b") and [*One] == [One.A, One["B"]]
    assert "b" not in {member.value for member in AttentionBackendName}


@pytest.mark.parametrize("first", [
    "import nunchaku_py; import diffusers.models.attention_dispatch as d",
    "import diffusers.models.attention_dispatch as d; import nunchaku_py",
    "import nunchaku_py.attention_backend; import diffusers.models.attention_dispatch as d",
])
def test_registered_whatever_comes_first(first):
    code = f"{first}; print(d.AttentionBackendName('nunchaku_int8') in d._AttentionBackendRegistry._backends)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


# --------------------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_on_the_kernels(name, flux, as_gpu, monkeypatch):
    model, inputs = flux
    expected = run(model, inputs)
    model.set_attention_backend(name)
    taken = monkeypatch_count(monkeypatch)
    out = run(model, inputs)
    assert taken == [BACKENDS[name] == "auto"] * 4 and not refusals()
    assert 0 < relative(out, expected) < (0.05 if BACKENDS[name] == "auto" else 0.02)
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(run(model, inputs), expected)


def monkeypatch_count(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of the kernels, whether it was in FP8."""
    from nunchaku_py.kernels import attention as kernels

    calls, launched = [], kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *args: (calls.append(args[4]), launched(*args))[1])
    return calls


def test_diffusers_layout_is_neither_copied_nor_changed(as_gpu):
    q, k, v = tensors()
    o = attend("nunchaku_int8_16bit", q, k, v)
    true = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert o.is_contiguous() and o.shape == q.shape and relative(o, true) < 0.02


def test_the_scale_reaches_the_kernels(as_gpu):
    q, k, v = tensors()
    o, default = (attend("nunchaku_int8_16bit", q, k, v, scale=scale) for scale in (0.02, None))
    true = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=0.02).transpose(1, 2)
    assert relative(o, true) < 0.02 < relative(default, true)


def test_compiled_as_one_graph(flux, as_gpu):
    model, inputs = flux
    model.set_attention_backend("nunchaku_int8")
    expected = run(model, inputs)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs), expected)
    assert not refusals()


def test_compiled_as_one_graph_where_it_falls_back(flux, caplog):
    model, inputs = flux
    expected = run(model, inputs)
    model.set_attention_backend("nunchaku_int8")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, inputs), expected)
    said, = (record.message for record in caplog.records if record.name == "nunchaku_py")
    assert said.startswith("attention: nunchaku_int8 leaves calls") and said.endswith("because the tensors are on cpu")


def test_a_copied_model_keeps_it(flux, as_gpu):
    model, inputs = flux
    model.set_attention_backend("nunchaku_int8")
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(run(again, inputs), run(model, inputs)) and not refusals()


@pytest.mark.parametrize("name, calls", [("z_image", 4), ("qwen_image", 2)])
def test_other_models_that_come_by_run_as_before(name, calls, flux, as_gpu):
    """… after one of them was set, which sets the default of all: with what the kernels do not compute."""
    model, inputs = MODELS[name]()
    expected = run(model, inputs)
    flux[0].set_attention_backend("nunchaku_int8")
    assert torch.equal(run(model, inputs), expected) and sum(refusals().values()) == calls


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart", "sana", "cogvideox"])
def test_models_whose_processors_call_torch_are_not_reached(name, as_gpu):
    model, inputs = MODELS[name]()
    expected = run(model, inputs)
    assert attention_backend.attention_lines(model) == []
    model.set_attention_backend("nunchaku_int8")
    assert torch.equal(run(model, inputs), expected) and not refusals()
    line, = attention_backend.attention_lines(model)
    assert line.endswith("modules: their processors take no backend, and call torch themselves")


def test_resetting_a_model_leaves_the_default_of_the_process(flux, as_gpu):
    """… as diffusers does: the way back is to set "native"."""
    model, inputs = flux
    expected = run(model, inputs)
    model.set_attention_backend("nunchaku_int8")
    set_, _ = run(model, inputs), model.reset_attention_backend()
    assert torch.equal(run(model, inputs), set_) and "nunchaku_int8" in attention_backend.attention_lines(model)[0]
    model.set_attention_backend("native")
    assert torch.equal(run(model, inputs), expected) and attention_backend.attention_lines(model) == []


# ------------------------------------------------------------------------------------------------------------ fallbacks
MASK = torch.zeros(5, 7, dtype=torch.bfloat16)


@pytest.mark.parametrize("make, more, sentence", [
    (tensors, {"attn_mask": MASK}, "a mask is asked for"),
    (tensors, {"is_causal": True}, "causal order is asked for"),
    (tensors, {"dropout_p": 1e-9}, "dropout is asked for"),
    (tensors, {"enable_gqa": True}, "groups of heads that share keys is asked for"),
    (lambda: tensors(dtype=torch.float32), {}, "it computes in bfloat16 or float16, not float32"),
    (lambda: tensors(40), {}, "it takes heads of 64 or 128 channels, not 40"),
    (lambda: [t.requires_grad_() for t in tensors()], {}, "it has no gradients"),
    (lambda: [t.mT.contiguous().mT for t in tensors()], {}, "the channels of q are not side by side in memory"),
])
def test_what_it_cannot_do_goes_to_diffusers(make, more, sentence, as_gpu, caplog):
    q, k, v = make()
    for _ in range(3):
        assert torch.equal(attend("nunchaku_int8", q, k, v, **more), attend("native", q, k, v, **more))
    assert refusals() == {sentence: 3}
    told = [record for record in caplog.records if record.name == "nunchaku_py"]
    assert [record.levelno for record in told] == [logging.WARNING] and told[0].message.endswith(f"because {sentence}")


def test_a_compiler_meets_any_of_them(as_gpu):
    torch._dynamo.reset()
    call = torch.compile(lambda *args, **more: attend("nunchaku_int8", *args, **more), fullgraph=True,
                         backend="aot_eager")
    for args, more in ((tensors(), {"attn_mask": MASK}), (tensors(40), {}), (tensors(), {"scale": 0.2})):
        assert relative(call(*args, **more), attend("native", *args, **more)) < 0.05
    assert refusals() == {"a mask is asked for": 1, "it takes heads of 64 or 128 channels, not 40": 1}


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiler_meets_several_scales(dynamic, as_gpu):
    """… the second of which it would leave open."""
    torch._dynamo.reset()
    call = torch.compile(lambda *args: attend("nunchaku_int8_16bit", *args[:3], scale=args[3]), fullgraph=True,
                         backend="aot_eager", dynamic=dynamic)
    for scale in (0.1, 0.2, 0.4, 1):
        q, k, v = tensors()
        assert relative(call(q, k, v, scale), attend("native", q, k, v, scale=scale)) < 0.03
    assert not refusals()


def test_gradients_flow(as_gpu):
    q, k, v = (t.requires_grad_() for t in tensors())
    attend("nunchaku_int8", q, k, v).float().sum().backward()
    assert v.grad is not None and v.grad.abs().sum() > 0
    with torch.no_grad():
        attend("nunchaku_int8", q, k, v)
    assert refusals() == {"it has no gradients": 1}


def test_context_parallelism_is_diffusers_own(as_gpu, monkeypatch):
    assert _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName("nunchaku_int8"))
    seen = []
    monkeypatch.setattr(dispatch, "_templated_context_parallel_attention",
                        lambda *args, _parallel_config, **more: seen.append(_parallel_config) or args[0])
    attend("nunchaku_int8", *tensors(), parallel_config="a configuration")
    assert seen == ["a configuration"] and refusals() == {"context parallelism is asked for": 1}


def test_another_backend_that_is_forced_is_heeded(as_gpu):
    q, k, v = tensors()
    with nq.ops.backend("torch"):
        assert torch.equal(attend("nunchaku_int8", q, k, v), attend("native", q, k, v))
    assert refusals() == {"the backend torch is asked for, and not triton": 1}


def test_autocast_says_what_it_wants(as_gpu):
    with torch.autocast("cpu", torch.bfloat16):
        assert attend("nunchaku_int8", *tensors()).dtype == torch.bfloat16 and not refusals()
        assert attend("nunchaku_int8", *tensors(dtype=torch.float16)).dtype == torch.bfloat16
    assert refusals() == {"autocast wants another dtype": 1}


def test_shapes_that_diffusers_refuses_are_refused_by_diffusers():
    q, k, v = tensors()
    with pytest.raises(RuntimeError):
        attend("nunchaku_int8", q, k[..., :32], v[..., :32])


# -------------------------------------------------------------------------------------------------------------- explain
def test_explain_says_where_attention_runs(flux, monkeypatch):
    model, _ = flux
    nq.quantize(model, QUICK)
    assert nq.explain(model).attention == []
    model.set_attention_backend("nunchaku_int8")
    kind = "attention nunchaku_int8, 4 modules with heads of 64 channels: runs on "
    line = kind + "diffusers' native backend, because the tensors are on cpu"
    assert nq.explain(model).attention == [line] and str(nq.explain(model)).endswith(line)


def test_explain_says_that_it_runs_on_triton(flux, as_gpu):
    flux[0].set_attention_backend("nunchaku_int8_16bit")
    assert attention_backend.attention_lines(flux[0]) == [
        "attention nunchaku_int8_16bit, 4 modules with heads of 64 channels: runs on triton; what goes to diffusers' "
        "native backend is logged"]
