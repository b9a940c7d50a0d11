"""Linear classification on frozen features (Caron et al. 2021, section 4.1).

    python eval_linear.py --epochs 20                        # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_linear.py --arch vit_small --patch_size 16 --data_path /path/to/imagenet \\
        --output_dir /path/to/linear                         # released ViT-S/16: 77.0

A linear layer learns with random crops and flips. For ViTs it sees the class tokens of the last blocks and, by flag,
the mean patch token. The result is the accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from dino.flags import evaluation_parser, load_frozen
from dino.hub import CARD, fetch_linear_weights
from dino.vision_transformer import VisionTransformer
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_probe_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import LinearClassifier, load_classifier, tell_accuracy
from shared.networks.weights import weights_checksum
from shared.run.flags import bool_flag

# A run that is resumed must have these as they were.
RUN_FLAGS = "arch n_last_blocks avgpool_patchtokens epochs batch_size lr seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("features").add_argument
    add("--n_last_blocks", type=int, default=4, help="ViT: class tokens of the last n blocks; 4 for ViT-S, 1 for ViT-B")
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: also the mean patch token (true for ViT-B)")

    add = add_data_flags(parser)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add = add_probe_flags(parser, epochs=100)
    add("--lr", type=float, default=0.001, help="learning rate at the start for 256 images per step; scaled linearly")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="for checkpoint.pth.tar and linear_log.txt")
    add("--evaluate", action="store_true", help="only validate the classifier of --linear_weights")
    add("--linear_weights", default="", help="with --evaluate: a file; without it the released weights")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {"num_labels": 12, "crop_scale": (0.6, 1.0), "lr": 0.1, "output_dir": "runs/materials"}
    return parse_evaluation(get_args_parser(), arguments, pretrained_weights=CARD.embedded_run, **embedded)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    backbone, transform = load_frozen(args)
    sources = frozen.labelled_sources(args, classifier=args.linear_weights, num_labels=args.num_labels)

    # frozen features and linear classifier
    features = FrozenFeatures(backbone.to(device), args.n_last_blocks, args.avgpool_patchtokens)
    classifier = LinearClassifier(features.dim(backbone.feature_dim), args.num_labels).to(device)
    training = frozen.LabelledTraining(args, CARD, classifier, features, sources, transform, device)
    if args.evaluate:
        load_classifier(classifier, args.linear_weights or fetch_linear_weights(args.arch, args.patch_size))
        return tell_accuracy(training.validate(), len(sources[1]))

    # optimiser, schedule, epochs
    lr = args.lr * args.batch_size * distributed.get_world_size() / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    checksum = weights_checksum(backbone)
    files = "checkpoint.pth.tar", "linear_log.txt"
    return training.train(optimizer, scheduler, checksum, *files, RUN_FLAGS, origin_key="backbone")


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


def main() -> None:
    distributed.run_script(eval_linear, parse_args)


if __name__ == "__main__":
    main()
