"""Supervised training of a Cross-Covariance Image Transformer.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model xcit_small_12_p16 --batch-size 128 --drop-path 0.05 \\
        --data-path /path/to/imagenet --output_dir /path/to/run --full_crop      # 400 epochs: 82.0 top-1

The recipe is DeiT's: RandAugment, Mixup and CutMix, Random Erasing, repeated augmentation, AdamW, and optionally a
teacher whose predictions are learned too. Running the same command again resumes the run.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from torch import nn

from shared import distributed
from shared.networks.classifiers import fill_classifier
from shared.optimisation.precision import Precision
from shared.run.flags import AnyDashParser, tell_embedded_defaults
from shared.run.run import Run
from shared.supervised import flags
from shared.supervised.data import LabelledViews, build_mixup, open_images
from shared.supervised.losses import build_loss
from shared.supervised.train import BestAccuracy, train_classifier
from shared.supervised.transforms import train_transform
from xcit.hub import CROP_RATIO, MEAN, STD, build_network, read_weights
from xcit.report import report

EMBEDDED_NETWORK = {"model": "xcit_nano_12_p8", "input_size": 32, "full_crop": True}
EMBEDDED_DATA_DEFAULTS = flags.EMBEDDED_RECIPE | EMBEDDED_NETWORK | {"lr": 0.016}
NETWORK_FLAGS = ("model", "in_chans")


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    flags.add_data_set_flags(parser)

    add = parser.add_argument_group("network").add_argument
    add("--model", default="xcit_small_12_p16", help="xcit_<size>_<depth>_p<patch>, or any timm or torchvision model")
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    weights = "weights to start from, or to --eval: a release (xcit_small_12_p16_224), a file or an address"
    add("--pretrained", default=None, help=weights)
    key = "network to take from a training checkpoint given as --pretrained, or with --eval"
    add("--checkpoint_key", default="model", choices=("model", "model_ema"), help=key)
    add("--surgery", default=None, help="weights whose patch embedding is taken over and kept fixed")
    flags.add_network_flags(add)

    flags.add_augmentation_flags(parser, color_jitter=0.4)
    flags.add_distillation_flags(parser)
    flags.add_optimisation_flags(parser, epochs=400)

    add = flags.add_evaluation_flags(parser, "--pretrained")
    add("--full_crop", action="store_true", help=f"centre crops of the whole short side, not of {CROP_RATIO} of it")

    flags.add_output_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line, of ``parser`` if further flags are in it.

    Without any images the defaults are those of the embedded data.
    """
    return flags.parse_recipe(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def train_xcit(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none; or evaluate."""
    if args.eval:
        evaluate_xcit(args)
        return
    run = Run(args, args.amp)
    images = open_images(args, run.output_dir, run.precision, MEAN, STD, crop_ratio(args))

    network = build_classifier(args, images.num_classes)
    if args.pretrained:
        fill_classifier(network, read_weights(args.pretrained, args.checkpoint_key), args.pretrained)
    if args.surgery:
        transplant_patch_embedding(network, args.surgery)
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    transform = train_transform(args, MEAN, STD)
    best = BestAccuracy("best_model.pth", keeps_ties=True)
    train_classifier(
        args,
        run,
        images,
        transform,
        network,
        build_loss(args, images.num_classes, run.device),
        best,
        peak_lr=args.lr * args.batch_size * distributed.get_world_size() / 512,
        network_flags=NETWORK_FLAGS,
        weights_flag="--pretrained",
    )
    views = LabelledViews(images.train, transform, args.seed, images.bad_images)
    report(run, views, build_mixup(args, images.num_classes), images, best.acc1)


def evaluate_xcit(args: argparse.Namespace) -> None:
    """Print the accuracy of ``--pretrained``, or of the run in ``--output_dir``, which may be going on."""
    device, output_dir = distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    origin = args.pretrained or args.resume or str(output_dir / "checkpoint.pth")
    trained_at = flags.check_against_run(args, origin, *NETWORK_FLAGS).get("input_size")
    if trained_at not in (None, args.input_size):
        distributed.print_once(f"--eval with --input-size {args.input_size}, the training had {trained_at}")
    images = open_images(args, output_dir, Precision(args.amp, device), MEAN, STD, crop_ratio(args))
    network = build_classifier(args, images.num_classes)
    if not fill_classifier(network, read_weights(origin, args.checkpoint_key, "--eval: the checkpoint"), origin):
        raise ValueError(
            f"--eval: {origin} has no classifier for the {images.num_classes} classes of {images.val.name}"
        )
    images.print_accuracy(network.to(device))


def build_classifier(args: argparse.Namespace, num_classes: int) -> nn.Module:
    options = {"in_chans": args.in_chans, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    return build_network(args.model, num_classes, args.input_size, **options)


def crop_ratio(args: argparse.Namespace) -> float:
    """Side of the centre crop that is evaluated, over the short side of the image."""
    return 1.0 if args.full_crop else CROP_RATIO


def transplant_patch_embedding(network: nn.Module, path: str) -> None:
    """Take the patch embedding from a file and keep it fixed, which makes large networks stable (``--surgery``)."""
    if not hasattr(network, "patch_embed"):
        raise ValueError("--surgery: the network has no patch embedding")
    prefix = "patch_embed."
    tensors = read_weights(path, flag="--surgery")
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    fill_classifier(network.patch_embed, part, f"--surgery {path}")
    network.patch_embed.requires_grad_(False).eval()  # neither do its running statistics move


def main() -> None:
    distributed.run_script(train_xcit, parse_args)


if __name__ == "__main__":
    main()
