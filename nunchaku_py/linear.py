"""QuantLinear: the module that stands where nn.Linear stood. Its 1×1-convolution twin is in conv.py.

The canonical tensors are parameters (so offload hooks move them); what packing derives from them for one device and
mode are non-persistent buffers (so state_dict() stays canonical). Packing happens when a mode is set, on a move to a
GPU, and else at the first call.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .backends import cpu, cuda, triton
from .division import undivided
from .errors import NunchakuError
from .gradient import StraightThrough, wants_gradient
from .input_key import InputKey, digest_of, input_key
from .lora.branch import Adapter, Columns, InputGroup, Room, own_columns
from .module_tools import Berth, data_of, dtype_name, filled, is_offloaded, move_only, nothing, used_on
from .precision import as_autocast, without_autocast
from .site import (
    MODES,
    Mode,
    Packing,
    QuantizedInput,
    Residency,
    Site,
    SiteTensors,
    auto_mode,
    auto_weights,
    shift_correction,
)
from .tensor import QTensor

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DERIVED = ("inv_smooth", "folded_codes", "folded_scales", "unshift", "mma_scales", "kernel_bias")
LINEAR_OPS = {"int4": ops.linear_w4a4, "uint4": ops.linear_w4a4, "nvfp4": ops.linear_w4a4,
               "int8": ops.linear_w4a8, "none": ops.linear_w4a16}


class QuantizedSite(nn.Module):
    """What linears and 1×1 convolutions share: tensors, packing, and rows → rows."""

    is_nunchaku_quantized = True
    _is_hf_initialized = True
    berth: Berth | None = None  # given by nq.offload

    def _declare(self, site: Site, n: int, k: int, bias: bool, dtype: torch.dtype) -> None:
        self.site, self.rows_out, self.rows_in = site, n, k
        self.file_dtype = dtype  # 16 bit, of the stored tensors: casting the module never changes it
        self.compute_dtype = dtype
        self.requested_mode: str = "auto"
        self.requested_weights: str = "auto"
        self.row_dtype: torch.dtype | None = None  # of the rows that came last; None: since a move or cast, none has
        self.packed: Packing | None = None
        self.input_key: InputKey | None = None
        self.group: InputGroup | None = None  # with whom it may share its input
        self.adapters: tuple[Adapter, ...] = ()  # folded into the branch, see lora/branch.py
        self.adapter_room = Room()
        self.table: Any = None  # of a modulation linear: see tables/
        self.set_branch(None, None, None, "")
        for name, (shape, kind) in site.tensors(n, k, bias, dtype).items():
            empty = torch.empty(shape, dtype=kind, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if not bias:
            self.register_parameter("bias", None)
        self._unpack()

    # ------------------------------------------------------------------------------------------------- tensors
    def tensor_dtypes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype) the file must hold; the bias may also be 32 bit."""
        has_bias = self._parameters.get("bias") is not None
        return self.site.tensors(self.rows_out, self.rows_in, has_bias, self.file_dtype)

    def set_tensor(self, name: str, tensor: Tensor, label: str | None = None) -> None:
        """Put one canonical tensor in place, refusing in a sentence what does not fit."""
        shape, dtype = self.tensor_dtypes()[name]
        dtypes = (dtype, torch.float32, torch.bfloat16, torch.float16) if name == "bias" else (dtype,)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise NunchakuError(f"{label or name}: expected {shape} {dtype_name(dtype)}, "
                                f"got {tuple(tensor.shape)} {dtype_name(tensor.dtype)}")
        self._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        self._unpack()

    def set_tensors(self, tensors: SiteTensors, label: str = "") -> None:
        for name, tensor in tensors.named().items():
            self.set_tensor(name, tensor, f"{label}.{name}" if label else name)

    def qtensor(self) -> QTensor:
        get = self._parameters.get
        return QTensor(self.codes.data, self.scales.data, self.site.weight_format, self.rows_in,
                       data_of(get("zeros")), data_of(get("channel_scale")))

    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())

    # ------------------------------------------------------------------------------------------------- packing
    @property
    def mode(self) -> Mode:  # what the site runs in, on the device where it is
        if self.site.kind == "w4a16" or self.requested_mode == "auto":
            return auto_mode(self.site, used_on(self))
        return self.requested_mode

    def set_mode(self, mode: str, now: bool = True) -> None:
        """Choose the activation mode; now=False leaves packing to the first call or move."""
        if mode != "auto" and mode not in MODES:
            raise NunchakuError(f"mode: expected 'auto', 'a4', 'a8' or 'a16', got {mode!r}")
        if mode != self.requested_mode:
            self.requested_mode = mode
            self._unpack()
        if now and self.has_data():
            self.pack()

    def set_weights(self, weights: str) -> None:
        """How mode a8 holds the weight on a GPU: see nq.set_weights."""
        if weights != self.requested_weights:
            self.requested_weights = weights
            self._unpack()
        if self.has_data():
            self.pack()

    def has_data(self) -> bool:
        """False on the meta device, and in host memory, where offloading leaves the tensors between calls."""
        return not (self.berth and self.berth.away or any(p.is_meta for p in self.parameters(recurse=False)))

    @torch.no_grad()
    def pack(self) -> None:
        """Derive what the ops want on this device in this mode."""
        if not self.has_data():
            raise NunchakuError("this quantized linear has no weights yet (meta device): load them before running it")
        if self.packed == (wanted := self._wanted()):
            return
        if torch.compiler.is_compiling():
            raise NunchakuError("this model is not packed for its device: nq.set_mode(model, 'auto') before compiling")
        self.packed, self.linear_spec = wanted, self.site.linear_spec(wanted.mode, self.rows_in, wanted.residency)
        with without_autocast(wanted.device):
            codes, scales = self._fold()
            self._derive("inv_smooth", 1.0 / self.smooth.data.float() if self.site.has_smooth else None)
            self._derive("folded_codes", codes)
            self._derive("folded_scales", scales)
            self._derive("unshift", self.correction() if self.site.shift and wanted.mode != "a4" else None)
            scales = cuda.packed_scales(self.scales.data, wanted.dtype) if wanted.residency == "mma" else None
            self._derive("mma_scales", scales)
            gpu = wanted.mode != "a16" and cuda.asked_for(self.codes.device)
            self._derive("kernel_bias", self._bias().float() if gpu else None)
        self.input_key = self._input_key()

    def _wanted(self) -> Packing:
        return Packing(mode := self.mode, self._residency(mode), used_on(self).type, self._packing_dtype(mode))

    def _packing_dtype(self, mode: Mode) -> torch.dtype | None:
        """The CUDA kernels of a4 want their scales in the type of the rows; those of a8 have no float32."""
        if mode == "a16" or not cuda.asked_for(used_on(self)):
            return None
        dtype = self._row_dtype()
        return dtype if mode == "a4" or dtype == torch.float32 else None

    def _row_dtype(self) -> torch.dtype:
        return self.row_dtype or self.compute_dtype

    def _residency(self, mode: Mode) -> Residency:
        """4 bits where kernels take them so, or fold them as they read; on a GPU also where INT8 is too much."""
        if mode == "a4" and self.why_not_mma() is None:
            return "mma"
        scaled = self.site.linear_spec(mode, self.rows_in, "scaled")
        device, dtype, offloaded = self.codes.device, self._row_dtype(), is_offloaded(self)
        if not scaled.row_scales:
            return "codes"
        if cuda.expands(scaled, self.rows_out, device, dtype) or triton.expands(scaled, device, dtype):
            wanted = auto_weights(device) if self.requested_weights == "auto" else self.requested_weights
            return "scaled" if offloaded or wanted == "int4" else "folded"
        return "scaled" if cpu.folds(scaled, device) else "codes" if offloaded else "folded"

    def why_not_mma(self) -> str | None:
        """Why the CUDA kernels do not multiply 4-bit activations by this site's weight."""
        spec = self.site.linear_spec("a4", self.rows_in)
        return cuda.why_not_packed(spec, self.rows_out, self.scales.data, self._row_dtype())

    def _fold(self) -> tuple[Tensor | None, Tensor | None]:
        """(folded_codes, folded_scales): INT8 and its scales; or none, and what stands in aux before channel_scale."""
        spec = self.linear_spec
        if spec.weight == "int8":
            return self.qtensor().fold_int8()
        if not spec.row_scales:
            return None, None
        weight, channel = self.qtensor(), self._parameters.get("channel_scale")
        scales = cpu.row_scales(weight) if weight.codes.device.type == "cpu" else weight.fold_int8()[1]
        return None, scales if channel is None else torch.cat((scales, channel.data))

    def _unpack(self) -> None:
        self.packed = self.input_key = self._digest = None
        for name in DERIVED:
            self._derive(name, None)

    def ensure_packed(self, dtype: torch.dtype | None = None) -> None:
        """Before every call, with the dtype of its rows: offloading may have moved the tensors, or hooked itself on."""
        here, looks = self.packed, not torch.compiler.is_compiling()
        if looks and dtype not in (None, self.row_dtype):
            self.row_dtype = dtype
        stale = here is None or here.device != used_on(self).type
        if not stale and (looks or here.dtype):  # a compiler cannot look who is asked for; without a dtype it suits all
            stale = here.dtype != self._packing_dtype(here.mode)
        if stale or (self.folded_codes is not None and is_offloaded(self)):
            self.pack()

    def correction(self) -> Tensor:
        return shift_correction(self.qtensor(), self.smooth.data, self.site.shift)

    def _input_key(self) -> InputKey | None:
        """What the quantized input depends on: sites with equal keys share it. Modulation sites quantize nothing."""
        if not self.site.has_smooth:
            return None
        return input_key(self.linear_spec.act.token, self.input_digest() + self.branch_name)

    def input_digest(self) -> str:
        """Of the stored tensors that its input is quantized with."""
        if self._digest is None:
            self._digest = digest_of((self.smooth.data, *([self.down.data] if self.site.rank else [])))
        return self._digest

    def _derive(self, name: str, value: Tensor | None) -> None:
        """A non-persistent buffer where there is a tensor, else a plain None: offload hooks trip over empty buffers."""
        self._buffers.pop(name, None)
        self.__dict__.pop(name, None)
        if value is None:
            self.__dict__[name] = None
        else:
            self.register_buffer(name, value, persistent=False)

    # ----------------------------------------------------------------------------------------------- execution
    def set_branch(self, down: Tensor | None, up: Tensor | None, columns: Columns | None, name: str) -> None:
        """What stands for the stored down and up: with the adapters of all who share the input, and its own. columns:
        where in h its own stand; name: tells one such down from all others."""
        self._derive("adapter_down", down)
        self._derive("adapter_up", up)
        self.adapter_columns, self.branch_name = columns, name
        self.input_key = None if self.packed is None else self._input_key()

    def branch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down, up) in the activation dtype; rank 0 is a size, not None."""
        if self.adapter_down is not None:
            return self.adapter_down.to(dtype), self.adapter_up.to(dtype)
        if self.site.rank:
            return self.down.to(dtype), self.up.to(dtype)
        kind = {"dtype": dtype, "device": self.codes.device}
        return torch.empty(0, self.rows_in, **kind), torch.empty(self.rows_out, 0, **kind)

    def quantize_input(self, rows: Tensor) -> QuantizedInput:
        """rows (M,K) → what `multiply` of this site, and of every site of its group, takes."""
        self.ensure_packed(rows.dtype)
        rows = rows.contiguous()  # the same bits however the input lay in memory
        down, _ = self.branch(rows.dtype)
        if not self.site.has_smooth:
            empty = torch.empty(0, dtype=torch.float32, device=rows.device)
            return QuantizedInput(rows, empty, (rows.float() @ down.float().T).float())
        return QuantizedInput(*ops.quantize_act(rows, self.inv_smooth, down, self.linear_spec.act))

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(qw, sw, aux, up, bias) as the linear ops take them."""
        self.ensure_packed(dtype)
        _, up = self.branch(dtype)
        if self.mma_scales is not None:
            return self.codes, self.mma_scales, self._aux(up), up, self.kernel_bias
        bias = self._bias() if self.kernel_bias is None else self.kernel_bias
        if self.folded_codes is not None:
            return self.folded_codes, self.folded_scales, up.new_empty(0), up, bias
        return self.codes, self.scales, self._aux(up) if self.folded_scales is None else self.folded_scales, up, bias

    def _bias(self) -> Tensor:
        """A mode that does not shift takes the correction back. A part of a linear leaves both to the whole."""
        if self.bias is None:
            return torch.zeros(self.rows_out, device=self.codes.device)
        return self.bias if self.unshift is None else self.bias.float() + self.unshift

    def _aux(self, like: Tensor) -> Tensor:
        if self.site.format == "nvfp4":
            return self.channel_scale
        return self.zeros if self.site.format == "uint4" else like.new_empty(0)

    def product(self, x: QuantizedInput, dtype: torch.dtype) -> ops.Call:
        """Quantized rows → y (M,N), not computed yet."""
        qw, sw, aux, up, bias = self.operands(dtype)
        op = LINEAR_OPS[self.linear_spec.act.format]
        h = x.h if self.adapter_columns is None else own_columns(x.h, self.adapter_columns)
        return ops.Call(op, (x.qx, x.sx, qw, sw, aux, h, up, bias, self.linear_spec))

    def multiply(self, x: QuantizedInput, dtype: torch.dtype) -> Tensor:
        return self.product(x, dtype).run()

    def apply_rows(self, rows: Tensor) -> Tensor:
        rows = as_autocast(rows)
        if wants_gradient(rows):
            return StraightThrough.apply(rows, self)
        return self.multiply(self.quantize_input(rows), rows.dtype)

    # ------------------------------------------------------------------------------------- the nn.Module surface
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves follow; casts do not reach the stored tensors (their bits are the model) but set the compute dtype."""
        device, before = self.codes.device, self._row_dtype()
        move = move_only if self.table is None else self.table.move
        super()._apply(lambda tensor: move(fn, tensor), recurse)
        wanted = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        self.compute_dtype = wanted if wanted in COMPUTE_DTYPES else self.compute_dtype
        self.row_dtype = None
        if self.codes.device.type != device.type or before != self.compute_dtype:
            self._follow()
        return self

    def _follow(self) -> None:
        """After a move or a cast: what is packed is kept where the same is wanted here; what a GPU's kernels want of it
        waits, being little, as offloading moves back and forth."""
        here = self._wanted() if self.has_data() else None
        if here is None or self.packed is None:
            self._unpack()
        elif self.packed[:2] == here[:2] and self.packed.dtype == here.dtype:
            self.packed = here
            return
        elif here.device == "cuda" or self.mma_scales is None:
            self._unpack()
        if self.codes.device.type == "cuda" and self.has_data():
            self.pack()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name, (_, dtype) in self.tensor_dtypes().items():
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != dtype and name != "bias":
                errors.append(f"{prefix}{name}: expected {dtype_name(dtype)}, got {dtype_name(found.dtype)}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in self._parameters):  # not where an adapter is loaded beside it
            self._unpack()

    def _shim(self, *shape: int) -> Tensor:
        return nothing(shape, self.compute_dtype, self.codes.device if self.table is None else self.table.device(self))

    def effective_weight(self) -> Tensor:
        """(N,K) fp32: the weight of the 16-bit model that this site stands for, adapters included."""
        return undivided(self.weight_with(self.folded()), self)

    def folded(self) -> tuple[Tensor, Tensor, Columns] | None:
        """What set_branch was given, where it stands for more than the stored branch."""
        return None if self.adapter_down is None else (self.adapter_down, self.adapter_up, self.adapter_columns)

    def weight_with(self, folded: tuple[Tensor, Tensor, Columns] | None) -> Tensor:
        """(N,K) fp32: what its input is multiplied by, as it arrives."""
        weight = self.qtensor().dequantize()
        if self.site.has_smooth:
            weight = weight / self.smooth.data.float()
        if folded is not None:
            down, up, columns = folded
            return weight + up.float() @ own_columns(down.T, columns).T.float()
        return weight + self.up.data.float() @ self.down.data.float() if self.site.rank else weight

    def effective_bias(self) -> Tensor | None:
        """(N): the bias without the shift correction, or None."""
        if not self.site.shift or self.bias is None:
            return data_of(self.bias)
        return self.bias.data.float() + self.correction()

    def describe(self) -> str:
        rank = f", rank={self.site.rank}" if self.site.rank else ""
        return f"{self.site.kind} {self.site.format} g{self.site.group}{rank}, mode={self.mode}"


class QuantPart(QuantizedSite):
    """A quantized linear over some input columns of another. No nn.Linear: offload hooks take the whole linear."""

    def __init__(self, site: Site, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._declare(site, out_features, in_features, bias, dtype)

    @property
    def weight(self) -> Tensor:
        return self._shim(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) if self.table is None else self.table.answer(self, x)

    def run(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise NunchakuError(f"input: expected (…, {self.in_features}), got {tuple(x.shape)}")
        return self.apply_rows(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.describe()}"


class QuantLinear(QuantPart, nn.Linear):
    """A quantized nn.Linear; looks like one to diffusers and PEFT (in_features, out_features, weight, bias)."""

    def dense(self) -> nn.Linear:
        """A 16-bit nn.Linear with the same weights."""
        bias = self.effective_bias()
        out = nn.Linear(self.in_features, self.out_features, bias is not None, self.codes.device, self.compute_dtype)
        return filled(out, self.effective_weight(), undivided(bias, self))
