"""Semantic segmentation: Semantic FPN (Kirillov et al. 2019) on an XCiT feature pyramid (section 4.4).

    python main.py                                                        # generated shapes, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model xcit_small_12_p16 --pretrained xcit_small_12_p16_384_dist \\
        --data-path /path/to/ADEChallengeData2016 --output_dir /path/to/run     # 80,000 steps: mIoU 43.9

Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.ops import FeaturePyramidNetwork

from shared import distributed
from shared.run.flags import AnyDashParser, parse_with_embedded_defaults
from shared.run.run import Run
from xcit import dense_training
from xcit.feature_pyramid import build_pyramid, fill_trunk
from xcit.hub import MEAN, STD
from xcit.prediction_pictures import COUNT, paint_labels, save_predictions
from xcit.semantic_segmentation.ade20k import UNLABELLED, ADE20KDataset
from xcit.shapes import CLASSES, write_ade20k

SHAPES_DEFAULTS = {
    "model": "xcit_nano_12_p8",
    "num_classes": len(CLASSES) + 1,
    "iterations": 120,
    "lr": 1e-3,
    "warmup_iters": 10,
    "crop_size": 64,
    "output_dir": "runs/shapes",
}
MINIMUM = dense_training.MINIMUM | {"iterations": 1, "num_classes": 1, "crop_size": 32}  # a map of stride 32
NECK_CHANNELS, HEAD_CHANNELS = 256, 128


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    dense_training.add_flags(parser)
    add = parser.add_argument_group("recipe").add_argument
    add("--num-classes", type=int, default=150, help="classes of the label maps")
    add("--iterations", type=int, default=80_000, help="steps")
    add("--lr", type=float, default=6e-5, help="learning rate; it is not scaled with the batch")
    add("--weight-decay", type=float, default=0.01, help="of everything but norms")
    add("--warmup-iters", type=int, default=1500, help="steps of the linear warm-up")
    add("--crop-size", type=int, default=512, help="side of the training crops, short side in evaluation, in pixels")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_with_embedded_defaults(get_args_parser(), arguments, SHAPES_DEFAULTS, MINIMUM)


def convolution(channels: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, HEAD_CHANNELS, kernel_size=3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(HEAD_CHANNELS), nn.ReLU())


class SemanticFPN(nn.Module):
    """Every level of the pyramid is brought to stride 4 by convolutions and doublings; their sum is classified.

    In training maps lists of images and targets to ``{"loss": ...}``, else images to logits of their sizes.

    Args:
        model: Name of the trunk.
    """

    def __init__(self, model: str, num_classes: int, drop_path_rate: float = 0.0):
        super().__init__()
        self.backbone = build_pyramid(model, drop_path_rate)
        dim = self.backbone.embed_dim
        channels = dim if model.startswith("xcit_medium") else NECK_CHANNELS  # as published
        self.neck = FeaturePyramidNetwork([dim] * 4, channels)
        self.scale_heads = nn.ModuleList(
            nn.ModuleList(convolution(channels if i == 0 else HEAD_CHANNELS) for i in range(max(1, level)))
            for level in range(4)
        )
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(HEAD_CHANNELS, num_classes, kernel_size=1)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to logits (B, classes, H, W)."""
        features = self.neck(self.backbone((images - self.mean) / self.std))
        total = 0
        for level, convolutions in enumerate(self.scale_heads):
            x = features[str(level)]
            for i, layer in enumerate(convolutions):
                x = layer(x)
                if level > 0:  # each doubling ends at the size of a finer level
                    x = F.interpolate(x, features[str(level - 1 - i)].shape[-2:], mode="bilinear", align_corners=False)
            total = total + x
        logits = self.classifier(self.dropout(total))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, images: list[Tensor], targets: list[dict] | None = None):
        if targets is None:
            return [self.logits(image[None])[0] for image in images]
        labels = torch.stack([target["labels"] for target in targets])
        logits = self.logits(torch.stack(images)).float()
        # a batch without any label has a loss of 0
        known = (labels != UNLABELLED).sum().clamp_min(1)
        return {"loss": F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / known}


def build_metrics(num_classes: int) -> MetricCollection:
    """``miou``, over classes that occur or are predicted, and ``pixel_acc``; unlabelled pixels do not count."""
    options = {"num_classes": num_classes, "ignore_index": UNLABELLED}
    return MetricCollection(
        {"miou": MulticlassJaccardIndex(**options), "pixel_acc": MulticlassAccuracy(**options, average="micro")}
    )


