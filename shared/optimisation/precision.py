"""Mixed precision: which number format a device computes fast in, and the scaling that fp16 needs."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shared import distributed


def fast_bf16(device: torch.device) -> bool:
    """Whether the device computes faster in bfloat16 than in float32.

    A CPU does with AMX, and with the bfloat16 instructions of AVX-512 where these run at full rate. Intel's cores that
    also have float16 instructions (Sapphire Rapids and later) leave such products to AMX: where a virtual machine hides
    it, bfloat16 takes twice the time of float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not have it
        has_float16 = capabilities.get("avx512_fp16", False)
        return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not has_float16)
    return False


class _NarrowMapsInFloat32(TorchFunctionMode):
    """Under bf16 autocast on a CPU: 2-d convolutions whose stride is longer than their input stay in float32.

    oneDNN's bfloat16 gradient of their weight reads memory that nobody has written: it is random and at times not
    finite. A ResNet meets them in its last stage, with views of 32 pixels or less.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.conv2d and _stride_exceeds_map(*args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                return function(*_in_float32(args), **{k: _in_float32(v) for k, v in kwargs.items()})
        return function(*args, **kwargs)


def _stride_exceeds_map(input, weight, bias=None, stride=1, *unused, **unused_too) -> bool:
    return min(input.shape[-2:]) < (stride if isinstance(stride, int) else max(stride))


def _in_float32(value):
    if isinstance(value, tuple):
        return tuple(map(_in_float32, value))
    return value.float() if isinstance(value, Tensor) else value


def autocast_again() -> contextlib.AbstractContextManager:
    """For a forward pass that ``torch.utils.checkpoint`` repeats: what it does not restore of :class:`Precision`."""
    return _NarrowMapsInFloat32() if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


class Precision:
    """Autocast for the forward pass and, for fp16, the scaling of the loss.

    Weights, losses and the optimiser stay in float32.

    Args:
        amp: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the device is fast in it, else fp16 on a GPU and
            float32 on a CPU.
        device: Where the forward pass runs.

    Raises:
        ValueError: For fp16 on a CPU, where gradients cannot be scaled reliably.
    """

    def __init__(self, amp: str, device: torch.device):
        if amp == "auto":
            amp = "bf16" if fast_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
        if amp == "fp16" and device.type == "cpu":
            raise ValueError("--amp fp16 needs a GPU; use bf16 or fp32 on a CPU")
        self.name = amp
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        if self.device.type == "cpu":
            return self._cpu_autocast()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def _cpu_autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=self.dtype), _NarrowMapsInFloat32():
            yield

    def backward(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Gradients of ``loss`` in float32 and at their true scale."""
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)

    def update(self) -> None:
        """Adapt the scale of the loss after the optimiser's step (fp16 only)."""
        if self.scaler.is_enabled():
            self.scaler.update()

    def share_scale(self) -> None:
        """Give all processes the least scale of the loss: weights that only some have overflow there alone (fp16)."""
        if self.scaler.is_enabled() and distributed.get_world_size() > 1:
            scale = torch.tensor([self.scaler.get_scale()], device=self.device)
            self.scaler.update(distributed.all_gather(scale).min().item())
