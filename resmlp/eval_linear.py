"""Linear classification on the frozen features of a ResMLP.

    python eval_linear.py                                    # embedded digits, weights of the run in runs/digits
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights resmlp_24_dino --data_path /path/to/imagenet \\
        --output_dir /path/to/linear                         # released ResMLP-S24, trained with DINO: 72.8

A linear layer learns on the mean of the patches, with random crops and flips. The result is the accuracy after the last
epoch. Running the same command again resumes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resmlp.flags import add_data_flags, add_process_flags, evaluation_parser, frozen_network, parse_evaluation
from resmlp.hub import CARD
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.linear import LinearClassifier, train_one_epoch, validate
from shared.images.loading import BadImages, EvalDataset
from shared.images.views import ViewRecipe
from shared.networks.weights import weights_checksum
from shared.run import randomness
from shared.run.checkpoint import load_latest, restore, save


def get_args_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser(__doc__)
    add = add_data_flags(parser)
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable train image does")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more train images than this are unreadable")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, help="passes over the train images")
    add("--lr", type=float, default=0.001, help="learning rate at the start for 256 images per step; scaled linearly")
    add("--val_freq", type=int, default=1, help="validate every so many epochs, and after the last one")
    add("--seed", type=int, default=0, help="of the classifier, the order of the images and the crops")
    add("--output_dir", default=".", help="for linear.pth and linear_log.txt")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    minimum = {"epochs": 1, "val_freq": 1, "batch_size_per_gpu": 1}
    digits = {"crop_scale": (0.6, 1.0), "lr": 0.1, "epochs": 20, "output_dir": "runs/digits"}
    return parse_evaluation(get_args_parser(), arguments, minimum, **digits)


def eval_linear(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate the classifier; loss and accuracies in percent after the last epoch."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    output_dir = Path(args.output_dir)
    if distributed.is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
    distributed.barrier()

    # data, frozen network, linear classifier
    train, val = frozen.labelled_sources(args.data_path, args.val_path, args.allow_absolute_paths)
    for source in (train, val):
        distributed.print_once(source.describe())
    network, transform = frozen_network(args)
    classifier = LinearClassifier(network.embed_dim, len(train.classes)).to(device)
    wrapped = distributed.wrap(classifier, device)
    validation = (network.to(device), EvalDataset(val, transform), device, args.batch_size_per_gpu, args.num_workers)
    recipe = ViewRecipe(network.img_size, tuple(args.crop_scale))
    bad_images = BadImages(len(train), output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    loader, sampler = frozen.train_crops(
        train, recipe, args.batch_size_per_gpu, args.seed, transform.in_chans, bad_images, args.num_workers, device
    )
    lr = args.lr * args.batch_size_per_gpu * distributed.get_world_size() / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    # resume
    checksum, log, first_epoch = weights_checksum(network), [], 0
    path = output_dir / "linear.pth"
    checkpoint = load_latest(path)
    if checkpoint is not None:
        if checkpoint.get("network") != checksum:
            raise ValueError(f"{path} was trained on the features of other weights; use another --output_dir")
        restore(checkpoint, classifier=classifier, optimizer=optimizer)
        scheduler.load_state_dict(checkpoint["scheduler"])
        first_epoch, log = checkpoint["epoch"], checkpoint["log"]
        distributed.print_once(f"resuming at epoch {first_epoch}")

    # epochs
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        line = {"epoch": epoch, "train_lr": optimizer.param_groups[0]["lr"]}
        line["train_loss"] = train_one_epoch(wrapped, network, frozen.on_device(CARD, loader, device), optimizer)
        scheduler.step()
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            result = validate(classifier, *validation)
            line |= {f"test_{name}": value for name, value in result.items()}
        log.append(line)
        distributed.print_once("  ".join(f"{name} {value:.5g}" for name, value in line.items()))
        if distributed.is_main_process():
            state = {"classifier": classifier.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"scheduler": scheduler.state_dict(), "epoch": epoch + 1, "network": checksum, "log": log}
            save(path, state)
            (output_dir / "linear_log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    if first_epoch >= args.epochs:  # resumed after the last epoch
        result = validate(classifier, *validation)
    distributed.print_once(
        f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 {result['acc5']:.2f} %)"
    )
    return result


def main() -> None:
    with distributed.clean_exit():
        eval_linear(parse_args())


if __name__ == "__main__":
    main()
