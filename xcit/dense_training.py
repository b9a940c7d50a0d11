"""What detection and segmentation do in the same way: flags, loading, one epoch, checkpoints."""

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared import distributed
from shared.evaluation.features import RankSampler, check_replaced
from shared.images.decode import ImageError
from shared.images.loading import BadImages, EpochBatchSampler, default_num_workers, make_loader
from shared.images.sources import FileSource
from shared.images.training_data import TrainingData
from shared.networks.batchnorm import synchronize_batchnorm
from shared.networks.classifiers import load_completely
from shared.networks.weights import flags_of_training, safe_load
from shared.optimisation.optim import build_optimizer, clip_total_grad_norm_
from shared.run import randomness
from shared.run.checkpoint import load_latest_or_given
from shared.run.flags import add_bad_image_flags, add_run_flags
from shared.run.run import Run

from .cross_covariance_transformer import ARCHITECTURES

# Stochastic depth of the published runs; else 0
DETECTION_DROP_PATH = {"xcit_small_12": 0.05, "xcit_small_24": 0.1, "xcit_medium_24": 0.15}
SEGMENTATION_DROP_PATH = DETECTION_DROP_PATH | {"xcit_medium_24": 0.2}
MINIMUM = dict.fromkeys(("batch_size", "test_freq", "log_freq"), 1) | {"weight_decay": 0, "warmup_iters": 0}
SIZES = ("min_size", "max_size", "crop_size")  # of the images; the last one of several is that of evaluation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Data, network, optimisation and run."""
    add = parser.add_argument_group("data").add_argument
    add("--data-path", default=None, help="folder of the data set; without it generated shapes, and defaults for them")
    workers = "loader processes per rank; None: cores per rank less one, at most 10"
    add("--num_workers", type=int, default=None, help=workers)
    add_bad_image_flags(add, "replace", "skip", "error")  # an image of the evaluation is left out or an error

    add = parser.add_argument_group("network").add_argument
    add("--model", default="xcit_small_12_p16", choices=ARCHITECTURES, metavar="XCIT", help="the trunk")
    add("--pretrained", default="", help="weights of the trunk: a release, a file or an address; none: random")
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
        annotations_checksum: Changes with the annotations.

    Attributes:
        bad_images: Policy for images that cannot be read; the first one is an error where a training sets no other.
    """

    def __init__(self, source: FileSource, seed: int, augment: bool, annotations_checksum: int):
        self.source, self.seed, self.augment = source, seed, augment
        self.annotations_checksum = annotations_checksum
        self.bad_images = BadImages(len(source), on_bad_image="error")

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


def print_result(result: dict[str, float]) -> None:
    """Print what an evaluation has found."""
    distributed.print_once("  ".join(f"{name} {value:.2f}" for name, value in result.items()))


def fill(network: nn.Module, args: argparse.Namespace) -> None:
    """Fill a network completely from the checkpoint that ``--eval`` is about; say where sizes of images differ.

    Raises:
        ValueError: If there is none, or it is that of another network.
    """
    path = Path(args.resume or Path(args.output_dir) / "checkpoint.pth")
    if not path.is_file():
        raise ValueError(f"--eval: {path} is not a file")
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"--eval: {path} is not the checkpoint of a training run")
    load_completely(network, checkpoint["model"], str(path), f"--model {args.model}")
    trained_with = flags_of_training(checkpoint)
    for size in SIZES:
        values = getattr(args, size, None), trained_with.get(size)
        given, of_run = (value[-1] if isinstance(value, list | tuple) else value for value in values)
        if of_run not in (None, given):
            distributed.print_once(f"--eval with --{size} {given}, the training had {of_run}")


def own_share(
    dataset: DenseDataset, between_images: Callable[[], None], left_out: list[int]
) -> Iterator[tuple[int, Tensor, dict]]:
    """(index, image, targets) of the images that this process evaluates.

    Args:
        between_images: Called equally often on every process; may raise to stop.
        left_out: Gets the indices, of all processes, of images that cannot be read and are not evaluated.
    """
    share = RankSampler(len(dataset))
    own = len(range(share.rank, len(dataset), share.world_size))
    for number, index in enumerate(share):
        if number < own:  # the rest fills up the share of the last ranks
            image, targets, read = dataset[index]
            if read == index:
                yield index, image, targets
            else:
                left_out.append(index)
        between_images()
    left_out[:] = chain.from_iterable(distributed.all_gather_object(left_out))
    check_replaced(dataset, left_out)


def bad_val_images(args: argparse.Namespace, dataset: DenseDataset) -> BadImages:
    """Images of an evaluation are never replaced: an unreadable one is an error, or left out if that is asked for."""
    policy = "skip" if args.on_bad_image == "skip" else "error"
    return BadImages(len(dataset), None, policy, args.max_bad_fraction)


# --- Training ---------------------------------------------------------------------------------------------------------


def data_folder(args: argparse.Namespace, output_dir: Path, write: Callable, parts: dict[str, int]) -> Path:
    """``--data-path``, or generated shapes in the output folder, which ``write(folder, parts)`` draws."""
    if args.data_path:
        return Path(args.data_path)
    if distributed.is_main_process():
        write(output_dir / "data", parts)
    distributed.barrier()
    return output_dir / "data"


def batches(args: argparse.Namespace, dataset: DenseDataset, output_dir: Path, device: torch.device) -> TrainingData:
    """Batches of a training set, whose unreadable images are listed in ``output_dir``."""
    policy = (output_dir / "bad_images.txt", args.on_bad_image, args.max_bad_fraction)
    dataset.bad_images = BadImages(len(dataset), *policy)
    images = dataset.source.checksum()
    checksums = (len(dataset), images, dataset.annotations_checksum)
    distributed.check_same_on_all_processes(checksums, "the training data (number of images, checksums)")
    world_size = distributed.get_world_size()
    sampler = EpochBatchSampler(len(dataset), args.batch_size, args.seed, distributed.get_rank(), world_size)
    num_workers = default_num_workers() if args.num_workers is None else args.num_workers
    loader = make_loader(dataset, batch_sampler=sampler, num_workers=num_workers, device=device)
    batch_size = args.batch_size * world_size
    return TrainingData(dataset, sampler, loader, dataset.bad_images, images, batch_size, num_workers)


def train(
    args: argparse.Namespace,
    run: Run,
    data: TrainingData,
    network: nn.Module,
    lr: Sequence[float],
    evaluate: Callable[..., dict[str, float]],
) -> None:
    """Train with AdamW from the newest checkpoint in the output folder, from ``--resume``, or from the start.

    Args:
        lr: Learning rate of every step of the run.
        evaluate: Called as ``evaluate(between_images=...)``; returns what the log states.
    """
    wrapped = distributed.wrap(synchronize_batchnorm(network, run.device).to(run.device), run.device)
    optimizer = build_optimizer("adamw", decay_groups(network, args.weight_decay))
    checkpoint = load_latest_or_given(run.path, args.resume, "--pretrained")
    annotations = data.dataset.annotations_checksum
    check_annotations(checkpoint, annotations, args.on_changed_run)
    layout = {"to_official": partial(to_official, annotations=annotations), "from_official": from_official}
    run.resume(data, len(lr), ("model",), checkpoint=checkpoint, **layout, model=network, optimizer=optimizer)
    tested: dict[str, float] = {}
    with run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(run, wrapped, data.loader, optimizer, lr)
            tested = {}
            if (epoch + 1) % args.test_freq == 0 or run.steps_done == run.total_steps:
                tested = evaluate(between_images=run.stop_if_asked)
                run.log_evaluation(**tested)
            run.log_epoch(**tested, bad_images=data.bad_images.count())
            run.end_epoch()
    print_result(tested or evaluate())  # a run that was finished before is evaluated again


def check_annotations(checkpoint: dict, annotations: int, on_changed_run: str) -> None:
    """Raise ``ValueError`` if a checkpoint that says so was written with annotations of another checksum."""
    if checkpoint.get("annotations", annotations) == annotations:
        return
    if on_changed_run != "continue":
        raise ValueError(
            "the checkpoint to go on with was written with other annotations: name another output folder, or go on all "
            "the same with --on_changed_run continue"
        )
    distributed.print_once("resuming with other annotations")


def to_official(state: dict, annotations: int) -> dict:
    """The state of a run under the names of the classifiers' checkpoints."""
    state = {"scaler" if name == "fp16_scaler" else name: value for name, value in state.items()}
    return state | {"annotations": annotations}


def from_official(checkpoint: dict) -> dict:
    return checkpoint | {"fp16_scaler": checkpoint.get("scaler")}


def train_one_epoch(
    run: Run, network: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, lr: Sequence[float]
) -> None:
    """One epoch of a network that maps images and targets to a dictionary of losses, of which the sum is minimised.

    Args:
        loader: Yields lists of images, targets and indices.
        lr: Learning rate of every step of the run.
    """
    parameters = list(network.parameters())
    network.train()
    for step, (pictures, targets, _) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = lr[step]
        optimizer.zero_grad(set_to_none=True)
        with run.precision.autocast():
            losses = network(to_device(pictures, run.device), to_device(targets, run.device))
        loss = sum(losses.values())
        run.backward(loss, optimizer)
        run.update(clip_total_grad_norm_(parameters, max_norm=None), optimizer)
        run.end_step(len(pictures), {"loss": loss, **losses, "lr": lr[step]})
