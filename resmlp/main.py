"""Supervised training of ResMLP.

Touvron et al., "ResMLP: Feedforward networks for image classification with data-efficient training", 2021.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model resmlp_12 --batch-size 256 --opt lamb --lr 5e-3 --unscale-lr \\
        --weight-decay 0.2 --epochs 400 --drop-path 0.05 --amp fp32 --eval-crop-ratio 0.9 \\
        --data_path /path/to/imagenet --output_dir /path/to/run               # 76.6 top-1

The recipe is DeiT's: RandAugment, Mixup and CutMix, Random Erasing, repeated augmentation, and optionally a teacher
whose predictions are learned too. Running the same command again resumes the run.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch.nn.functional as F
from torch import Tensor, nn

from resmlp.augmentations import ThreeAugment
from resmlp.hub import MEAN, STD, build_network, fill, read_weights
from resmlp.report import report
from resmlp.resmlp_models import ARCHITECTURES
from shared import distributed
from shared.images.channels import are_asked_for
from shared.optimisation.precision import Precision
from shared.run.flags import AnyDashParser, tell_embedded_defaults
from shared.run.run import Run
from shared.supervised import flags
from shared.supervised.data import open_images
from shared.supervised.losses import build_loss, class_probabilities
from shared.supervised.train import BestAccuracy, train_classifier
from shared.supervised.transforms import train_transform

EMBEDDED_NETWORK = {"model": "resmlp_12", "input_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4}
EMBEDDED_DATA_DEFAULTS = flags.EMBEDDED_RECIPE | EMBEDDED_NETWORK | {"lr": 0.05}
SIZES = ("patch_size", "embed_dim", "depth")
NETWORK_FLAGS = ("model", "input_size", "in_chans", *SIZES)


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    flags.add_data_set_flags(parser)

    add = parser.add_argument_group("network").add_argument
    known = "resmlp_12, resmlp_24, resmlp_36, resmlpB_24, or any timm or torchvision model"
    add("--model", default="resmlp_24", help=known)
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    add("--patch-size", type=int, default=None, help="side of the patches in pixels; None: the published one")
    add("--embed-dim", type=int, default=None, help="channels of a ResMLP or ViT; None: the published ones")
    add("--depth", type=int, default=None, help="blocks of a ResMLP or ViT; None: the published ones")
    weights = "weights to start from: a release (resmlp_24_dist), a file or an address; any image size and classes"
    add("--finetune", default="", help=weights)
    add("--attn-only", action="store_true", help="train the cross-patch layers and the classifier only")
    key = "network to take from a training checkpoint given as --finetune, or with --eval"
    add("--checkpoint_key", default="model", choices=("model", "model_ema"), help=key)
    flags.add_network_flags(add)

    add = flags.add_augmentation_flags(parser, color_jitter=0.3)
    add("--ThreeAugment", action="store_true", help="one of grey, solarised and blurred instead of --aa and erasing")
    add("--src", action="store_true", help="with --ThreeAugment: crops of the resized image, not of random size")
    add("--bce-loss", action="store_true", help="binary cross-entropy: every mixed class is right; no smoothing")
    add("--cosub", action="store_true", help="co-training of submodels: two draws of stochastic depth teach each other")
    flags.add_distillation_flags(parser)
    add = flags.add_optimisation_flags(parser, epochs=300)
    add("--unscale-lr", action="store_true", help="--lr is the peak itself, whatever the batch size")
    add("--train-mode", action=argparse.BooleanOptionalAction, default=True, help="dropout and stochastic depth are on")

    add = flags.add_evaluation_flags(parser, "--resume, --finetune")
    ratio = "side of the centre crop over the resized short side; 0.9 for the published numbers"
    add("--eval-crop-ratio", type=float, default=0.875, help=ratio)

    add = flags.add_output_flags(parser)
    add("--distributed", action="store_true", help="ignored: read from the environment")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line, of ``parser`` if further flags are in it.

    Without any images the defaults are those of the embedded data.
    """
    parser = parser or get_args_parser()
    own = parser.parse_args(arguments).model in ARCHITECTURES  # the sizes of other networks are part of their names
    defaults = {flag: value for flag, value in EMBEDDED_DATA_DEFAULTS.items() if own or flag not in SIZES}
    args = flags.parse_recipe(parser, arguments, defaults)
    if not 0 < args.eval_crop_ratio <= 1:
        parser.error(f"--eval-crop-ratio {args.eval_crop_ratio} is not in (0, 1]")
    if args.distillation_type != "none" and args.cosub:
        parser.error(f"--cosub and --distillation-type {args.distillation_type}: only one of the two")
    if args.bce_loss:
        given = parser.parse_args(arguments, argparse.Namespace(smoothing=0.0)).smoothing
        if given:
            parser.error(f"--smoothing {given} would make every class right with --bce-loss: leave it out")
        args.smoothing = 0.0
    if args.ThreeAugment and are_asked_for(args):
        parser.error("--ThreeAugment changes colours, which images read by --in_chans and --value_range do not have")
    if args.src and not args.ThreeAugment:
        parser.error("--src belongs to --ThreeAugment")
    return args


