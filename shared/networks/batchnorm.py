"""Batch normalisation whose statistics are those of the whole batch, over all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed


class _SumOverProcesses(torch.autograd.Function):
    """Sum over the ranks of a group; the gradient with respect to each one's term is the sum of their gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return distributed.all_reduce_sum(tensor, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return distributed.all_reduce_sum(grad, ctx.group), None


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What ``nn.SyncBatchNorm`` computes on GPUs; torch's refuses tensors on a CPU.

    Input (B, C, ...), any number of trailing dimensions; ranks may hold different numbers of rows. The output has the
    input's type; the statistics are in float32.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dtype = x.dtype
        x = x if dtype == torch.double else x.float()  # statistics of what autocast computed in less are float32 too
        reduced = [d for d in range(x.ndim) if d != 1]
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _SumOverProcesses.apply(torch.cat([x.sum(reduced), count]), self.process_group)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(-1, *[1] * (x.ndim - 2))
        variance = _SumOverProcesses.apply(centred.square().sum(reduced), self.process_group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = centred * scale.view(-1, *[1] * (x.ndim - 2)) + self.bias.view(-1, *[1] * (x.ndim - 2))
        return y.to(dtype)


def has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def synchronize_batchnorm(module: nn.Module, device: torch.device, group_size: int | None = None) -> nn.Module:
    """The module with its batch norms synchronised over processes (unchanged for one process).

    Args:
        group_size: Synchronise within groups of so many processes of consecutive ranks; None: over all.
    """
    if distributed.get_world_size() == 1:
        return module
    group = None if group_size is None else distributed.neighbours(group_size)
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = CPUSyncBatchNorm  # same parameters, buffers and names
            child.process_group = group
    return module
