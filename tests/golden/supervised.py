"""Checks of what supervised methods share, against their golden files, which have these groups alike."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.supervised.data import RepeatedAugmentationSampler
from shared.supervised.losses import distillation_loss
from tests.golden.golden_file import GoldenFile


def distillation_cases(golden: GoldenFile) -> list[str]:
    """Keys ``distill/<base>/<kind>/alpha<alpha>_tau<tau>``."""
    return [key for key in golden.keys("distill/") if key.count("/") == 3]


def base_loss(golden: GoldenFile, name: str, logits: Tensor) -> Tensor:
    if name == "soft_target":
        return F.cross_entropy(logits, golden.tensor("distill/soft_targets"))
    smoothing = 0.0 if name == "ce" else float(name.removeprefix("label_smooth"))
    return F.cross_entropy(logits, golden.tensor("distill/labels"), label_smoothing=smoothing)


def check_distillation(golden: GoldenFile, key: str) -> None:
    _, base, kind, numbers = key.split("/")
    alpha, tau = map(float, re.fullmatch(r"alpha([\d.]+)_tau([\d.]+)", numbers).groups())
    logits, logits_kd, teacher = (golden.tensor(f"distill/{n}") for n in ("outputs", "outputs_kd", "teacher_logits"))
    loss = distillation_loss(base_loss(golden, base, logits), logits_kd, teacher, kind, alpha, tau)
    torch.testing.assert_close(loss, golden.tensor(key).view(()), rtol=1e-5, atol=0)


def check_repeated_augmentation(golden: GoldenFile, case: str, monkeypatch) -> None:
    """The indices of a rank in an epoch; the case's name has its sizes, ``rep`` and ``sh`` (shuffled) not always."""
    sizes = {name: int(value) for name, value in re.findall(r"([a-z]+)(\d+)", case)}
    if not sizes.get("sh", 1):
        monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    length, total = (golden.scalar(f"rasampler/{case}/{name}") for name in ("len", "sum"))
    expected = golden[f"rasampler/{case}/indices"].tolist()
    if length == 0:  # fewer images than it rounds to: here they are not lost
        assert sizes["n"] < 256 and len(expected) == total == 0
        return
    sampler = RepeatedAugmentationSampler(sizes["n"], 1, rank=sizes["r"], world_size=sizes["w"])
    sampler.repeats = sizes.get("rep", sampler.repeats)
    sampler.set_epoch(sizes["e"])
    indices = [index for ((_, index, _),) in sampler]
    assert len(indices) == len(sampler) == length
    assert sum(indices) == total
    assert indices[: len(expected)] == expected
