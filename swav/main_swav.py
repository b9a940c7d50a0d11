"""Unsupervised learning by contrasting cluster assignments: train a backbone with SwAV.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020.

    python main_swav.py                                                   # embedded digits, minutes on a CPU
    torchrun --nproc_per_node=8 main_swav.py --data_path /path/to/imagenet/train --dump_path /path/to/run \\
        --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \\
        --batch_size 32 --base_lr 0.6 --final_lr 0.0006 --epochs 400 --warmup_epochs 0 --queue_length 3840 \\
        --freeze_prototypes_niters 5005                                   # one node, 400 epochs: 74.3 linear

Every crop of an image gets a code: a soft assignment to K prototypes, balanced over the batch by Sinkhorn-Knopp. The
network learns to predict the code of one crop from the other crops of the image. Running the same command again
resumes the run.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.evaluation.knn_monitor import build_knn_monitor
from shared.images.training_data import open_training_data
from shared.multicrop import normalize_views
from shared.networks.weights import safe_load
from shared.optimisation.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from shared.optimisation.precision import Precision
from shared.optimisation.schedules import cosine_schedule
from shared.run import randomness
from shared.run.checkpoint import Checkpointer, is_at_start, load_latest
from shared.run.flags import bool_flag
from shared.run.health import feature_spread, rank_me
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run
from shared.sinkhorn import sinkhorn_knopp
from swav import training_flags
from swav.augmentations import swav_views
from swav.collapse import CollapseMonitor, PrototypeUsage
from swav.hub import MEAN, STD
from swav.larc import LARC
from swav.losses import EmbeddingQueue, normalize_prototypes_, swapped_prediction
from swav.report import save_pictures, summary
from swav.resnet50 import Trunk
from swav.training_setup import (
    CHECKPOINT,
    Resumable,
    build_student,
    numbered_checkpoint,
    patience_steps,
)

# What replaces the official defaults when no --data_path is given: 8x8 pixel digits need no ResNet-50 at 224 pixels,
# small crops of them have no digit in them, and with few prototypes the usual epsilon makes codes uniform.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "test_resnet",  # timm's smallest ResNet, 0.4 million weights
    "nmb_crops": [2],
    "size_crops": [32],
    "min_scale_crops": [0.6],
    "max_scale_crops": [1.0],
    "blur_radius": (0.1, 0.5),
    "hidden_mlp": 256,
    "feat_dim": 32,
    "nmb_prototypes": 30,
    "epsilon": 0.02,
    "batch_size": 64,
    "base_lr": 2.0,
    "epochs": 12,
    "warmup_epochs": 2,
    "freeze_prototypes_niters": 66,
    "output_dir": "runs/digits",
}
ADVICE = {
    "uniform": "lower --epsilon (0.03), or take more --nmb_prototypes than --feat_dim",
    "few": "lengthen --freeze_prototypes_niters, lower --base_lr, or take fewer --nmb_prototypes or a longer "
    "--queue_length for a small batch",
    "features": "lower --base_lr, or lengthen --warmup_epochs and --freeze_prototypes_niters",
    "flat": "lower --epsilon (0.03), take more --nmb_prototypes than --feat_dim, fewer or larger crops, or lengthen "
    "--freeze_prototypes_niters",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "SwAV", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training_flags.add_data_flags(parser)
    training_flags.add_view_flags(parser)
    add = training_flags.add_network_flags(parser)
    add("--nmb_prototypes", type=int, default=3000, help="number of prototypes K")

    add = parser.add_argument_group("codes and their prediction").add_argument
    add("--crops_for_assign", type=int, nargs="+", default=[0, 1], help="indices of the crops that get a code")
    add("--temperature", type=float, default=0.1, help="of the softmax that predicts a code")
    add("--epsilon", type=float, default=0.05, help="entropy regularisation of the codes")
    add("--sinkhorn_iterations", type=int, default=3, help="balancing steps behind the codes")
    add("--queue_length", type=int, default=0, help="embeddings of earlier batches that small batches need for their "
        "codes, on all processes; 0: none")  # fmt: skip
    add("--epoch_queue_starts", type=int, default=15, help="first epoch (from 0) with the queue")

    add = training_flags.add_optimisation_flags(parser)
    add("--freeze_prototypes_niters", type=int, default=313, help="steps in which the prototypes are not trained")
    add("--use_fp16", type=bool_flag, default=True, help="false: the same as --amp fp32")
    training_flags.add_run_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for scripts that have them.
    """
    parser = parser or get_args_parser()
    args = training_flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if args.nmb_prototypes < 2:
        parser.error(f"--nmb_prototypes {args.nmb_prototypes}: at least two are needed")
    return args


