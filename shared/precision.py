"""Mixed precision: which number format a device computes fast in, and the scaling that fp16 needs."""

import contextlib

import torch
from torch import Tensor


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has matrix units for bfloat16 (elsewhere bfloat16 is emulated and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


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
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of ``loss`` in float32 and at their true scale."""
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def update(self) -> None:
        """Adapt the scale of the loss after the optimiser's step (fp16 only)."""
        if self.scaler.is_enabled():
            self.scaler.update()
