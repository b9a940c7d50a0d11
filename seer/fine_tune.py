"""Fine-tune a RegNetY with labels, with all of them or a list of 1 % or 10 % (Goyal et al. 2021, sections 4.1, 4.2).

    python fine_tune.py                                      # embedded materials, weights of the run in runs/materials
    python fine_tune.py --pretrained random                  # the same network without pre-training
    torchrun --nproc_per_node=8 fine_tune.py --arch regnet128Gf --data_path /path/to/imagenet \\
        --output_dir /path/to/fine_tuned                     # released weights, 384 pixels: 84.5
    torchrun --nproc_per_node=8 fine_tune.py --arch regnet256Gf_1 --image_size 224 --subset_list 10percent.txt \\
        --epochs 70 --decay_epochs 30 60 --lr 0.05 --data_path /path/to/imagenet --output_dir /path/to/few

The network learns as a whole; the result is the accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from seer.eval_linear import EMBEDDED, load_chosen, network_parser
from seer.hub import CARD
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_data_flags, add_probe_flags, add_process_flags, parse_evaluation
from shared.evaluation.linear import start_afresh
from shared.images.subsets import labelled_subset
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import weights_checksum
from shared.run.flags import bool_flag

COLOURS = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grey_p": 0.2, "blur_p": 0.5}
RUN_FLAGS = "arch image_size num_labels labels_perc subset_list epochs lr lr_head wd decay_epochs colours seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = add_data_flags(parser, batch_size=16)
    add("--num_labels", type=int, default=1000, help="outputs of the classifier")
    add("--labels_perc", type=float, default=100, help="per cent of the images of every class that have a label")
    add("--subset_list", default=None, help="list of the labelled images instead, such as SimCLR's 1percent.txt")
    add("--colours", type=bool_flag, default=True, help="the colour distortion and blur of the pre-training")
    add = add_probe_flags(parser, epochs=105)
    add("--lr", type=float, default=0.1, help="learning rate for 256 images per step; scaled linearly")
    add("--lr_head", type=float, default=1.0, help="that of the classifier, times --lr")
    add("--decay_epochs", type=int, nargs="+", default=[30, 60, 90, 100], help="epochs at which it falls to a tenth")
    add("--wd", type=float, default=0.0, help="weight decay")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="for checkpoint.pth and log.txt; not the folder of the training run")
    add_process_flags(parser)
    parser.set_defaults(image_size=384)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = EMBEDDED | {"num_labels": 12, "crop_scale": (0.6, 1.0), "image_size": 32, "colours": False}
    embedded |= {"epochs": 6, "decay_epochs": [4, 5], "lr": 0.2, "output_dir": "runs/materials/fine_tuned"}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def fine_tune(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and validate; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    image_size, args.image_size = args.image_size, None  # not that of the pre-training
    network, _ = load_chosen(args)
    args.image_size = image_size
    train, val = frozen.labelled_sources(args, num_labels=args.num_labels)
    if args.labels_perc != 100 or args.subset_list:
        train = labelled_subset(train, args.labels_perc, args.subset_list, args.seed)
        distributed.print_once(train.describe())

    checksum = weights_checksum(network)
    network.requires_grad_(True).fc = nn.Linear(network.embed_dim, args.num_labels)
    start_afresh(network.fc)
    network = synchronize_batchnorm(network, device).to(device)
    transform = frozen.eval_transform(CARD, args.image_size, network)
    crops = {"interpolation": "bicubic", "drop_single": True, "colours": COLOURS if args.colours else {}}
    training = frozen.LabelledTraining(args, CARD, network, None, (train, val), transform, device, **crops)
    lr = args.lr * args.batch_size * distributed.get_world_size() / 256
    trunk = [parameter for name, parameter in network.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": trunk}, {"params": list(network.fc.parameters()), "lr": lr * args.lr_head}]
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=args.wd, nesterov=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.decay_epochs)
    names = {"weights_key": "model", "prefix": "", "rates": ("train_lr", "train_lr_head")}
    return training.train(optimizer, scheduler, checksum, "checkpoint.pth", flags=RUN_FLAGS, **names)


def main() -> None:
    distributed.run_script(fine_tune, parse_args)


if __name__ == "__main__":
    main()