def train_swav(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    device, output_dir = start_run(args, "checkpoints")
    precision = Precision(args.amp if args.use_fp16 else "fp32", device)
    recipes = swav_views(args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops, args.blur_radius)
    data = open_training_data(args, recipes, args.batch_size, output_dir, device, "--size_crops")
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in EMBEDDED_DATA_DEFAULTS)
        distributed.print_once(f"without --data_path these flags have defaults for the embedded data: {names}")
    steps_per_epoch = data.steps_per_epoch

    # network, optimiser, schedule
    network = build_student(args, args.nmb_prototypes, device)
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=args.wd)
    lr_schedule = cosine_schedule(
        args.base_lr, args.final_lr, args.epochs, steps_per_epoch, args.warmup_epochs, args.start_warmup
    )

    # the queue is made in its first epoch
    queue = None
    queue_rows = rows_of_queue(args.queue_length, args.batch_size, distributed.get_world_size())
    usage = PrototypeUsage(args.nmb_prototypes, device)
    monitor = CollapseMonitor(args.nmb_prototypes, patience_steps(len(lr_schedule), steps_per_epoch), ADVICE)

    # resume
    checkpoint = load_latest(output_dir / CHECKPOINT)
    log = RunLog(output_dir, args.epochs * steps_per_epoch, args.log_freq, args.tensorboard, resumed=bool(checkpoint))
    training = Resumable(args, data, network, optimizer, precision, log)
    first_epoch, first_step, skipped_steps = 0, 0, 0

    def new_queue() -> EmbeddingQueue:
        return EmbeddingQueue(len(args.crops_for_assign), queue_rows, args.feat_dim, device)

    def state(epoch: int, step_in_epoch: int) -> dict:
        """Everything a run needs to go on at this step."""
        return {
            **training.state(epoch, step_in_epoch),
            "queue": None if queue is None else queue.state_dict(),
            "prototype_usage": usage.state_dict(),
        }

    if checkpoint is not None:
        first_epoch, first_step = training.load(checkpoint)
        skipped_steps = checkpoint.get("skipped_steps", 0)
        if "prototype_usage" in checkpoint:
            usage.load_state_dict(checkpoint["prototype_usage"])
        official_queue = output_dir / f"queue{distributed.get_rank()}.pth"  # the official code has one file per rank
        if queue_rows and checkpoint.get("queue"):
            queue = new_queue()
            queue.load_state_dict(checkpoint["queue"])
        elif queue_rows and "queue" not in checkpoint and official_queue.is_file():
            queue = new_queue()
            queue.load_rows(safe_load(official_queue)["queue"])
    training.guard = guard = FiniteGuard(
        {"network": distributed.unwrap(network)}, output_dir, args.max_skipped_steps, device, in_a_row=skipped_steps
    )
    knn = build_knn_monitor(args, args.size_crops[0], MEAN, STD, device, data.num_workers, output_dir, args.in_chans)
    trunk = Trunk(distributed.unwrap(network))

    # epochs
    with Checkpointer(
        output_dir / CHECKPOINT, state, args.saveckp_steps, args.saveckp_minutes, guard.is_good
    ) as checkpointer:
        if is_at_start(checkpoint) and knn.is_due(-1):
            stop = partial(checkpointer.stop_if_asked, 0, 0)
            log.evaluation(0, 0, knn_top1=knn.run(trunk, stop))
        for epoch in range(first_epoch, args.epochs):
            if queue is None and queue_rows and epoch >= args.epoch_queue_starts:
                queue = new_queue()
            data.sampler.set_epoch(epoch, first_step)
            train_one_epoch(
                network,
                data.loader,
                optimizer,
                lr_schedule,
                queue,
                crops_for_assign=args.crops_for_assign,
                temperature=args.temperature,
                epsilon=args.epsilon,
                sinkhorn_iterations=args.sinkhorn_iterations,
                freeze_prototypes_niters=args.freeze_prototypes_niters,
                epoch=epoch,
                first_step=first_step,
                steps_per_epoch=steps_per_epoch,
                seed=args.seed,
                precision=precision,
                log=log,
                usage=usage,
                monitor=monitor,
                guard=guard,
                checkpointer=checkpointer,
            )
            first_step = 0
            if knn.is_due(epoch):
                stop = partial(checkpointer.stop_if_asked, epoch, steps_per_epoch)
                log.evaluation((epoch + 1) * steps_per_epoch, epoch + 1, knn_top1=knn.run(trunk, stop))
            log.end_epoch(epoch, bad_images=data.bad_images.count(), **usage.of_epoch())
            usage.reset()
            checkpointer.after_epoch(epoch, keep_as=numbered_checkpoint(epoch, args.epochs, args.checkpoint_freq))
    log.close()
    pictures = save_pictures(trunk, data.dataset, knn, args.size_crops[0], output_dir, device) if args.pictures else []
    problems = list(monitor.warnings.values())
    if distributed.is_main_process():
        weights = output_dir / CHECKPOINT
        print(summary("main_swav.py", output_dir, weights, args.arch, args.data_path, knn, pictures, problems))


