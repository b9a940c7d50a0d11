"""Unsupervised learning by contrasting cluster assignments: train a backbone with SwAV.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020.

    python main_swav.py                                                   # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main_swav.py --data_path /path/to/imagenet/train --dump_path /path/to/run \\
        --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \\
        --batch_size 32 --base_lr 0.6 --final_lr 0.0006 --epochs 400 --warmup_epochs 0 --queue_length 3840 \\
        --freeze_prototypes_niters 5005                                   # one node, 400 epochs: 74.3 linear

Every crop of an image gets a code: a soft assignment to K prototypes, balanced over the batch by Sinkhorn-Knopp. The
network learns to predict the code of one crop from the other crops of the image. Running the same command again
resumes the run.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.resolutions import recipes_of
from shared.images.training_data import open_training_data
from shared.multicrop import normalize_views
from shared.networks.backbones import Through
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.networks.weights import safe_load
from shared.optimisation.accumulation import accumulate
from shared.optimisation.larc import LARC
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.schedules import cosine_schedule
from shared.run.flags import Parser, add_data_flags, add_own_images_flags, bool_flag, tell_embedded_defaults
from shared.run.health import HealthMonitor, assignment_health
from shared.run.run import Run
from swav import flags
from swav.flags import FLIP_COLOR_AND_BLUR
from swav.hub import MEAN, STD, build_network
from swav.losses import EmbeddingQueue, PrototypeUsage, SwappedPrediction, normalize_prototypes_
from swav.report import health_rules, report, suit_settings

# What replaces the official defaults when no --data_path is given: images of 32 pixels need no ResNet-50 at 224 pixels,
# and with few prototypes the usual epsilon makes codes uniform.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "test_resnet",  # timm's smallest ResNet, 0.4 million weights
    "hidden_mlp": 256,
    "feat_dim": 32,
    "nmb_prototypes": 60,
    "epsilon": 0.02,
    "nmb_crops": [2, 2],
    "size_crops": [32, 16],
    "min_scale_crops": [0.5, 0.2],
    "max_scale_crops": [1.0, 0.5],
    "blur_radius": (0.1, 0.4),
    "batch_size": 64,
    "base_lr": 1.0,
    "epochs": 24,
    "warmup_epochs": 1,
    "freeze_prototypes_niters": 60,
    "output_dir": "runs/materials",
}
NETWORK_FLAGS = ("arch", "in_chans", "feat_dim", "hidden_mlp", "nmb_prototypes", "crops_for_assign")
CHECKPOINT = "checkpoint.pth.tar"


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_own_images_flags(parser, __file__)
    flags.add_view_flags(parser)
    add = flags.add_network_flags(parser)
    add("--nmb_prototypes", type=int, default=3000, help="number of prototypes K")

    add = parser.add_argument_group("codes and their prediction").add_argument
    add("--crops_for_assign", type=int, nargs="+", default=[0, 1], help="indices of the crops that get a code")
    add("--temperature", type=float, default=0.1, help="of the softmax that predicts a code")
    add("--epsilon", type=float, default=0.05, help="entropy regularisation of the codes")
    add("--sinkhorn_iterations", type=int, default=3, help="balancing steps behind the codes")
    queue = "embeddings of earlier batches, on all processes, that help to balance small batches; 0: none"
    add("--queue_length", type=int, default=0, help=queue)
    add("--epoch_queue_starts", type=int, default=15, help="first epoch (from 0) with the queue")

    add = flags.add_optimisation_flags(parser)
    add("--freeze_prototypes_niters", type=int, default=313, help="steps in which the prototypes are not trained")
    add("--use_fp16", type=bool_flag, default=True, help="false: the same as --amp fp32")
    flags.add_run_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; ``parser`` is that of :func:`get_args_parser`, or one with further flags."""
    return flags.parse_and_check(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def train_swav(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp if args.use_fp16 else "fp32", CHECKPOINT, subfolder="checkpoints")
    device = run.device

    # data
    recipes = recipes_of(args, **FLIP_COLOR_AND_BLUR)
    data = open_training_data(args, recipes, args.batch_size, run.output_dir, device, "--size_crops")
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)
    suit_settings(args, data, args.epochs * data.steps_per_epoch)

    # network, loss, optimiser, schedule
    network = build_for_training(args, device)
    criterion = SwappedPrediction(args.crops_for_assign, args.temperature, args.epsilon, args.sinkhorn_iterations)
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=args.wd)
    lr_schedule = cosine_schedule(
        args.base_lr, args.final_lr, args.epochs, data.steps_per_epoch, args.warmup_epochs, args.start_warmup
    )

    # embeddings of earlier batches, and how often each prototype is used
    queue_rows = rows_of_queue(args.queue_length, args.batch_size, distributed.get_world_size())
    queue = EmbeddingQueue(len(args.crops_for_assign), queue_rows, args.feat_dim, device)
    usage = PrototypeUsage(args.nmb_prototypes, device)

    # checkpoints under the names of the official ones, monitoring
    run.resume(
        data,
        len(lr_schedule),
        NETWORK_FLAGS,
        to_official=to_official,
        from_official=from_official,
        network=network,
        optimizer=optimizer,
        queue=queue,
        prototype_usage=usage,
    )
    official_queue = run.output_dir / f"queue{distributed.get_rank()}.pth"  # the official code has one file per rank
    if queue_rows and not run.is_new and not queue.has_started and official_queue.is_file():
        queue.load_rows(safe_load(official_queue)["queue"])
    run.health = HealthMonitor(health_rules("SwAV", args.nmb_prototypes, args.epochs, data.steps_per_epoch))
    knn = KNNMonitor(run, args.size_crops[0], MEAN, STD, data.num_workers)
    trunk = Through(distributed.unwrap(network), "forward_backbone")

    with run:
        if run.is_new:
            knn.evaluate(-1, trunk)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            queue.has_started |= epoch >= args.epoch_queue_starts
            train_one_epoch(
                network,
                criterion,
                queue,
                usage,
                data.loader,
                optimizer,
                lr_schedule,
                run,
                freeze_prototypes_niters=args.freeze_prototypes_niters,
            )
            knn.evaluate(epoch, trunk)
            run.log_epoch(bad_images=data.bad_images.count(), **usage.end_epoch())
            run.end_epoch(keep_as=numbered_checkpoint(epoch, args.epochs, args.checkpoint_freq))
    report("SwAV", run, data.dataset, trunk, knn)


