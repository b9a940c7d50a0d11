"""Self-distillation with no labels: train a backbone with DINO.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.

    python main_dino.py --arch vit_small                                  # embedded materials, minutes on a CPU
    torchrun --nproc_per_node=8 main_dino.py --arch vit_small \\
        --data_path /path/to/imagenet/train --output_dir /path/to/run     # 100 epochs: 69.3 k-NN, 74.0 linear

A student sees all views of an image, a teacher (the moving average of the student) only the two global ones, and the
student learns to predict the teacher's output across views. Running the same command again resumes the run.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from torch import Tensor, nn

from dino.augmentations import dino_views
from dino.hub import MEAN, NETWORK_FLAGS, STD, VIT_NAMES, build_backbone, plain_name, to_official
from dino.losses import DINOLoss
from dino.report import health_rules, report, suit_settings
from dino.vision_transformer import DINOHead
from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.training_data import open_training_data
from shared.multicrop import MultiCropWrapper, normalize_views
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate, add_accumulation_flag
from shared.optimisation.optim import (
    build_optimizer,
    clip_grad_norm_per_tensor_,
    ema_update_,
    param_groups_no_decay_on_bias_and_norm,
)
from shared.optimisation.schedules import cosine_schedule
from shared.run.flags import (
    Parser,
    add_data_flags,
    add_own_images_flags,
    add_run_flags,
    bool_flag,
    check_positive,
    parse_with_embedded_defaults,
    shorten_unset_warmup,
    tell_embedded_defaults,
)
from shared.run.health import HealthMonitor, feature_spread, rank_me
from shared.run.run import Run

# What replaces the official defaults when no --data_path is given: images of 32 pixels need no ViT at 224 pixels, and a
# run of minutes needs a teacher that follows fast and a learning rate ten times as high.
EMBEDDED_DATA_DEFAULTS = {
    "arch": "vit_micro",
    "patch_size": 4,
    "global_crop_size": 32,
    "local_crop_size": 16,
    "local_crops_number": 2,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_scale": (0.2, 0.5),
    "blur_radius": (0.1, 0.4),
    "drop_path_rate": 0.0,
    "out_dim": 256,
    "use_bn_in_head": True,
    "momentum_teacher": 0.98,
    "warmup_teacher_temp": 0.03,
    "teacher_temp": 0.03,
    "weight_decay_end": 0.04,
    "epochs": 8,
    "batch_size_per_gpu": 32,
    "lr": 0.012,
    "warmup_epochs": 1,
    "freeze_last_layer": 0,
    "saveckp_freq": 0,
    "output_dir": "runs/materials",
}
# Than vit_micro: patches are what materials take, and smaller views pay for them.
FOR_LARGER_VITS = {
    "global_crop_size": 16,
    "local_crop_size": 8,
    "batch_size_per_gpu": 16,
    "lr": 0.003,
    "warmup_epochs": 2,
}
FOR_OTHER_NETWORKS = {"lr": 0.0015}
ONE_SIZE_ONLY = ("resmlp", "mixer", "gmixer", "gmlp")  # networks of timm
MINIMUM = {"epochs": 1, "batch_size_per_gpu": 1, "out_dim": 2, "log_freq": 1, "patch_size": 1, "local_crops_number": 0}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_own_images_flags(parser, __file__)

    add = parser.add_argument_group("views").add_argument
    add("--global_crops_scale", type=float, nargs=2, default=(0.4, 1.0), help="area range of the two global crops")
    add("--local_crops_number", type=int, default=8, help="number of local crops")
    add("--local_crops_scale", type=float, nargs=2, default=(0.05, 0.4), help="area range of the local crops")
    add("--global_crop_size", type=int, default=224, help="side of the global views in pixels")
    add("--local_crop_size", type=int, default=96, help="side of the local views in pixels")
    add("--blur_radius", type=float, nargs=2, default=(0.1, 2.0), help="range of the blur in pixels of the view")
    add("--augmentation", default="fast", choices=("fast", "pil"), help="pil: the slow exact reference chain")

    add = parser.add_argument_group("networks").add_argument
    add("--arch", default="vit_small", help="vit_micro, vit_tiny, vit_small, vit_base, or of torchvision or timm")
    add("--patch_size", type=int, default=16, help="side of the ViT's patches in pixels")
    add("--drop_path_rate", type=float, default=0.1, help="stochastic depth of the student")
    add("--out_dim", type=int, default=65536, help="outputs of the head")
    add("--norm_last_layer", type=bool_flag, default=True, help="freeze the norms of the last layer's rows at 1")
    add("--use_bn_in_head", type=bool_flag, default=False, help="batch normalisation in the head")
    add("--compile", action="store_true", help="torch.compile the backbones; stochastic depth then draws otherwise")
    add_accumulation_flag(add)

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=float, default=0.996, help="first EMA momentum of the teacher, cosine to the last")
    add("--momentum_teacher_end", type=float, default=1.0, help="last EMA momentum of the teacher")
    add("--warmup_teacher_temp", type=float, default=0.04, help="teacher temperature at epoch 0")
    add("--teacher_temp", type=float, default=0.04, help="teacher temperature after its warm-up")
    add("--warmup_teacher_temp_epochs", type=int, default=0, help="epochs of the linear temperature warm-up")
    add("--center_momentum", type=float, default=0.9, help="momentum of the centre; 1 switches centring off")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, help="passes over the images")
    add("--batch_size_per_gpu", type=int, default=64, help="images per process")
    add("--optimizer", default="adamw", choices=("adamw", "sgd", "lars"), help="lars: large batches")
    add("--lr", type=float, default=0.0005, help="peak learning rate for 256 images per step; scaled linearly")
    add("--warmup_epochs", type=float, default=10, help="epochs (or parts of one) of linear learning-rate warm-up")
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end")
    add("--weight_decay", type=float, default=0.04, help="weight decay at the start")
    add("--weight_decay_end", type=float, default=0.4, help="weight decay at the end")
    add("--clip_grad", type=float, default=3.0, help="cap of each tensor's gradient norm; 0 disables it")
    add("--freeze_last_layer", type=int, default=1, help="epochs during which the last layer is not updated")
    add("--use_fp16", type=bool_flag, default=True, help="false: the same as --amp fp32")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = add_run_flags(parser)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--saveckp_freq", type=int, default=20, help="keep a numbered checkpoint every so many epochs; 0: none")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line, of ``parser`` if further flags are in it.

    Without ``--data_path`` the defaults are those of the embedded data.
    """
    parser = parser or get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, MINIMUM)
    if args.arch != EMBEDDED_DATA_DEFAULTS["arch"]:
        suited = FOR_LARGER_VITS if args.arch in VIT_NAMES else FOR_OTHER_NETWORKS
        args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS | suited, MINIMUM)
    shorten_unset_warmup(parser, args, arguments)
    check_positive(parser, args, "teacher_temp", "warmup_teacher_temp")
    for flag in ("momentum_teacher", "momentum_teacher_end", "center_momentum"):
        if not 0 <= getattr(args, flag) <= 1:
            parser.error(f"--{flag} {getattr(args, flag)} is not in [0, 1]")
    if args.epochs < max(args.warmup_epochs, args.warmup_teacher_temp_epochs):
        parser.error(
            f"--epochs {args.epochs} is less than --warmup_epochs {args.warmup_epochs} or "
            f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs}"
        )
    sizes_differ = args.local_crops_number and args.local_crop_size != args.global_crop_size
    if args.arch.startswith(ONE_SIZE_ONLY) and sizes_differ:
        parser.error(
            f"--arch {args.arch} mixes a fixed number of patches, so all views must have one size: "
            f"--local_crop_size {args.local_crop_size} differs from --global_crop_size {args.global_crop_size}"
        )
    if args.arch in VIT_NAMES:
        args.arch = plain_name(args.arch)  # as in the official checkpoints
        for flag in ("global_crop_size", "local_crop_size"):
            if getattr(args, flag) < args.patch_size:
                parser.error(f"--{flag} {getattr(args, flag)} is less than --patch_size {args.patch_size}")
    return args


