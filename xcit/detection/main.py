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

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared import distributed
from shared.evaluation.features import RankSampler
from shared.images.loading import BadImages
from shared.run.flags import AnyDashParser
from xcit import dense_training
from xcit.detection.average_precision import as_detections, average_precision
from xcit.detection.coco import CocoDataset
from xcit.feature_pyramid import build_pyramid, fill_trunk
from xcit.prediction_pictures import paint_objects, save_predictions
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
NECK_CHANNELS = 256


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(
        "XCiT Mask R-CNN", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    dense_training.add_flags(parser)
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=int, default=36, help="passes over the images")
    add("--lr", type=float, default=1e-4, help="learning rate; it is not scaled with the batch")
    add("--weight-decay", type=float, default=0.05, help="of everything but norms")
    add("--steps", type=int, nargs="*", default=[27, 33], help="epochs after which the rate falls by ten")
    add("--warmup-iters", type=int, default=500, help="steps of the linear warm-up from a thousandth of the rate")
    add("--min-size", type=int, nargs="+", default=list(range(480, 801, 32)), help="short sides of training images in "
        "pixels; the last one is that of evaluation")  # fmt: skip
    add("--max-size", type=int, default=1333, help="longest side")
    add("--rois-per-image", type=int, default=512, help="proposals that train the heads")
    add("--crop", action=argparse.BooleanOptionalAction, default=True, help="half of the training images are crops")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    if args.data_path is None:
        parser.set_defaults(**SHAPES_DEFAULTS)
        args = parser.parse_args(arguments)
    for flag in ("epochs", "batch_size", "test_freq", "log_freq"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is less than 1")
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
        pretrained: Weights of the trunk, see :func:`xcit.pretrained.read_weights`.
        rois_per_image: Proposals that train the heads.
    """
    backbone = DetectionBackbone(model, drop_path_rate)
    if pretrained:
        fill_trunk(backbone.body, pretrained)
    sizes = {"min_size": tuple(min_size), "max_size": max_size, "box_batch_size_per_image": rois_per_image}
    return MaskRCNN(backbone, num_classes + 1, **sizes)


@torch.no_grad()
def evaluate_detector(
    network: MaskRCNN,
    dataset: CocoDataset,
    device: torch.device,
    between_batches: Callable[[], None] | None = None,
) -> dict[str, float]:
    """COCO's AP of boxes and masks; images are shared out over the processes.

    Returns:
        ``box_ap``, ``box_ap50``, ``box_ap75`` and the same of masks, in percent.
    """
    was_training = network.training
    network.eval()
    detections = []
    share = RankSampler(len(dataset))
    own = len(range(share.rank, len(dataset), share.world_size))
    for number, index in enumerate(share):
        if number < own:  # the rest fills up the share of the last ranks
            image, _, _ = dataset[index]
            (prediction,) = network([image.to(device)])
            detections += as_detections(prediction, dataset.image_ids[index], dataset.category_ids)
        if between_batches is not None:
            between_batches()
    network.train(was_training)
    by_rank = distributed.all_gather_object(detections)
    result = None
    if distributed.is_main_process():
        result = average_precision(dataset.annotations, [detection for part in by_rank for detection in part])
    return distributed.broadcast_object(result)


def draw_detections(network: MaskRCNN, dataset: CocoDataset, device: torch.device, output_dir: Path) -> Path:
    """A picture of the objects in the first images and of those that are found."""

    def paint(image: Tensor, target: dict) -> tuple[np.ndarray, np.ndarray]:
        (found,) = network([image.to(device)])
        return tuple(paint_objects(image, objects, dataset.classes) for objects in (target, found))

    return save_predictions(network, dataset, paint, output_dir)


def train_detector(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start; or evaluate."""
    device, output_dir = dense_training.start(args)
    data_path = Path(args.data_path) if args.data_path else output_dir / "data"
    if args.data_path is None:
        if distributed.is_main_process():
            write_coco(data_path, {"train": 64, "val": 16})
        distributed.barrier()
    train = CocoDataset(data_path, "train", args.seed, crop=args.crop)
    policy = (output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    train.bad_images = BadImages(len(train), *policy)
    val = CocoDataset(data_path, "val", augment=False)
    if val.classes != train.classes:
        raise ValueError(f"--data-path {data_path}: train and val part have other categories")
    rate = dense_training.drop_path_rate(args, dense_training.DETECTION_DROP_PATH)
    network = build_detector(
        args.model, len(train.classes), rate, args.min_size, args.max_size, args.pretrained, args.rois_per_image
    )
    evaluate = partial(evaluate_detector, dataset=val, device=device)
    if args.eval:
        dense_training.evaluate_only(args, network, evaluate, device)
        return

    def steps(steps_per_epoch: int) -> tuple[int, Callable[[int], float]]:
        def learning_rate(step: int) -> float:
            falls = bisect_right(args.steps, step // steps_per_epoch)
            return args.lr * 0.1**falls * dense_training.warmup_factor(step, args.warmup_iters, 0.001)

        return args.epochs * steps_per_epoch, learning_rate

    draw = partial(draw_detections, dataset=val, device=device, output_dir=output_dir)
    dense_training.train_dense(args, network, train, steps, args.weight_decay, evaluate, draw, device, output_dir)


def main() -> None:
    with distributed.clean_exit():
        train_detector(parse_args())


if __name__ == "__main__":
    main()
