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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed, randomness
from shared.batchnorm import synchronize_batchnorm
from shared.checkpoint import Checkpointer, check_flags, load_latest, restore, resume_position
from shared.data import (
    BadImages,
    EpochBatchSampler,
    EvalDataset,
    default_num_workers,
    make_loader,
)
from shared.flags import AnyDashParser, add_data_flags, add_run_flags
from shared.image_cache import cache_images
from shared.metrics import RunLog
from shared.not_finite import FiniteGuard
from shared.precision import Precision
from shared.start import start_run
from shared.supervised.data import LabelledViews, RepeatedAugmentationSampler
from shared.supervised.datasets import add_data_set_flags, open_train_and_val
from shared.supervised.distillation import build_teacher, distillation_loss
from shared.supervised.ema import NetworkEMA
from shared.supervised.evaluation import evaluate_classifier
from shared.supervised.optimizer import build_timm_optimizer, build_timm_schedule, clip_and_step, set_learning_rate
from shared.supervised.transforms import TrainTransform, eval_transform
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
LEAST = {"epochs": 1, "batch_size": 1, "log_freq": 1, "input_size": 1, "test_freq": 1, "start_epoch": 0}
SHARES = ("smoothing", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha", "model_ema_decay")
NETWORK_FLAGS = ("model", "in_chans")


def get_args_parser() -> argparse.ArgumentParser:
    parser = AnyDashParser(
        "XCiT", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = add_data_flags(parser)
    add("--num_workers", type=int, default=None,
        help="loader processes per rank; None: cores per rank less one, at most 10")  # fmt: skip
    add_data_set_flags(parser)

    add = parser.add_argument_group("network").add_argument
    add("--model", default="xcit_small_12_p16", help="xcit_<size>_<depth>_p<patch>, or any timm or torchvision model")
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    add("--drop", type=float, default=0.0, help="dropout")
    add("--drop-path", type=float, default=0.1, help="stochastic depth")
    add("--pretrained", default=None, help="weights to start from, for fine-tuning or --eval: the name of a release "
        "(xcit_small_12_p16_224), a file or an address; a classifier for other classes is left out")  # fmt: skip
    add("--checkpoint_key", default="model", choices=("model", "model_ema"), help="network to take from a training "
        "checkpoint given as --pretrained, or with --eval")  # fmt: skip
    add("--surgery", default=None, help="weights whose patch embedding is taken over and kept fixed")
    add("--model-ema", action=argparse.BooleanOptionalAction, default=True, help="keep a moving average of the network")
    add("--model-ema-decay", type=float, default=0.99996, help="weight of the old average at every step")
    add("--model-ema-force-cpu", action="store_true", help="keep the average in the memory of the host")
    add("--compile", action="store_true", help="torch.compile the network; stochastic depth then draws otherwise")

    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment or RandAugment specification; none")
    add("--color-jitter", type=float, default=0.4, help="strength; without --aa only")
    add("--train-interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"), help="of the crops")
    add("--repeated-aug", action=argparse.BooleanOptionalAction, default=True, help="three views of a third of the "
        "images per epoch")  # fmt: skip
    add("--reprob", type=float, default=0.25, help="probability of Random Erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased rectangles are filled with")
    add("--recount", type=int, default=1, help="number of rectangles")
    add("--resplit", action="store_true", help="not used, as in the official code")
    add("--mixup", type=float, default=0.8, help="alpha of Mixup; 0: none")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0: none")
    add("--cutmix-minmax", type=float, nargs=2, default=None, help="range of CutMix's sides instead of --cutmix")
    add("--mixup-prob", type=float, default=1.0, help="probability of either")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing weight")
    add("--smoothing", type=float, default=0.1, help="label smoothing")

    add = parser.add_argument_group("distillation").add_argument
    add("--teacher-model", default="regnety_160", help="a model of timm or torchvision")
    add("--teacher-path", default="", help="file or address of its weights")
    add("--distillation-type", default="none", choices=("none", "soft", "hard"), help="what is learned from it")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the distillation")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=400, help="passes over the images")
    add("--batch-size", type=int, default=64, help="images per process; half as many again in evaluation")
    add("--opt", default="adamw", help="timm's name of the optimiser")
    add("--opt-eps", type=float, default=1e-8, help="its epsilon")
    add("--opt-betas", type=float, nargs="+", default=None, help="its betas; None: the optimiser's own")
    add("--clip-grad", type=float, default=None, help="cap of the norm of all gradients together; None: no cap")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=0.05, help="of all but biases, vectors and the class token")
    add("--sched", default="cosine", help="timm's name of the schedule")
    add("--lr", type=float, default=5e-4, help="peak learning rate for 512 images per step; scaled linearly")
    add("--lr-noise", type=float, nargs="+", default=None, help="share of the epochs from which on (to which) rates "
        "are noisy")  # fmt: skip
    add("--lr-noise-pct", type=float, default=0.67, help="largest relative noise")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of the noise")
    add("--warmup-lr", type=float, default=1e-6, help="rate at the start of the warm-up; not scaled")
    add("--min-lr", type=float, default=1e-5, help="rate at the end; not scaled")
    add("--warmup-epochs", type=int, default=5, help="epochs of the warm-up")
    add("--decay-epochs", type=float, default=30, help="epochs per step of --sched step")
    add("--decay-rate", "--dr", type=float, default=0.1, help="factor of --sched step")
    add("--cooldown-epochs", type=int, default=10, help="not used, as in the official code")
    add("--patience-epochs", type=int, default=10, help="not used: --sched plateau is refused")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="evaluate --pretrained, or the run in --output_dir, and stop")
    add("--full_crop", action="store_true", help=f"centre crops of the whole short side, not of {CROP_RATIO} of it")
    add("--test-freq", type=int, default=1, help="epochs between evaluations")
    add("--eval-ema", action="store_true", help="evaluate the moving average too")
    add("--dist-eval", action="store_true", help="not needed: evaluation is always shared out, and exact")

    add = add_run_flags(parser, knn=False)
    add("--output_dir", default=".", help="checkpoints, logs and pictures")
    add("--resume", default="", help="checkpoint to go on from when --output_dir has none")
    add("--start_epoch", type=int, default=0, help="first epoch without a checkpoint")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the views")
    add("--pin-mem", action=argparse.BooleanOptionalAction, default=True, help="not needed: done where there is a GPU")
    add("--world_size", type=int, default=None, help="ignored: read from the environment")
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
    for flag, least in LEAST.items():
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is less than {least}")
    for flag in SHARES:
        if not 0 <= getattr(args, flag) <= 1:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not in [0, 1]")
    if mixes_labels(args) and args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size}: Mixup and CutMix take pairs of images, so it must be even")
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs the teacher's weights as --teacher-path")
    return args