def train_resmlp(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none; or evaluate."""
    if args.eval:
        evaluate_resmlp(args)
        return
    run = Run(args, args.amp)
    images = open_images(args, run.output_dir, run.precision, MEAN, STD, args.eval_crop_ratio)

    network = build_classifier(args, images.num_classes).train(args.train_mode)
    if args.finetune:
        fill(network, read_weights(args.finetune, args.checkpoint_key, "--finetune"), args.finetune)
    if args.attn_only:
        keep_cross_patch_layers_trainable(network)
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)

    if args.ThreeAugment:
        transform = ThreeAugment(args.input_size, args.color_jitter, args.src, args.in_chans)
    else:
        transform = train_transform(args, MEAN, STD)
    if args.cosub:
        criterion = SubmodelLoss(args.bce_loss, args.smoothing)
    else:
        criterion = build_loss(args, images.num_classes, run.device, args.bce_loss)
    peak_lr = args.lr if args.unscale_lr else args.lr * args.batch_size * distributed.get_world_size() / 512
    best = BestAccuracy("best_checkpoint.pth")
    train_classifier(
        args,
        run,
        images,
        transform,
        network,
        criterion,
        best,
        peak_lr=peak_lr,
        network_flags=NETWORK_FLAGS,
        weights_flag="--finetune",
    )
    report(run, network, images, best.acc1)


def evaluate_resmlp(args: argparse.Namespace) -> None:
    """Print the accuracy of ``--resume``, ``--finetune`` or the run in ``--output_dir``, which may be going on."""
    device, output_dir = distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    origin = args.resume or args.finetune or str(output_dir / "checkpoint.pth")
    flags.check_against_run(args, origin, *NETWORK_FLAGS)
    images = open_images(args, output_dir, Precision(args.amp, device), MEAN, STD, args.eval_crop_ratio)
    network = build_classifier(args, images.num_classes)
    if not fill(network, read_weights(origin, args.checkpoint_key, "--eval: the checkpoint"), origin):
        raise ValueError(
            f"--eval: {origin} has no classifier for the {images.num_classes} classes of {images.val.name}"
        )
    images.print_accuracy(network.to(device))


def build_classifier(args: argparse.Namespace, num_classes: int) -> nn.Module:
    options = {"in_chans": args.in_chans, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    options |= {size: getattr(args, size) for size in SIZES}
    return build_network(args.model, num_classes, args.input_size, **options)


def keep_cross_patch_layers_trainable(network: nn.Module) -> None:
    """Freeze all but the layers named ``attn`` and the classifier (``--attn-only``; Touvron et al. 2022)."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith("head.")
    if not any(".attn." in name for name, _ in network.named_parameters()):
        raise ValueError("--attn-only: the network has no layer of that name")


class SubmodelLoss:
    """Co-training of submodels (Touvron et al. 2022, "Co-training 2L Submodels", eq. 3): labels and each other.

    Every image passes twice, with other blocks dropped. Targets are mixed labels as they are.

    Args:
        binary: Every class with a positive target is right.
        smoothing: Of labels that are not mixed.
    """

    def __init__(self, binary: bool = False, smoothing: float = 0.0):
        self.binary, self.smoothing = binary, smoothing

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        one, other = network(images.repeat(2, 1, 1, 1)).float().chunk(2)
        targets = class_probabilities(targets, one.shape[1], self.smoothing)
        if self.binary:
            targets = targets.gt(0).float()
        pairs = ((one, targets), (other, targets), (one, other.detach().sigmoid()), (other, one.detach().sigmoid()))
        return sum(F.binary_cross_entropy_with_logits(logits, target) for logits, target in pairs) / 4


def main() -> None:
    distributed.run_script(train_resmlp, parse_args)


if __name__ == "__main__":
    main()
