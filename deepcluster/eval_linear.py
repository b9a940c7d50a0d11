"""Linear classification on the maps of one convolutional layer of a frozen network (Caron et al. 2018, section 4.2).

    python eval_linear.py --conv 3                    # embedded digits, weights of the run in runs/digits
    python eval_linear.py --data /path/to/imagenet --model /path/to/checkpoint.pth.tar --conv 3 --lr 0.01 --wd -7 \\
        --tencrops --exp /path/to/linear --workers 12

Maps are averaged to about 9,600 numbers, on which a linear layer learns with random crops and flips. The result is the
accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import ten_crop

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepcluster.augmentations import centre_crop, resize_for
from deepcluster.convnets import ClusterNetwork, check_conv, conv_maps
from deepcluster.flags import IMAGES_HELP, MODEL_HELP, add_process_flags, evaluation_parser
from deepcluster.hub import MEAN, RUN_ON_DIGITS, STD, load_network
from shared import distributed
from shared.evaluation.features import check_features
from shared.evaluation.linear import train_one_epoch
from shared.images.labelled import open_labelled
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.sources import ImageSource
from shared.multicrop import normalize_views
from shared.run import randomness
from shared.run.checkpoint import load_latest, save

# average pooling (kernel, stride, padding) of AlexNet's maps of 224-pixel images, layer by layer
ALEXNET_POOLING = {1: (6, 6, 3), 2: (4, 4, 0), 3: (3, 3, 1), 4: (3, 3, 1), 5: (2, 2, 0)}
ALEXNET_SHAPES = {1: (96, 55), 2: (256, 27), 3: (384, 13), 4: (384, 13), 5: (256, 13)}
MOST_INPUTS = 9600


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--model", default=None, help=MODEL_HELP)
    layers = "layer: AlexNet has 1 to 5, VGG16 1 to 13, a ResNet 1 to 5; None: the features that are clustered"
    add("--conv", type=int, default=None, help=layers)

    add = parser.add_argument_group("data").add_argument
    add("--data", default=None, help=f"labelled images, perhaps in train/ and val/: {IMAGES_HELP}")
    add("--val_path", default=None, help="validation images; by default those that belong to --data")
    add("--tencrops", action="store_true", help="validate on the corners, the centre, and their mirror images")
    add("--batch_size", type=int, default=256, help="images per step of all processes together; half in validation")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=90)
    add("--lr", type=float, default=0.01, help="learning rate of the first step")
    add("--momentum", type=float, default=0.9)
    add("--weight_decay", "--wd", type=float, default=-4, help="weight decay, as a power of ten")
    add("--seed", type=int, default=31)

    add = parser.add_argument_group("run").add_argument
    add("--exp", "--output_dir", dest="output_dir", default="", help="for linear_conv<N>.pth.tar and its log")
    add("--verbose", action="store_true", help="accepted; every epoch is printed anyway")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.data is None:
        parser.set_defaults(model=RUN_ON_DIGITS, output_dir="runs/digits", epochs=20, batch_size=64)
        args = parser.parse_args(arguments)
    if args.model is None:
        parser.error("--model: give a checkpoint")
    return args


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the probe; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    world_size = distributed.get_world_size()
    if args.batch_size % world_size:
        raise ValueError(f"--batch_size {args.batch_size} cannot be shared out over {world_size} processes")

    # data and frozen network
    train, val = open_labelled(args.data, args.val_path, flag="--data")
    network = load_network(args.model, keep_top_layer=False).requires_grad_(False).to(device)
    features = LayerFeatures(network, args.conv)
    train_set = RandomCrops(train, network.img_size, args.seed)
    sampler = EpochBatchSampler(
        len(train), args.batch_size // world_size, args.seed, distributed.get_rank(), world_size, drop_last=False
    )
    loader = make_loader(train_set, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    val_set = EvalDataset(val, TenCrops(network.img_size) if args.tencrops else centre_crop(network.img_size, False))
    for source in (train, val):
        distributed.print_once(source.describe())

    # linear layer with torch's default initialisation, and its optimiser
    example = torch.zeros(1, 3, network.img_size, network.img_size, device=device)
    probe = nn.Linear(features(example).shape[1], len(train.classes)).to(device)
    wrapped = distributed.wrap(probe, device)
    optimizer = torch.optim.SGD(probe.parameters(), args.lr, args.momentum, weight_decay=10**args.weight_decay)

    # resume
    output_dir = Path(args.output_dir)
    name = "linear" if args.conv is None else f"linear_conv{args.conv}"
    log: list[dict] = []
    checkpoint = load_latest(output_dir / f"{name}.pth.tar")
    if checkpoint is not None:
        probe.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        log = checkpoint["log"]
        distributed.print_once(f"resuming at epoch {len(log)}")

    # epochs
    for epoch in range(len(log), args.epochs):
        sampler.set_epoch(epoch)
        batches = scheduled_batches(loader, optimizer, epoch * len(sampler), args.lr, device)
        loss = train_one_epoch(wrapped, features, batches, optimizer)
        result = validate(
            probe, features, val_set, device, max(1, args.batch_size // 2 // world_size), args.num_workers
        )
        log.append({"epoch": epoch, "train_loss": loss} | {f"test_{key}": value for key, value in result.items()})
        distributed.print_once("  ".join(f"{key} {value:.5g}" for key, value in log[-1].items()))
        if distributed.is_main_process():
            output_dir.mkdir(parents=True, exist_ok=True)
            state = {
                "epoch": epoch + 1,
                "state_dict": probe.state_dict(),
                "optimizer": optimizer.state_dict(),
                "log": log,
            }
            save(output_dir / f"{name}.pth.tar", state)
            (output_dir / f"{name}_log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    result = {key.removeprefix("test_"): value for key, value in log[-1].items() if key.startswith("test_")}
    best = max(line["test_acc1"] for line in log)
    distributed.print_once(
        f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
        f"best top-1 of all epochs {best:.2f} %)"
    )
    return result


class LayerFeatures:
    """What the probe sees: maps of one layer, averaged over places to at most 9,600 numbers.

    Args:
        network: In evaluation mode.
        conv: Number of the layer, from 1; None for the features that are clustered.
    """

    def __init__(self, network: ClusterNetwork, conv: int | None):
        if conv is not None:
            check_conv(network, conv)
        self.network, self.conv = network, conv

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to features (B, D)."""
        if self.conv is None:
            return self.network.embed(images)
        return pool_maps(conv_maps(self.network, images, self.conv), self.conv).flatten(1)


