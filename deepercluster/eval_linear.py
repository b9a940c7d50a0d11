"""Linear classification on the maps of one convolution of a frozen network (Caron et al. 2019, section 5.3).

    python eval_linear.py --conv 13                   # embedded materials, weights of the run in runs/materials
    python eval_linear.py --data_path /path/to/imagenet --pretrained ours --conv 13 --lr 0.02 --batch_size 256 \\
        --dump_path /path/to/linear --workers 12
    python eval_linear.py --data_path /path/to/VOCdevkit/VOC2007 --split trainval --pretrained ours --conv 13 \\
        --lr 0.02 --batch_size 128 --nepochs 60       # several classes an image: mean average precision

Maps are averaged to about 9,000 numbers, on which a linear layer learns with random crops and flips. ``--kfold`` and
``--cross_valid`` learn from a part of the training images and classify the rest, to choose rates. Running the same
command again resumes (but on VOC).
"""

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepercluster.hub import CARD, load_network
from deepercluster.vgg16 import VGG16, after_relu
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_labelled_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import train_one_epoch
from shared.images.sources import ImageSource
from shared.images.subsets import Subset
from shared.networks.pretrained import flags_of_run
from shared.networks.weights import weights_checksum
from shared.run.flags import AnyDashParser, bool_flag

# (kernel of the average pooling, side of the maps of 224-pixel images), by the number of poolings before
POOLING = ((18, 226), (14, 113), (9, 56), (6, 28), (3, 14))


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = add_network_flags(parser)
    rates = "0.005, 0.01, four times 0.03, 0.02, three times 0.03, three times 0.02"
    conv = f"number of the convolution, 1 to 13, whose maps are looked at; published --lr at batches of 256: {rates}"
    add("--conv", type=int, default=1, help=conv)
    add = add_training_flags(parser, batch_size=64, seed=31)
    add("--split", default="train", choices=("train", "trainval"), help="of VOC 2007, to learn from")
    add("--kfold", type=int, default=None, help="cut the training images of each class into so many parts")
    add("--cross_valid", type=int, default=None, help="classify this part, from 0, learn from the others")
    return parser


def add_network_flags(parser: argparse.ArgumentParser) -> Callable:
    """The network of a file, as the three evaluations take it; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("network").add_argument
    add("--pretrained", default="", help="a run, a file or a release")
    add("--sobel", type=bool_flag, default=None, help="None: the file tells; else an error where it is not so")
    add("--image_size", type=int, default=None, help="side of the crops in pixels; None: that of the training")
    return add


def add_training_flags(parser: argparse.ArgumentParser, batch_size: int, seed: int) -> Callable:
    """A training on labelled images; returns the ``add_argument`` of the group of the images."""
    data = add_labelled_flags(parser)
    data("--batch_size", type=int, default=batch_size, help="images per step on this process")
    data("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add = parser.add_argument_group("optimisation").add_argument
    add("--nepochs", "--epochs", dest="epochs", type=int, default=100)
    add("--lr", type=float, default=0.05, help="learning rate at the start")
    add("--wd", type=float, default=1e-5, help="weight decay")
    add("--seed", type=int, default=seed)
    add = parser.add_argument_group("run").add_argument
    add("--dump_path", "--output_dir", dest="output_dir", default=".", help="for checkpoint and log")
    for name in ("--epoch", "--start_iter"):
        add(name, type=int, default=0, help="not used, as in the official code: the checkpoint tells")
    add("--debug_slurm", type=bool_flag, default=False, help="not needed: outside of srun its variables are not read")
    add_process_flags(parser, num_workers=8)
    return data


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    embedded = {"pretrained": CARD.embedded_run, "output_dir": "runs/materials/linear", "epochs": 20, "conv": 13}
    embedded |= {"crop_scale": (0.4, 1.0)}
    args = parse_evaluation(parser, arguments, **embedded)
    after_relu(args.conv)  # that there is one
    if (args.kfold is None) != (args.cross_valid is None):
        parser.error("--kfold and --cross_valid belong together")
    if args.kfold is not None and not 0 <= args.cross_valid < args.kfold:
        parser.error(f"--cross_valid {args.cross_valid}: the parts of --kfold {args.kfold} are 0 to {args.kfold - 1}")
    return args


def load_frozen(args: argparse.Namespace, **options) -> VGG16:
    """The network of ``--pretrained``, for images of ``--image_size``; what is open is taken from the network."""
    args.channels = flags_of_run(args.pretrained).get("channels")
    network = load_network(args.pretrained, **options)
    if args.sobel not in (None, network.sobel is not None):
        raise ValueError(f"--sobel {args.sobel}: the network of --pretrained {args.pretrained} is another one")
    args.image_size = args.image_size or network.img_size
    return network


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the probe; loss and accuracies, or mean average precision, in percent."""
    device = frozen.start(args)
    network = load_frozen(args).requires_grad_(False).to(device)
    side, in_chans = args.image_size, network.in_chans

    def features(images: Tensor) -> Tensor:
        return pooled(network.maps(images, args.conv), args.conv).flatten(1)

    dim = features(torch.zeros(1, in_chans, side, side, device=device)).shape[1]
    transform = frozen.eval_transform(CARD, side, network)
    if args.data_path and Path(os.path.abspath(args.data_path)).parts[-2:] == ("VOCdevkit", "VOC2007"):
        return probe_voc(args, features, dim, transform, device)
    train, val = frozen.labelled_sources(args)
    if args.kfold is not None:
        train, val = fold(train, args.kfold, args.cross_valid)
    probe = linear_layer(dim, len(train.classes), device)
    training = frozen.LabelledTraining(args, CARD, probe, features, (train, val), transform, device)
    optimizer = torch.optim.SGD(probe.parameters(), args.lr, 0.9, weight_decay=args.wd)
    batches = partial(decaying, optimizer=optimizer, lr=args.lr)
    files = f"linear_conv{args.conv}.pth.tar", f"linear_conv{args.conv}_log.txt"
    return training.train(optimizer, None, weights_checksum(network), *files, batches=batches, prefix="")


