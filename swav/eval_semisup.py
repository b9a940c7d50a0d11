"""Fine-tuning with 1 % or 10 % of the labels (Caron et al. 2020, section 4.1).

    python eval_semisup.py                                   # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 eval_semisup.py --labels_perc 10 --subset_list imagenet_subsets/10percent.txt \\
        --data_path /path/to/imagenet --dump_path /path/to/semisup           # released SwAV, 800 epochs: 70.2

The whole network learns, with a new linear layer on top that has its own learning rate. The result is the accuracy
after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_probe_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import tell_accuracy
from shared.images.subsets import labelled_subset
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import weights_checksum
from swav.evaluation import choose_network, evaluation_parser, load_chosen
from swav.hub import CARD, load_network
from swav.resnet50 import PrototypeNetwork

# A run that is resumed must have these as they were.
RUN_FLAGS = "labels_perc subset_list arch epochs batch_size lr lr_last_layer decay_epochs gamma seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = add_data_flags(parser, batch_size=32)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add = parser.add_argument_group("labels").add_argument
    add("--labels_perc", type=float, default=10, help="per cent of the images that have a label")
    names = "file with their names, one a line (n01440764_10183.JPEG, or from the train folder); None: they are drawn"
    add("--subset_list", default=None, help=names)

    add = add_probe_flags(parser, epochs=20, seed=31)
    add("--lr", type=float, default=0.01, help="learning rate of the trunk; the rates fit 8 processes of 32 images")
    add("--lr_last_layer", type=float, default=0.2, help="learning rate of the last layer (1 %%: 5, and 0.02 for --lr)")
    add("--decay_epochs", type=int, nargs="+", default=[12, 16], help="epochs at which the rates drop")
    add("--gamma", type=float, default=0.2, help="by this factor")

    add = parser.add_argument_group("run").add_argument
    folder = "for checkpoint.pth.tar and log.txt; not the folder of the training run"
    add("--dump_path", "--output_dir", dest="output_dir", default=".", help=folder)
    add("--evaluate", action="store_true", help="only validate the fine-tuned network of --pretrained")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {"num_labels": 12, "crop_scale": (0.6, 1.0), "lr": 0.003, "lr_last_layer": 0.03}
    embedded |= {"pretrained": CARD.embedded_run, "output_dir": "runs/materials/semisup"}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def eval_semisup(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and validate; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    choose_network(args)
    classifier = args.pretrained if args.evaluate else ""
    train, val = frozen.labelled_sources(args, classifier=classifier, num_labels=args.num_labels)

    # network: the trunk, and a new linear layer; or both of a file
    if args.evaluate:
        network = load_classifier(args.arch, args.pretrained, args.num_labels).to(device)
    else:
        train = labelled_subset(train, args.labels_perc, args.subset_list, args.seed)
        distributed.print_once(train.describe())
        network = load_chosen(args).requires_grad_(True)
        checksum = weights_checksum(network)
        network.add_heads(network.embed_dim, output_dim=args.num_labels)
        network = synchronize_batchnorm(network, device).to(device)
    transform = frozen.eval_transform(CARD, args.image_size, network)
    training = frozen.LabelledTraining(args, CARD, network, None, (train, val), transform, device, drop_single=True)
    if args.evaluate:
        return tell_accuracy(training.validate(), len(val))

    # optimiser, schedule, epochs
    last_layer = list(network.projection_head.parameters())
    trunk = [parameter for name, parameter in network.named_parameters() if not name.startswith("projection_head.")]
    optimizer = torch.optim.SGD(
        [{"params": trunk}, {"params": last_layer, "lr": args.lr_last_layer}], args.lr, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs, args.gamma)
    names = {"rates": ("train_lr", "train_lr_last_layer"), "best_of": ("acc1", "acc5")}
    return training.train(optimizer, scheduler, checksum, flags=RUN_FLAGS, **names)


def load_classifier(arch: str, pretrained: str, num_labels: int) -> PrototypeNetwork:
    """A fine-tuned network, ours or an official one: trunk and one linear layer with an output per class."""
    network = load_network(arch, pretrained)
    if not isinstance(network.projection_head, nn.Linear) or network.projection_head.out_features != num_labels:
        raise ValueError(f"--evaluate: {pretrained} holds no fine-tuned network with {num_labels} outputs")
    return network


def main() -> None:
    distributed.run_script(eval_semisup, parse_args)


if __name__ == "__main__":
    main()
