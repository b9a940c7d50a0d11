"""Supervised training of ResMLP.

Touvron et al., "ResMLP: Feedforward networks for image classification with data-efficient training", 2021.

    python main.py                                                        # embedded digits, minutes on a CPU
    torchrun --nproc_per_node=8 main.py --model resmlp_12 --batch-size 256 --opt lamb --lr 5e-3 --unscale-lr \\
        --weight-decay 0.2 --epochs 400 --drop-path 0.05 --amp fp32 --eval-crop-ratio 0.9 \\
        --data_path /path/to/imagenet --output_dir /path/to/run               # 76.6 top-1

The recipe is DeiT's: RandAugment, Mixup and CutMix, Random Erasing, repeated augmentation, and optionally a teacher
whose predictions are learned too. Running the same command again resumes the run.
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

from resmlp.augmentations import MEAN, STD, ThreeAugment
from resmlp.networks import build_network
from resmlp.pretrained import fill, read_weights
from resmlp.report import save_pictures, summary
from resmlp.resmlp_models import ARCHITECTURES
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

# What replaces the official defaults when no --data_path is given: digits of 8x8 pixels need a small network and little
# augmentation, and a run of minutes no warm-up (its first two epochs would hardly learn) and a shorter average.
EMBEDDED_DATA_DEFAULTS = {
    "model": "resmlp_12",
    "input_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 4,
    "batch_size": 32,
    "epochs": 6,
    "drop_path": 0.0,
    "lr": 0.05,
    "warmup_epochs": 0,
    "model_ema_decay": 0.98,
    "aa": "none",
    "repeated_aug": False,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "output_dir": "runs/digits",
}
SIZES = ("patch_size", "embed_dim", "depth")
MINIMUM = {"epochs": 1, "batch_size": 1, "log_freq": 1, "input_size": 1, "start_epoch": 0}
NETWORK_FLAGS = ("model", "input_size", "in_chans", *SIZES)


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(
        "ResMLP", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_flags(parser)
    add_data_set_flags(parser)

    add = parser.add_argument_group("network").add_argument
    add("--model", default="resmlp_24", help="resmlp_12, resmlp_24, resmlp_36, resmlpB_24, or any timm or torchvision "
        "model")  # fmt: skip
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    add("--patch-size", type=int, default=None, help="side of the patches in pixels; None: the published one")
    add("--embed-dim", type=int, default=None, help="channels of a ResMLP or ViT; None: the published ones")
    add("--depth", type=int, default=None, help="blocks of a ResMLP or ViT; None: the published ones")
    add("--finetune", default="", help="weights to start from: the name of a release (resmlp_24_dist), a file or an "
        "address; other image sizes and other classes are possible")  # fmt: skip
    add("--attn-only", action="store_true", help="train the cross-patch layers and the classifier only")
    add("--checkpoint_key", default="model", choices=("model", "model_ema"), help="network to take from a training "
        "checkpoint given as --finetune, or with --eval")  # fmt: skip
    add_network_flags(add)

    add = add_augmentation_flags(parser, color_jitter=0.3)
    add("--ThreeAugment", action="store_true", help="one of grey, solarised and blurred instead of --aa and erasing")
    add("--src", action="store_true", help="with --ThreeAugment: crops of the resized image, not of random size")
    add("--bce-loss", action="store_true", help="binary cross-entropy: every class of a mixed image is right")
    add("--cosub", action="store_true", help="co-training of submodels: two draws of stochastic depth teach each other")
    add_distillation_flags(parser)
    add = add_optimisation_flags(parser, epochs=300)
    add("--unscale-lr", action="store_true", help="--lr is the peak itself, whatever the batch size")
    add("--train-mode", action=argparse.BooleanOptionalAction, default=True, help="dropout and stochastic depth are on")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="evaluate --resume, --finetune or the run in --output_dir, and stop")
    add("--eval-crop-ratio", type=float, default=0.875, help="side of the centre crop over the resized short side; 0.9 "
        "for the published numbers")  # fmt: skip
    add("--eval-ema", action="store_true", help="evaluate the moving average too")

    add = add_run_flags(parser, knn=False)
    add_output_flags(add)
    add("--distributed", action="store_true", help="ignored: read from the environment")
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--data_path`` the defaults are those of the embedded data.

    Args:
        arguments: The command line's own by default.
        parser: That of :func:`get_args_parser` with further flags, for scripts that have them.
    """
    parser = parser or get_args_parser()
    args = parser.parse_args(arguments)
    if args.data_path is None and args.val_path is None:
        own = args.model in ARCHITECTURES  # the sizes of other networks are part of their names
        parser.set_defaults(
            **{flag: value for flag, value in EMBEDDED_DATA_DEFAULTS.items() if own or flag not in SIZES}
        )
        args = parser.parse_args(arguments)
    check_recipe(parser, args, MINIMUM)
    if not 0 < args.eval_crop_ratio <= 1:
        parser.error(f"--eval-crop-ratio {args.eval_crop_ratio} is not in (0, 1]")
    if args.distillation_type != "none" and args.cosub:
        parser.error(f"--cosub and --distillation-type {args.distillation_type}: only one of the two")
    if args.src and not args.ThreeAugment:
        parser.error("--src belongs to --ThreeAugment")
    return args


