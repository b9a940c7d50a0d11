"""Multi-label classification on Pascal VOC 2007, with or without fine-tuning (Caron et al. 2018, section 4.3).

    python eval_voc_classif.py --vocdir /path/to/VOCdevkit/VOC2007 --split trainval --model checkpoint.pth.tar \\
        --fc6_8 1 --train_batchnorm 1                       # released AlexNet: 72.0 mAP

The fully connected layers start afresh. Crops are small parts of the images, and the score of an image is the sum over
ten crops. The lists are part of the protocol: an unreadable image is an error, or with ``--on_bad_image skip`` has no
score (in training another one takes its place), which the results say.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from xml.etree.ElementTree import parse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchvision.datasets import VOCDetection

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepcluster.convnets import ClusterNetwork
from deepcluster.eval_linear import TenCrops
from deepcluster.flags import MODEL_HELP
from deepcluster.hub import MEAN, STD, load_network
from shared import distributed
from shared.evaluation.flags import add_process_flags
from shared.evaluation.frozen import bad_images_of
from shared.images.loading import LEFT_OUT, EpochBatchSampler, EvalDataset, make_loader
from shared.images.sources import FileSource
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.run import randomness
from shared.run.flags import Parser, add_bad_image_flags

CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
TEST_SPLIT = {"train": "val", "trainval": "test"}
IGNORED = 255
BATCH_SIZE, MOMENTUM, LARGEST_GRADIENT_NORM = 16, 0.9, 10
BIAS = 0.1  # of the layers that start afresh
CROPS = 10
LOG_EVERY = 100  # steps


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--vocdir", default="", help="folder VOC2007, with ImageSets/Main, Annotations and JPEGImages")
    add("--split", default="train", choices=tuple(TEST_SPLIT), help="images to learn from; tested on val or test")
    add("--model", default="", help=MODEL_HELP)
    add("--nit", type=int, default=80000, help="training steps")
    add("--fc6_8", type=int, default=1, choices=(0, 1), help="1: the convolutional part stays as it is")
    add("--train_batchnorm", type=int, default=0, choices=(0, 1), help="1: but its batch norms learn scale and shift")
    add("--eval_random_crops", type=int, default=1, choices=(0, 1), help="1: ten random crops; 0: corners and centre")
    add("--stepsize", type=int, default=5000, help="steps after which the learning rate is halved")
    add("--lr", type=float, default=0.003, help="learning rate at the start")
    add("--wd", type=float, default=1e-6, help="weight decay (the value itself)")
    add("--min_scale", type=float, default=0.1, help="least area of the random crops")
    add("--max_scale", type=float, default=0.5, help="largest area of the random crops")
    add("--seed", type=int, default=31)
    add_bad_image_flags(add, "error", "skip")
    add_process_flags(parser, launcher=False, num_workers=4)
    return parser


def eval_voc_classif(args: argparse.Namespace) -> dict[str, float]:
    """Train the classifier; mean average precision in percent on the training and on the test split."""
    device = distributed.init(device=args.device)
    randomness.seed_everything(args.seed)
    splits = {split: VOCImages(Path(args.vocdir), split) for split in (args.split, TEST_SPLIT[args.split])}
    network = load_network(args.model, keep_top_layer=False).to(device)
    recipe = ViewRecipe(network.img_size, (args.min_scale, args.max_scale), ratio=(1.0, 1.0), interpolation="bilinear")
    parameters = start_classifier(network, bool(args.fc6_8), bool(args.train_batchnorm))
    train(network, parameters, splits[args.split], recipe, args, device)

    results = {}
    for split, images in splits.items():
        scores = crop_scores(network, images, recipe if args.eval_random_crops else None, args, device)
        precisions = average_precisions(scores, images.labels)
        results[split] = 100 * float(np.nanmean(precisions))
        for name, precision in zip(CLASSES, precisions, strict=True):
            print(f"{split} {name}: {100 * precision:.2f} %")
        unread = int(np.isnan(scores).all(axis=1).sum())
        note = f" (without {unread} of {len(scores)} images)" if unread else ""
        print(f"{split} mAP: {results[split]:.2f} %{note}", flush=True)
    return results


class VOCImages:
    """Images of a split of VOC 2007 and which classes they show, read by torchvision.

    Attributes:
        source: The images.
        labels: (N, 20), int64: 1 shown, 0 not shown, 255 shown by objects marked as difficult only.

    Raises:
        ValueError: If the folder has another layout or lacks the split.
    """

    def __init__(self, vocdir: Path, split: str):
        folder = vocdir.absolute()
        if folder.parts[-2:] != ("VOCdevkit", "VOC2007") or not folder.is_dir():
            raise ValueError(f"--vocdir {vocdir}: expected a folder that ends in VOCdevkit/VOC2007")
        if not (folder / "ImageSets" / "Main" / f"{split}.txt").is_file():
            raise ValueError(f"--vocdir {vocdir}: has no ImageSets/Main/{split}.txt")
        reader = VOCDetection(str(folder.parents[1]), year="2007", image_set=split)
        self.source = FileSource(f"VOC 2007 {split}", folder, reader.images)
        self.labels = np.array([_labels(reader.parse_voc_xml(parse(file).getroot())) for file in reader.annotations])


def _labels(annotation: dict) -> list[int]:
    """Label of each class in an image's annotation."""
    all_difficult: dict[str, bool] = {}
    for thing in annotation["annotation"].get("object", []):
        is_difficult = thing.get("difficult", "0") == "1"
        all_difficult[thing["name"]] = all_difficult.get(thing["name"], True) and is_difficult
    return [0 if name not in all_difficult else IGNORED if all_difficult[name] else 1 for name in CLASSES]


