"""Clustering and classification in turn: train a backbone with DeepCluster-v2.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020, section 5.

    python main_deepclusterv2.py                                          # embedded materials, minutes on a CPU
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.resolutions import recipes_of
from shared.images.training_data import open_training_data
from shared.multicrop import normalize_views
from shared.networks.backbones import Through
from shared.networks.weights import safe_load
from shared.optimisation.larc import LARC
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.precision import Precision
from shared.optimisation.schedules import cosine_schedule
from shared.run import randomness
from shared.run.flags import Parser, add_data_flags, add_own_images_flags, tell_embedded_defaults
from shared.run.health import HealthMonitor, feature_spread, rank_me, usage_of
from shared.run.run import Run
from swav import flags, main_swav
from swav.flags import FLIP_COLOR_AND_BLUR
from swav.hub import MEAN, STD
from swav.kmeans import MemoryBank, check_prototypes, cluster_memory
from swav.losses import cluster_classification
from swav.main_swav import CHECKPOINT, NETWORK_FLAGS, build_for_training, numbered_checkpoint
from swav.report import health_rules, report, suit_settings

# What replaces the official defaults when no --data_path is given.
EMBEDDED_DATA_DEFAULTS = main_swav.EMBEDDED_DATA_DEFAULTS | {
    "nmb_prototypes": [30, 30, 30],
    "output_dir": "runs/materials_deepclusterv2",
}
del EMBEDDED_DATA_DEFAULTS["epsilon"], EMBEDDED_DATA_DEFAULTS["freeze_prototypes_niters"]  # of SwAV alone


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_own_images_flags(parser, __file__, "small_data_deepclusterv2.yaml")
    flags.add_view_flags(parser)
    add = flags.add_network_flags(parser)
    add("--nmb_prototypes", type=int, nargs="+", default=[3000] * 3, help="number of clusters, one value for each head")

    add = parser.add_argument_group("clusters and their prediction").add_argument
    add("--crops_for_assign", type=int, nargs="+", default=[0, 1], help="indices of the crops that are clustered")
    add("--temperature", type=float, default=0.1, help="of the softmax that predicts a cluster")

    add = flags.add_optimisation_flags(parser)
    add("--freeze_prototypes_niters", type=int, default=int(1e10), help="steps in which prototypes are not trained")
    flags.add_run_flags(parser)
    parser.set_defaults(amp="fp32")  # as published
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """As :func:`swav.main_swav.parse_args`."""
    return flags.parse_and_check(parser or get_args_parser(), arguments, EMBEDDED_DATA_DEFAULTS)


def train_deepclusterv2(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp, CHECKPOINT, subfolder="checkpoints")
    device = run.device

    # data
    recipes = recipes_of(args, **FLIP_COLOR_AND_BLUR)
    data = open_training_data(args, recipes, args.batch_size, run.output_dir, device, "--size_crops")
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)
    suit_settings(args, data, args.epochs * data.steps_per_epoch)

    # network, optimiser, schedule
    network = build_for_training(args, device)
    heads = distributed.unwrap(network).prototypes.heads()
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=args.wd)
    lr_schedule = cosine_schedule(
        args.base_lr, args.final_lr, args.epochs, data.steps_per_epoch, args.warmup_epochs, args.start_warmup
    )

    # the embeddings that are clustered, and the clusters of all images
    rows = data.steps_per_epoch * args.batch_size
    check_prototypes(max(args.nmb_prototypes), rows)
    memory = MemoryBank(len(data.dataset), len(args.crops_for_assign), rows, args.feat_dim, device)

    # checkpoints under the names of the official ones, monitoring
    run.resume(
        data,
        len(lr_schedule),
        NETWORK_FLAGS,
        to_official=to_official,
        from_official=from_official,
        network=network,
        optimizer=optimizer,
        memory=memory,
    )
    official_memory = run.output_dir / f"mb{distributed.get_rank()}.pth"  # the official code has one file per rank
    if not run.is_new and not memory.is_filled and official_memory.is_file():
        stored = safe_load(official_memory)
        memory.load_rows(stored["local_memory_index"], stored["local_memory_embeddings"])
    fewest = min(args.nmb_prototypes)
    run.health = HealthMonitor(health_rules("DeepCluster-v2", fewest, args.epochs, data.steps_per_epoch))
    knn = KNNMonitor(run, args.size_crops[0], MEAN, STD, data.num_workers)
    trunk = Through(distributed.unwrap(network), "forward_backbone")

    with run:
        if run.is_new:
            knn.evaluate(-1, trunk)
        if not memory.is_filled and run.epoch < args.epochs:
            distributed.print_once("filling the memory: one pass over the images")
            data.sampler.set_epoch(run.epoch - 1)
            how = args.crops_for_assign, run.precision, run.stop_if_asked
            fill_memory(distributed.unwrap(network), data.loader, memory, *how)
        for epoch in run.epochs():
            if run.step_in_epoch == 0 or memory.assignments is None:
                orders = first_centroids(args.seed, epoch, len(heads), rows)
                memory.assignments = cluster_memory(memory, heads, orders)
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(
                network,
                memory,
                data.loader,
                optimizer,
                lr_schedule,
                run,
                crops_for_assign=args.crops_for_assign,
                temperature=args.temperature,
                freeze_prototypes_niters=args.freeze_prototypes_niters,
            )
            knn.evaluate(epoch, trunk)
            run.log_epoch(bad_images=data.bad_images.count(), **cluster_usage(memory.assignments, heads))
            run.end_epoch(keep_as=numbered_checkpoint(epoch, args.epochs, args.checkpoint_freq))
    report("DeepCluster-v2", run, data.dataset, trunk, knn)


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints; the clusters are an entry of their own."""
    memory = dict(state["memory"])
    return main_swav.to_official(state) | {"assignments": memory.pop("assignments"), "memory": memory}


