"""Dispatch, refusals, and the ops as torch.compile sees them."""
import pytest
import torch

from nunchaku_py import ops
from nunchaku_py.errors import NunchakuError
from nunchaku_py.ops import OPS, ActSpec, backend
from nunchaku_py.ops.registry import Backend, own_choice
from tests.ops.helpers import ACTS_OF, ENDINGS, SHAPES, op_args

LINEARS = [family + ending for family in ACTS_OF for ending in ENDINGS]


def results(value):
    return value if isinstance(value, tuple) else (value,)


def same(a, b):
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
               for x, y in zip(map(torch.Tensor.contiguous, results(a)), map(torch.Tensor.contiguous, results(b)),
                               strict=True) if x.numel() or y.numel())


@pytest.fixture
def fake_backend(monkeypatch):
    """Registers a backend of linear_w4a8 that answers with a constant."""
    op = OPS["linear_w4a8"]

    def register(name, refuses, layouts=("row",)):
        def run(qx, sx, qw, sw, aux, h, up, bias, spec):
            return up.new_full((qx.shape[0], qw.shape[0]), 7.0)

        monkeypatch.setitem(op.backends, name, Backend(run, refuses, frozenset(layouts)))

    return register


def test_every_op_is_there_by_name():
    assert set(OPS) == {"quantize_act", "norm_modulate_quantize", "attention", *LINEARS}
    assert all(getattr(ops, name) is op and name in ops.__all__ for name, op in OPS.items())
    assert all(op.__doc__ and op.name == name for name, op in OPS.items())


def test_parameters_say_what_an_op_takes():
    names = [p.name for p in OPS["linear_w4a4_qkv_rope"].parameters]
    assert names == ["qx", "sx", "qw", "sw", "aux", "h", "up", "bias", "q_norm", "k_norm", "rotary", "spec"]


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_fake_results_look_like_real_ones(name, shape):
    args = op_args(name, shape)
    op = OPS[name]
    real = results(op(*args))
    with torch._subclasses.FakeTensorMode() as mode:
        tensors = [mode.from_tensor(a) for a in args if isinstance(a, torch.Tensor)]
        token = [args[-1].token] if op.spec_class else []
        fake = results(op.torch_op(*tensors, *token))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@pytest.mark.parametrize("name", sorted(OPS))
def test_opcheck(name):
    args = op_args(name)
    token = (args[-1].token,) if OPS[name].spec_class else args[-1:]
    torch.library.opcheck(OPS[name].torch_op, (*args[:-1], *token))


@pytest.mark.parametrize("name", sorted(OPS))
def test_compiles_without_a_break(name):
    args = op_args(name)
    op = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: op(*tensors, *args[len(tensors):]), fullgraph=True, backend="aot_eager")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    assert same(compiled(*tensors), op(*args))


def test_compiles_for_any_number_of_rows():
    torch._dynamo.reset()
    op, args = OPS["quantize_act"], op_args("quantize_act", (6, 131, 24, 5))
    compiled = torch.compile(lambda x: op(x, *args[1:]), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 5, 3):
        assert same(compiled(args[0][:rows]), op(args[0][:rows], *args[1:]))


def test_explain_names_every_backend(fake_backend):
    args = op_args("linear_w4a8")
    answers = OPS["linear_w4a8"].explain(*args)
    assert list(answers) == ["cuda", "triton", "cpu", "torch"] and answers["cuda"] != "can run"
    assert list(answers.values())[1:] == ["the tensors are on cpu", "can run", "can run"]
    fake_backend("triton", lambda *args: "needs a GPU")
    assert OPS["linear_w4a8"].explain(*args)["triton"] == "needs a GPU"


def test_the_first_that_does_not_refuse_runs(fake_backend):
    args = op_args("linear_w4a8")
    fake_backend("cuda", lambda *args: "needs a GPU")
    fake_backend("cpu", lambda *args: None)
    assert (OPS["linear_w4a8"](*args) == 7).all()
    fake_backend("cpu", lambda *args: "needs AVX2")
    assert not (OPS["linear_w4a8"](*args) == 7).all()


def test_forced_by_with_and_by_environment(fake_backend, monkeypatch):
    args = op_args("linear_w4a8")
    fake_backend("cpu", lambda *args: None)
    with backend("torch"):
        assert not (OPS["linear_w4a8"](*args) == 7).all()
        with backend("cpu"):
            assert (OPS["linear_w4a8"](*args) == 7).all()
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "torch")
    assert not (OPS["linear_w4a8"](*args) == 7).all()
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "gpu")
    with pytest.raises(NunchakuError, match="backend: expected one of cuda, triton, cpu, torch, got 'gpu'"):
        OPS["linear_w4a8"](*args)


def test_forcing_what_refuses_says_why(fake_backend):
    args = op_args("linear_w4a8")
    fake_backend("cuda", lambda *args: "needs a GPU")
    with backend("cuda"), pytest.raises(NunchakuError, match=r"linear_w4a8: .* \(cuda: needs a GPU\)"):
        OPS["linear_w4a8"](*args)
    with backend("triton"), pytest.raises(NunchakuError, match=r"\(triton: the tensors are on cpu\)"):
        OPS["linear_w4a8"](*args)
    with pytest.raises(NunchakuError, match="got 'gpu'"), backend("gpu"):
        pass


def test_own_choice_is_free_of_what_is_asked_for(fake_backend, monkeypatch):
    args = op_args("linear_w4a8")
    fake_backend("cpu", lambda *args: None)
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "torch")
    with backend("torch"), own_choice():
        assert (OPS["linear_w4a8"](*args) == 7).all()
        with backend("torch"):
            assert not (OPS["linear_w4a8"](*args) == 7).all()


def test_a_foreign_layout_is_refused_by_all_but_its_backend(fake_backend):
    *tensors, spec = op_args("linear_w4a8")
    tiles = type(spec)(spec.weight, spec.group, spec.k, ActSpec("int8", layout="tiles"), layout="tiles")
    sentence = "a tensor is laid out as 'tiles', this backend takes 'row'"
    assert OPS["linear_w4a8"].explain(*tensors, tiles)["torch"] == sentence
    with pytest.raises(NunchakuError, match=f"triton: the tensors are on cpu; .* torch: {sentence}"):
        OPS["linear_w4a8"](*tensors, tiles)
    fake_backend("cpu", lambda *args: None, layouts=("tiles",))
    assert (OPS["linear_w4a8"](*tensors, tiles) == 7).all()


def test_a_backend_must_have_the_ops_parameters():
    with pytest.raises(TypeError, match="linear_w4a8/cpu: parameters"):
        OPS["linear_w4a8"].backend("cpu")(lambda x, w: None)
