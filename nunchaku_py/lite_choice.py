"""Who runs diffusers' `nunchaku_lite` folders: diffusers' own quantizer, or ours.

    auto    ours where diffusers would refuse: without CUDA, without its kernels, on GPUs that those do not know
    always  ours everywhere
    never   diffusers' own everywhere

Set by `nq.set_nunchaku_lite`, else by the environment variable NUNCHAKU_PY_LITE; "auto" if by neither. `nq.load` always
takes ours."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import NunchakuError

CHOICES = ("auto", "always", "never")
VARIABLE = "NUNCHAKU_PY_LITE"
log = logging.getLogger("nunchaku_py")
_chosen: list[str] = []  # by set_nunchaku_lite; none yet: the environment says
_loading: ContextVar[bool] = ContextVar("nunchaku_lite_is_ours", default=False)
_told: set[str] = set()


def set_nunchaku_lite(choice: str) -> None:
    """Who runs models of diffusers' `nunchaku_lite` folders that are loaded from now on: "auto" (ours where diffusers
    would refuse), "always" (ours) or "never" (diffusers' own). Goes before the environment's NUNCHAKU_PY_LITE."""
    if choice not in CHOICES:
        raise NunchakuError(f"set_nunchaku_lite: expected 'auto', 'always' or 'never', got {choice!r}")
    _chosen[:] = [choice]


def choice() -> str:
    if _chosen:
        return _chosen[0]
    found = os.environ.get(VARIABLE) or "auto"
    if found not in CHOICES:
        raise NunchakuError(f"{VARIABLE}: expected 'auto', 'always' or 'never', got {found!r}")
    return found


@contextmanager
def always_ours() -> Iterator[None]:
    """Whatever is loaded in here is ours."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def why_ours(refusal: Callable[[], str | None]) -> str | None:
    """The reason to take our quantizer, or None; `refusal` asks diffusers why it would not load the model."""
    if _loading.get():
        return "nq.load was asked for it"
    chosen = choice()
    if chosen != "auto":
        return "it was asked for: always" if chosen == "always" else None
    why = refusal()
    if why is not None and why not in _told:
        _told.add(why)
        log.info("nunchaku_lite: our kernels run it, as diffusers would not: %s", why)
    return why