@dataclass
class Schedules:
    """One value per training step of the learning rate, the weight decay and the teacher's momentum."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray

    @classmethod
    def from_args(cls, args: argparse.Namespace, batch_size: int, steps_per_epoch: int) -> "Schedules":
        length = (args.epochs, steps_per_epoch)
        return cls(
            lr=cosine_schedule(args.lr * batch_size / 256, args.min_lr, *length, args.warmup_epochs),
            weight_decay=cosine_schedule(args.weight_decay, args.weight_decay_end, *length),
            momentum=cosine_schedule(args.momentum_teacher, args.momentum_teacher_end, *length),
        )

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = float(self.lr[step])
            if i == 0:  # the second group holds biases and norms, which never decay
                group["weight_decay"] = float(self.weight_decay[step])


def train_dino(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch if there is none."""
    run = Run(args, args.amp if args.use_fp16 else "fp32")
    device = run.device

    # data
    recipes = dino_views(
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.global_crop_size,
        args.local_crop_size,
        args.blur_radius,
    )
    data = open_training_data(args, recipes, args.batch_size_per_gpu, run.output_dir, device, "--global_crop_size")
    tell_about_flags(args)
    momenta = Schedules.from_args(args, data.batch_size, data.steps_per_epoch).momentum
    suit_settings(args, len(data.dataset), momenta)

    # student and teacher: the same network and the same initial weights
    student = build_network(args, args.drop_path_rate)
    teacher = build_network(args, drop_path_rate=0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    # with batch norms the teacher normalises with its own batches' statistics, and both need those of all processes
    student = synchronize_batchnorm(student, device).to(device)
    teacher = synchronize_batchnorm(teacher, device).to(device)
    if args.compile:
        compile_network(student.backbone)
        compile_network(teacher.backbone)
    accumulate(student.backbone, args.accumulate)
    student = distributed.wrap(student, device)

    # loss, optimiser, schedules
    criterion = DINOLoss(
        args.out_dim,
        2 + args.local_crops_number,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        center_momentum=args.center_momentum,
    ).to(device)
    optimizer = build_optimizer(args.optimizer, param_groups_no_decay_on_bias_and_norm(student))
    schedules = Schedules.from_args(args, data.batch_size, data.steps_per_epoch)

    # checkpoints under the names of the official ones, monitoring
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "dino_loss": criterion}
    run.resume(
        data, len(schedules.lr), NETWORK_FLAGS, to_official=to_official, scheduled=("lr", "weight_decay"), **parts
    )
    run.health = HealthMonitor(health_rules(args, data.steps_per_epoch))
    knn = KNNMonitor(run, args.global_crop_size, MEAN, STD, data.num_workers)

    with run:
        if run.is_new:
            knn.evaluate(-1, teacher.backbone)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(
                student,
                teacher,
                criterion,
                data.loader,
                optimizer,
                schedules,
                run,
                clip_grad=args.clip_grad,
                freeze_last_layer=args.freeze_last_layer,
            )
            knn.evaluate(epoch, teacher.backbone)
            run.log_epoch(bad_images=data.bad_images.count())
            numbered = args.saveckp_freq and epoch % args.saveckp_freq == 0
            run.end_epoch(keep_as=f"checkpoint{epoch:04d}.pth" if numbered else None)
    report(run, data.dataset, teacher.backbone, knn)


