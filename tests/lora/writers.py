"""Random LoRAs, and savers that write one as each trainer does. Names are spelled out here, not taken from `lora`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nunchaku_py.lora.delta import Delta, Target

State = dict[str, Tensor]
PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")
FLUX_FUSED = {
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{n}" for n in "qkv"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{n}_proj" for n in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks.{}.txt_mod.lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks.{}.linear1": [f"single_transformer_blocks.{{}}.attn.to_{n}" for n in "qkv"]
    + ["single_transformer_blocks.{}.proj_mlp"],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.proj_out"],
    "single_blocks.{}.modulation.lin": ["single_transformer_blocks.{}.norm.linear"],
}
FLUX2_FUSED = {name: modules for name, modules in FLUX_FUSED.items() if "attn" in name} | {
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.linear_in"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.linear_out"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.linear_in"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.linear_out"],
    "single_blocks.{}.linear1": ["single_transformer_blocks.{}.attn.to_qkv_mlp_proj"],
    "single_blocks.{}.linear2": ["single_transformer_blocks.{}.attn.to_out"],
}
SD3_FUSED = {
    "joint_blocks.{}.x_block.attn.qkv": [f"transformer_blocks.{{}}.attn.to_{n}" for n in "qkv"],
    "joint_blocks.{}.context_block.attn.qkv": [f"transformer_blocks.{{}}.attn.add_{n}_proj" for n in "qkv"],
    "joint_blocks.{}.x_block.attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "joint_blocks.{}.x_block.mlp.fc1": ["transformer_blocks.{}.ff.net.0.proj"],
    "joint_blocks.{}.context_block.mlp.fc2": ["transformer_blocks.{}.ff_context.net.2"],
    "joint_blocks.{}.x_block.adaLN_modulation.1": ["transformer_blocks.{}.norm1.linear"],
}
Z_IMAGE_FUSED = {f"{blocks}.{{}}.attention.{name}": [f"{blocks}.{{}}.attention.{own}" for own in modules]
                 for blocks in ("layers", "noise_refiner", "context_refiner")
                 for name, modules in {"qkv": ["to_q", "to_k", "to_v"], "out": ["to_out.0"]}.items()}
WAN_FUSED = {f"blocks.{{}}.{name}": [f"blocks.{{}}.{own}"] for name, own in {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}.items()}
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": FLUX_FUSED["double_blocks.{}.img_attn.qkv"],
    "double_blocks.{}.processor.qkv_lora2": FLUX_FUSED["double_blocks.{}.txt_attn.qkv"],
    "double_blocks.{}.processor.proj_lora1": FLUX_FUSED["double_blocks.{}.img_attn.proj"],
    "double_blocks.{}.processor.proj_lora2": FLUX_FUSED["double_blocks.{}.txt_attn.proj"],
    "single_blocks.{}.processor.qkv_lora": [f"single_transformer_blocks.{{}}.attn.to_{n}" for n in "qkv"],
    "single_blocks.{}.processor.proj_lora": ["single_transformer_blocks.{}.proj_out"],
}


def target_of(model: nn.Module) -> Target:
    return Target(type(model).__name__, {name: tuple(module.weight.shape) for name, module in model.named_modules()
                                         if isinstance(module, nn.Linear | nn.Conv2d)})


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_lora(modules: Mapping[str, tuple[int, ...]], rank: int = 4, alpha: float = 2.0,
                dtype: torch.dtype = torch.bfloat16, shared: Mapping[str, int] | None = None) -> dict[str, Delta]:
    """`shared`: module → number; modules of one number have the same down, as those of a fused weight do."""
    lora = {}
    for n, (name, shape) in enumerate(modules.items()):
        down = normal((shared or {}).get(name, 1000 + n), rank, *shape[1:]).to(dtype)
        up = normal(n, shape[0], rank, *(1,) * (len(shape) - 2)).to(dtype)
        lora[name] = Delta(down, up, alpha)
    return lora


def blocks(table: Mapping[str, list[str]], target: Target, count: int = 2) -> dict[str, list[str]]:
    """The rows of a table for every block that the model has."""
    rows = {name.format(n): [module.format(n) for module in modules] for name, modules in table.items()
            for n in range(count)}
    return {name: modules for name, modules in rows.items() if all(module in target.shapes for module in modules)}


def lora_of(table: Mapping[str, list[str]], target: Target, **more: object) -> dict[str, Delta]:
    """A LoRA of just the modules of a table, that a file with fused names can hold."""
    shared = {module: 5000 + n for n, modules in enumerate(table.values()) for module in modules}
    return random_lora({module: target.shapes[module] for module in shared}, shared=shared, **more)


def write(lora: Mapping[str, Delta], name: Callable[[str], str], parts: tuple[str, str] = PEFT,
          alpha: str | None = ".alpha") -> State:
    """One pair of keys per module: name(module) + part."""
    return write_fused(lora, {module: [module] for module in lora}, name, parts, alpha)


def write_fused(lora: Mapping[str, Delta], table: Mapping[str, list[str]], name: Callable[[str], str],
                parts: tuple[str, str] = PEFT, alpha: str | None = ".alpha") -> State:
    state = {}
    for foreign, modules in table.items():
        stem, first = name(foreign), lora[modules[0]]
        state[stem + parts[0]] = first.down
        state[stem + parts[1]] = torch.cat([lora[module].up for module in modules])
        if alpha is not None:
            state[stem + alpha] = torch.tensor(first.alpha)
    return state


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flattened(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def assert_same(got: Mapping[str, Delta], want: Mapping[str, Delta]) -> None:
    assert set(got) == set(want)
    for name, delta in want.items():
        assert got[name].down.dtype == delta.down.dtype and got[name].alpha == delta.alpha, name
        assert torch.equal(got[name].down, delta.down) and torch.equal(got[name].up, delta.up), name


def change(delta: Delta) -> Tensor:
    """alpha/r · up·down in fp64, (N, K)."""
    return delta.alpha / delta.rank * (delta.up.double().flatten(1) @ delta.down.double().flatten(1))
