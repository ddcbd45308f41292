"""Finding blocks and linears by rule, and what is known of their inputs: which are shared, which come from a GELU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from .pattern import Pattern, Shared, matches

MIN_K, MIN_N = 32, 16  # below this the scales and the branch weigh as much as the 4-bit codes save

# Their minima are above -0.171875, the shift of INT4 sites: GELU -0.16997, its tanh form -0.17004, the sigmoid -0.1636.
GELU_CLASSES = frozenset(
    "GELU ApproximateGELU GELUActivation GELUTanh NewGELUActivation FastGELUActivation QuickGELUActivation "
    "AccurateGELUActivation".split()
)


def is_linear(module: nn.Module) -> bool:
    """A plain linear, or a convolution that is one: 1×1, stride 1, no groups, no padding."""
    if type(module) is nn.Linear:
        return True
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    n, k = linear.weight.shape[:2]
    return n, k


def is_gelu(module: nn.Module | None) -> bool:
    return type(module).__name__ in GELU_CLASSES


def blocks_of(model: nn.Module, pattern: Pattern | None = None) -> dict[str, nn.Module]:
    """Name → repeated block, in order of execution (as far as registration and `pattern.order` tell).

    Blocks are the modules of the classes declared in `_repeated_blocks`; else of those in `_no_split_modules` (which
    also names embeddings: only children of a ModuleList count); else the children of the outermost ModuleLists.
    """
    for names, listed in ((_declared(model, "_repeated_blocks"), False), (_declared(model, "_no_split_modules"), True)):
        found = _outermost(model, lambda name, module, n=names: type(module).__name__ in n)
        found = {name: module for name, module in found.items() if not listed or _is_item(model, name, module)}
        if found := _with_linears(found):
            break
    else:
        found = _with_linears(_outermost(model, lambda name, module: _is_item(model, name, module)))
    return _ordered(found, pattern.order if pattern else ())


def _declared(model: nn.Module, attribute: str) -> set[str]:
    """Class names in the attribute, of the model and of the modules in it (a ControlNet declares none itself)."""
    return {name for module in model.modules() for name in (getattr(type(module), attribute, None) or ())}


def _is_item(model: nn.Module, name: str, module: nn.Module) -> bool:
    """An item of a ModuleList, not a list itself: something whose forward is called."""
    parent, _, _ = name.rpartition(".")
    in_list = bool(parent) and isinstance(model.get_submodule(parent), nn.ModuleList)
    return in_list and not isinstance(module, nn.ModuleList)


def _outermost(model: nn.Module, wanted) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if name and not inside and wanted(name, module):
            found[name] = module
    return found


def _with_linears(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without blocks that hold no linear, quantized or not, or are one (the zero projections of a ControlNet)."""
    def counts(module: nn.Module) -> bool:
        return is_linear(module) or getattr(module, "is_nunchaku_quantized", False)

    return {name: block for name, block in found.items() if not counts(block) and any(map(counts, block.modules()))}


def _ordered(found: dict[str, nn.Module], order: tuple[str, ...]) -> dict[str, nn.Module]:
    def rank(name: str) -> int:
        return next((i for i, glob in enumerate(order) if fnmatchcase(name, glob)), len(order))

    return {name: found[name] for name in sorted(found, key=rank)}


def linears_in(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def shared_inputs(block: nn.Module, pattern: Pattern) -> list[tuple[str, ...]]:
    """Groups of linears of the block that read one input; each linear in one group at most."""
    linears, taken, groups = linears_in(block), set(), []
    for group in (*pattern.groups, *shared_children(block, pattern.shared, is_linear)):
        whole = all(name in linears and name not in taken for name in group)
        if whole and len({shape_of(linears[name])[1] for name in group}) == 1:
            groups.append(group)
            taken.update(group)
    return groups


def shared_children(block: nn.Module, rules: Iterable[Shared], linear: Callable[[nn.Module | None], bool]
                    ) -> Iterator[tuple[str, ...]]:
    """Names of the members of every rule that holds; `linear` says what counts as one."""
    for name, module in block.named_modules():
        for rule in rules:
            if rule.self_attention and reads_two_inputs(name, module):
                continue
            present = all(linear(getattr(module, child, None)) for child in rule.members)
            if present and has_child(module, rule.beside):
                yield tuple(f"{name}.{child}" if name else child for child in rule.members)


def has_child(module: nn.Module, name: str) -> bool:
    return not name or isinstance(getattr(module, name, None), nn.Module)


def reads_two_inputs(name: str, attention: nn.Module) -> bool:
    """Cross-attention: queries from one sequence, keys and values from another."""
    if hasattr(attention, "is_cross_attention"):
        return bool(attention.is_cross_attention)
    leaf = name.rpartition(".")[2].lower()
    return leaf.endswith("attn2") or any(part in leaf for part in ("cross", "_to_", "encdec", "encoder_attn"))


def after_gelu(block: nn.Module, pattern: Pattern) -> set[str]:
    """Linears of the block whose input is the output of a GELU."""
    found = {name for name in linears_in(block) if matches(name, pattern.gelu)}
    for name, module in block.named_modules():
        for child in _fed_by_gelu(module):
            found.add(f"{name}.{child}" if name else child)
    return found


def _fed_by_gelu(module: nn.Module) -> Iterator[str]:
    children = [(n, c) for n, c in module.named_children() if not isinstance(c, (nn.Dropout, nn.Identity))]
    if isinstance(module, nn.Sequential) or _is_feed_forward(module):
        for (_, before), (name, after) in zip(children, children[1:], strict=False):
            if is_gelu(before) and is_linear(after):
                yield name
    elif _is_two_layer_mlp([child for _, child in children]):
        yield [name for name, child in children if is_linear(child)][1]


def _is_feed_forward(module: nn.Module) -> bool:
    """`net` of diffusers' FeedForward: a list run from first to last."""
    return isinstance(module, nn.ModuleList) and len(module) > 1 and is_gelu(module[0])


def _is_two_layer_mlp(children: list[nn.Module]) -> bool:
    """Exactly two linears, the first as wide as the second reads, one GELU, and nothing else."""
    linears = [child for child in children if is_linear(child)]
    if len(linears) != 2 or len(children) != 3 or not any(is_gelu(child) for child in children):
        return False
    return shape_of(linears[0])[0] == shape_of(linears[1])[1]
