"""Masked Siamese Networks: train a ViT without labels, for classes of which there are very few labelled images.

Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022.

    python main.py                                                        # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --fname configs/pretrain/msn_vits16.yaml --batch_size 128 \\
        --data_path /path/to/imagenet/train --folder /path/to/run         # 47.1 with one labelled image per class

An encoder sees anchors, views from which patches are missing, and learns to assign them to the same prototypes as the
target encoder, its moving average, assigns a complete view of the image. A YAML file gives flags other defaults.
Running the same command again resumes the run.
"""

import argparse
import copy
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from msn.augmentations import msn_views
from msn.checkpoints import NETWORK_FLAGS, from_official, to_official
from msn.flags import parse_with_images
from msn.hub import MEAN, STD
from msn.losses import LossTerms, MSNLoss, log_power_law, new_prototypes, read_log_prior
from msn.report import health_rules, report, suit_settings
from msn.schedules import Schedules
from msn.vision_transformer import ARCHITECTURES, ProjectionHead, Trunk, VisionTransformer, build, num_kept_patches
from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.training_data import open_training_data
from shared.images.views import ViewRecipe
from shared.multicrop import normalize_views
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate, add_accumulation_flag
from shared.optimisation.optim import build_optimizer, ema_update_, param_groups_no_decay_on_bias_and_norm
from shared.run.checkpoint import load_latest
from shared.run.flags import (
    Parser,
    add_data_flags,
    add_own_images_flags,
    add_run_flags,
    bool_flag,
    check_minimum,
    shorten_unset_warmup,
    tell_embedded_defaults,
)
from shared.run.health import HealthMonitor, feature_spread, rank_me
from shared.run.run import Run
from shared.run.yaml_config import parse_args_with_config, read_config, write_config

# What replaces the published values when no --data_path is given: images of 32 pixels need no ViT at 224 pixels, small
# batches need sharper targets, and a run of a minute a target encoder that follows fast.
EMBEDDED_DATA_DEFAULTS = {
    "model_name": "deit_micro",
    "patch_size": 4,
    "rand_size": 32,
    "focal_size": 16,
    "rand_views": 1,
    "focal_views": 2,
    "rand_scale": (0.4, 1.0),
    "focal_scale": (0.2, 0.5),
    "color_jitter_strength": 0.5,
    "blur_radius": (0.1, 0.4),
    "num_proto": 64,
    "start_sharpen": 0.1,
    "final_sharpen": 0.1,
    "hidden_dim": 512,
    "output_dim": 64,
    "batch_size": 32,
    "epochs": 16,
    "warmup": 1,
    "start_lr": 0.0002,
    "lr": 0.0015,
    "ema": (0.98, 1.0),
    "weight_decay": 0.04,
    "final_weight_decay": 0.04,
    "output_dir": "runs/materials",
}
MINIMUM = {"epochs": 1, "batch_size": 1, "num_proto": 2, "hidden_dim": 1, "output_dim": 1, "log_freq": 1, "warmup": 0}
# Keys of the published files that the official code reads and does not use, with the value that says so.
UNUSED = {"bottleneck": 1, "two_layer": False, "use_pred_head": False, "use_fp16": False, "copy_data": False}


