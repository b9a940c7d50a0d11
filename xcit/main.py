"""Supervised training of a Cross-Covariance Image Transformer.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021.

    python main.py                                                        # embedded digits, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model xcit_small_12_p16 --batch-size 128 --drop-path 0.05 \\
        --data-path /path/to/imagenet --output_dir /path/to/run --full_crop      # 400 epochs: 82.0 top-1

The recipe is DeiT's: RandAugment, Mixup and CutMix, Random Erasing, repeated augmentation, AdamW, and optionally a
teacher whose predictions are learned too. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.networks.batchnorm import synchronize_batchnorm
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.checkpoint import Checkpointer
from shared.run.flags import AnyDashParser, add_data_flags, add_run_flags
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run
from shared.supervised.data import LabelledViews
from shared.supervised.distillation import build_teacher, distillation_loss
from shared.supervised.ema import NetworkEMA
from shared.supervised.flags import (
    add_augmentation_flags,
    add_data_set_flags,
    add_distillation_flags,
    add_network_flags,
    add_optimisation_flags,
    add_output_flags,
    check_recipe,
)
from shared.supervised.optimizer import build_timm_optimizer, build_timm_schedule, clip_and_step, set_learning_rate
from shared.supervised.training import TrainingState, build_mixup, open_images, train_loader
from shared.supervised.transforms import train_transform
from xcit.augmentations import CROP_RATIO, MEAN, STD
from xcit.networks import build_network
from xcit.pretrained import fill, read_weights
from xcit.report import save_pictures, summary

# What replaces the official defaults when no --data_path is given: digits of 8x8 pixels need a small network and little
# augmentation, a run of minutes no warm-up (its first two epochs would hardly learn) and a shorter moving average.
EMBEDDED_DATA_DEFAULTS = {
    "model": "xcit_nano_12_p8",
    "input_size": 24,
    "batch_size": 32,
    "epochs": 6,
    "drop_path": 0.0,
    "lr": 0.008,
    "warmup_epochs": 0,
    "model_ema_decay": 0.98,
    "aa": "none",
    "repeated_aug": False,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "full_crop": True,
    "output_dir": "runs/digits",
}
MINIMUM = {"epochs": 1, "batch_size": 1, "log_freq": 1, "input_size": 1, "test_freq": 1, "start_epoch": 0}
NETWORK_FLAGS = ("model", "in_chans")


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(
        "XCiT", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_flags(parser)
    add_data_set_flags(parser)

    add = parser.add_argument_group("network").add_argument
    add("--model", default="xcit_small_12_p16", help="xcit_<size>_<depth>_p<patch>, or any timm or torchvision model")
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    add("--pretrained", default=None, help="weights to start from, for fine-tuning or --eval: the name of a release "
        "(xcit_small_12_p16_224), a file or an address; a classifier for other classes is left out")  # fmt: skip
    add("--checkpoint_key", default="model", choices=("model", "model_ema"), help="network to take from a training "
        "checkpoint given as --pretrained, or with --eval")  # fmt: skip
    add("--surgery", default=None, help="weights whose patch embedding is taken over and kept fixed")
    add_network_flags(add)

    add_augmentation_flags(parser, color_jitter=0.4)
    add_distillation_flags(parser)
    add_optimisation_flags(parser, epochs=400)

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="evaluate --pretrained, or the run in --output_dir, and stop")
    add("--full_crop", action="store_true", help=f"centre crops of the whole short side, not of {CROP_RATIO} of it")
    add("--test-freq", type=int, default=1, help="epochs between evaluations")
    add("--eval-ema", action="store_true", help="evaluate the moving average too")

    add_output_flags(add_run_flags(parser, knn=False))
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without any images the defaults are those of the embedded data.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for scripts that have them.
    """
    parser = parser or get_args_parser()
    args = parser.parse_args(arguments)
    if args.data_path is None and args.val_path is None:
        parser.set_defaults(**EMBEDDED_DATA_DEFAULTS)
        args = parser.parse_args(arguments)
    check_recipe(parser, args, MINIMUM)
    return args