def build_for_training(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network with its heads, on this process's device and joined with those of the other processes."""
    network = build_network(
        args.arch,
        output_dim=args.feat_dim,
        hidden_mlp=args.hidden_mlp,
        nmb_prototypes=args.nmb_prototypes,
        normalize=True,
        img_size=args.size_crops[0],
        in_chans=args.in_chans,
    )
    if args.sync_bn != "none":
        group_size = min(args.syncbn_process_group_size, distributed.get_world_size())
        network = synchronize_batchnorm(network, device, group_size if args.sync_bn == "apex" else None)
    network.to(device)
    if args.compile:
        compile_network(network)
    accumulate(network, args.accumulate)
    return distributed.wrap(network, device)


def numbered_checkpoint(epoch: int, epochs: int, checkpoint_freq: int) -> str | None:
    """Name under which the checkpoint of this epoch stays, as in the official code; None for most epochs."""
    due = checkpoint_freq > 0 and (epoch % checkpoint_freq == 0 or epoch == epochs - 1)
    return f"checkpoints/ckp-{epoch}.pth" if due else None


def rows_of_queue(queue_length: int, batch_size: int, world_size: int) -> int:
    """Rows of the queue on each process: ``queue_length`` rounded down to whole batches of all processes."""
    total = queue_length // (batch_size * world_size) * (batch_size * world_size)
    if total != queue_length:
        distributed.print_once(
            f"--queue_length {queue_length} is no multiple of the {batch_size * world_size} images of a step: "
            + (f"the queue has {total} rows" if total else "there is no queue")
        )
    return total // world_size


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose networks are wrapped for processes."""
    network = {f"module.{name}": value for name, value in state["network"].items()}
    return {"state_dict": network} | {name: value for name, value in state.items() if name != "network"}


def from_official(checkpoint: dict) -> dict:
    """The way back; official checkpoints have no counts of prototypes, and their queue is another file."""
    state = {"network" if name == "state_dict" else name: value for name, value in checkpoint.items()}
    return state | {name: checkpoint.get(name) or {} for name in ("queue", "prototype_usage")}


def train_one_epoch(
    network: nn.Module,
    criterion: SwappedPrediction,
    queue: EmbeddingQueue,
    usage: PrototypeUsage,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_schedule: np.ndarray,
    run: Run,
    *,
    freeze_prototypes_niters: int,
) -> None:
    """One epoch of Algorithm 1.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, crop-major: uint8 images, or float
    tensors that are normalised already.
    """
    parameters = list(network.parameters())
    prototypes = distributed.unwrap(network).prototypes
    network.train()
    for step, (loaded_views, labels, _) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = float(lr_schedule[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, run.device, MEAN, STD)

        normalize_prototypes_(prototypes)
        with run.precision.autocast():
            embeddings, scores = network(views)
        embeddings, scores = (rows.unflatten(0, (-1, len(labels))) for rows in (embeddings, scores))  # (V, B, ...)

        codes = []
        with torch.no_grad():  # codes are constants
            for i, crop in enumerate(criterion.crops_for_assign):
                rows = scores[crop]
                if queue.is_used:
                    if queue.is_full(i):  # a small batch is balanced together with the embeddings before it
                        rows = torch.cat([prototypes(queue.embeddings[i]), rows])
                    queue.push(i, embeddings[crop])
                codes.append(criterion.assign(rows)[-len(labels) :])
                usage.add(codes[i])
        loss = criterion(scores, codes)

        run.backward(loss, optimizer)
        if step < freeze_prototypes_niters:
            prototypes.weight.grad = None  # no update, no weight decay, no momentum
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)

        health = None
        if run.logs_this_step:
            counts = distributed.all_reduce_sum(usage.counts)
            health = assignment_health(torch.cat(codes), counts, embeddings[0])
        run.end_step(len(labels), {"loss": loss, "lr": lr_schedule[step]}, health)


def main() -> None:
    distributed.run_script(train_swav, parse_args)


if __name__ == "__main__":
    main()