def from_official(checkpoint: dict) -> dict:
    """The way back; the memory of official checkpoints is another file, and there are no clusters."""
    memory = {**(checkpoint.get("memory") or {}), "assignments": checkpoint.get("assignments")}
    return main_swav.from_official(checkpoint) | {"memory": memory}


def first_centroids(seed: int, epoch: int, num_heads: int, rows: int) -> list[Tensor]:
    """For each head a permutation of the memory's rows; the first ones are where k-means starts."""
    seeds = [randomness.derive_seed(seed, epoch, head) for head in range(num_heads)]
    return [torch.randperm(rows, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds]


@torch.no_grad()
def fill_memory(
    network: nn.Module,
    loader: Iterable,
    memory: MemoryBank,
    crops_for_assign: Sequence[int],
    precision: Precision,
    stop_if_asked: Callable[[], None] = lambda: None,
) -> None:
    """One pass over the images before training, in train mode and crop by crop as in the official code.

    A run that is asked to stop is saved with the statistics that it had before, and starts the pass again.
    """
    network.train()
    start, buffers = 0, list(network.buffers())
    before = [buffer.clone() for buffer in buffers]
    for loaded_views, labels, indices in loader:
        views = normalize_views(loaded_views, precision.device, MEAN, STD)
        crops = [crop for group in views for crop in group.split(len(labels))]
        with precision.autocast():
            embeddings = [network(crops[crop])[0] for crop in crops_for_assign]
        memory.write(start, indices, torch.stack(embeddings))
        start += len(labels)
        now = [buffer.clone() for buffer in buffers]
        torch._foreach_copy_(buffers, before)
        stop_if_asked()
        torch._foreach_copy_(buffers, now)
    memory.is_filled = True


def train_one_epoch(
    network: nn.Module,
    memory: MemoryBank,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lr_schedule: np.ndarray,
    run: Run,
    *,
    crops_for_assign: list[int],
    temperature: float,
    freeze_prototypes_niters: int,
) -> None:
    """One epoch: predict the clusters of the images, and remember their embeddings for the next ones.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, crop-major: uint8 images, or float
    tensors that are normalised already.
    """
    parameters = list(network.parameters())
    heads = distributed.unwrap(network).prototypes.heads()
    usage = {"ln_k": math.log(min(len(head.weight) for head in heads)), **cluster_usage(memory.assignments, heads)}
    network.train()
    for step, (loaded_views, labels, indices) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = float(lr_schedule[step])
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, run.device, MEAN, STD)

        clusters = memory.assignments[:, indices].to(run.device, non_blocking=True)
        with run.precision.autocast():
            embeddings, scores = network(views)
        loss = cluster_classification(scores, clusters, temperature)
        embeddings = embeddings.detach().unflatten(0, (-1, len(labels)))  # (V, B, D)
        of_crops = torch.stack([embeddings[crop] for crop in crops_for_assign])
        memory.write(step % run.data.steps_per_epoch * len(labels), indices, of_crops)

        run.backward(loss, optimizer)
        if step < freeze_prototypes_niters:
            for head in heads:
                head.weight.grad = None  # no update, no weight decay, no momentum
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)

        health = None
        if run.logs_this_step:
            health = usage | {"feature_spread": feature_spread(embeddings[0]), "rank_me": rank_me(embeddings[0])}
        run.end_step(len(labels), {"loss": loss, "lr": lr_schedule[step]}, health)


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
    distributed.run_script(train_deepclusterv2, parse_args)


if __name__ == "__main__":
    main()
