"""SEER: SwAV on a RegNetY and one pass over a stream of unlabelled images.

Goyal et al., "Self-supervised Pretraining of Visual Features in the Wild", 2021; Goyal et al., "Vision Models Are More
Robust And Fair When Pretrained On Uncurated Images Without Supervision", 2022.

    python main_seer.py                                                   # embedded materials, minutes on a CPU
    python main_seer.py --fname configs/regnet10B.yaml --plan 496         # memory of 496 devices, before a run
    torchrun --nproc_per_node=8 main_seer.py --fname configs/regnet256Gf_1.yaml --data_path /path/to/shards \\
        --output_dir /path/to/run

Images come in the order of their files or tar shards, shuffled in windows; there are no epochs. Two crops of an image
get assignments to prototypes, balanced over all processes, which the other crops predict. The network may be shared out
over processes (``--fsdp``) and compute its activations twice (``--recompute``). Running the same command again resumes
the run at its step in the stream.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from seer.hub import MEAN, STD
from seer.losses import SwappedAssignments, learning_rate, normalize_prototypes_
from seer.regnet import SIZES, Head, RegNet
from seer.report import health_rules, report, suit_settings
from seer.sharding import WholeNetwork, WholeOptimizer, build_network, shard_network
from seer.stream import StreamSampler, find_shards, open_stream
from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.resolutions import add_resolution_flags, check_assigned_crops, recipes_of
from shared.multicrop import MultiCropWrapper, normalize_views
from shared.networks.backbones import Through
from shared.networks.compiling import compile_network
from shared.optimisation.larc import LARC, tensor_norms
from shared.plan import NUMBERS, make_plan, tell_large
from shared.run.checkpoint import load_latest
from shared.run.flags import (
    Parser,
    add_data_flags,
    add_own_images_flags,
    add_run_flags,
    bool_flag,
    check_minimum,
    check_positive,
    tell_embedded_defaults,
)
from shared.run.health import HealthMonitor, assignment_health
from shared.run.run import Run
from shared.run.yaml_config import parse_args_with_config

EMBEDDED_DATA_DEFAULTS = {
    "arch": "regnet_micro",
    "hidden_mlp": [256],
    "feat_dim": 32,
    "nmb_prototypes": [60],
    "nmb_crops": [2, 2],
    "size_crops": [32, 16],
    "min_scale_crops": [0.5, 0.2],
    "max_scale_crops": [1.0, 0.5],
    "blur_radius": (0.1, 0.4),
    "epsilon": 0.02,
    "batch_size": 64,
    "passes": 16,
    "base_lr": 16.0,
    "head_bn": True,
    "freeze_prototypes_niters": 60,
    "output_dir": "runs/materials",
}
COLOURS = {"flip_p": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grey_p": 0.2, "blur_p": 0.5}
NO_CLASSES = "the images of tar files have no classes"
NETWORK_FLAGS = ("arch", "in_chans", "hidden_mlp", "feat_dim", "nmb_prototypes", "head_bn", "crops_for_assign")
MINIMUM = dict.fromkeys(
    "passes batch_size shuffle_window log_freq feat_dim sinkhorn_iterations total_images".split(), 1
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--fname", default=None, help="YAML file of defaults, such as one of configs; flags win")
    add = add_data_flags(parser)
    add("--passes", "--epochs", type=int, default=1, dest="passes", help="how often the stream is read")
    add("--total_images", type=int, default=None, help="length of the run; None: all passes")
    add("--shuffle_window", type=int, default=1 << 16, help="neighbours of the stream that are shuffled together")
    add_own_images_flags(parser, __file__)

    add_resolution_flags(parser, [2, 4], [224, 96], [0.14, 0.05], [1.0, 0.14])

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="regnet256Gf_1", help=", ".join(name for name in SIZES if name != "regnet_micro"))
    add("--hidden_mlp", type=int, nargs="+", default=[8192, 8192], help="hidden widths of the projection head")
    add("--feat_dim", type=int, default=256, help="dimension of the embeddings")
    add("--nmb_prototypes", type=int, nargs="+", default=[16000], help="number of prototypes of each set")
    add("--head_bn", type=bool_flag, default=False, help="batch norm in the projection head")
    add("--fsdp", action="store_true", help="share weights, gradients and momentum out over the processes")
    add("--recompute", action="store_true", help="keep the inputs of blocks only, and compute the rest again")
    add("--compile", action="store_true", help="torch.compile the blocks")

    add = parser.add_argument_group("assignments and their prediction").add_argument
    add("--crops_for_assign", type=int, nargs="+", default=[0, 1], help="indices of the crops that get assignments")
    add("--temperature", type=float, default=0.1, help="of the softmax that predicts an assignment")
    add("--epsilon", type=float, default=0.03, help="entropy regularisation of the assignments; 0.05 in 2021")
    add("--sinkhorn_iterations", type=int, default=10, help="balancing steps behind the assignments")
    add("--hard_steps", type=int, default=0, help="first steps, in which assignments are hard")
    add("--power_law", type=float, default=0.0, help="use of prototype k falls as k^-power; 0: all equally")
    add("--freeze_prototypes_niters", type=int, default=313, help="steps in which the prototypes are not trained")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=16, help="images per process; 8,192 in all when published")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--base_lr", type=float, default=0.3, help="peak learning rate for 256 images per step; scaled linearly")
    add("--start_lr", type=float, default=0.009375, help="the same at the start of the warm-up")
    add("--final_lr", type=float, default=0.0003, help="the same at the end")
    add("--warmup", type=float, default=0.065, help="share of the run; 0: a constant rate comes from equal ones")
    add("--wd", type=float, default=1e-5, help="weight decay, of all parameters")

    add = add_run_flags(parser, knn=False)
    freq = "k-NN before and after the run; None: with at most 100,000 images; 0: no evaluation"
    add("--eval_knn_freq", type=int, default=None, choices=(0, 1), help=freq)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    add("--plan", type=int, default=0, metavar="N", help="tell what each of N devices holds, and stop")
    add("--device_gib", type=float, default=80.0, help="with --plan: memory of a device")
    parser.set_defaults(epochs=1, saveckp_steps=100)  # the run is one epoch of its stream
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` or ``--fname`` it is that of the embedded data."""
    parser = parser or get_args_parser()
    args = parser.parse_args(arguments)
    if not args.data_path and not args.fname:
        parser.set_defaults(**EMBEDDED_DATA_DEFAULTS)
    args = parse_args_with_config(parser, arguments)
    check_minimum(parser, args, MINIMUM)
    if not 0 <= args.warmup <= 1:
        parser.error(f"--warmup {args.warmup} is not in [0, 1]")
    check_positive(parser, args, "temperature", "epsilon")
    check_assigned_crops(parser, args)
    if args.fsdp and args.amp == "fp16":
        parser.error("--fsdp needs another --amp than fp16")
    if args.arch not in SIZES:
        parser.error(f"--arch {args.arch} is none of {', '.join(SIZES)}")
    if find_shards(args.data_path):
        if args.eval_knn_freq:
            parser.error(f"--eval_knn_freq {args.eval_knn_freq}: {NO_CLASSES}")
        args.eval_knn_freq = 0
    return args


