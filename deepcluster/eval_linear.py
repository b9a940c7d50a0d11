"""Linear classification on the maps of one convolutional layer of a frozen network (Caron et al. 2018, section 4.2).

    python eval_linear.py --conv 3                    # embedded materials, weights of the run in runs/materials
    python eval_linear.py --data /path/to/imagenet --model /path/to/checkpoint.pth.tar --conv 3 --lr 0.01 --wd -7 \\
        --tencrops --exp /path/to/linear --workers 12

Maps are averaged to about 9,600 numbers, on which a linear layer learns with random crops and flips. The result is the
accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from deepcluster.augmentations import centre_crop, resize_for
from deepcluster.convnets import ClusterNetwork, check_conv, conv_maps
from deepcluster.flags import MODEL_HELP
from deepcluster.hub import CARD, MEAN, STD, load_network
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_labelled_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import EpochTraining, validate
from shared.evaluation.voc import TenCrops
from shared.images.loading import BadImages, EpochBatchSampler, EvalTransform, make_loader
from shared.images.sources import ImageSource
from shared.multicrop import normalize_views
from shared.networks.pretrained import flags_of_run
from shared.networks.weights import weights_checksum
from shared.run import randomness
from shared.run.flags import Parser

# A run that is resumed must have these as they were.
RUN_FLAGS = "batch_size lr momentum weight_decay seed".split()
# average pooling (kernel, stride, padding) of AlexNet's maps of 224-pixel images, layer by layer
ALEXNET_POOLING = {1: (6, 6, 3), 2: (4, 4, 0), 3: (3, 3, 1), 4: (3, 3, 1), 5: (2, 2, 0)}
ALEXNET_SHAPES = {1: (96, 55), 2: (256, 27), 3: (384, 13), 4: (384, 13), 5: (256, 13)}
MOST_INPUTS = 9600


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--model", default=None, help=MODEL_HELP)
    layers = "layer: AlexNet has 1 to 5, VGG16 1 to 13, a ResNet 1 to 5; None: the features that are clustered"
    add("--conv", type=int, default=None, help=layers)

    add = add_labelled_flags(parser, "--data")
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
    add_process_flags(parser, num_workers=4)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    embedded = {"model": CARD.embedded_run, "output_dir": "runs/materials", "epochs": 20, "batch_size": 64}
    args = parse_evaluation(parser, arguments, **embedded)
    if args.model is None:
        parser.error("--model: give a checkpoint")
    return args


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the probe; loss and accuracies in percent after the last epoch."""
    device, output_dir = frozen.start(args), Path(args.output_dir)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if args.batch_size % world_size:
        raise ValueError(f"--batch_size {args.batch_size} cannot be shared out over {world_size} processes")
    args.channels = flags_of_run(args.model).get("channels")
    train, val = frozen.labelled_sources(args, "--data")

    # frozen network, and a linear layer with torch's default initialisation
    network = load_network(args.model, keep_top_layer=False).requires_grad_(False).to(device)
    features = LayerFeatures(network, args.conv)
    side, in_chans = network.img_size, network.in_chans
    example = torch.zeros(1, in_chans, side, side, device=device)
    probe = nn.Linear(features(example).shape[1], len(train.classes)).to(device)
    crops = TenCrops(side, in_chans) if args.tencrops else centre_crop(side, False, in_chans)
    val_set = frozen.val_images(args, val, crops)
    half_batch = max(1, args.batch_size // 2 // world_size)
    validation = partial(validate, probe, features.of_crops, val_set, device, half_batch, args.num_workers, score_crops)

    # crops, optimiser, epochs
    bad_images = frozen.bad_images_of(args, train, output_dir / "bad_images.txt")
    train_set = RandomCrops(train, side, args.seed, bad_images, in_chans)
    sampler = EpochBatchSampler(len(train), args.batch_size // world_size, args.seed, rank, world_size, drop_last=False)
    loader = make_loader(train_set, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    optimizer = torch.optim.SGD(probe.parameters(), args.lr, args.momentum, weight_decay=10**args.weight_decay)
    batches = partial(scheduled_batches, loader, optimizer, args.lr, device)
    name = "linear" if args.conv is None else f"linear_conv{args.conv}"
    files = (output_dir / f"{name}.pth.tar", output_dir / f"{name}_log.txt")
    options = {"flags": {name: getattr(args, name) for name in RUN_FLAGS}, "prefix": ""}
    training = EpochTraining(*files, probe, optimizer, None, weights_checksum(network), train, **options)
    return training.run(batches, features, validation, args.epochs, bad_images)


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

    def of_crops(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) or crops of them (B, crops, C, H, W) to features (B, crops, D)."""
        crops = images if images.dim() == 5 else images[:, None]
        (normalised,) = normalize_views([crops.flatten(0, 1)], images.device, MEAN, STD)
        return self(normalised).unflatten(0, crops.shape[:2])


def pool_maps(maps: Tensor, conv: int) -> Tensor:
    """Average maps (B, C, H, W) as the paper does for AlexNet, and others to the largest square that fits."""
    channels, height, width = maps.shape[1:]
    if height == width and ALEXNET_SHAPES.get(conv) == (channels, height):
        return F.avg_pool2d(maps, *ALEXNET_POOLING[conv])
    side = max(1, min(height, width, int((MOST_INPUTS / channels) ** 0.5)))
    return F.adaptive_avg_pool2d(maps, side)


class RandomCrops(Dataset):
    """Crops at random places, perhaps flipped, of the centre of each image; drawn from (seed, epoch, index).

    An item's key is (epoch, index); it is an image (C, ``size_px``, ``size_px``) and a label.
    """

    def __init__(self, source: ImageSource, size_px: int, seed: int, bad_images: BadImages, in_chans: int = 3):
        self.source, self.size_px, self.seed, self.bad_images = source, size_px, seed, bad_images
        side = resize_for(size_px)
        self.centre = EvalTransform(side, side, in_chans=in_chans, interpolation="bilinear")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.bad_images.read(self.source, index, key, self._read)
        room = image.shape[1] - self.size_px + 1
        top, left, flip = (
            randomness.derive_seed(self.seed, epoch, index, i) % n for i, n in enumerate((room, room, 2))
        )
        crop = image[:, top : top + self.size_px, left : left + self.size_px]
        return (crop.flip(2) if flip else crop).contiguous(), label

    def _read(self, index: int) -> tuple[Tensor, int]:
        return self.centre(self.source.load(index).decode()), self.source.label(index)


def learning_rate(start: float, weight_decay: float, step: int) -> float:
    """``start / sqrt(1 + start * weight_decay * step)``, one value per step."""
    return start / (1 + start * weight_decay * step) ** 0.5


def scheduled_batches(
    loader: DataLoader, optimizer: torch.optim.Optimizer, lr: float, device: torch.device, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of an epoch, each with the learning rate of its step set."""
    loader.batch_sampler.set_epoch(epoch)
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, group["weight_decay"], step)
        yield normalize_views([images], device, MEAN, STD)[0], labels.to(device)


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
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
