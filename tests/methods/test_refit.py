import torch

from nunchaku_py.methods.error import output_error
from nunchaku_py.methods.fit import fit
from nunchaku_py.methods.gptq import damping
from nunchaku_py.methods.lowrank import lowrank
from nunchaku_py.methods.refit import leading, refit, survival, target, weighed
from tests.methods.layers import CTX, small


def prepared(**more):
    work, held_out = small(**more)
    lowrank(work, CTX)
    fit(work, CTX)
    return work, held_out


def test_is_the_closed_form():
    work, _ = prepared()
    rate, weigh = survival(work, CTX), weighed(work, CTX, torch.eye(160))
    up, low = leading(work, CTX, rate)
    b = target(work, CTX, slice(None), rate)
    root = torch.linalg.cholesky(weigh.double())
    u = torch.linalg.svd(b.double() @ root).U[:, :8]
    best = ((b.double() - u @ u.T @ b.double()) @ root).norm()
    assert ((b - up @ low).double() @ root).norm() <= 1.002 * best


def test_helps_on_held_out_tokens_and_is_never_kept_when_it_does_not():
    work, held_out = prepared()
    before, seen_before = output_error(work, CTX, tokens=held_out), output_error(work, CTX)
    refit(work, CTX)
    assert output_error(work, CTX, tokens=held_out) < before and output_error(work, CTX) < seen_before
    up = work.up.clone()
    work.stats.gram = torch.diag(torch.rand(160, generator=torch.Generator().manual_seed(0)))  # a misleading one
    after = output_error(work, CTX)
    refit(work, CTX)
    assert output_error(work, CTX) == after and torch.equal(up, work.up)


def test_without_a_gram_matrix_and_without_rank():
    work, _ = prepared()
    before, work.stats.gram = output_error(work, CTX), None
    refit(work, CTX)
    assert output_error(work, CTX) <= before
    none, _ = prepared(rank=0)
    refit(none, CTX)
    assert none.up.shape[1] == 0


def test_damping_is_that_of_gptq():
    work, _ = prepared()
    plain = work.stats.gram.diagonal()
    found = weighed(work, CTX, torch.eye(160)).diagonal()
    assert torch.allclose(found - plain, damping(work, CTX) * plain.mean(), rtol=1e-2)