def rows_of_queue(queue_length: int, batch_size: int, world_size: int) -> int:
    """Rows of the queue on each process: ``queue_length`` rounded down to whole batches of all processes."""
    total = queue_length // (batch_size * world_size) * (batch_size * world_size)
    if total != queue_length:
        distributed.print_once(
            f"--queue_length {queue_length} is no multiple of the {batch_size * world_size} images of a step: "
            + (f"the queue has {total} rows" if total else "there is no queue")
        )
    return total // world_size


def train_one_epoch(
    network: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_schedule: np.ndarray,
    queue: EmbeddingQueue | None,
    *,
    crops_for_assign: list[int],
    temperature: float,
    epsilon: float,
    sinkhorn_iterations: int,
    freeze_prototypes_niters: int,
    epoch: int,
    first_step: int,
    steps_per_epoch: int,
    seed: int,
    precision: Precision,
    log: RunLog,
    usage: PrototypeUsage,
    monitor: CollapseMonitor,
    guard: FiniteGuard,
    checkpointer: Checkpointer,
) -> None:
    """One epoch (from its step ``first_step`` on) of Algorithm 1.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, crop-major: uint8 images, or float
    tensors that are normalised already.
    """
    parameters = list(network.parameters())
    prototypes = distributed.unwrap(network).prototypes
    network.train()
    start = epoch * steps_per_epoch + first_step
    for step, (loaded_views, labels, indices) in enumerate(log.batches(loader), start=start):
        randomness.seed_step(seed, step, distributed.get_rank())
        for group in optimizer.param_groups:
            group["lr"] = float(lr_schedule[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, precision.device, MEAN, STD)

        normalize_prototypes_(prototypes)
        with precision.autocast():
            embeddings, scores = network(views)
        embeddings, scores = (rows.unflatten(0, (-1, len(labels))) for rows in (embeddings, scores))  # (V, B, ...)

        codes = []
        with torch.no_grad():  # codes are constants
            for i, crop in enumerate(crops_for_assign):
                rows = scores[crop]
                if queue is not None:
                    if queue.is_full(i):  # a small batch is balanced together with the embeddings before it
                        rows = torch.cat([prototypes(queue.embeddings[i]), rows])
                    queue.push(i, embeddings[crop])
                codes.append(sinkhorn_knopp(rows, epsilon, sinkhorn_iterations, max_abs_score=1.0)[-len(labels) :])
                usage.add(codes[i])
        loss = swapped_prediction(scores, codes, crops_for_assign, temperature)

        precision.backward(loss, optimizer)
        if step < freeze_prototypes_niters:
            prototypes.weight.grad = None  # no update, no weight decay, no momentum
        skipped = step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(parameters, max_norm=0))
        precision.update()
        guard.count(skipped)

        averages = {"loss": loss, "lr": lr_schedule[step], "skipped": skipped}
        health = assignment_health(codes, embeddings[0], usage) if log.is_due(step) else {}
        line = log.step(step, epoch, len(labels), averages, **health)
        if line is not None and (problem := monitor.check(line)):
            log.say(problem)
        if line is not None and guard.too_many():
            randomness.seed_step(seed, step, distributed.get_rank())
            with precision.autocast():
                batch = {"views": loaded_views, "indices": indices, "step": step, "epoch": epoch}
                guard.stop(batch, views, {"network": views}, loss)
        checkpointer.after_step(epoch, step + 1 - epoch * steps_per_epoch)


def assignment_health(codes: list[Tensor], embeddings: Tensor, usage: PrototypeUsage) -> dict[str, Tensor | float]:
    """What shows a collapse: codes with an entropy of ln K, few prototypes in use, embeddings that are all the same."""
    return {
        "code_entropy": torch.special.entr(torch.cat(codes)).sum(dim=1).mean(),
        "ln_k": math.log(codes[0].shape[1]),
        **usage.summary(),
        "feature_spread": feature_spread(embeddings),
        "rank_me": rank_me(embeddings),
    }


def main() -> None:
    with distributed.clean_exit():
        train_swav(parse_args())


if __name__ == "__main__":
    main()
