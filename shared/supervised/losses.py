"""Losses of classifiers: labels, and distillation (Hinton et al. 2015; hard labels: Touvron et al. 2021)."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.classifiers import build_library_classifier, load_completely
from shared.networks.weights import fetch_file, safe_load, select_backbone_weights

from .flags import mixes_labels


@dataclass
class ClassificationLoss:
    """Cross-entropy of hard, smoothed or mixed labels, and distillation; labels and teacher act on the same logits.

    Attributes:
        smoothing: Of hard labels.
        binary: Binary cross-entropy instead, in which every class with a positive target is right: of labels that are
            not smoothed.
        teacher: Maps the student's images to logits.
        distillation, alpha, tau: See :func:`distillation_loss`.
    """

    smoothing: float = 0.0
    binary: bool = False
    teacher: Callable[[Tensor], Tensor] | None = None
    distillation: str = "none"
    alpha: float = 0.5
    tau: float = 1.0

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; ``targets`` are class numbers (B,), or probabilities (B, classes)."""
        logits = network(images).float()
        if self.binary:
            right = class_probabilities(targets, logits.shape[1]).gt(0).float()
            loss = F.binary_cross_entropy_with_logits(logits, right)
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return distillation_loss(loss, logits, teacher_logits, self.distillation, self.alpha, self.tau)


def build_loss(
    args: argparse.Namespace, num_classes: int, device: torch.device, binary: bool = False
) -> ClassificationLoss:
    """The loss that the flags ask for; Mixup smooths the labels itself."""
    teacher = None
    if args.distillation_type != "none":
        teacher = build_teacher(args.teacher_model, args.teacher_path, num_classes, args.in_chans, args.input_size)
        teacher.to(device)
    distillation = (args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return ClassificationLoss(0.0 if mixes_labels(args) else args.smoothing, binary, teacher, *distillation)


def class_probabilities(targets: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Class numbers (B,) as (B, classes), smoothed; mixed labels as they are."""
    if targets.dim() > 1:
        return targets
    return F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes


def distillation_loss(
    base_loss: Tensor, student_logits: Tensor, teacher_logits: Tensor, kind: str, alpha: float, tau: float
) -> Tensor:
    """(1 - alpha) * base loss + alpha * distillation.

    Args:
        base_loss: That of the labels.
        student_logits: Of the head that is distilled into, (B, C).
        teacher_logits: (B, C), without gradient.
        kind: ``none``; ``soft``: tau^2 times the mean over all B * C elements of the KL divergence of both outputs at
            temperature tau; ``hard``: cross-entropy of the teacher's most likely class.
        alpha: Weight of the distillation.
        tau: Temperature, ``soft`` only.
    """
    if kind == "none":
        return base_loss
    if kind == "soft":
        student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student_logits, teacher_logits))
        distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / student.numel()
    elif kind == "hard":
        distillation = F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=1))
    else:
        raise ValueError(f"--distillation-type {kind} is none of none, soft, hard")
    return (1 - alpha) * base_loss + alpha * distillation


def build_teacher(
    name: str, path: str, num_classes: int, in_chans: int = 3, input_size: int | None = None
) -> nn.Module:
    """A network of timm or torchvision, filled from a file, frozen and in evaluation mode.

    Args:
        name: timm's name, or else torchvision's.
        path: File or address of its weights, of any layout.
        num_classes: Outputs; those of the file must be as many.
        in_chans: Channels of the images, which are the student's; networks of torchvision take 3.
        input_size: Side of the images in pixels, for networks whose weights depend on it; None: the teacher's own.

    Raises:
        ValueError: If there is no such network or file, or the file does not fill the network.
    """
    teacher = build_library_classifier(name, num_classes, in_chans, flag="--teacher-model", img_size=input_size)
    weights = select_backbone_weights(safe_load(fetch_file(path, "--teacher-path")), "model", path)
    target = f"--teacher-model {name}" + (f" at --input-size {input_size}" if input_size else "")
    load_completely(teacher, weights.tensors, f"--teacher-path {path}", target)
    return teacher.eval().requires_grad_(False)
