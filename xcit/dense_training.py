"""What detection and segmentation do in the same way: flags, loading, the training loop, checkpoints."""

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared import distributed
from shared.images.decode import ImageError
from shared.images.loading import BadImages, EpochBatchSampler, default_num_workers, make_loader
from shared.images.sources import FileSource
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.weights import safe_load
from shared.optimisation.optim import build_optimizer
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.attempt import NotFinite
from shared.run.checkpoint import Checkpointer, check_flags, load_latest, restore, resume_position
from shared.run.flags import add_run_flags
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run
from shared.supervised.optimizer import clip_and_step

from .cross_covariance_transformer import ARCHITECTURES

# Stochastic depth of the published runs; else 0
DETECTION_DROP_PATH = {"xcit_small_12": 0.05, "xcit_small_24": 0.1, "xcit_medium_24": 0.15}
SEGMENTATION_DROP_PATH = DETECTION_DROP_PATH | {"xcit_medium_24": 0.2}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Data, network, optimisation and run."""
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default=None, help="folder of the data set; without it generated shapes, and defaults for them")
    add("--num_workers", type=int, default=None,
        help="loader processes per rank; None: cores per rank less one, at most 10")  # fmt: skip
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable image does")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this share are unreadable")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="xcit_small_12_p16", choices=ARCHITECTURES, metavar="XCIT", help="the trunk")
    add("--pretrained", default="", help="weights of the trunk: a release (xcit_small_12_p16_384_dist), a file or an "
        "address; none: random")  # fmt: skip
    add("--drop-path", type=float, default=None, help="stochastic depth; None: that of the published runs")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=2, help="images per process; the published runs have 16 in all")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = add_run_flags(parser, knn=False)
    add("--output_dir", default=".", help="checkpoints and logs")
    add("--eval", action="store_true", help="evaluate the run in --output_dir, or --resume, and stop")
    add("--resume", default="", help="checkpoint to go on from when --output_dir has none")
    add("--test-freq", type=int, default=1, help="epochs between evaluations")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images and the augmentation")


def drop_path_rate(args: argparse.Namespace, published: dict[str, float]) -> float:
    """``--drop-path``, or what ``published`` has for the trunk, whatever its patch size."""
    return published.get(args.model.rpartition("_p")[0], 0.0) if args.drop_path is None else args.drop_path


class DenseDataset(Dataset):
    """Images with dense targets; every draw is a function of (seed, epoch, index).

    Args:
        source: The image files.
        augment: False for evaluation, whose keys are indices.
    """

    def __init__(self, source: FileSource, seed: int = 0, augment: bool = True, bad_images: BadImages | None = None):
        self.source, self.seed, self.augment = source, seed, augment
        self.bad_images = bad_images or BadImages(len(source), on_bad_image="error")

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, rng: random.Random) -> tuple[Tensor, dict]:
        """Image (3, H, W) in [0, 1] and targets of image ``index``.

        Raises:
            ImageError: If a file cannot be read; ``bad_images`` decides what follows.
            ValueError: If the annotations do not fit the image, which always ends the run.
        """
        raise NotImplementedError

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict, int]:
        epoch, index = (0, key) if isinstance(key, int) else key
        key = (self.seed, epoch, index)
        rng = random.Random(randomness.derive_seed(*key))
        state = rng.getstate()

        def read(candidate: int) -> tuple[Tensor, dict, int]:
            rng.setstate(state)
            return *self.sample(candidate, rng), candidate

        try:
            return self.bad_images.read(self.source, index, key, read)
        except ValueError as error:
            # of this type a loader process hands over the message alone, of others its traceback too
            raise ImageError(str(error)) from error

    def __getitems__(self, keys: Sequence) -> tuple[list[Tensor], list[dict], list[int]]:
        """Lists of images, targets and indices: images may differ in size."""
        return tuple(map(list, zip(*(self[key] for key in keys), strict=True)))


def warmup_factor(step: int, warmup_steps: int, start: float) -> float:
    """Linear from ``start`` at step 0 to 1."""
    return 1.0 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - start)


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Everything decays but the parameters with "norm" in their names, as in the published runs."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups["norm" in name]["params"].append(parameter)
    return groups


def to_device(value, device: torch.device):
    """Tensors of nested lists and dictionaries on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(entry, device) for key, entry in value.items()}
    return [to_device(entry, device) for entry in value] if isinstance(value, list) else value


def start(args: argparse.Namespace) -> tuple[torch.device, Path]:
    """Join the other processes, and claim the output folder unless ``--eval``; this process's device and the folder."""
    if args.eval:  # leaves a run that is going on in the folder alone
        return distributed.init(args.dist_url, args.device, args.dist_timeout), Path(args.output_dir)
    return start_run(args)


def evaluate_only(args: argparse.Namespace, network: nn.Module, evaluate: Callable, device: torch.device) -> dict:
    """Fill the network from the checkpoint that the flags name, completely, and evaluate it."""
    path = Path(args.resume or Path(args.output_dir) / "checkpoint.pth")
    if not path.is_file():
        raise ValueError(f"--eval: {path} is not a file")
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"--eval: {path} is not the checkpoint of a training run")
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not fill --model {args.model}: {' '.join(str(error).split())[:500]}") from error
    result = evaluate(network.to(device))
    say(result)
    return result


def say(result: dict[str, float]) -> None:
    """Print what an evaluation has found."""
    distributed.print_once("  ".join(f"{name} {value:.2f}" for name, value in result.items()))