def predict_labels(network: SemanticFPN, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Classes (H, W), for ``size`` = (H, W), of an image (3, h, w)."""
    (logits,) = network([image])
    return F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False).argmax(dim=1)[0]


@torch.no_grad()
def draw_segments(network: SemanticFPN, dataset: ADE20KDataset, device: torch.device, output_dir: Path) -> Path:
    """A picture of the label maps of the first images and of those that are predicted."""
    network.eval()
    pairs = []
    for index in range(min(COUNT, len(dataset))):
        image, target, _ = dataset[index]
        labels = target["labels"]
        predicted = predict_labels(network, image.to(device), labels.shape)
        resized = F.interpolate(image[None], labels.shape, mode="bilinear", align_corners=False)[0]
        pairs.append((paint_labels(resized, labels), paint_labels(resized, predicted)))
    return save_predictions(pairs, output_dir)


@torch.no_grad()
def evaluate_segmenter(
    network: SemanticFPN,
    dataset: ADE20KDataset,
    device: torch.device,
    num_classes: int,
    between_images: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """mIoU and the share of right pixels, in percent, at the images' own sizes; processes share the images out.

    ``left_out`` is the number of images that cannot be read and do not count, where there are any.
    """
    network.eval()
    left_out: list[int] = []
    metrics = build_metrics(num_classes).to(device)  # summed over processes when they are computed
    for _, image, target in dense_training.own_share(dataset, between_images, left_out):
        labels = target["labels"].to(device)
        metrics.update(predict_labels(network, image.to(device), labels.shape)[None], labels[None])
    result = {name: 100 * value.item() for name, value in metrics.compute().items()}
    return result | ({"left_out": len(left_out)} if left_out else {})


def open_images(args: argparse.Namespace, output_dir: Path) -> tuple[ADE20KDataset, ADE20KDataset]:
    """The training and the validation part; generated shapes without ``--data-path``."""
    data_path = dense_training.data_folder(args, output_dir, write_ade20k, {"training": 64, "validation": 16})
    options = {"crop_px": args.crop_size, "num_classes": args.num_classes}
    train = ADE20KDataset(data_path, "training", seed=args.seed, **options)
    val = ADE20KDataset(data_path, "validation", augment=False, **options)
    val.bad_images = dense_training.bad_val_images(args, val)
    return train, val


def network_of(args: argparse.Namespace) -> SemanticFPN:
    rate = dense_training.drop_path_rate(args, dense_training.SEGMENTATION_DROP_PATH)
    network = SemanticFPN(args.model, args.num_classes, rate)
    if args.pretrained:
        fill_trunk(network.backbone, args.pretrained)
    return network


def learning_rates(args: argparse.Namespace) -> list[float]:
    """A warm-up, and linearly to 0; one rate per step of the run."""

    def rate(step: int) -> float:
        falling = 1 - step / args.iterations
        return args.lr * falling * dense_training.warmup_factor(step, args.warmup_iters, 1e-6)

    return [rate(step) for step in range(args.iterations)]


def train_segmenter(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start; or evaluate."""
    if args.eval:
        evaluate(args)
        return
    run = Run(args, args.amp)
    train, val = open_images(args, run.output_dir)
    network = network_of(args)
    data = dense_training.batches(args, train, run.output_dir, run.device)
    evaluation = partial(evaluate_segmenter, network, val, run.device, args.num_classes)
    dense_training.train(args, run, data, network, learning_rates(args), evaluation)
    if args.pictures and distributed.is_main_process():
        print(f"what it finds: {draw_segments(network, val, run.device, run.output_dir)}", flush=True)


def evaluate(args: argparse.Namespace) -> None:
    """Print the mIoU of the run in ``--output_dir``, which may be going on, or of ``--resume``."""
    device = distributed.init(args.dist_url, args.device, args.dist_timeout)
    _, val = open_images(args, Path(args.output_dir))
    network = network_of(args)
    dense_training.fill(network, args)
    dense_training.print_result(evaluate_segmenter(network.to(device), val, device, args.num_classes))


def main() -> None:
    distributed.run_script(train_segmenter, parse_args)


if __name__ == "__main__":
    main()