def train_resmlp(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none; or evaluate."""
    if args.eval:  # leaves a run that is going on in the folder alone
        device, output_dir = distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    else:
        device, output_dir = start_run(args)
    precision = Precision(args.amp, device)
    images = open_images(args, output_dir, precision, MEAN, STD, args.eval_crop_ratio)
    num_classes = images.num_classes

    # network
    network = build_network(
        args.model,
        num_classes,
        args.input_size,
        args.in_chans,
        args.drop,
        args.drop_path,
        **{size: getattr(args, size) for size in SIZES},
    )
    if args.eval:
        origin = args.resume or args.finetune or str(output_dir / "checkpoint.pth")
        if not fill(network, read_weights(origin, args.checkpoint_key, "--eval: the checkpoint"), origin):
            raise ValueError(f"--eval: {origin} has no classifier for the {num_classes} classes of {images.val.name}")
        result = images.evaluate(network.to(device))
        distributed.print_once(f"{images.val.describe()}: top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %")
        return
    if args.finetune:
        fill(network, read_weights(args.finetune, args.checkpoint_key, "--finetune"), args.finetune)
    if args.attn_only:
        keep_cross_patch_layers_trainable(network)
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
    if args.ThreeAugment:
        transform = ThreeAugment(args.input_size, args.color_jitter, args.src, args.in_chans)
    else:
        transform = train_transform(args, MEAN, STD)
    views = LabelledViews(images.train, transform, args.seed, images.bad_images)
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
    peak_lr = args.lr if args.unscale_lr else args.lr * args.batch_size * distributed.get_world_size() / 512
    optimizer = build_timm_optimizer(
        distributed.unwrap(network), args.opt, peak_lr, args.weight_decay, args.momentum, args.opt_eps, args.opt_betas
    )
    scheduler = build_timm_schedule(args, optimizer)
    training_loss = TrainingLoss(
        num_classes,
        0.0 if mixup else args.smoothing,
        args.bce_loss,
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
        weights_flag="--finetune",
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
                cosub=args.cosub,
                train_mode=args.train_mode,
                seed=args.seed,
                precision=precision,
                log=state.log,
                guard=state.guard,
                checkpointer=checkpointer,
            )
            tested = state.test(epoch, images.evaluate, checkpointer)
            is_best = tested["test_acc1"] > state.best_acc1
            state.best_acc1 = max(state.best_acc1, tested["test_acc1"])
            bad_images = images.bad_images.count()
            state.log.end_epoch(epoch, **tested, n_parameters=num_parameters, bad_images=bad_images)
            checkpointer.after_epoch(epoch, keep_as="best_checkpoint.pth" if is_best else None)
    state.log.close()
    if distributed.is_main_process():
        pictures = save_pictures(distributed.unwrap(network), output_dir) if args.pictures else []
        paths = args.data_path, args.val_path
        print(summary(output_dir, args.model, *paths, images.val, tested, state.best_acc1, pictures))


def keep_cross_patch_layers_trainable(network: nn.Module) -> None:
    """Freeze all but the layers named ``attn`` and the classifier (``--attn-only``; Touvron et al. 2022)."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith("head.")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("--attn-only: the network has no layer of that name")


class TrainingLoss:
    """Cross-entropy of hard, smoothed or mixed labels, and distillation.

    ResMLP has one classifier, on the mean of all patches: labels and teacher act on the same logits.

    Args:
        num_classes: Outputs of the network.
        smoothing: Of hard labels.
        binary: Binary cross-entropy instead, in which every class with a positive target is right.
        teacher: Maps the student's images to logits.
        distillation: ``none``, ``soft`` or ``hard``.
        alpha, tau: See :func:`shared.supervised.distillation.distillation_loss`.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float,
        binary: bool = False,
        teacher: nn.Module | None = None,
        distillation: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ):
        self.num_classes, self.smoothing, self.binary, self.teacher = num_classes, smoothing, binary, teacher
        self.distillation, self.alpha, self.tau = distillation, alpha, tau

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; ``targets`` are class numbers (B,), or probabilities (B, classes)."""
        logits = logits.float()
        if self.binary:
            loss = F.binary_cross_entropy_with_logits(logits, self.probabilities(targets).gt(0).float())
        else:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return distillation_loss(loss, logits, teacher_logits, self.distillation, self.alpha, self.tau)

    def of_submodels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Co-training of submodels (Touvron et al. 2022, "Co-training 2L Submodels", eq. 3): labels and each other.

        Args:
            logits: Of the images twice, with other blocks dropped, (2 B, classes).
            targets: Of the images once.
        """
        one, other = logits.float().chunk(2)
        targets = self.probabilities(targets)
        if self.binary:
            targets = targets.gt(0).float()
        pairs = ((one, targets), (other, targets), (one, other.detach().sigmoid()), (other, one.detach().sigmoid()))
        return sum(F.binary_cross_entropy_with_logits(logits, target) for logits, target in pairs) / 4

    def probabilities(self, targets: Tensor) -> Tensor:
        """Class numbers (B,) as (B, classes); mixed labels as they are."""
        return F.one_hot(targets, self.num_classes).float() if targets.dim() == 1 else targets


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
    cosub: bool,
    train_mode: bool,
    seed: int,
    precision: Precision,
    log: RunLog,
    guard: FiniteGuard,
    checkpointer: Checkpointer,
) -> None:
    """One epoch, from its step ``first_step`` on. ``loader`` yields (views, labels, indices)."""
    parameters = list(network.parameters())
    network.train(train_mode)
    start = epoch * steps_per_epoch + first_step
    for step, (loaded_images, labels, indices) in enumerate(log.batches(loader), start=start):
        randomness.seed_step(seed, step, distributed.get_rank())  # mixing, dropout, stochastic depth
        images = loaded_images.to(precision.device, non_blocking=True)
        targets = labels.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        optimizer.zero_grad(set_to_none=True)

        with precision.autocast():
            if cosub:
                images = images.repeat(2, 1, 1, 1)
                loss = training_loss.of_submodels(network(images), targets)
            else:
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
        train_resmlp(parse_args())


if __name__ == "__main__":
    main()