def train_dense(
    args: argparse.Namespace,
    network: nn.Module,
    dataset: DenseDataset,
    steps: Callable[[int], tuple[int, Callable[[int], float]]],
    weight_decay: float,
    evaluate: Callable[..., dict[str, float]],
    draw: Callable[[nn.Module], Path],
    device: torch.device,
    output_dir: Path,
) -> None:
    """Train from the newest checkpoint in ``output_dir``, or from the start if there is none.

    Args:
        network: In training maps (images, targets) to a dictionary of losses.
        steps: Maps the steps of an epoch to those of the whole run and a function that gives each its learning rate.
        evaluate: Called as ``evaluate(network, between_batches=...)``; returns what the log states.
        draw: Writes a picture of what the network predicts after its training, in one process, and returns its path.
    """
    precision, world_size = Precision(args.amp, device), distributed.get_world_size()
    sampler = EpochBatchSampler(len(dataset), args.batch_size, args.seed, distributed.get_rank(), world_size)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device)
    steps_per_epoch = len(sampler)
    total_steps, learning_rate = steps(steps_per_epoch)
    epochs = -(-total_steps // steps_per_epoch)
    images = dataset.source.checksum()
    distributed.check_same_on_all_processes((len(dataset), images), "the training data (number of images, checksum)")
    network = distributed.wrap(synchronize_batchnorm(network, device).to(device), device)
    optimizer = build_optimizer("adamw", decay_groups(network, weight_decay))

    checkpoint = load_latest(output_dir / "checkpoint.pth")
    if checkpoint is None and args.resume:
        checkpoint = load_latest(args.resume)
        if checkpoint is None:
            raise ValueError(f"--resume {args.resume}: there is no such file")
        checkpoint.pop("log", None)  # its lines are in another folder
    resumed_log = checkpoint is not None and "log" in checkpoint
    log = RunLog(output_dir, total_steps, args.log_freq, args.tensorboard, resumed=resumed_log)
    first_epoch, first_step = 0, 0

    def state(epoch: int, step_in_epoch: int) -> dict:
        return {
            "model": distributed.unwrap(network).state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "scaler": precision.scaler.state_dict(),
            "args": vars(args),
            "step_in_epoch": step_in_epoch,
            "skipped_steps": int(guard.in_a_row),
            "batch_size": args.batch_size * world_size,
            "world_size": world_size,
            "images": images,
            "log": log.state_dict(),
        }

    if checkpoint is not None:
        check_flags(checkpoint, args, ("model",))
        restore(checkpoint, model=distributed.unwrap(network), optimizer=optimizer)
        if checkpoint.get("scaler"):
            precision.scaler.load_state_dict(checkpoint["scaler"])
        if resumed_log:
            log.load_state_dict(checkpoint["log"])
        batch_size = args.batch_size * world_size
        first_epoch, first_step = resume_position(checkpoint, batch_size, images, args.on_changed_run)
        distributed.print_once(f"resuming at epoch {first_epoch}, step {first_step}")
    in_a_row = checkpoint.get("skipped_steps", 0) if checkpoint else 0
    trained = {"network": distributed.unwrap(network)}
    guard = FiniteGuard(trained, output_dir, args.max_skipped_steps, device, in_a_row)

    tested: dict[str, float] = {}
    with Checkpointer(
        output_dir / "checkpoint.pth", state, args.saveckp_steps, args.saveckp_minutes, guard.is_good
    ) as checkpointer:
        for epoch in range(first_epoch, epochs):
            sampler.set_epoch(epoch, first_step)
            network.train()
            start = epoch * steps_per_epoch + first_step
            for step, (pictures, targets, indices) in enumerate(log.batches(loader), start=start):
                if step >= total_steps:
                    break
                randomness.seed_step(args.seed, step, distributed.get_rank())
                lr = learning_rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad(set_to_none=True)
                with precision.autocast():
                    losses = network(to_device(pictures, device), to_device(targets, device))
                loss = sum(losses.values())
                precision.backward(loss, optimizer)
                skipped = clip_and_step(optimizer, list(network.parameters()), max_norm=None)
                precision.update()
                guard.count(skipped)

                averages = {"loss": loss, **losses, "lr": lr, "skipped": skipped}
                line = log.step(step, epoch, len(pictures), averages)
                if line is not None and guard.too_many():
                    raise NotFinite(
                        f"{int(guard.in_a_row)} steps in a row, up to step {step + 1} with images {indices}, had "
                        "gradients that are not finite; the weights are those of the last good checkpoint"
                    )
                checkpointer.after_step(epoch, step + 1 - epoch * steps_per_epoch)
            first_step, tested = 0, {}
            if (epoch + 1) % args.test_freq == 0 or epoch == epochs - 1:
                stop = partial(checkpointer.stop_if_asked, epoch, steps_per_epoch)
                tested = evaluate(distributed.unwrap(network), between_batches=stop)
                log.evaluation(min((epoch + 1) * steps_per_epoch, total_steps), epoch + 1, **tested)
            log.end_epoch(epoch, **tested, bad_images=dataset.bad_images.count())
            checkpointer.after_epoch(epoch)
    log.close()
    say(tested or evaluate(distributed.unwrap(network)))  # a run that was finished before is evaluated again
    if args.pictures and distributed.is_main_process():
        print(f"what it finds: {draw(distributed.unwrap(network))}", flush=True)
