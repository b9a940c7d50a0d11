"""Object detection and instance segmentation: Mask R-CNN on an XCiT feature pyramid (section 4.3).

    python main.py                                                        # generated shapes, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model xcit_small_12_p16 --pretrained xcit_small_12_p16_384_dist \\
        --data-path /path/to/coco --output_dir /path/to/run               # 36 epochs: box AP 45.3, mask AP 40.8

The detector is torchvision's; the trunk, its taps and the recipe are the paper's. Running the same command again
resumes the run.
"""

import argparse
import sys
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from shared import distributed
from shared.run.flags import AnyDashParser, parse_with_embedded_defaults
from shared.run.run import Run
from xcit import dense_training
from xcit.detection.average_precision import as_detections, average_precision
from xcit.detection.coco import CocoDataset
from xcit.feature_pyramid import build_pyramid, fill_trunk
from xcit.prediction_pictures import COUNT, paint_objects, save_predictions
from xcit.shapes import write_coco

SHAPES_DEFAULTS = {
    "model": "xcit_nano_12_p8",
    "epochs": 4,
    "lr": 5e-4,
    "steps": [3],
    "warmup_iters": 10,
    "min_size": [64],
    "max_size": 64,
    "crop": False,
    "rois_per_image": 32,
    "output_dir": "runs/shapes",
}
MINIMUM = dense_training.MINIMUM | dict.fromkeys(("epochs", "min_size", "max_size", "rois_per_image"), 1)
NECK_CHANNELS = 256


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    dense_training.add_flags(parser)
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=int, default=36, help="passes over the images")
    add("--lr", type=float, default=1e-4, help="learning rate; it is not scaled with the batch")
    add("--weight-decay", type=float, default=0.05, help="of everything but norms")
    add("--steps", type=int, nargs="*", default=[27, 33], help="epochs after which the rate falls by ten")
    add("--warmup-iters", type=int, default=500, help="steps of the linear warm-up from a thousandth of the rate")
    sides = "short sides of training images in pixels; the last one is that of evaluation"
    add("--min-size", type=int, nargs="+", default=list(range(480, 801, 32)), help=sides)
    add("--max-size", type=int, default=1333, help="longest side")
    add("--rois-per-image", type=int, default=512, help="proposals that train the heads")
    add("--crop", action=argparse.BooleanOptionalAction, default=True, help="half of the training images are crops")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    args = parse_with_embedded_defaults(get_args_parser(), arguments, SHAPES_DEFAULTS, MINIMUM)
    args.steps = sorted(args.steps)
    return args


class DetectionBackbone(nn.Module):
    """Trunk and feature pyramid network: five maps of 256 channels, strides 4 to 64."""

    def __init__(self, model: str, drop_path_rate: float = 0.0):
        super().__init__()
        self.body = build_pyramid(model, drop_path_rate)
        self.fpn = FeaturePyramidNetwork([self.body.embed_dim] * 4, NECK_CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = NECK_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))