# --- Network ----------------------------------------------------------------------------------------------------------


class PrototypeNetwork(MultiCropWrapper):
    """Views to embeddings and scores of all of them, crop by crop, or to the features of the trunk."""

    def forward(self, views: Tensor | list[Tensor], features_only: bool = False):
        features = self.embed(views)
        return features if features_only else self.head(features)


def network_of(args: argparse.Namespace) -> PrototypeNetwork:
    trunk = RegNet(SIZES[args.arch], in_chans=args.in_chans, recompute=args.recompute)
    dims = [trunk.embed_dim, *args.hidden_mlp, args.feat_dim]
    return PrototypeNetwork(trunk, Head(dims, args.nmb_prototypes, args.head_bn))


def tell_plan(args: argparse.Namespace) -> None:
    """Memory of the devices of a run, and the fewest devices that can run it with so many images on each."""
    data = args.plan if args.fsdp else 1
    image = (args.in_chans, args.size_crops[0], args.size_crops[0])
    views = list(zip(args.nmb_crops, args.size_crops, strict=True))
    number = NUMBERS.get(args.amp, torch.bfloat16)
    plan = make_plan(lambda _: network_of(args), image, args.batch_size * data, (data, 1), number, 1, views=views)
    print(plan.text())
    whole = "every device has a whole copy; --fsdp shares it out"
    print(plan.fitting_text(args.device_gib) if args.fsdp else whole)


# --- Training ---------------------------------------------------------------------------------------------------------


