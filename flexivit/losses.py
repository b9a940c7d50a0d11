"""Losses of the supervised training and of the distillation, of logits (B, K), per sample: (B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("kl", "euclidean", "l2", "hard", "logsoftmax_euclidean", "agree")


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the classes; ``targets`` (B, K) in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the probabilities ``targets`` (B, K)."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1)


def distance(student: Tensor, teacher: Tensor, kind: str = "kl", t: float = 1.0, ls: float = 0.0, k: int = 1) -> Tensor:
    """How far the student's logits are from the teacher's (section 3.4, "kl", and the others of the ablation).

    Args:
        kind: ``kl``: t^2 KL(softmax(teacher / t) || softmax(student / t)); ``euclidean``, ``l2``: of the logits, with
            and without the root; ``logsoftmax_euclidean``; ``hard``: cross-entropy with the teacher's most likely
            class, less the entropy of the smoothed target; ``agree``: whether that class is among the student's k.
        t: Temperature of ``kl``.
        ls: Label smoothing of ``hard``, spread over the other classes.
        k: Of ``agree``.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind == "kl":
        teacher_log, student_log = (F.log_softmax(logits / t, dim=1) for logits in (teacher, student))
        probabilities = teacher_log.exp()
        return t**2 * (probabilities * (probabilities.clamp_min(1e-8).log() - student_log)).sum(dim=1)
    if kind == "hard":
        classes = teacher.shape[1]
        targets = F.one_hot(teacher.argmax(dim=1), classes).to(student.dtype)
        targets = targets * (1 - ls) + (1 - targets) * ls / (classes - 1)
        return softmax_cross_entropy(student, targets) - torch.special.entr(targets).sum(dim=1)  # at least 0
    if kind == "agree":
        return (student.topk(k, dim=1).indices == teacher.argmax(dim=1, keepdim=True)).any(dim=1).to(student.dtype)
    if kind == "logsoftmax_euclidean":
        student, teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    elif kind not in ("euclidean", "l2"):
        raise ValueError(f"distance {kind!r} is none of {', '.join(DISTANCES)}")
    squared = (student - teacher).square().sum(dim=1)
    return squared if kind == "l2" else torch.sqrt(squared + 1e-12)