# --- Training ---------------------------------------------------------------------------------------------------------


def start_classifier(network: ClusterNetwork, freeze: bool, train_batchnorm: bool) -> list[nn.Parameter]:
    """Start the fully connected layers afresh, with a top layer of 20 outputs, and return what will learn.

    Args:
        freeze: Leave the convolutional part as it is.
        train_batchnorm: But let its batch norms learn scale and shift.
    """
    device = next(network.features.parameters()).device
    network.top_layer = nn.Linear(network.dim, len(CLASSES), device=device)
    nn.init.constant_(network.top_layer.bias, BIAS)
    for layer in network.classifier:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, BIAS)
    network.features.requires_grad_(not freeze)
    if train_batchnorm:
        for layer in network.features.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.requires_grad_(True)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def train(
    network: ClusterNetwork,
    parameters: list[nn.Parameter],
    images: VOCImages,
    recipe: ViewRecipe,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """``args.nit`` steps of SGD; the learning rate is halved every ``args.stepsize`` steps."""
    optimizer = torch.optim.SGD(parameters, args.lr, MOMENTUM, weight_decay=args.wd)
    labels = torch.from_numpy(images.labels)
    total = torch.zeros((), device=device)
    batches = endless_batches(images, recipe, args, device)
    for step, (views, indices) in enumerate(islice(batches, args.nit)):
        if step > 0 and step % args.stepsize == 0:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        randomness.seed_step(args.seed, step)  # dropout
        network.train()
        network.features.eval()  # batch norms keep the statistics of the pre-training
        loss = multilabel_loss(network(views), labels[indices].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT_NORM, error_if_nonfinite=True)
        optimizer.step()
        total += loss.detach()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == args.nit:
            done = (step % LOG_EVERY) + 1
            print(f"step {step + 1} of {args.nit}: loss {total.item() / done:.4f}", flush=True)
            total.zero_()


def endless_batches(
    images: VOCImages, recipe: ViewRecipe, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised random crops (B, 3, H, W) and their indices, epoch after epoch in a new order."""
    batch_size = min(BATCH_SIZE, len(images.source))
    sampler = EpochBatchSampler(len(images.source), batch_size, args.seed, drop_last=False)
    dataset = MultiCropDataset(images.source, [recipe], args.seed, bad_images=bad_images_of(args, images.source))
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    for epoch in count():
        sampler.set_epoch(epoch)
        for views, _, indices in loader:
            yield normalize_views(views, device, MEAN, STD)[0], indices


def multilabel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy summed over the classes that are not ignored, mean over the images.

    Args:
        scores: (B, 20).
        labels: (B, 20): 0, 1, or 255 for ignored.
    """
    counts = labels != IGNORED
    losses = F.binary_cross_entropy_with_logits(scores, labels.where(counts, 0).float(), reduction="none")
    return (losses * counts).sum() / len(scores)


# --- Testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def crop_scores(
    network: ClusterNetwork,
    images: VOCImages,
    recipe: ViewRecipe | None,
    args: argparse.Namespace,
    device: torch.device,
) -> np.ndarray:
    """Sum of the scores of ten crops, (N, 20); NaN for images that cannot be read.

    Args:
        recipe: Of random crops; None for the corners, the centre and their mirror images.
    """
    network.eval()
    scores, bad_images = torch.zeros(len(images.source), len(CLASSES)), bad_images_of(args, images.source)
    if recipe is None:
        dataset = EvalDataset(images.source, TenCrops(network.img_size), bad_images)
        loader = make_loader(dataset, batch_size=1, num_workers=args.num_workers, device=device)
        for i, (crops, labels, _) in enumerate(loader):
            (views,) = normalize_views([crops[0]], device, MEAN, STD)
            scores[i] = torch.nan if labels[0] == LEFT_OUT else network(views).sum(dim=0).cpu()
        return scores.numpy()
    times_read = torch.zeros(len(scores))  # less often than others: never; more often: for one that cannot be read
    dataset = MultiCropDataset(images.source, [recipe], args.seed, bad_images=bad_images)
    sampler = EpochBatchSampler(len(images.source), 1, args.seed, drop_last=False)
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    for crop in range(CROPS):
        sampler.set_epoch(-1 - crop)  # draws that training has not seen
        for views, _, indices in loader:
            scores[indices] += network(normalize_views(views, device, MEAN, STD)[0]).cpu()
            times_read[indices] += 1
    scores[times_read != CROPS] *= (CROPS / times_read[times_read != CROPS])[:, None]
    return scores.numpy()


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each class, in [0, 1]; NaN where no image shows it.

    Of equal scores, images that do not show the class come first.

    Args:
        scores: (N, classes); NaN: not scored.
        labels: (N, classes): 0, 1, or 255 for ignored.
    """
    precisions = []
    for score, label in zip(scores.T, labels.T, strict=True):
        counts = (label != IGNORED) & ~np.isnan(score)
        score, label = score[counts], label[counts]
        precisions.append(average_precision_score(label, score - 1e-5 * label) if label.any() else np.nan)
    return np.array(precisions)


def main() -> None:
    distributed.run_script(eval_voc_classif, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