def train_xcit(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none; or evaluate."""
    if args.eval:  # leaves a run that is going on in the folder alone
        device, output_dir = distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    else:
        device, output_dir = start_run(args)
    precision = Precision(args.amp, device)
    crop_ratio = 1.0 if args.full_crop else CROP_RATIO
    images = open_images(args, output_dir, precision, MEAN, STD, crop_ratio)
    num_classes = images.num_classes

    # network
    network = build_network(args.model, num_classes, args.in_chans, args.drop, args.drop_path, args.input_size)
    if args.eval:
        origin = args.pretrained or args.resume or str(output_dir / "checkpoint.pth")
        if not fill(network, read_weights(origin, args.checkpoint_key, "--eval: the checkpoint"), origin):
            raise ValueError(f"--eval: {origin} has no classifier for the {num_classes} classes of {images.val.name}")
        result = images.evaluate(network.to(device))
        distributed.print_once(f"{images.val.describe()}: top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %")
        return
    if args.pretrained:
        fill(network, read_weights(args.pretrained, args.checkpoint_key), args.pretrained)
    if args.surgery:
        transplant_patch_embedding(network, args.surgery)
    num_parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    network = synchronize_batchnorm(network, device).to(device)
    ema = None
    if args.model_ema:
        ema = NetworkEMA(network, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)
    if args.compile:
        network.compile()
    network = distributed.wrap(network, device)
    teacher = None
    if args.distillation_type != "none":
        teacher = build_teacher(args.teacher_model, args.teacher_path, num_classes, args.in_chans).to(device)

    # views
    views = LabelledViews(images.train, train_transform(args, MEAN, STD), args.seed, images.bad_images)
    loader, sampler = train_loader(args, views, images.num_workers, device)
    steps_per_epoch = len(sampler)
    mixup = build_mixup(args, num_classes)
    distributed.print_once(
        f"{images.train.describe()}: {steps_per_epoch} steps per epoch; {num_parameters:,} parameters"
    )
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in EMBEDDED_DATA_DEFAULTS)
        distributed.print_once(f"without --data_path these flags have defaults for the embedded data: {names}")

    # optimiser, schedule
    peak_lr = args.lr * args.batch_size * distributed.get_world_size() / 512
    optimizer = build_timm_optimizer(
        distributed.unwrap(network), args.opt, peak_lr, args.weight_decay, args.momentum, args.opt_eps, args.opt_betas
    )
    scheduler = build_timm_schedule(args, optimizer)
    training_loss = TrainingLoss(
        0.0 if mixup else args.smoothing,
        teacher,
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )

    # resume
    state = TrainingState(
        args,
        output_dir,
        distributed.unwrap(network),
        ema,
        optimizer,
        precision,
        images.checksum,
        steps_per_epoch,
        must_match=NETWORK_FLAGS,
        weights_flag="--pretrained",
    )

    # epochs
    tested: dict[str, float] = {}
    with Checkpointer(
        output_dir / "checkpoint.pth", state, args.saveckp_steps, args.saveckp_minutes, state.guard.is_good
    ) as checkpointer:
        for epoch in range(state.first_epoch, args.epochs):
            first_step = state.first_step if epoch == state.first_epoch else 0
            sampler.set_epoch(epoch, first_step)
            train_one_epoch(
                network,
                ema,
                training_loss,
                loader,
                mixup,
                optimizer,
                epoch=epoch,
                lr=set_learning_rate(scheduler, optimizer, epoch),
                first_step=first_step,
                steps_per_epoch=steps_per_epoch,
                clip_grad=args.clip_grad,
                fixed_patch_embedding=args.surgery is not None,
                seed=args.seed,
                precision=precision,
                log=state.log,
                guard=state.guard,
                checkpointer=checkpointer,
            )
            is_best, tested = False, {}
            if (epoch + 1) % args.test_freq == 0 or epoch == args.epochs - 1:
                tested = state.test(epoch, images.evaluate, checkpointer)
                is_best = tested["test_acc1"] >= state.best_acc1
                state.best_acc1 = max(state.best_acc1, tested["test_acc1"])
            bad_images = images.bad_images.count()
            state.log.end_epoch(epoch, **tested, n_parameters=num_parameters, bad_images=bad_images)
            checkpointer.after_epoch(epoch, keep_as="best_model.pth" if is_best else None)
    state.log.close()
    if distributed.is_main_process():
        pictures = save_pictures(views, mixup, output_dir) if args.pictures else []
        needed = ("data_path", "val_path", "data_set", "inat_category", "model", "input_size", "in_chans")
        parser = get_args_parser()
        given = {flag: getattr(args, flag) for flag in needed if getattr(args, flag) != parser.get_default(flag)}
        network_and_data = given | {"model": args.model}
        print(summary(output_dir, network_and_data, args.full_crop, images.val, tested, state.best_acc1, pictures))


def transplant_patch_embedding(network: nn.Module, path: str) -> None:
    """Take the patch embedding from a file and keep it fixed, which makes large networks stable (``--surgery``)."""
    if not hasattr(network, "patch_embed"):
        raise ValueError("--surgery: the network has no patch embedding")
    prefix = "patch_embed."
    tensors = read_weights(path, flag="--surgery")
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    fill(network.patch_embed, part, f"--surgery {path}")
    network.patch_embed.requires_grad_(False)


class TrainingLoss:
    """Cross-entropy of hard, smoothed or mixed labels, and distillation.

    XCiT has one classifier: labels and teacher act on the same logits.

    Args:
        smoothing: Of hard labels.
        teacher: Maps the student's images to logits.
        distillation: ``none``, ``soft`` or ``hard``.
        alpha, tau: See :func:`shared.supervised.distillation.distillation_loss`.
    """

    def __init__(
        self,
        smoothing: float,
        teacher: nn.Module | None = None,
        distillation: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ):
        self.smoothing, self.teacher = smoothing, teacher
        self.distillation, self.alpha, self.tau = distillation, alpha, tau

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; ``targets`` are class numbers (B,), or probabilities (B, classes)."""
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return distillation_loss(loss, logits, teacher_logits, self.distillation, self.alpha, self.tau)


def train_one_epoch(
    network: nn.Module,
    ema: NetworkEMA | None,
    training_loss: TrainingLoss,
    loader: Iterable,
    mixup: Mixup | None,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    lr: float,
    first_step: int,
    steps_per_epoch: int,
    clip_grad: float | None,
    fixed_patch_embedding: bool,
    seed: int,
    precision: Precision,
    log: RunLog,
    guard: FiniteGuard,
    checkpointer: Checkpointer,
) -> None:
    """One epoch, from its step ``first_step`` on. ``loader`` yields (views, labels, indices)."""
    parameters = list(network.parameters())
    network.train()
    if fixed_patch_embedding:
        distributed.unwrap(network).patch_embed.eval()  # neither do its running statistics move
    start = epoch * steps_per_epoch + first_step
    for step, (loaded_images, labels, indices) in enumerate(log.batches(loader), start=start):
        randomness.seed_step(seed, step, distributed.get_rank())  # mixing, dropout, stochastic depth
        images = loaded_images.to(precision.device, non_blocking=True)
        targets = labels.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        optimizer.zero_grad(set_to_none=True)

        with precision.autocast():
            loss = training_loss(images, network(images), targets)

        precision.backward(loss, optimizer)
        skipped = clip_and_step(optimizer, parameters, clip_grad)
        precision.update()
        guard.count(skipped)
        if ema is not None:
            ema.update(distributed.unwrap(network))

        line = log.step(step, epoch, len(labels), {"loss": loss, "lr": lr, "skipped": skipped})
        if line is not None and guard.too_many():
            randomness.seed_step(seed, step, distributed.get_rank())
            with precision.autocast():
                batch = {"images": images, "indices": indices, "step": step, "epoch": epoch}
                guard.stop(batch, [images], {"network": images}, loss)
        checkpointer.after_step(epoch, step + 1 - epoch * steps_per_epoch)


def main() -> None:
    with distributed.clean_exit():
        train_xcit(parse_args())


if __name__ == "__main__":
    main()
