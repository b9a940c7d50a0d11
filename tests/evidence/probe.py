"""What features are worth: k-NN and the one linear classifier of all tables, for networks and raw pixels alike."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.evaluation.features import extract_features
from shared.evaluation.knn import knn_classify
from shared.evaluation.linear import LinearClassifier
from shared.images.labelled import open_labelled
from shared.images.loading import EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.subsets import Subset
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.card import Card
from shared.networks.pretrained import load_pretrained
from tests.evidence.runs import in_parallel, machine, once

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPOCHS, BATCH, RATES, CROP_SCALE = 10, 64, (0.3, 3.0, 30.0), (0.5, 1.0)
Images = tuple[str | None, str | None]  # --data_path and --val_path of the training scripts; None: part of the first


class Pixels(nn.Module):
    """Raw pixels as features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Features:
    """Features of the labelled images that a run evaluates on.

    Args:
        side: Of the images in pixels.
    """

    def __init__(self, card: Card, network: nn.Module, images: Images, side: int):
        self.card, self.network, self.side = card, network.to(DEVICE).eval(), side
        transform = EvalTransform(round(side * 256 / 224), side, card.mean, card.std, interpolation=card.interpolation)
        self.source, val = open_labelled(*images)
        datasets = (EvalDataset(source, transform) for source in (self.source, val))
        found = [tensor.cpu() for data in datasets for tensor in extract_features(self.network, data, DEVICE)]
        self.train, self.train_labels, self.val, self.val_labels = found

    def knn(self) -> float:
        """Top-1 of k-NN with 20 neighbours, in percent."""
        return knn_classify(self.train, self.train_labels, self.val, self.val_labels, k=20)[0]

    def linear(self, seed: int = 0, epochs: int = EPOCHS) -> dict[str, float]:
        """Top-1 of a linear classifier in percent, and its learning rate.

        It learns from random crops and flips of nine in ten training images by SGD with momentum, features divided by
        their root mean square norm, the rate falling to 0 as a cosine. Of three classifiers, one for each rate, it is
        the best on the other training images.
        """
        torch.manual_seed(seed)
        held_out = torch.arange(len(self.train)) % 10 == 0
        learn = Subset(self.source, (~held_out).nonzero()[:, 0].numpy(), self.source.name)
        views = MultiCropDataset(learn, [ViewRecipe(self.side, CROP_SCALE, interpolation="bilinear")], seed)
        sampler = EpochBatchSampler(len(learn), BATCH, seed, drop_last=False)
        scale = self.train.square().sum(dim=1).mean().rsqrt()
        classes = int(self.train_labels.max()) + 1
        heads = [LinearClassifier(self.train.shape[1], classes).to(DEVICE) for _ in RATES]
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, RATES, strict=True)]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for batch, labels, _ in make_loader(views, batch_sampler=sampler, num_workers=0, device=DEVICE):
                with torch.no_grad():
                    (pixels,) = normalize_views(batch, DEVICE, self.card.mean, self.card.std)
                    inputs = scale * self.network(pixels).float()
                optimizer.zero_grad()
                sum(F.cross_entropy(head(inputs), labels.to(DEVICE)) for head in heads).backward()
                optimizer.step()
            scheduler.step()

        @torch.no_grad()
        def accuracy(head: nn.Module, features: Tensor, labels: Tensor) -> float:
            return 100 * (head.cpu()(scale * features).argmax(dim=1) == labels).double().mean().item()

        chosen = [accuracy(head, self.train[held_out], self.train_labels[held_out]) for head in heads]
        best = max(range(len(RATES)), key=chosen.__getitem__)
        return {"linear": accuracy(heads[best], self.val, self.val_labels), "linear_rate": RATES[best]}


def with_linear(
    results: list[dict], card: Card, load: Callable[[Path], nn.Module], images: Images, side: int, parallel: int
) -> list[dict]:
    """Results of runs, and the linear classifier on the features of each; ``load`` gives the network of a folder."""

    def probe(result: dict) -> dict:
        file, seed = result["run"].with_suffix(".linear.json"), result["seed"]
        work = lambda: Features(card, load(result["run"]), images, side).linear(seed)  # noqa: E731
        return result | once(file, [result["command"], EPOCHS, *RATES], work)

    return in_parallel(probe, results, parallel)


def baselines(
    card: Card, images: Images, side: int, out: Path, seeds: tuple[int, ...] = (), arch: str = "", **options
) -> list[dict]:
    """Rows of raw pixels and, for every seed, of random weights: k-NN and linear.

    Args:
        out: Folder for what has been measured.
        options: Of the network, for ``card.build``.
    """

    def row(variant: str, network: Callable[[], nn.Module], seed: int | None) -> dict:
        def work() -> dict:
            torch.manual_seed(seed or 0)
            features = Features(card, network(), images, side)
            return {"variant": variant, "seed": seed, "knn_last": features.knn(), **features.linear(seed or 0)}

        settings = [variant, arch, f"seed {seed}", str(options), str(images), EPOCHS, *RATES]
        out.mkdir(parents=True, exist_ok=True)
        found = once(out / f"{variant.replace(' ', '_')}-{seed}.json", settings, work)
        return found | {"command": f"tests/evidence/probe.py: {settings[:3]}", "machine": machine("fp32")}

    rows = [row("raw pixels", Pixels, None)]
    return rows + [row("random weights", lambda: load_pretrained(card, arch, "random", **options), s) for s in seeds]
