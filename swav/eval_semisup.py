"""Fine-tuning with 1 % or 10 % of the labels (Caron et al. 2020, section 4.1).

    python eval_semisup.py                                   # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_semisup.py --labels_perc 10 --subset_list imagenet_subsets/10percent.txt \\
        --data_path /path/to/imagenet --dump_path /path/to/semisup           # released SwAV, 800 epochs: 70.2

The whole network learns, with a new linear layer on top that has its own learning rate. The result is the accuracy
after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.linear import validate
from shared.images.loading import EvalDataset
from shared.images.sources import ImageSource
from shared.images.subsets import Subset, listed_images
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import weights_checksum
from shared.run import randomness
from swav import evaluation
from swav.hub import CARD, load_backbone, load_network
from swav.resnet50 import PrototypeNetwork

# A run that is resumed must have these as they were.
RUN_FLAGS = "labels_perc subset_list arch epochs lr lr_last_layer decay_epochs gamma seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser(__doc__)
    evaluation.add_data_flags(parser)
    add = parser.add_argument_group("labels").add_argument
    add("--labels_perc", type=float, default=10, help="per cent of the images that have a label")
    names = "file with their names, one a line (n01440764_10183.JPEG, or from the train folder); None: they are drawn"
    add("--subset_list", default=None, help=names)

    add = parser.add_argument_group("optimisation").add_argument
    evaluation.add_training_flags(add, epochs=20)
    add("--lr", type=float, default=0.01, help="learning rate of the trunk; the rates fit 8 processes of 32 images")
    add("--lr_last_layer", type=float, default=0.2, help="learning rate of the last layer (1 %%: 5, and 0.02 for --lr)")
    add("--decay_epochs", type=int, nargs="+", default=[12, 16], help="epochs at which the rates drop")
    add("--gamma", type=float, default=0.2, help="by this factor")
    evaluation.add_run_flags(parser, "the fine-tuned network of --pretrained")
    evaluation.add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    digits = {"num_labels": 10, "crop_scale": (0.6, 1.0), "lr": 0.003, "lr_last_layer": 0.03}
    return evaluation.parse_and_check(get_args_parser(), arguments, **digits, dump_path="runs/digits/semisup")


def eval_semisup(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and validate; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)

    # data
    train, val = evaluation.labelled_sources(args)
    images_as_they_are = nn.Identity()  # the network learns as a whole: nothing is computed before it
    if args.evaluate:
        network = load_classifier(args.arch, args.pretrained, args.num_labels).to(device)
        val_set = EvalDataset(val, frozen.eval_transform(CARD, args.image_size, network))
        result = validate(network, images_as_they_are, val_set, device, args.batch_size, args.workers)
        distributed.print_once(f"Accuracy of the network on the {len(val)} test images: {result['acc1']:.1f}%")
        return result
    subset = labelled_subset(train, args.labels_perc, args.subset_list, args.seed)
    distributed.print_once(subset.describe())

    # network: the trunk, and a new linear layer
    network = load_backbone(args.arch, args.pretrained, args.allow_partial).requires_grad_(True)
    checksum = weights_checksum(network)
    network.add_heads(network.embed_dim, output_dim=args.num_labels)
    network = synchronize_batchnorm(network, device).to(device)
    val_set = EvalDataset(val, frozen.eval_transform(CARD, args.image_size, network))

    # optimiser, schedule, epochs
    last_layer = list(network.projection_head.parameters())
    trunk = [parameter for name, parameter in network.named_parameters() if not name.startswith("projection_head.")]
    optimizer = torch.optim.SGD(
        [{"params": trunk}, {"params": last_layer, "lr": args.lr_last_layer}], args.lr, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs, args.gamma)
    names = {"rates": ("train_lr", "train_lr_last_layer"), "best_of": ("acc1", "acc5")}
    training = evaluation.LabelledTraining(
        args, network, images_as_they_are, optimizer, scheduler, RUN_FLAGS, checksum, **names
    )
    return training.run(subset, val_set, device, drop_single=True)


def load_classifier(arch: str, pretrained: str, num_labels: int) -> PrototypeNetwork:
    """A fine-tuned network, ours or an official one: trunk and one linear layer with an output per class."""
    network = load_network(arch, pretrained)
    if not isinstance(network.projection_head, nn.Linear) or network.projection_head.out_features != num_labels:
        raise ValueError(f"--evaluate: {pretrained} holds no fine-tuned network with {num_labels} outputs")
    return network


# --- Labelled images --------------------------------------------------------------------------------------------------


def labelled_subset(train: ImageSource, percent: float, list_path: str | None, seed: int) -> Subset:
    """The images whose labels may be seen: those of a list, or a share of every class.

    Raises:
        ValueError: If the list or the percentage does not fit the images.
    """
    if list_path is not None:
        return Subset(train, listed_images(train, list_path), f"labelled images of {list_path}")
    if not 0 < percent <= 100:
        raise ValueError(f"--labels_perc {percent:g} is outside (0, 100]")
    name = f"labelled images: {percent:g} % of every class, drawn with --seed {seed}"
    return Subset(train, drawn_images(train.labels, percent, seed), name)


def drawn_images(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Indices of ``percent`` % of the images of every class, at least one of each."""
    chosen = []
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        number = max(1, round(len(members) * percent / 100))
        generator = np.random.default_rng(randomness.derive_seed(seed, int(label)))
        chosen.append(generator.permutation(members)[:number])
    return np.sort(np.concatenate(chosen))


def main() -> None:
    with distributed.clean_exit():
        eval_semisup(parse_args())


if __name__ == "__main__":
    main()