def linear_layer(dim: int, classes: int, device: torch.device) -> nn.Sequential:
    """Under the official name, ``linear``."""
    return nn.Sequential(OrderedDict(linear=nn.Linear(dim, classes))).to(device)


def pooled(maps: Tensor, conv: int) -> Tensor:
    """Maps (B, C, H, W) of a convolution averaged as the paper does, for smaller images in smaller squares."""
    kernel, side = POOLING[after_relu(conv) - 3 * conv]
    return F.avg_pool2d(maps, max(1, kernel * maps.shape[-1] // side))


def decaying(
    crops: frozen.TrainCrops, epoch: int, optimizer: torch.optim.Optimizer, lr: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of an epoch, each step with its rate: lr / sqrt(1 + lr * wd * step)."""
    for step, batch in enumerate(crops(epoch), start=epoch * len(crops.loader)):
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + lr * group["weight_decay"] * step) ** 0.5
        yield batch


# --- Folds ------------------------------------------------------------------------------------------------------------


def fold_indices(targets: np.ndarray, parts: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to learn from and to classify: of each class, in the order in which they first appear, one of ``parts``
    consecutive blocks of equal size; what is left over is in neither.
    """
    train, val = [], []
    for label in dict.fromkeys(targets.tolist()):
        (images,) = np.nonzero(targets == label)
        size = len(images) // parts
        blocks = [images[i * size : (i + 1) * size] for i in range(parts)]
        val.append(blocks.pop(number))
        train += blocks
    return np.concatenate(train), np.concatenate(val)


def fold(source: ImageSource, parts: int, number: int) -> tuple[Subset, Subset]:
    """Both as sources; raises ``ValueError`` where a class has fewer images than there are parts."""
    if (least := np.bincount(source.labels).min()) < parts:
        raise ValueError(f"--kfold {parts}: a class has {least} images")
    train, val = fold_indices(source.labels, parts, number)
    return Subset(source, train, f"{source.name}, learnt from"), Subset(source, val, f"{source.name}, part {number}")


# --- VOC 2007 ---------------------------------------------------------------------------------------------------------


def probe_voc(args: argparse.Namespace, features, dim: int, transform, device: torch.device) -> dict[str, float]:
    """Train on a split of VOC 2007, where an image has several classes, and test; on one process."""
    from shared.evaluation.voc import CLASSES, TEST_SPLIT, VOCImages, average_precisions, multilabel_loss

    if args.kfold is not None or distributed.get_world_size() > 1:
        raise ValueError("VOC 2007 has no --kfold here, and takes one process")
    train, test = (VOCImages(Path(args.data_path), s, "--data_path") for s in (args.split, TEST_SPLIT[args.split]))
    labels = torch.from_numpy(train.labels).to(device)
    train.source.labels = np.arange(len(train.source))  # which image it is: the loss looks up its classes
    probe = linear_layer(dim, len(CLASSES), device)
    crops = frozen.TrainCrops(args, CARD, train.source, transform, device)
    optimizer = torch.optim.SGD(probe.parameters(), args.lr, 0.9, weight_decay=args.wd)
    for epoch in range(args.epochs):
        batches = decaying(crops, epoch, optimizer, args.lr)
        loss = train_one_epoch(
            probe, features, batches, optimizer, lambda scores, images: multilabel_loss(scores, labels[images])
        )
        print(f"epoch {epoch}: loss {loss:.4f}", flush=True)
    images = frozen.val_images(args, test.source, transform)
    scores = torch.full((len(test.source), len(CLASSES)), torch.nan)  # of images that cannot be read
    with torch.no_grad():
        for i, (image, _, read) in enumerate(images):
            if read == i:
                scores[i] = probe(features(image[None].to(device)))[0].cpu()
    precision = 100 * float(np.nanmean(average_precisions(scores.numpy(), test.labels)))
    print(f"{TEST_SPLIT[args.split]} mAP: {precision:.2f} %", flush=True)
    return {"mAP": precision}


def main() -> None:
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