def build_detector(
    model: str,
    num_classes: int,
    drop_path_rate: float = 0.0,
    min_size: tuple[int, ...] = (800,),
    max_size: int = 1333,
    pretrained: str = "",
    rois_per_image: int = 512,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on an XCiT trunk.

    Args:
        num_classes: Without the background.
        min_size, max_size: Of the images, see torchvision's detectors.
        pretrained: Weights of the trunk, see :func:`xcit.hub.read_weights`.
        rois_per_image: Proposals that train the heads.
    """
    backbone = DetectionBackbone(model, drop_path_rate)
    if pretrained:
        fill_trunk(backbone.body, pretrained)
    sizes = {"min_size": tuple(min_size), "max_size": max_size, "box_batch_size_per_image": rois_per_image}
    return MaskRCNN(backbone, num_classes + 1, **sizes)


@torch.no_grad()
def evaluate_detector(
    network: MaskRCNN, dataset: CocoDataset, device: torch.device, between_images: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """COCO's AP of boxes and masks; images are shared out over the processes.

    Returns:
        ``box_ap``, ``box_ap50``, ``box_ap75`` and the same of masks, in percent; ``left_out``, where there are any:
        the number of images that cannot be read and do not count.
    """
    network.eval()
    detections, left_out = [], []
    for index, image, _ in dense_training.own_share(dataset, between_images, left_out):
        (prediction,) = network([image.to(device)])
        detections += as_detections(prediction, dataset.image_ids[index], dataset.category_ids)
    by_rank = distributed.all_gather_object(detections)
    result = None
    if distributed.is_main_process():
        unseen = {dataset.image_ids[index] for index in left_out}
        annotations = [one for one in dataset.annotations["annotations"] if one["image_id"] not in unseen]
        found = [detection for part in by_rank for detection in part]
        result = average_precision(dataset.annotations | {"annotations": annotations}, found)
    return distributed.broadcast_object(result) | ({"left_out": len(left_out)} if left_out else {})


@torch.no_grad()
def draw_detections(network: MaskRCNN, dataset: CocoDataset, device: torch.device, output_dir: Path) -> Path:
    """A picture of the objects in the first images and of those that are found."""
    network.eval()
    pairs = []
    for index in range(min(COUNT, len(dataset))):
        image, target, _ = dataset[index]
        (found,) = network([image.to(device)])
        pairs.append(tuple(paint_objects(image, objects, dataset.classes) for objects in (target, found)))
    return save_predictions(pairs, output_dir)


def open_images(args: argparse.Namespace, output_dir: Path) -> tuple[CocoDataset, CocoDataset]:
    """The train and the val part; generated shapes without ``--data-path``."""
    data_path = dense_training.data_folder(args, output_dir, write_coco, {"train": 64, "val": 16})
    train = CocoDataset(data_path, "train", args.seed, crop=args.crop)
    val = CocoDataset(data_path, "val", augment=False)
    val.bad_images = dense_training.bad_val_images(args, val)
    if val.classes != train.classes:
        raise ValueError(f"--data-path {data_path}: train and val part have other categories")
    return train, val


def network_of(args: argparse.Namespace, num_classes: int) -> MaskRCNN:
    rate = dense_training.drop_path_rate(args, dense_training.DETECTION_DROP_PATH)
    sizes = (args.min_size, args.max_size)
    return build_detector(args.model, num_classes, rate, *sizes, args.pretrained, args.rois_per_image)


def learning_rates(args: argparse.Namespace, steps_per_epoch: int) -> list[float]:
    """A warm-up, then a tenth after each of the epochs ``--steps``; one rate per step of the run."""

    def rate(step: int) -> float:
        falls = bisect_right(args.steps, step // steps_per_epoch)
        return args.lr * 0.1**falls * dense_training.warmup_factor(step, args.warmup_iters, 0.001)

    return [rate(step) for step in range(args.epochs * steps_per_epoch)]


def train_detector(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start; or evaluate."""
    if args.eval:
        evaluate(args)
        return
    run = Run(args, args.amp)
    train, val = open_images(args, run.output_dir)
    network = network_of(args, len(train.classes))
    data = dense_training.batches(args, train, run.output_dir, run.device)
    lr = learning_rates(args, data.steps_per_epoch)
    dense_training.train(args, run, data, network, lr, partial(evaluate_detector, network, val, run.device))
    if args.pictures and distributed.is_main_process():
        print(f"what it finds: {draw_detections(network, val, run.device, run.output_dir)}", flush=True)


def evaluate(args: argparse.Namespace) -> None:
    """Print the AP of the run in ``--output_dir``, which may be going on, or of ``--resume``."""
    device = distributed.init(args.dist_url, args.device, args.dist_timeout)
    train, val = open_images(args, Path(args.output_dir))
    network = network_of(args, len(train.classes))
    dense_training.fill(network, args)
    dense_training.print_result(evaluate_detector(network.to(device), val, device))


def main() -> None:
    distributed.run_script(train_detector, parse_args)


if __name__ == "__main__":
    main()