def get_args_parser() -> argparse.ArgumentParser:
    """Flags in the sections of the published YAML files, with their values for ViT-S/16."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--fname", default=None, help="YAML file of defaults, such as one of configs/pretrain; the command line wins")
    add("--devices", nargs="+", default=None, metavar="DEVICE", help="start a process on each, e.g. cuda:0 cuda:1")
    add_own_images_flags(parser, __file__)

    add = add_data_flags(parser)
    add("--root_path", default=None, help="with --image_folder: --data_path <root_path>/<image_folder>/train")
    add("--image_folder", default=None, help="see --root_path")
    add("--rand_views", type=int, default=1, help="random anchors per image; one more random view is the target")
    add("--focal_views", type=int, default=10, help="focal anchors per image")
    add("--rand_size", type=int, default=224, help="side of the random views in pixels")
    add("--focal_size", type=int, default=96, help="side of the focal views in pixels")
    add("--rand_scale", type=float, nargs=2, default=(0.3, 1.0), help="share of the image area of the random views")
    add("--focal_scale", type=float, nargs=2, default=(0.05, 0.3), help="share of the image area of the focal views")
    add("--patch_drop", type=float, default=0.15, help="share of the patches of the random anchors that are not seen")
    add("--color_jitter_strength", type=float, default=0.5, help="strength s of the colour jitter")
    add("--blur_radius", type=float, nargs=2, default=(0.1, 2.0), help="range of the blur in pixels of the view")
    add("--augmentation", default="fast", choices=("fast", "pil"), help="pil: the slow exact reference chain")
    add("--label_smoothing", type=float, default=0.0, help="share of each assignment spread over all prototypes")
    add("--pin_mem", type=bool_flag, default=True, help="ignored: batches for a GPU are always pinned")

    add = parser.add_argument_group("meta").add_argument
    names = tuple(ARCHITECTURES)
    add("--model_name", default="deit_small", choices=names, metavar="NAME", help=", ".join(names))
    add("--patch_size", type=int, default=None, help="side of the patches in pixels; None: that of the name")
    add("--drop_path_rate", type=float, default=0.0, help="stochastic depth of the last block, in both encoders")
    add("--compile", action="store_true", help="torch.compile the encoders; stochastic depth then draws otherwise")
    add_accumulation_flag(add)
    add("--hidden_dim", type=int, default=2048, help="hidden width of the projection head")
    add("--output_dim", type=int, default=256, help="dimension of embeddings and prototypes")
    add("--use_bn", type=bool_flag, default=True, help="batch normalisation in the projection head")
    add("--load_checkpoint", type=bool_flag, default=False, help="true: a run without a checkpoint is an error")
    add("--read_checkpoint", default=None, help="file in --folder to start from when there is no <write_tag>-latest")
    for name, only in UNUSED.items():
        no_effect = "of the published files; has no effect there and no other value here"
        add(f"--{name}", type=int if name == "bottleneck" else bool_flag, default=only, help=no_effect)

    add = parser.add_argument_group("criterion").add_argument
    add("--num_proto", type=int, default=1024, help="prototypes K")
    add("--freeze_proto", type=bool_flag, default=False, help="keep the prototypes as they were drawn")
    add("--temperature", type=float, default=0.1, help="of the softmax over prototypes")
    add("--start_sharpen", type=float, default=0.25, help="first sharpening temperature of the targets")
    add("--final_sharpen", type=float, default=0.25, help="towards which it goes in a straight line")
    add("--use_sinkhorn", type=bool_flag, default=True, help="balance the targets over the prototypes")
    add("--me_max", type=bool_flag, default=True, help="mean-entropy maximisation: mean assignment near the prior")
    add("--memax_weight", type=float, default=1.0, help="its weight (5 without Sinkhorn)")
    add("--power_law_exponent", type=float, default=0.0, help="of the prior (PMSN: 0.25); 0: the uniform one")
    add("--prior", default=None, help="text file of one positive number per prototype: any other prior")
    add("--use_ent", type=bool_flag, default=False, help="compute the entropy of single assignments")
    add("--ent_weight", type=float, default=1.0, help="its weight in the loss")
    add("--batch_size", type=int, default=64, help="images per process")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=800, help="passes over the images")
    add("--warmup", type=float, default=15, help="epochs of linear learning-rate warm-up")
    add("--start_lr", type=float, default=0.0002, help="learning rate at the start of the warm-up")
    add("--lr", type=float, default=0.001, help="peak learning rate; it is not scaled with the batch")
    add("--final_lr", type=float, default=1e-6, help="learning rate at the end of the schedule, 1.25 times the run")
    add("--weight_decay", type=float, default=0.04, help="weight decay at the start")
    add("--final_weight_decay", type=float, default=0.4, help="weight decay at the end of the schedule")
    add("--ema", type=float, nargs=2, default=(0.996, 1.0), help="first and last momentum of the target encoder")
    add("--clip_grad", type=float, default=3.0, help="cap of the norm of the encoder's gradient; 0 disables it")
    add("--amp", default="fp32", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("logging").add_argument
    add("--folder", "--output_dir", default=".", dest="output_dir", help="checkpoints, logs and pictures")
    add("--write_tag", default="msn", help="start of the checkpoints' names")
    add("--checkpoint_freq", type=int, default=25, help="keep a numbered checkpoint every so many epochs; 0: none")

    add = add_run_flags(parser)
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images, the views and the masks")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line and its YAML file; ``parser`` may have further flags."""
    parser = parser or get_args_parser()
    args = parse_with_images(
        parser, lambda: parse_args_with_config(parser, arguments), EMBEDDED_DATA_DEFAULTS, folder="train"
    )
    stated = read_config(args.fname, parser) if args.fname else ()
    shorten_unset_warmup(parser, args, arguments, "warmup", stated=stated)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one clear message if a flag cannot be."""
    check_minimum(parser, args, MINIMUM)
    for flag, only in UNUSED.items():
        if getattr(args, flag) != only:
            instead = {"use_fp16": "; use --amp", "copy_data": "; use --cache FOLDER"}.get(flag, "")
            parser.error(f"--{flag} {getattr(args, flag)} has no effect{instead}")
    if args.epochs < args.warmup:
        parser.error(f"--epochs {args.epochs} is less than --warmup {args.warmup}")
    for flag in ("start_sharpen", "final_sharpen"):
        if not getattr(args, flag) > 0:
            parser.error(f"--{flag} {getattr(args, flag)} is not positive")
    if not all(0 <= momentum <= 1 for momentum in args.ema):
        parser.error(f"--ema {args.ema[0]} {args.ema[1]}: both have to be in [0, 1]")
    if not 0 <= args.drop_path_rate < 1:
        parser.error(f"--drop_path_rate {args.drop_path_rate} is outside [0, 1)")
    if args.write_tag != Path(args.write_tag).name:
        parser.error(f"--write_tag {args.write_tag} is not the start of a file name")
    if args.patch_size is None:
        args.patch_size = ARCHITECTURES[args.model_name]["patch_size"]
    for flag in ("rand_size", "focal_size") if args.focal_views else ("rand_size",):
        if getattr(args, flag) < args.patch_size:
            parser.error(f"--{flag} {getattr(args, flag)} is less than the patches of {args.patch_size} pixels")
    masked = "rand_size" if args.rand_views else "focal_size"
    try:
        num_kept_patches((getattr(args, masked) // args.patch_size) ** 2, args.patch_drop)
    except ValueError as error:
        parser.error(f"--patch_drop {args.patch_drop} with --{masked} {getattr(args, masked)}: {error}")


def train_msn(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp, f"{args.write_tag}-latest.pth.tar")
    device = run.device

    # data
    data = open_training_data(args, build_views(args), args.batch_size, run.output_dir, device, "--rand_size")
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)
    suit_settings(args, len(data.dataset), Schedules.from_args(args, data.steps_per_epoch).momentum)
    if distributed.is_main_process():
        write_config(run.output_dir / "params-msn-train.yaml", args, get_args_parser())

    # anchor and target encoder: the same network and the same initial weights; prototypes
    encoder = build_encoder(args)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    prototypes = new_prototypes(args.num_proto, args.output_dim)
    # the target encoder normalises with its own batches' statistics, and both need those of all processes
    encoder = synchronize_batchnorm(encoder, device).to(device)
    target_encoder = synchronize_batchnorm(target_encoder, device).to(device)
    if args.compile:
        compile_network(encoder)
        compile_network(target_encoder)
    accumulate(encoder, args.accumulate)
    prototypes = nn.Parameter(prototypes.to(device), requires_grad=not args.freeze_proto)

    # loss, optimiser, schedules
    criterion = build_loss(args).to(device)
    optimizer = build_optimizer("adamw", param_groups(encoder, prototypes))
    schedules = Schedules.from_args(args, data.steps_per_epoch)
    encoder = distributed.wrap(encoder, device)

    # checkpoints under the names of the official ones, monitoring
    epoch_loss = EpochLoss()
    run.resume(
        data,
        len(schedules.lr),
        NETWORK_FLAGS,
        checkpoint=find_checkpoint(run.path, args.read_checkpoint, args.load_checkpoint),
        to_official=to_official,
        from_official=from_official,
        scheduled=("lr", "weight_decay"),
        encoder=encoder,
        opt=optimizer,
        prototypes=nn.ParameterList([prototypes]),
        target_encoder=target_encoder,
        loss=epoch_loss,
    )
    run.health = HealthMonitor(health_rules(args, data.steps_per_epoch))
    knn = KNNMonitor(run, args.rand_size, MEAN, STD, data.num_workers)
    trunk = Trunk(target_encoder)

    with run:
        if run.is_new:
            knn.evaluate(-1, trunk)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(
                encoder,
                target_encoder,
                prototypes,
                criterion,
                data.loader,
                optimizer,
                schedules,
                run,
                patch_drop=args.patch_drop,
                clip_grad=args.clip_grad,
            )
            knn.evaluate(epoch, trunk)
            epoch_loss.value = run.log_epoch(bad_images=data.bad_images.count())["train_loss"]
            numbered = args.checkpoint_freq and (epoch + 1) % args.checkpoint_freq == 0
            run.end_epoch(keep_as=f"{args.write_tag}-ep{epoch + 1}.pth.tar" if numbered else None)
    report(run, data.dataset, trunk, knn)


def find_checkpoint(latest: Path, read_checkpoint: str | None, must_exist: bool) -> dict:
    """The newest state of this run, else the one to start from, else nothing.

    Raises:
        ValueError: If it was asked for and there is none.
    """
    checkpoint = load_latest(latest)
    if checkpoint is None and read_checkpoint is not None:
        checkpoint = load_latest(latest.parent / read_checkpoint)
        if checkpoint is None:
            raise ValueError(f"--read_checkpoint {read_checkpoint}: there is no such file in {latest.parent}")
    if checkpoint is None and must_exist:
        raise ValueError(f"--load_checkpoint true: there is no {latest}")
    return checkpoint or {}


class EpochLoss:
    """Mean loss of the last complete epoch, for checkpoints."""

    value: float | None = None

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def build_views(args: argparse.Namespace) -> list[ViewRecipe]:
    """The target, the random anchors, the focal anchors."""
    return msn_views(
        args.rand_size,
        args.focal_size,
        args.rand_views,
        args.focal_views,
        args.color_jitter_strength,
        args.rand_scale,
        args.focal_scale,
        args.blur_radius,
    )


def build_loss(args: argparse.Namespace) -> MSNLoss:
    log_prior = log_power_law(args.num_proto, args.power_law_exponent) if args.power_law_exponent else None
    if args.prior is not None:
        if args.power_law_exponent:
            raise ValueError(f"--prior {args.prior} and --power_law_exponent {args.power_law_exponent}: give one")
        log_prior = read_log_prior(args.prior, args.num_proto)
    return MSNLoss(
        args.num_proto,
        args.temperature,
        args.me_max,
        args.memax_weight,
        args.use_ent,
        args.ent_weight,
        args.use_sinkhorn,
        args.label_smoothing,
        log_prior,
    )


def build_encoder(args: argparse.Namespace) -> VisionTransformer:
    """ViT and projection head."""
    if args.use_bn and args.batch_size * distributed.get_world_size() < 2:
        raise ValueError("--batch_size 1: one image has no statistics for the head's batch norms; see --use_bn false")
    encoder = build(
        args.model_name,
        patch_size=args.patch_size,
        img_size=args.rand_size,
        in_chans=args.in_chans,
        drop_path_rate=args.drop_path_rate,
    )
    encoder.fc = ProjectionHead(encoder.embed_dim, args.hidden_dim, args.output_dim, args.use_bn)
    return encoder


def param_groups(encoder: nn.Module, prototypes: nn.Parameter) -> list[dict]:
    """Weights, which decay; biases and norms; prototypes. The marks are those of the official checkpoints."""
    decayed, plain = param_groups_no_decay_on_bias_and_norm(encoder)
    return [
        decayed,
        plain | {"WD_exclude": True},
        {"params": [prototypes], "weight_decay": 0.0, "LARS_exclude": True, "WD_exclude": True},
    ]


def train_one_epoch(
    encoder: nn.Module,
    target_encoder: nn.Module,
    prototypes: nn.Parameter,
    criterion: MSNLoss,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    run: Run,
    *,
    patch_drop: float,
    clip_grad: float,
) -> None:
    """One epoch of Algorithm 1.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, view-major, the target views of
    all images first: uint8 images, or float tensors that are normalised already.
    """
    parameters = list(encoder.parameters())
    target_parameters = list(target_encoder.parameters())
    encoder.train()
    target_encoder.train()
    for step, (loaded_views, labels, _) in run.steps(loader):
        schedules.apply(optimizer, step)
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, run.device, MEAN, STD)
        target_views, anchor_views = split_views(views, len(labels))

        with run.precision.autocast():
            anchors = encoder(anchor_views, patch_drop)
            with torch.no_grad():
                targets = target_encoder(target_views)
        terms = criterion(anchors, targets, prototypes, float(schedules.sharpen[step]))

        run.backward(terms.total, optimizer)
        grad_norms = nn.utils.clip_grad_norm_(parameters, clip_grad if clip_grad > 0 else math.inf)[None]
        if prototypes.grad is not None:  # DistributedDataParallel does not know them; they are not clipped
            prototypes.grad = distributed.all_reduce_mean(prototypes.grad)
            grad_norms = torch.cat([grad_norms, prototypes.grad.norm()[None]])
        run.update(grad_norms, optimizer)
        ema_update_(target_parameters, parameters, schedules.momentum[step])  # parameters only, no buffers

        averages = {
            "loss": terms.total,
            "msn": terms.cross_entropy,
            "me_max": terms.me_max,
            "ent": terms.entropy,
            "lr": schedules.lr[step],
            "wd": schedules.weight_decay[step],
        }
        run.end_step(len(labels), averages, assignment_health(terms, targets) if run.logs_this_step else None)


def split_views(views: list[Tensor], batch_size: int) -> tuple[Tensor, list[Tensor]]:
    """The target views, (B, C, H, W), and the anchor views, one batch per resolution."""
    first, *others = views
    anchors = [first[batch_size:], *others]
    return first[:batch_size], [batch for batch in anchors if len(batch)]


def assignment_health(terms: LossTerms, targets: Tensor) -> dict[str, Tensor | float]:
    """What shows a collapse: targets that say nothing about their image, embeddings that are all the same."""
    target_entropy = torch.special.entr(terms.targets).sum(dim=1).mean()
    mean_target = distributed.all_reduce_mean(terms.targets.mean(dim=0))
    return {
        "target_entropy": target_entropy,
        "information": torch.special.entr(mean_target).sum() - target_entropy,
        "ln_k": math.log(terms.targets.shape[1]),
        "max_target": terms.targets.amax(dim=1).mean(),
        "min_target": terms.targets.amin(dim=1).mean(),
        "prototypes_used": terms.targets.argmax(dim=1).unique().numel(),
        "feature_spread": feature_spread(targets),
        "rank_me": rank_me(targets),
    }


def start_on_devices(devices: list[str], arguments: list[str]) -> str:
    """Replace this process by torchrun with a process on each device, if there are several and no launcher did so.

    Returns:
        The kind of the devices, for ``--device``.

    Raises:
        ValueError: If the devices are not all CPUs or all GPUs with a number.
    """
    numbers = [name.removeprefix("cuda:") for name in devices if name.startswith("cuda:")]
    on_gpus = len(numbers) == len(devices) and all(number.isdigit() for number in numbers)
    if not on_gpus and set(devices) != {"cpu"}:
        raise ValueError(f"--devices {' '.join(devices)}: expected cuda:0 cuda:1 ..., or cpu once per process")
    device = "cuda" if on_gpus else "cpu"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if "RANK" in os.environ or ("SLURM_STEP_ID" in os.environ and tasks != "1"):  # a shell of srun is a step of one
        return device
    if on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(numbers)
    if len(devices) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(devices)}"]
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), *arguments, "--device", device]
        os.execv(sys.executable, command)
    return device


def train_on_devices(args: argparse.Namespace) -> None:
    """Train on ``--devices``, if they are given."""
    if args.devices:
        args.device = start_on_devices(args.devices, sys.argv[1:])
    train_msn(args)


def main() -> None:
    distributed.run_script(train_on_devices, parse_args)


if __name__ == "__main__":
    main()
