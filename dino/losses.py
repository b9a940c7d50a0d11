"""The objective of DINO (Caron et al. 2021): cross-entropy between centred, sharpened teacher and student."""

import torch
from torch import Tensor, nn

from shared import distributed
from shared.optimisation.schedules import teacher_temperature_schedule


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's distributions over K outputs (eq. 1-3).

    Every view of the student is compared with both global views of the teacher, never with itself.

    Args:
        out_dim: K, outputs of the heads.
        num_crops: V, views per image; the first two are the global ones.
        warmup_teacher_temp: Teacher temperature in the first epoch.
        teacher_temp: Teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: Length of the linear warm-up.
        num_epochs: Length of the training.
        student_temp: Student temperature.
        center_momentum: Weight of the old centre.

    Attributes:
        center: Moving average of the teacher's mean output, shape ``(1, K)``.
        teacher_entropy: Mean entropy of the teacher's distributions in the last call, in nats (0-d). The
            loss minus this is the mean KL divergence between teacher and student.
    """

    def __init__(
        self,
        out_dim: int,
        num_crops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        self.num_crops = num_crops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.teacher_temps = teacher_temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, num_epochs
        )
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_entropy = torch.tensor(0.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> Tensor:
        """Mean loss over all pairs of a teacher's and another student's view, and over the batch.

        Args:
            student_logits: Head outputs of all views, crop-major, shape ``(V * B, K)``.
            teacher_logits: Head outputs of the two global views, shape ``(2 * B, K)``, taken as constants.
            epoch: Chooses the teacher's temperature.

        Returns:
            0-d float32 tensor, whatever the inputs' precision.

        Raises:
            ValueError: If the two numbers of rows do not belong to ``num_crops`` and 2 views of one batch.
        """
        if 2 * len(student_logits) != self.num_crops * len(teacher_logits):
            raise ValueError(
                f"{len(student_logits)} student rows and {len(teacher_logits)} teacher rows are not "
                f"{self.num_crops} and 2 views of one batch"
            )
        teacher_logits = teacher_logits.detach().float()
        sharpened = (teacher_logits - self.center) / self.teacher_temps[epoch]
        targets = sharpened.softmax(dim=1)
        self.teacher_entropy = (sharpened.logsumexp(dim=1) - (targets * sharpened).sum(dim=1)).mean()
        loss = CrossViewEntropy.apply(student_logits, targets, self.num_crops, self.student_temp)
        self.update_center(teacher_logits)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """Moving average of the teacher's mean output over both views and all processes (eq. 4).

        A batch with a mean that is not finite does not count: it would stay in the average for ever.
        """
        batch_center = distributed.all_reduce_mean(teacher_logits.mean(dim=0, keepdim=True))
        updated = self.center.lerp(batch_center, 1 - self.center_momentum)
        self.center.copy_(torch.where(batch_center.isfinite().all(), updated, self.center))


class CrossViewEntropy(torch.autograd.Function):
    """Mean of ``-sum_k q_k log p_k`` over pairs of a target q and the prediction p of another view.

    The gradient is made together with the value, view by view, and no other array is as large as the logits of all
    views. It is handed on in place, so a graph that is kept cannot be run backward a second time.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, targets: Tensor, num_crops: int, temperature: float) -> Tensor:
        targets = targets.unflatten(0, (2, -1))  # (2, B, K)
        both = targets.sum(dim=0)
        weight = 1 / (2 * (num_crops - 1) * targets.shape[1])
        loss = torch.zeros((), device=student_logits.device)
        grad = torch.empty_like(student_logits)
        for v, (logits, grad_v) in enumerate(zip(student_logits.chunk(num_crops), grad.chunk(num_crops), strict=True)):
            target, mass = (targets[1 - v], 1) if v < 2 else (both, 2)  # a view is never its own target
            logits = logits.float() / temperature
            prediction = logits.softmax(dim=1)
            log_partition = logits.logsumexp(dim=1)
            loss += weight * (mass * log_partition - (target * logits).sum(dim=1)).sum()
            torch.sub(mass * prediction, target, out=prediction)
            grad_v.copy_(prediction.mul_(weight / temperature))
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_loss), None, None, None