def tell_about_flags(args: argparse.Namespace) -> None:
    """Print which flags have other defaults, and which pixels of local crops are in no patch."""
    tell_embedded_defaults(args.data_path, EMBEDDED_DATA_DEFAULTS)
    if args.arch in VIT_NAMES and (unseen := args.local_crop_size % args.patch_size):  # global crops: build_backbone
        distributed.print_once(
            f"--patch_size {args.patch_size} does not divide --local_crop_size {args.local_crop_size}; the last "
            f"{unseen} rows and columns of pixels are not seen"
        )


def build_network(args: argparse.Namespace, drop_path_rate: float) -> MultiCropWrapper:
    """Backbone and projection head; the teacher's and the student's differ in stochastic depth only."""
    backbone, embed_dim = build_backbone(
        args.arch, args.patch_size, drop_path_rate, img_size=args.global_crop_size, in_chans=args.in_chans
    )
    head = DINOHead(embed_dim, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
    return MultiCropWrapper(backbone, head)


def train_one_epoch(
    student: nn.Module,
    teacher: MultiCropWrapper,
    criterion: DINOLoss,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    schedules: Schedules,
    run: Run,
    *,
    clip_grad: float,
    freeze_last_layer: int,
) -> None:
    """One epoch of Algorithm 1.

    ``loader`` yields (views, labels, indices); views holds one batch per resolution, crop-major, the two global views
    of each image first: uint8 images, or float tensors that are normalised already.
    """
    parameters = list(student.parameters())
    teacher_parameters = list(teacher.parameters())
    last_layer = [p for name, p in student.named_parameters() if "last_layer" in name]
    student.train()
    teacher.train()
    for step, (loaded_views, labels, _) in run.steps(loader):
        schedules.apply(optimizer, step)
        optimizer.zero_grad(set_to_none=True)  # before the activations: the two never need memory at once
        views = normalize_views(loaded_views, run.device, MEAN, STD)
        global_views = views[0][: 2 * len(labels)]

        with run.precision.autocast():
            with torch.no_grad():  # the teacher sees the global views only
                teacher_features = teacher.embed(global_views)
                teacher_logits = teacher.head(teacher_features)
            loss = criterion(student(views), teacher_logits, run.epoch)

        run.backward(loss, optimizer)
        grad_norms = clip_grad_norm_per_tensor_(parameters, clip_grad)
        if run.epoch < freeze_last_layer:
            for parameter in last_layer:
                parameter.grad = None  # no update, no weight decay, no state
        run.update(grad_norms, optimizer)
        ema_update_(teacher_parameters, parameters, schedules.momentum[step])  # parameters only, no buffers

        run.end_step(
            len(labels),
            {"loss": loss, "lr": schedules.lr[step], "wd": schedules.weight_decay[step]},
            output_health(criterion, loss, teacher_features) if run.logs_this_step else None,
        )


def output_health(criterion: DINOLoss, loss: Tensor, teacher_features: Tensor) -> dict[str, Tensor | float]:
    """What shows a collapse: both ways end with a KL of 0, at an entropy of ln K or of 0 (section 5.3)."""
    return {
        "teacher_entropy": criterion.teacher_entropy,
        "kl": loss.detach() - criterion.teacher_entropy,
        "ln_k": math.log(criterion.center.shape[1]),
        "feature_spread": feature_spread(teacher_features),
        "rank_me": rank_me(teacher_features),
    }


def main() -> None:
    distributed.run_script(train_dino, parse_args)


if __name__ == "__main__":
    main()
