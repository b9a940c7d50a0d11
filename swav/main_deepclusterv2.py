"""Clustering and classification in turn: train a backbone with DeepCluster-v2.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020, section 5.

    python main_deepclusterv2.py                                          # embedded digits, minutes on a CPU
    torchrun --nnodes=8 --nproc_per_node=8 main_deepclusterv2.py --data_path /path/to/imagenet/train \\
        --dump_path /path/to/run --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 \\
        --max_scale_crops 1. 0.14 --epochs 800 --final_lr 0.0048 --start_warmup 0.3   # 75.2 linear

At the start of every epoch the embeddings of the epoch before are clustered by spherical k-means, and the centroids
become the prototypes. The network learns to predict the cluster of an image from each of its crops. Running the same
command again resumes the run.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
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
from shared.run.health import feature_spread, rank_me
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run
from swav import training_flags
from swav.augmentations import swav_views
from swav.collapse import CollapseMonitor, usage_of
from swav.hub import MEAN, STD
from swav.kmeans import cluster_memory
from swav.larc import LARC
from swav.losses import cluster_classification
from swav.main_swav import EMBEDDED_DATA_DEFAULTS as SWAV_DEFAULTS
from swav.memory_bank import MemoryBank
from swav.report import save_pictures, summary
from swav.resnet50 import Trunk
from swav.training_setup import (
    CHECKPOINT,
    Resumable,
    build_student,
    numbered_checkpoint,
    patience_steps,
)

# What replaces the official defaults when no --data_path is given.
EMBEDDED_DATA_DEFAULTS = {
    **{name: value for name, value in SWAV_DEFAULTS.items() if name not in ("epsilon", "freeze_prototypes_niters")},
    "nmb_prototypes": [30, 30, 30],
    "output_dir": "runs/digits_deepclusterv2",
}
ADVICE = {
    "few": "lower --base_lr, or take fewer --nmb_prototypes",
    "features": "lower --base_lr, or lengthen --warmup_epochs",
    "flat": "take fewer --nmb_prototypes, fewer or larger crops, or a higher --base_lr",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "DeepCluster-v2", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    training_flags.add_data_flags(parser)
    training_flags.add_view_flags(parser)
    add = training_flags.add_network_flags(parser)
    add("--nmb_prototypes", type=int, nargs="+", default=[3000, 3000, 3000],
        help="number of clusters, one value for each head")  # fmt: skip

    add = parser.add_argument_group("clusters and their prediction").add_argument
    add("--crops_for_assign", type=int, nargs="+", default=[0, 1], help="indices of the crops that are clustered")
    add("--temperature", type=float, default=0.1, help="of the softmax that predicts a cluster")

    add = training_flags.add_optimisation_flags(parser)
    add("--freeze_prototypes_niters", type=int, default=int(1e10), help="steps in which prototypes are not trained")
    training_flags.add_run_flags(parser)
    parser.set_defaults(amp="fp32")  # as published
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for scripts that have them.
    """
    parser = parser or get_args_parser()
    args = training_flags.parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS)
    if min(args.nmb_prototypes) < 2:
        parser.error(f"--nmb_prototypes {' '.join(map(str, args.nmb_prototypes))}: at least two are needed")
    return args