def pool_maps(maps: Tensor, conv: int) -> Tensor:
    """Average maps (B, C, H, W) as the paper does for AlexNet, and others to the largest square that fits."""
    channels, height, width = maps.shape[1:]
    if height == width and ALEXNET_SHAPES.get(conv) == (channels, height):
        return F.avg_pool2d(maps, *ALEXNET_POOLING[conv])
    side = max(1, min(height, width, int((MOST_INPUTS / channels) ** 0.5)))
    return F.adaptive_avg_pool2d(maps, side)


class RandomCrops(Dataset):
    """Crops at random places, perhaps flipped, of the centre of each image; drawn from (seed, epoch, index).

    An item's key is (epoch, index); it is a uint8 image (3, ``size_px``, ``size_px``) and a label.
    """

    def __init__(self, source: ImageSource, size_px: int, seed: int):
        self.source, self.size_px, self.seed = source, size_px, seed
        side = resize_for(size_px)
        self.centre = EvalTransform(side, side, interpolation="bilinear")
        self.bad_images = BadImages(len(source), on_bad_image="error")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image = self.bad_images.read(self.source, index, key, lambda i: self.centre(self.source.load(i).decode()))
        room = image.shape[1] - self.size_px + 1
        top, left, flip = (
            randomness.derive_seed(self.seed, epoch, index, i) % n for i, n in enumerate((room, room, 2))
        )
        crop = image[:, top : top + self.size_px, left : left + self.size_px]
        return (crop.flip(2) if flip else crop).contiguous(), self.source.label(index)


class TenCrops:
    """The four corners, the centre, and the mirror images of the five: RGB pixels to uint8 (10, 3, size, size)."""

    def __init__(self, size_px: int):
        side = resize_for(size_px)
        self.size_px = size_px
        self.centre = EvalTransform(side, side, interpolation="bilinear")

    def __call__(self, pixels) -> Tensor:
        return torch.stack(ten_crop(self.centre(pixels), [self.size_px, self.size_px]))


def learning_rate(start: float, weight_decay: float, step: int) -> float:
    """``start / sqrt(1 + start * weight_decay * step)``, one value per step."""
    return start / (1 + start * weight_decay * step) ** 0.5


def scheduled_batches(
    loader: DataLoader, optimizer: torch.optim.Optimizer, first_step: int, lr: float, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, each with the learning rate of its step set."""
    for step, (images, labels) in enumerate(loader, start=first_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, group["weight_decay"], step)
        yield normalize_views([images], device, MEAN, STD)[0], labels.to(device)


@torch.no_grad()
def validate(
    probe: nn.Module,
    features: Callable[[Tensor], Tensor],
    dataset: Dataset,
    device: torch.device,
    batch_size: int,
    num_workers: int,
) -> dict[str, float]:
    """Loss and accuracies in percent, every image counted once, shared out over the processes."""
    share = range(distributed.get_rank(), len(dataset), distributed.get_world_size())
    loader = make_loader(dataset, batch_size=batch_size, sampler=share, num_workers=num_workers, device=device)
    totals = torch.zeros(3, dtype=torch.double, device=device)
    for images, labels, *_ in loader:
        crops = images if images.dim() == 5 else images[:, None]  # (B, 1 or 10, 3, H, W)
        inputs = features(normalize_views([crops.flatten(0, 1)], device, MEAN, STD)[0])
        check_features(inputs)
        loss, hits1, hits5 = score_crops(probe(inputs).unflatten(0, crops.shape[:2]), labels.to(device))
        totals += torch.stack([loss.double(), hits1.double(), hits5.double()])
    loss, hits1, hits5 = (distributed.all_reduce_sum(totals) / len(dataset)).tolist()
    return {"loss": loss, "acc1": 100 * hits1, "acc5": 100 * hits5}


def score_crops(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over images of the loss of the centre crop, and of hits of the mean prediction of all crops.

    Args:
        logits: (B, crops, C); of ten crops the fifth is the centre.
        labels: (B,).

    Returns:
        Loss, images whose label is predicted, images whose label is among the min(5, C) best; 0-d.
    """
    centre = logits[:, min(4, logits.shape[1] - 1)]
    best = logits.softmax(dim=2).mean(dim=1).topk(min(5, logits.shape[2]), dim=1).indices
    hits = best == labels[:, None]
    return F.cross_entropy(centre, labels, reduction="sum"), hits[:, 0].sum(), hits.sum()


def main() -> None:
    with distributed.clean_exit():
        eval_linear(parse_args())


if __name__ == "__main__":
    main()