def mixes_labels(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def train_xcit(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the start if there is none; or evaluate."""
    if args.eval:  # leaves a run that is going on in the folder alone
        device, output_dir = distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    else:
        device, output_dir = start_run(args)
    precision = Precision(args.amp, device)
    world_size = distributed.get_world_size()

    # data
    train, val = open_train_and_val(args)
    train, num_classes = cache_images(train, args.cache), len(train.classes)
    images = train.checksum()
    distributed.check_same_on_all_processes((len(train), images), "the training data (number of images, checksum)")
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    bad_images, bad_val_images = (
        BadImages(len(source), None if args.eval else output_dir / listed, args.on_bad_image, args.max_bad_fraction)
        for source, listed in ((train, "bad_images.txt"), (val, "bad_images_val.txt"))
    )
    crop_ratio = 1.0 if args.full_crop else CROP_RATIO
    val_views = EvalDataset(val, eval_transform(args.input_size, MEAN, STD, crop_ratio, args.in_chans), bad_val_images)
    evaluate = partial(
        evaluate_classifier,
        dataset=val_views,
        precision=precision,
        batch_size=int(1.5 * args.batch_size),
        num_workers=num_workers,
    )

    # network
    network = build_network(args.model, num_classes, args.in_chans, args.drop, args.drop_path, args.input_size)
    if args.eval:
        origin = args.pretrained or args.resume or str(output_dir / "checkpoint.pth")
        if not fill(network, read_weights(origin, args.checkpoint_key, "--eval: the checkpoint"), origin):
            raise ValueError(f"--eval: {origin} has no classifier for the {num_classes} classes of {val.name}")
        result = evaluate(network.to(device))
        distributed.print_once(f"{val.describe()}: top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} %")
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
        teacher = build_teacher(args.teacher_model, args.teacher_path, num_classes).to(device)

    # views
    transform = TrainTransform(
        args.input_size,
        MEAN,
        STD,
        auto_augment=None if args.aa in ("", "none") else args.aa,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        erase_p=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        in_chans=args.in_chans,
    )
    views = LabelledViews(train, transform, args.seed, bad_images)
    sampler_type = RepeatedAugmentationSampler if args.repeated_aug else EpochBatchSampler
    sampler = sampler_type(len(train), args.batch_size, args.seed, distributed.get_rank(), world_size)
    loader = make_loader(views, batch_sampler=sampler, num_workers=num_workers, device=device)
    steps_per_epoch = len(sampler)
    mixup = None
    if mixes_labels(args):
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    distributed.print_once(f"{train.describe()}: {steps_per_epoch} steps per epoch; {num_parameters:,} parameters")
    if args.data_path is None:
        names = " ".join(f"--{name}" for name in EMBEDDED_DATA_DEFAULTS)
        distributed.print_once(f"without --data_path these flags have defaults for the embedded data: {names}")

    # optimiser, schedule
    peak_lr = args.lr * args.batch_size * world_size / 512
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
    checkpoint = load_latest(output_dir / "checkpoint.pth")
    if checkpoint is None and args.resume:
        checkpoint = load_latest(args.resume)
        if checkpoint is None:
            raise ValueError(f"--resume {args.resume}: there is no such file")
        checkpoint.pop("log", None)  # its lines are in another folder
    resumed_log = checkpoint is not None and "log" in checkpoint
    log = RunLog(output_dir, args.epochs * steps_per_epoch, args.log_freq, args.tensorboard, resumed=resumed_log)
    first_epoch, first_step, best_acc1 = args.start_epoch, 0, 0.0

    def state(epoch: int, step_in_epoch: int) -> dict:
        """Everything a run needs to go on at this step; the first keys are those of the official checkpoints."""
        return {
            "model": distributed.unwrap(network).state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "model_ema": None if ema is None else ema.network.state_dict(),
            "scaler": precision.scaler.state_dict(),
            "args": vars(args),
            "step_in_epoch": step_in_epoch,
            "best_acc1": best_acc1,
            "skipped_steps": int(guard.in_a_row),
            "batch_size": args.batch_size * world_size,
            "world_size": world_size,
            "images": images,
            "log": log.state_dict(),
        }

    if checkpoint is not None:
        check_flags(checkpoint, args, NETWORK_FLAGS)
        restore(checkpoint, model=distributed.unwrap(network), optimizer=optimizer)
        if ema is not None:
            restore(checkpoint, model_ema=ema.network)
        if checkpoint.get("scaler"):
            precision.scaler.load_state_dict(checkpoint["scaler"])
        if resumed_log:
            log.load_state_dict(checkpoint["log"])
        if "step_in_epoch" not in checkpoint:  # the official code writes the number of the epoch that is finished
            checkpoint["epoch"] += 1
        first_epoch, first_step = resume_position(checkpoint, args.batch_size * world_size, images, args.on_changed_run)
        best_acc1 = checkpoint.get("best_acc1", 0.0)
        distributed.print_once(f"resuming at epoch {first_epoch}, step {first_step}")
    guard = FiniteGuard(
        {"network": distributed.unwrap(network)},
        output_dir,
        args.max_skipped_steps,
        device,
        in_a_row=checkpoint.get("skipped_steps", 0) if checkpoint else 0,
    )

    # epochs
    result = None
    with Checkpointer(
        output_dir / "checkpoint.pth", state, args.saveckp_steps, args.saveckp_minutes, guard.is_good
    ) as checkpointer:
        for epoch in range(first_epoch, args.epochs):
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
                log=log,
                guard=guard,
                checkpointer=checkpointer,
            )
            first_step = 0
            is_best, tested = False, {}
            if (epoch + 1) % args.test_freq == 0 or epoch == args.epochs - 1:
                stop = partial(checkpointer.stop_if_asked, epoch, steps_per_epoch)
                result = evaluate(distributed.unwrap(network), between_batches=stop)
                tested = {f"test_{name}": value for name, value in result.items()}
                if args.eval_ema and ema is not None:
                    tested["ema_acc1"] = evaluate_on(device, ema.network, evaluate, stop)
                log.evaluation((epoch + 1) * steps_per_epoch, epoch + 1, **tested)
                is_best = result["acc1"] >= best_acc1
                best_acc1 = max(best_acc1, result["acc1"])
            log.end_epoch(epoch, **tested, n_parameters=num_parameters, bad_images=bad_images.count())
            checkpointer.after_epoch(epoch, keep_as="best_model.pth" if is_best else None)
    log.close()
    if distributed.is_main_process():
        pictures = save_pictures(views, mixup, output_dir) if args.pictures else []
        needed = ("data_path", "val_path", "data_set", "inat_category", "model", "input_size", "in_chans")
        parser = get_args_parser()
        given = {flag: getattr(args, flag) for flag in needed if getattr(args, flag) != parser.get_default(flag)}
        print(summary(output_dir, given | {"model": args.model}, args.full_crop, val, result, best_acc1, pictures))


def transplant_patch_embedding(network: nn.Module, path: str) -> None:
    """Take the patch embedding from a file and keep it fixed, which makes large networks stable (``--surgery``)."""
    if not hasattr(network, "patch_embed"):
        raise ValueError("--surgery: the network has no patch embedding")
    prefix = "patch_embed."
    tensors = read_weights(path, flag="--surgery")
    part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    fill(network.patch_embed, part, f"--surgery {path}")
    network.patch_embed.requires_grad_(False)


def evaluate_on(
    device: torch.device, average: nn.Module, evaluate: Callable[..., dict], stop: Callable[[], None]
) -> float:
    """Top-1 of the moving average, wherever it is kept."""
    home = next(average.parameters()).device
    try:
        return evaluate(average.to(device), between_batches=stop)["acc1"]
    finally:
        average.to(home)


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
