"""Linear classification on frozen features (Caron et al. 2021, section 4.1).

    python eval_linear.py --epochs 20                        # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_linear.py --arch vit_small --patch_size 16 --data_path /path/to/imagenet \\
        --output_dir /path/to/linear                         # released ViT-S/16: 77.0

A linear layer learns with random crops and flips. For ViTs it sees the class tokens of the last blocks and, by flag,
the mean patch token. The result is the accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino.flags import EMBEDDED_DATA_DEFAULTS, add_data_flags, add_process_flags, evaluation_parser, load_chosen
from dino.hub import CARD, fetch_linear_weights
from dino.vision_transformer import VisionTransformer
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.linear import LinearClassifier, train_one_epoch, validate
from shared.images.loading import BadImages, EvalDataset
from shared.images.views import ViewRecipe
from shared.networks.weights import safe_load, weights_checksum
from shared.run import randomness
from shared.run.checkpoint import load_latest, save, without_prefix
from shared.run.flags import bool_flag, parse_with_embedded_defaults


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("features").add_argument
    add("--n_last_blocks", type=int, default=4, help="ViT: class tokens of the last n blocks; 4 for ViT-S, 1 for ViT-B")
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: also the mean patch token (true for ViT-B)")

    add = add_data_flags(parser)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add("--image_size", type=int, default=224, help="side in pixels of the train crops and of the val centre crops")
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable train image does")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more train images than this are unreadable")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, help="passes over the train images")
    add("--lr", type=float, default=0.001, help="learning rate at the start for 256 images per step; scaled linearly")
    add("--val_freq", type=int, default=1, help="validate every so many epochs, and after the last one")
    add("--seed", type=int, default=0, help="of the classifier, the order of the images and the crops")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="for checkpoint.pth.tar and linear_log.txt")
    add("--evaluate", action="store_true", help="only validate the classifier of --linear_weights")
    add("--linear_weights", default="", help="with --evaluate: a file; without it the released weights")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    digits = {"num_labels": 10, "crop_scale": (0.6, 1.0), "lr": 0.1, "output_dir": "runs/digits"}
    minimum = {"epochs": 1, "val_freq": 1, "batch_size_per_gpu": 1}
    return parse_with_embedded_defaults(get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS | digits, minimum)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)

    # data
    paths = (args.data_path, args.val_path, args.allow_absolute_paths)
    train, val = frozen.labelled_sources(*paths, num_labels=args.num_labels)
    for source in (train, val):
        distributed.print_once(source.describe())

    # frozen backbone and linear classifier
    backbone, embed_dim = load_chosen(args)
    features = FrozenFeatures(backbone.to(device), args.n_last_blocks, args.avgpool_patchtokens)
    classifier = LinearClassifier(features.dim(embed_dim), args.num_labels).to(device)
    val_set = EvalDataset(val, frozen.eval_transform(CARD, args.image_size, backbone))

    def validate_now() -> dict[str, float]:
        return validate(classifier, features, val_set, device, args.batch_size_per_gpu, args.num_workers)

    if args.evaluate:
        load_linear_weights(classifier, args.linear_weights, args.arch, args.patch_size)
        result = validate_now()
        distributed.print_once(f"Accuracy of the network on the {len(val)} test images: {result['acc1']:.1f}%")
        return result

    # loader and optimiser
    output_dir = Path(args.output_dir)
    if distributed.is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    bad_images = BadImages(len(train), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    recipe = ViewRecipe(args.image_size, tuple(args.crop_scale), interpolation="bilinear")
    batches = (args.batch_size_per_gpu, args.seed, val_set.transform.in_chans, bad_images, args.num_workers, device)
    loader, sampler = frozen.train_crops(train, recipe, *batches)
    lr = args.lr * args.batch_size_per_gpu * distributed.get_world_size() / 256
    wrapped = distributed.wrap(classifier, device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    # resume
    checksum = weights_checksum(backbone)
    log: list[dict] = []
    first_epoch, best_acc = 0, 0.0
    checkpoint = load_latest(output_dir / "checkpoint.pth.tar")
    if checkpoint is not None:
        if checkpoint.get("backbone", checksum) != checksum:
            raise ValueError(
                f"{output_dir / 'checkpoint.pth.tar'} was trained on the features of other weights than "
                f"{args.pretrained_weights or 'the released ones'}; use another --output_dir"
            )
        set_weights(classifier, checkpoint["state_dict"], output_dir / "checkpoint.pth.tar")
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first_epoch, best_acc, log = checkpoint["epoch"], checkpoint["best_acc"], checkpoint.get("log", [])
        distributed.print_once(f"resuming at epoch {first_epoch}")

    # epochs
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        line = {"epoch": epoch, "train_lr": optimizer.param_groups[0]["lr"]}
        line["train_loss"] = train_one_epoch(wrapped, features, frozen.on_device(CARD, loader, device), optimizer)
        line["bad_images"] = bad_images.count()
        scheduler.step()
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            result = validate_now()
            best_acc = max(best_acc, result["acc1"])
            line |= {f"test_{name}": value for name, value in result.items()} | {"best_acc1": best_acc}
        log.append(line)
        distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
        if distributed.is_main_process():
            state = {
                "epoch": epoch + 1,
                "state_dict": {f"module.{name}": value for name, value in classifier.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "best_acc": best_acc,
                "backbone": checksum,
                "log": log,
            }
            save(output_dir / "checkpoint.pth.tar", state)
            (output_dir / "linear_log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    if first_epoch >= args.epochs:  # resumed after the last epoch
        result = validate_now()
    distributed.print_once(
        f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %, "
        f"best top-1 of all epochs {best_acc:.2f} %)"
    )
    return result


class FrozenFeatures:
    """What the linear classifier sees of an image.

    For a ViT these are the normalised class tokens of its last blocks, joined, and on request the mean patch token of
    the last block. With one block, class token and mean patch token are interleaved, (cls_0, mean_0, cls_1, ...), as in
    the released classifiers; with more, the mean follows the class tokens. Other networks give their output.

    Args:
        backbone: In eval mode.
        n_last_blocks: Number of class tokens.
        avgpool_patchtokens: Whether to add the mean patch token.
    """

    def __init__(self, backbone: nn.Module, n_last_blocks: int, avgpool_patchtokens: bool):
        self.backbone = backbone
        self.is_vit = isinstance(backbone, VisionTransformer)
        if self.is_vit and not 1 <= n_last_blocks <= len(backbone.blocks):
            raise ValueError(f"--n_last_blocks {n_last_blocks} of a ViT with {len(backbone.blocks)} blocks")
        self.n_last_blocks = n_last_blocks
        self.avgpool_patchtokens = avgpool_patchtokens

    def dim(self, embed_dim: int) -> int:
        return embed_dim * (self.n_last_blocks + self.avgpool_patchtokens) if self.is_vit else embed_dim

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, dim)."""
        if not self.is_vit:
            return self.backbone(images)
        layers = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # each (B, N + 1, D)
        tokens = [layer[:, 0] for layer in layers]
        if self.avgpool_patchtokens:
            tokens.append(layers[-1][:, 1:].mean(dim=1))
            if self.n_last_blocks == 1:
                return torch.stack(tokens, dim=-1).flatten(1)
        return torch.cat(tokens, dim=-1)


def load_linear_weights(classifier: nn.Module, file: str, arch: str, patch_size: int) -> None:
    """Fill the classifier from a file of ours or a released one; without a file from the release of the backbone."""
    if not file:
        file = fetch_linear_weights(arch, patch_size)
    elif not Path(file).is_file():
        raise ValueError(f"--linear_weights {file} is not a file")
    checkpoint = safe_load(file)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--linear_weights {file} has no state_dict")
    set_weights(classifier, checkpoint["state_dict"], file)


def set_weights(classifier: nn.Module, state_dict: dict[str, Tensor], file: str | Path) -> None:
    """Load weights that were saved with the prefix ``module.``."""
    weights = without_prefix(state_dict, "module.")
    expected = {name: tuple(value.shape) for name, value in classifier.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise ValueError(
            f"{file} holds {found}, the classifier is {expected}; check --arch, --n_last_blocks, "
            "--avgpool_patchtokens and --num_labels"
        )
    classifier.load_state_dict(weights)


def main() -> None:
    with distributed.clean_exit():
        eval_linear(parse_args())


if __name__ == "__main__":
    main()
