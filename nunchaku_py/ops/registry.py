"""An op is its plain PyTorch reference; a backend is a function of the same parameters plus a reason to refuse."""
from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from ..errors import NunchakuError
from ..precision import without_autocast
from .spec import ActSpec, AttentionSpec, LinearSpec

ORDER = ("cuda", "triton", "cpu", "torch")
ENVIRONMENT = "NUNCHAKU_PY_BACKEND"
_NONE = ""
OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library("nunchaku_py", "DEF")
_SPECS = {"ActSpec": ActSpec, "AttentionSpec": AttentionSpec, "LinearSpec": LinearSpec}
_forced: ContextVar[str | None] = ContextVar("nunchaku_py_backend", default=None)
Refusal = Callable[..., "str | None"]
Together = Callable[[Sequence[tuple]], list]


class Backend(NamedTuple):
    """`run` has the op's parameters; `refuses` has them too and says why it cannot take these, or None. `together`, if
    there is one, takes the arguments of several calls and gives the results of all."""

    run: Callable[..., Any]
    refuses: Refusal
    layouts: frozenset[str]
    together: Together | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it every op runs on the backend `name`, or says why that one cannot."""
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def own_choice() -> Iterator[None]:
    """Within it ops choose their backend whatever is asked for: for what is derived once from weights."""
    token = _forced.set(_NONE)
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str) -> str:
    if name not in ORDER:
        raise NunchakuError(f"backend: expected one of {', '.join(ORDER)}, got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend asked for: by `with backend(…)`, else by the environment; None if there is none."""
    name = _forced.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT)
    return _known(name) if name else None


def _takes_anything(*args: Any) -> None:
    return None


class Op:
    """Callable with exactly the reference's parameters, by position.

    reference: the formula in torch; its annotations say how many tensors come out and which spec, if any, comes last.
    fake: the same parameters → empty outputs of the right shape, dtype and device.
    check: the same parameters; raises NunchakuError for what no backend could take.
    """

    def __init__(
        self, reference: Callable[..., Any], fake: Callable[..., Any], check: Callable[..., None] = _takes_anything
    ):
        self.name, self.__doc__ = reference.__name__, reference.__doc__
        self.reference, self.check = reference, check
        self.parameters = tuple(inspect.signature(reference).parameters.values())
        self.spec_class = _SPECS.get(self.parameters[-1].annotation)
        self.backends: dict[str, Backend] = {}
        self.backend("torch")(reference)
        self._register(fake)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.dispatch(*args)
        return self.torch_op(*args[:-1], args[-1].token) if self.spec_class else self.torch_op(*args)

    def together(self, calls: Sequence[tuple]) -> list:
        """The results of calls of which none needs another's, given their arguments: by as few launches as the backend
        knows how. A compiler sees single calls."""
        if torch.compiler.is_compiling() or not calls:
            return [self(*args) for args in calls]
        names = [self._choose(args) for args in calls]
        run = self.backends[names[0]].together if len(set(names)) == 1 else None
        if run is None or len(calls) == 1:
            return [self._run(name, args) for name, args in zip(names, calls, strict=True)]
        with without_autocast(calls[0][0].device.type):
            return run(calls)

    def backend(
        self, name: str, refuses: Refusal = _takes_anything, layouts: tuple[str, ...] = ("row",),
        together: Together | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register a function as this op's backend `name`; `layouts`: the memory layouts it takes."""
        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            theirs, ours = list(inspect.signature(run).parameters), [p.name for p in self.parameters]
            if theirs != ours:
                raise TypeError(f"{self.name}/{name}: parameters {theirs} differ from the reference's {ours}")
            self.backends[_known(name)] = Backend(run, refuses, frozenset(layouts), together)
            return run

        return register

    def dispatch(self, *args: Any) -> Any:
        """Run on the first backend that does not refuse."""
        return self._run(self._choose(args), args)

    def _run(self, name: str, args: tuple) -> Any:
        with without_autocast(args[0].device.type):
            return self.backends[name].run(*args)

    def _choose(self, args: tuple) -> str:
        self.check(*args)
        forced = forced_backend()
        for name in (forced,) if forced else ORDER:
            if name in self.backends and self._refusal(name, args) is None:
                return name
        asked = {forced: self._refusal(forced, args)} if forced else self.explain(*args)
        refusals = "; ".join(f"{name}: {why}" for name, why in asked.items())
        raise NunchakuError(f"{self.name}: no backend takes this call ({refusals})")

    def explain(self, *args: Any) -> dict[str, str]:
        """Backend → why it refuses these arguments, or "can run"."""
        return {name: self._refusal(name, args) or "can run" for name in ORDER}

    def _refusal(self, name: str, args: tuple) -> str | None:
        found = self.backends.get(name)
        if found is None:
            return "not built"
        return found.refuses(*args) or self._refused_layout(found, args)

    def _refused_layout(self, found: Backend, args: tuple) -> str | None:
        layouts = args[-1].layouts if self.spec_class else ()
        foreign = [layout for layout in layouts if layout not in found.layouts]
        taken = ", ".join(sorted(found.layouts))
        return f"a tensor is laid out as '{foreign[0]}', this backend takes '{taken}'" if foreign else None

    def _register(self, fake: Callable[..., Any]) -> None:
        """The op as torch.compile sees it: tensors, and the spec as its token."""
        def with_spec(run: Callable[..., Any]) -> Callable[..., Any]:
            parse = self.spec_class.parse if self.spec_class else None
            return (lambda *args: run(*args[:-1], parse(args[-1]))) if parse else run

        _LIBRARY.define(self.name + self._schema())
        _LIBRARY.impl(self.name, with_spec(self.dispatch), "CompositeExplicitAutograd")
        torch.library.register_fake(f"nunchaku_py::{self.name}", with_spec(fake), lib=_LIBRARY)
        self.torch_op = getattr(torch.ops.nunchaku_py, self.name).default

    def _schema(self) -> str:
        tensors = [f"Tensor {p.name}" for p in self.parameters if p.annotation not in _SPECS]
        spec = [f"str {self.parameters[-1].name}"] if self.spec_class else []
        outputs = ["Tensor"] * str(inspect.signature(self.reference).return_annotation).count("Tensor")
        returns = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        return f"({', '.join(tensors + spec)}) -> {returns}"


class Call(NamedTuple):
    """An op and its arguments, not run yet."""

    op: Op
    args: tuple

    def run(self) -> Any:
        return self.op(*self.args)


def together(calls: Sequence[Call]) -> list:
    """The results of calls of which none needs another's; those of one op go together."""
    results: dict[int, Any] = {}
    for op in dict.fromkeys(call.op for call in calls):
        mine = [i for i, call in enumerate(calls) if call.op is op]
        results |= zip(mine, op.together([calls[i].args for i in mine]), strict=True)
    return [results[i] for i in range(len(calls))]