def train_seer(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start of the stream if there is none."""
    if args.plan:
        tell_plan(args)
        return
    run = Run(args, args.amp)

    # stream
    data = open_stream(args, recipes_of(args, **COLOURS), run.output_dir, run.device)
    total_steps = data.steps_per_epoch
    tell_embedded_defaults(args.data_path or args.fname, EMBEDDED_DATA_DEFAULTS)
    suit_settings(args, data, total_steps)

    # network, loss, optimiser, schedule
    devices = distributed.get_world_size() if args.fsdp else 1
    tell_large(partial(network_of, args), run.device, devices, 1, "--fsdp")
    if args.fsdp and distributed.get_world_size() > 1:
        with torch.device("meta"):
            network = network_of(args)
        network = model = shard_network(network, [*network.backbone.blocks(), network.head], run.device)
    else:
        model = build_network(partial(network_of, args), run.device)
        network = distributed.unwrap(model)
    if args.compile:
        for block in network.backbone.blocks():
            compile_network(block, "compute")
    criterion = SwappedAssignments(
        args.crops_for_assign,
        args.temperature,
        args.epsilon,
        args.sinkhorn_iterations,
        args.hard_steps,
        args.power_law,
    )
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=args.wd)
    scale = data.batch_size / 256
    rates = [scale * rate for rate in (args.start_lr, args.base_lr, args.final_lr)]
    schedule = [learning_rate(step / total_steps, *rates, args.warmup) for step in range(total_steps)]

    # checkpoints of whole tensors, monitoring
    parts = {"model": model, "optimizer": optimizer}
    if network is model and distributed.get_world_size() > 1:
        parts = {"model": WholeNetwork(network), "optimizer": WholeOptimizer(optimizer)}
    newest = in_a_longer_run(load_latest(run.path) or {}, data.sampler)
    run.resume(data, total_steps, NETWORK_FLAGS, checkpoint=newest, **parts)
    run.guard.watch(model=network)
    run.health = HealthMonitor(health_rules(args.nmb_prototypes[0], total_steps))
    reason = {"disabled_reason": NO_CLASSES} if find_shards(args.data_path) else {}
    knn = KNNMonitor(run, args.size_crops[0], MEAN, STD, data.num_workers, **reason)
    trunk = Through(network, features_only=True)  # what processes share computes as a whole only

    with run:
        if run.is_new:
            knn.evaluate(-1, trunk)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_on_stream(run, model, criterion, data.loader, optimizer, schedule, args.freeze_prototypes_niters)
            knn.evaluate(epoch, trunk)
            run.log_epoch(bad_images=data.bad_images.count())
            run.end_epoch()
    report(run, data.dataset, trunk, knn)


def in_a_longer_run(checkpoint: dict, sampler: StreamSampler) -> dict:
    """The checkpoint of a finished run as that of a longer one, which goes on where the stream was left."""
    flags = checkpoint.get("args", {})
    if checkpoint.get("epoch") and "passes" in flags:
        seen = (flags["total_images"] or sampler.stream_length * flags["passes"]) // checkpoint["batch_size"]
        if seen * checkpoint["batch_size"] < len(sampler) * sampler.batch_size * sampler.world_size:
            return checkpoint | {"epoch": 0, "step_in_epoch": seen}
    return checkpoint


def train_on_stream(
    run: Run,
    model: nn.Module,
    criterion: SwappedAssignments,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedule: list[float],
    freeze_prototypes_niters: int,
) -> None:
    """The rest of the run.

    Args:
        loader: Yields (views, labels, indices), of which the views matter: one batch per resolution, crop by crop.
    """
    prototypes = distributed.unwrap(model).head.prototypes()
    model.train()
    for step, (loaded_views, labels, _) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = schedule[step]
        optimizer.zero_grad(set_to_none=True)
        views = normalize_views(loaded_views, run.device, MEAN, STD)

        normalize_prototypes_(prototypes)
        with run.precision.autocast():
            torch.set_autocast_cache_enabled(not run.args.fsdp)  # copies of all weights would undo the sharing
            embeddings, sets = model(views)
        sets = [scores.unflatten(0, (-1, len(labels))) for scores in sets]  # (V, B, K)
        codes = [[criterion.assign(scores[crop], step) for crop in criterion.crops_for_assign] for scores in sets]
        loss = torch.stack([criterion(scores, assigned) for scores, assigned in zip(sets, codes, strict=True)]).mean()

        run.backward(loss, optimizer)
        if step < freeze_prototypes_niters:
            for layer in prototypes:
                layer.weight.grad = None  # no update, no weight decay, no momentum
        run.update(tensor_norms([p.grad for p in model.parameters() if p.grad is not None]), optimizer)

        health = None
        if run.logs_this_step:
            of_set = torch.cat(codes[0])
            counts = torch.bincount(of_set.nan_to_num().argmax(dim=1), minlength=of_set.shape[1])
            health = assignment_health(of_set, distributed.all_reduce_sum(counts), embeddings[: len(labels)])
        run.end_step(len(labels), {"loss": loss, "lr": schedule[step]}, health)


def main() -> None:
    distributed.run_script(train_seer, parse_args)


if __name__ == "__main__":
    main()