def train_deepclusterv2(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    device, output_dir = start_run(args, "checkpoints")
    precision = Precision(args.amp, device)
    recipes = swav_views(args.nmb_crops, args.size_crops, args.min_scale_crops, args.max_scale_crops, args.blur_radius)
    data = open_training_data(args, recipes, args.batch_size, output_dir, device, "--size_crops")
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in EMBEDDED_DATA_DEFAULTS)
        distributed.print_once(f"without --data_path these flags have defaults for the embedded data: {names}")
    steps_per_epoch, num_images = data.steps_per_epoch, len(data.dataset)

    # network, optimiser, schedule
    network = build_student(args, args.nmb_prototypes, device)
    heads = distributed.unwrap(network).prototypes.heads()
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=args.wd)
    lr_schedule = cosine_schedule(
        args.base_lr, args.final_lr, args.epochs, steps_per_epoch, args.warmup_epochs, args.start_warmup
    )

    # the embeddings that are clustered, and the clusters of all images
    memory = MemoryBank(len(args.crops_for_assign), steps_per_epoch * args.batch_size, args.feat_dim, device)
    memory_is_filled, assignments = False, None
    monitor = CollapseMonitor(min(args.nmb_prototypes), patience_steps(len(lr_schedule), steps_per_epoch), ADVICE)

    # resume
    checkpoint = load_latest(output_dir / CHECKPOINT)
    log = RunLog(output_dir, args.epochs * steps_per_epoch, args.log_freq, args.tensorboard, resumed=bool(checkpoint))
    training = Resumable(args, data, network, optimizer, precision, log)
    first_epoch, first_step, skipped_steps = 0, 0, 0

    def state(epoch: int, step_in_epoch: int) -> dict:
        """Everything a run needs to go on at this step."""
        return {
            **training.state(epoch, step_in_epoch),
            "memory": memory.state_dict(),
            "assignments": assignments,
        }

    if checkpoint is not None:
        first_epoch, first_step = training.load(checkpoint)
        skipped_steps = checkpoint.get("skipped_steps", 0)
        official_memory = output_dir / f"mb{distributed.get_rank()}.pth"  # the official code has one file per rank
        if (assigned := checkpoint.get("assignments")) is not None and assigned.shape[1] == num_images:
            memory_is_filled = memory.load_state_dict(checkpoint["memory"])
            assignments = assigned if memory_is_filled else None
        elif official_memory.is_file():
            stored = safe_load(official_memory)
            memory.load_rows(stored["local_memory_index"], stored["local_memory_embeddings"])
            memory_is_filled = True
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
        if not memory_is_filled and first_epoch < args.epochs:
            distributed.print_once("filling the memory: one pass over the images")
            data.sampler.set_epoch(first_epoch - 1)
            fill_memory(distributed.unwrap(network), data.loader, memory, args.crops_for_assign, precision)
        for epoch in range(first_epoch, args.epochs):
            if first_step == 0 or assignments is None:
                orders = first_centroids(args.seed, epoch, len(heads), len(memory.indices))
                assignments = cluster_memory(memory, heads, num_images, orders)
            usage = cluster_usage(assignments, heads)
            data.sampler.set_epoch(epoch, first_step)
            train_one_epoch(
                network,
                data.loader,
                optimizer,
                lr_schedule,
                memory,
                assignments,
                crops_for_assign=args.crops_for_assign,
                temperature=args.temperature,
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
            log.end_epoch(epoch, bad_images=data.bad_images.count(), **usage)
            checkpointer.after_epoch(epoch, keep_as=numbered_checkpoint(epoch, args.epochs, args.checkpoint_freq))
    log.close()
    pictures = []
    if args.pictures:
        heading = "DeepCluster-v2 training"
        pictures = save_pictures(trunk, data.dataset, knn, args.size_crops[0], output_dir, device, heading)
    problems = list(monitor.warnings.values())
    if distributed.is_main_process():
        weights = output_dir / CHECKPOINT
        print(summary("main_deepclusterv2.py", output_dir, weights, args.arch, args.data_path, knn, pictures, problems))


def first_centroids(seed: int, epoch: int, num_heads: int, rows: int) -> list[Tensor]:
    """For each head a permutation of the memory's rows; the first ones are where k-means starts."""
    seeds = [randomness.derive_seed(seed, epoch, head) for head in range(num_heads)]
    return [torch.randperm(rows, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds]


@torch.no_grad()
def fill_memory(
    network: nn.Module, loader: Iterable, memory: MemoryBank, crops_for_assign: Sequence[int], precision: Precision
) -> None:
    """One pass over the images before training, in train mode and crop by crop as in the official code."""
    network.train()
    start = 0
    for loaded_views, labels, indices in loader:
        views = normalize_views(loaded_views, precision.device, MEAN, STD)
        crops = [crop for group in views for crop in group.split(len(labels))]
        with precision.autocast():
            embeddings = [network(crops[crop])[0] for crop in crops_for_assign]
        memory.write(start, indices, torch.stack(embeddings))
        start += len(labels)


def train_one_epoch(
    network: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_schedule: np.ndarray,
    memory: MemoryBank,
    assignments: Tensor,
    *,
    crops_for_assign: list[int],
    temperature: float,
    freeze_prototypes_niters: int,
    epoch: int,
    first_step: int,
    steps_per_epoch: int,
    seed: int,
    precision: Precision,
    log: RunLog,
    usage: dict[str, float],
    monitor: CollapseMonitor,
    guard: FiniteGuard,
    checkpointer: Checkpointer,
) -> None:
    """One epoch (from its step ``first_step`` on): predict the clusters, and remember the embeddings for the next ones.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, crop-major: uint8 images, or float
    tensors that are normalised already. ``assignments`` holds the cluster of every image for each head, ``usage`` what
    :func:`cluster_usage` says about them.
    """
    parameters = list(network.parameters())
    heads = distributed.unwrap(network).prototypes.heads()
    ln_k = math.log(min(len(head.weight) for head in heads))
    network.train()
    start = epoch * steps_per_epoch + first_step
    for step, (loaded_views, labels, indices) in enumerate(log.batches(loader), start=start):
        randomness.seed_step(seed, step, distributed.get_rank())
        for group in optimizer.param_groups:
            group["lr"] = float(lr_schedule[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, precision.device, MEAN, STD)

        clusters = assignments[:, indices].to(precision.device, non_blocking=True)
        with precision.autocast():
            embeddings, scores = network(views)
        loss = cluster_classification(scores, clusters, temperature)
        embeddings = embeddings.detach().unflatten(0, (-1, len(labels)))  # (V, B, D)
        memory.write((step - epoch * steps_per_epoch) * len(labels), indices, embeddings[crops_for_assign])

        precision.backward(loss, optimizer)
        if step < freeze_prototypes_niters:
            for head in heads:
                head.weight.grad = None  # no update, no weight decay, no momentum
        skipped = step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(parameters, max_norm=0))
        precision.update()
        guard.count(skipped)

        averages = {"loss": loss, "lr": lr_schedule[step], "skipped": skipped}
        health = {}
        if log.is_due(step):
            health = {"ln_k": ln_k, **usage, "feature_spread": feature_spread(embeddings[0])}
            health["rank_me"] = rank_me(embeddings[0])
        line = log.step(step, epoch, len(labels), averages, **health)
        if line is not None and (problem := monitor.check(line)):
            log.say(problem)
        if line is not None and guard.too_many():
            randomness.seed_step(seed, step, distributed.get_rank())
            with precision.autocast():
                batch = {"views": loaded_views, "indices": indices, "step": step, "epoch": epoch}
                guard.stop(batch, views, {"network": views}, loss)
        checkpointer.after_step(epoch, step + 1 - epoch * steps_per_epoch)


def cluster_usage(assignments: Tensor, heads: Sequence[nn.Linear]) -> dict[str, float]:
    """:func:`usage_of` the clusters of the head that uses them least evenly, and how many of its clusters are empty."""
    worst = None
    for clusters, head in zip(assignments, heads, strict=True):
        sizes = torch.bincount(clusters[clusters >= 0], minlength=len(head.weight))
        usage = {name: value.item() for name, value in usage_of(sizes).items()}
        usage["dead_prototypes"] = len(sizes) - usage["prototypes_used"]
        if worst is None or usage["prototype_perplexity"] < worst["prototype_perplexity"]:
            worst = usage
    return worst


def main() -> None:
    with distributed.clean_exit():
        train_deepclusterv2(parse_args())


if __name__ == "__main__":
    main()
