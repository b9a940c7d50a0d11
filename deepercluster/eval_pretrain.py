"""Supervised training of the whole network, from pre-trained weights or from scratch (Caron et al. 2019, section 5.4).

    python eval_pretrain.py                                  # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=4 eval_pretrain.py --data_path /path/to/imagenet --pretrained ours --sobel 1 \\
        --sobel2RGB 1 --lr 0.1 --wd 1e-4 --batch_size 64 --dump_path /path/to/run      # published: 74.9
    python eval_pretrain.py --data_path /path/to/imagenet --pretrained "" --dump_path /path/to/scratch

The fully connected layers start afresh; ``--sobel2RGB`` makes the Sobel filter a part of the first convolution, which
then learns from colours. The result is the accuracy after the last epoch. Running the same command again resumes.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from deepercluster.eval_linear import add_network_flags, add_training_flags, load_frozen
from deepercluster.hub import CARD, build, fill_body
from deepercluster.vgg16 import OFFICIAL_SIZE, OFFICIAL_WIDTH, VGG16, without_sobel
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import parse_evaluation
from shared.evaluation.linear import start_afresh, tell_accuracy
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import weights_checksum
from shared.run.flags import AnyDashParser, bool_flag

BIAS = 0.1  # of layers that start afresh
# A run that is resumed must have these as they were.
RUN_FLAGS = "sobel sobel2RGB image_size width lr wd batch_size seed".split()


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(__doc__)
    add = add_network_flags(parser)  # without --pretrained: from scratch
    add("--width", type=int, default=OFFICIAL_WIDTH, help="channels of the first convolution, from scratch")
    folds = "make the Sobel filter a part of the first convolution"
    add("--sobel2RGB", type=bool_flag, default=False, help=folds)
    add("--evaluate", type=bool_flag, default=False, help="only validate the network of --pretrained")
    add = add_training_flags(parser, batch_size=128, seed=35)
    add("--debug", type=bool_flag, default=False, help="train on the val images")
    add("--checkpoint_freq", type=int, default=20, help="not used: the newest checkpoint is kept")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    embedded = {"pretrained": CARD.embedded_run, "output_dir": "runs/materials/supervised", "epochs": 8}
    embedded |= {"crop_scale": (0.4, 1.0), "batch_size": 64, "image_size": 32, "width": 16}
    return parse_evaluation(get_args_parser(), arguments, **embedded)


def eval_pretrain(args: argparse.Namespace) -> dict[str, float]:
    """Train and validate; loss and accuracies in percent after the last epoch."""
    device = frozen.start(args)
    network, checksum = open_network(args)
    train, val = frozen.labelled_sources(args, classifier=args.pretrained if args.evaluate else "")
    if args.evaluate and network.pred_layer.out_features != len(train.classes):
        found = network.pred_layer.out_features
        raise ValueError(f"--evaluate: {args.pretrained} tells {found} classes apart, not {len(train.classes)}")
    if not args.evaluate:
        network.pred_layer = nn.Linear(network.dim, len(train.classes))
    network = synchronize_batchnorm(network, device).to(device)
    transform = frozen.eval_transform(CARD, args.image_size, network)
    sources = (val if args.debug else train), val
    training = frozen.LabelledTraining(args, CARD, network, None, sources, transform, device, drop_single=True)
    if args.evaluate:
        return tell_accuracy(training.validate(), len(val))

    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.wd)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    return training.train(optimizer, scheduler, checksum, flags=RUN_FLAGS)


def learning_rate(epoch: int) -> float:
    """Of an epoch, as a share of that of the first one."""
    return 0.1 ** (epoch // 30)


def open_network(args: argparse.Namespace) -> tuple[VGG16, int]:
    """The network that the flags choose, its fully connected layers afresh, and a checksum of what it starts from."""
    if args.evaluate:
        return load_frozen(args, relu=True, classifier=True), 0
    options = {"relu": True, "width": args.width, "sobel": bool(args.sobel)}
    if args.pretrained:
        frozen_network = load_frozen(args)
        options |= {"sobel": frozen_network.sobel is not None, "width": frozen_network.dim // 64}
        options["in_chans"] = frozen_network.in_chans
    network = build(img_size=args.image_size or OFFICIAL_SIZE, **options)
    args.image_size, args.sobel, args.width = network.img_size, options["sobel"], options["width"]
    if args.pretrained:
        fill_body(network, args.pretrained)
    checksum = weights_checksum(network.body.features)
    start_afresh(network.body.classifier, BIAS)
    return without_sobel(network) if args.sobel2RGB else network, checksum


def main() -> None:
    distributed.run_script(eval_pretrain, parse_args)


if __name__ == "__main__":
    main()
