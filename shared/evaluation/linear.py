"""Training on labels by epochs: linear classifiers on features of a frozen network, fine-tuning, exact validation."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from shared import distributed
from shared.images.loading import BadImages, make_loader
from shared.images.sources import ImageSource
from shared.networks.classifiers import load_completely
from shared.networks.weights import safe_load
from shared.run.checkpoint import SHORT_EPOCH_S, load_latest, save, without_prefix

from .features import check_features, check_norms

Features = Callable[[Tensor], Tensor]

# --- Classifier -------------------------------------------------------------------------------------------------------


def start_afresh(layers: nn.Module, bias: float = 0.0) -> None:
    """Give all linear layers weights from N(0, 0.01^2)."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)


class LinearClassifier(nn.Module):
    """One linear layer, weights from N(0, 0.01^2), biases 0.

    Args:
        dim: Size of a flattened feature.
        num_labels: Number of classes.
    """

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        start_afresh(self)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, ...) to logits (B, num_labels)."""
        return self.linear(features.flatten(1))


def load_classifier(classifier: nn.Module, file: str | Path, flag: str = "--linear_weights") -> None:
    """Fill a classifier from a checkpoint, ours or an official one.

    Raises:
        ValueError: If there is no such file, or it is not that of this classifier.
    """
    if not Path(file).is_file():
        raise ValueError(f"{flag} {file} is not a file")
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{flag} {file} has no state_dict")
    fill(classifier, checkpoint["state_dict"], file)


def fill(module: nn.Module, state_dict: dict[str, Tensor], file: str | Path) -> None:
    """Load weights that may have been saved with the prefix ``module.``."""
    target = "what these flags of network, features and labels ask for"
    load_completely(module, without_prefix(state_dict, "module."), str(file), target)


# --- Epochs -----------------------------------------------------------------------------------------------------------


def train_one_epoch(
    classifier: nn.Module,
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """Cross-entropy, or another loss, on every batch; only the classifier learns.

    Args:
        classifier: Maps features (B, ...) to logits; wrapped for several processes if there are any.
        features: The frozen network, images (B, C, H, W) to features (B, ...).
        batches: Images and labels (B,), on the device of the classifier.
        criterion: Loss of scores and labels.

    Returns:
        Mean loss over the images of all processes. A loss that is far above that of equal scores is told.

    Raises:
        ValueError: If the features are not finite or zero, or the loss is not finite.
    """
    classifier.train()
    total = torch.zeros(2, dtype=torch.double, device=next(classifier.parameters()).device)  # loss, images
    of_equal_scores = None
    for images, labels in batches:
        with torch.no_grad():
            inputs = features(images)
        scores = classifier(inputs)
        if of_equal_scores is None:
            check_features(inputs.flatten(1))
            of_equal_scores = criterion(torch.zeros_like(scores), labels).item()
        loss = criterion(scores, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach().double(), torch.ones_like(total[0])]) * len(labels)
    loss, images = distributed.all_reduce_sum(total).tolist()
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"the loss is {loss}; try a smaller --lr")
    if loss / images > 2 * of_equal_scores:
        distributed.print_once(
            f"WARNING: the loss, {loss / images:.4g}, is far above that of guessing, {of_equal_scores:.4g}: --lr is "
            "too large for these features, and accuracies say little; try a tenth of it, in another output folder"
        )
    return loss / images


def score_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over images (B, classes) of the loss, of hits, and of hits among the min(5, classes) best; 0-d."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return F.cross_entropy(logits, labels, reduction="sum"), hits[:, 0].sum(), hits.sum()


@torch.no_grad()
def validate(
    classifier: nn.Module,
    features: Features,
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = 0,
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = score_logits,
) -> dict[str, float]:
    """Loss and accuracy over the whole data set, every image counted once, shared out over the processes.

    Args:
        classifier: Maps features (B, ...) to logits (B, num_labels).
        features: As for :func:`train_one_epoch`.
        dataset: Items ``(image, label, ...)``.
        score: Sums over a batch of logits and labels.

    Returns:
        ``loss``, ``acc1`` and ``acc5`` (among the min(5, num_labels) best), accuracies in percent; the same on every
        process.

    Raises:
        ValueError: If features are all zeros or not finite.
    """
    classifier.eval()
    share = range(distributed.get_rank(), len(dataset), distributed.get_world_size())
    loader = make_loader(dataset, batch_size=batch_size, sampler=share, num_workers=num_workers, device=device)
    totals, norms = torch.zeros(3, dtype=torch.double, device=device), []
    for images, labels, *_ in loader:
        inputs = features(images.to(device, non_blocking=True))
        norms.append(inputs.flatten(1).norm(dim=1))
        logits = distributed.unwrap(classifier)(inputs)  # shares may differ by a batch: no collective in here
        totals += torch.stack([total.double() for total in score(logits, labels.to(device, non_blocking=True))])
    if norms:  # none where there are fewer images than processes
        check_norms(torch.cat(norms))
    loss, top1, top5 = (distributed.all_reduce_sum(totals) / len(dataset)).tolist()
    return {"loss": loss, "acc1": 100 * top1, "acc5": 100 * top5}


def tell_accuracy(result: dict[str, float], num_images: int) -> dict[str, float]:
    """Print the top-1 accuracy of a validation, and return the result."""
    distributed.print_once(f"Accuracy of the network on the {num_images} test images: {result['acc1']:.1f}%")
    return result


class EpochTraining:
    """Training on labels by epochs, with a log of JSON lines and a checkpoint, of short epochs once a minute.

    Goes on from the checkpoint, ours or an official one, if there is one.

    Args:
        file: Checkpoint.
        log_file: Log.
        module: What learns.
        scheduler: Of the learning rates, by epochs; None where the batches set them.
        origin: Checksum of the weights that the training started from, or whose features it sees.
        source: The labelled images.
        flags: Values that a run which is resumed must have as they were.
        rates: What the log calls the learning rate of each parameter group.
        best_of: Accuracies of the best epoch that the checkpoint names.
        weights_key, prefix, origin_key: How the checkpoint names the weights and the checksum.

    Raises:
        ValueError: If the checkpoint is not one of this run.
    """

    def __init__(
        self,
        file: Path,
        log_file: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        origin: int,
        source: ImageSource,
        *,
        flags: dict | None = None,
        rates: tuple[str, ...] = ("train_lr",),
        best_of: tuple[str, ...] = ("acc1",),
        weights_key: str = "state_dict",
        prefix: str = "module.",
        origin_key: str = "pretrained",
    ):
        self.file, self.log_file, self.module, self.optimizer = file, log_file, module, optimizer
        self.scheduler, self.origin, self.flags, self.rates, self.best_of = scheduler, origin, flags, rates, best_of
        self.weights_key, self.prefix, self.origin_key = weights_key, prefix, origin_key
        self.images, self.classes = source.checksum(), source.classes
        self.first_epoch, self.log, self.best, self.last_save = 0, [], (0.0,) * len(best_of), time.monotonic()
        checkpoint = load_latest(file)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict) -> None:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        parts = {name: part for name, part in parts.items() if part is not None}
        if not {"epoch", self.weights_key, *parts} <= checkpoint.keys():
            raise ValueError(f"{self.file} is a checkpoint of another script; choose another --output_dir")
        if checkpoint.get(self.origin_key, self.origin) != self.origin:
            raise ValueError(f"{self.file} started from other weights, or their features; use another --output_dir")
        if checkpoint.get("images", self.images) != self.images:
            raise ValueError(f"{self.file} has learned from other images than these; use another --output_dir")
        for flag, value in (self.flags or {}).items():
            if (before := checkpoint.get("flags", {}).get(flag, value)) != value:
                raise ValueError(
                    f"--{flag} {value} does not fit {self.file}, which was written with --{flag} {before}; use that or "
                    "another --output_dir"
                )
        fill(self.module, checkpoint[self.weights_key], self.file)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        self.first_epoch, self.log = checkpoint["epoch"], checkpoint.get("log", [])
        best = checkpoint.get("best_acc", self.best)
        self.best = tuple(best) if isinstance(best, list | tuple) else (best,)
        for line in self.log:
            self._see(line)
        distributed.print_once(f"resuming at epoch {self.first_epoch}")

    def _see(self, line: dict[str, float]) -> None:
        names = [f"test_{name}" for name in self.best_of]
        if names[0] in line:
            self.best = max(self.best, tuple(line[name] for name in names))

    def run(
        self,
        batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
        features: Features,
        validation: Callable[[], dict[str, float]],
        epochs: int,
        bad_images: BadImages,
        val_freq: int = 1,
    ) -> dict[str, float]:
        """The epochs that are still to be done; loss and accuracies in percent after the last one.

        Args:
            batches: Images and labels of an epoch, on the device of the module.
            features: What is computed of the images before the module, and does not learn.
            validation: The present loss and accuracies.
            bad_images: Policy of the batches.
            val_freq: Validate every so many epochs, and after the last one.
        """
        wrapped, result = distributed.wrap(self.module, next(self.module.parameters()).device), None
        for epoch in range(self.first_epoch, epochs):
            rates = [group["lr"] for group in self.optimizer.param_groups]
            line = {"epoch": epoch, **dict(zip(self.rates, rates, strict=True))}
            line["train_loss"] = train_one_epoch(wrapped, features, batches(epoch), self.optimizer)
            line["bad_images"] = bad_images.count()
            due = (epoch + 1) % val_freq == 0 or epoch + 1 == epochs
            result = validation() if due else None
            if result is not None:
                line |= {f"test_{name}": value for name, value in result.items()}
                self._see(line)
                line["best_acc1"] = self.best[0]
            self._end_epoch(line, is_last=epoch + 1 == epochs)
        result = result or validation()  # there was nothing left to train
        distributed.print_once(
            f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
            f"best top-1 of all epochs {self.best[0]:.2f} %)"
        )
        return result

    def _end_epoch(self, line: dict[str, float], is_last: bool) -> None:
        self.log.append(line)
        if self.scheduler is not None:
            self.scheduler.step()
        distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
        if not distributed.is_main_process():
            return
        self.log_file.write_text("".join(json.dumps(line) + "\n" for line in self.log))
        if not is_last and time.monotonic() - self.last_save < SHORT_EPOCH_S:
            return  # a large network that is fine-tuned on few images would be written every few steps
        self.last_save = time.monotonic()
        state = {
            "epoch": line["epoch"] + 1,
            self.weights_key: {f"{self.prefix}{name}": value for name, value in self.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "best_acc": self.best if len(self.best) > 1 else self.best[0],
            self.origin_key: self.origin,
            "images": self.images,
            "classes": self.classes,
            "log": self.log,
        }
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.flags is not None:
            state["flags"] = self.flags
        save(self.file, state)
