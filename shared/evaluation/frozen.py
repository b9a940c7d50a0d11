"""Evaluations of a frozen network: what k-NN and linear probes of every folder that has a card have in common."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from shared import distributed
from shared.images.labelled import match_classifier, open_labelled
from shared.images.loading import BadImages, EpochBatchSampler, EvalDataset, EvalTransform, make_loader
from shared.images.sources import ImageSource, reading
from shared.images.views import ViewRecipe
from shared.multicrop import MultiCropDataset, normalize_views
from shared.networks.backbones import input_channels
from shared.networks.card import Card
from shared.networks.pretrained import flags_of_run
from shared.networks.weights import safe_load
from shared.run import randomness
from shared.run.estimate import progress

from . import linear
from .features import extract_features
from .knn import knn_accuracies

FEATURE_FILES = ("trainfeat.pth", "testfeat.pth", "trainlabels.pth", "testlabels.pth")

# --- Images -----------------------------------------------------------------------------------------------------------


def labelled_sources(
    args: argparse.Namespace, flag: str = "--data_path", classifier: str | Path = "", **asked
) -> tuple[ImageSource, ImageSource]:
    """Train and val images with classes.

    Args:
        args: Flags of :func:`shared.evaluation.flags.add_labelled_flags`.
        flag: Of the images, for messages.
        classifier: File or run of one that is evaluated: its classes, where it names them, are those of the images.
        asked: By the flag's name, what the train images must suffice for: ``nb_knn``, the most neighbours; any other
            one, the outputs of a classifier (``num_labels``, ``num_classes``).

    Raises:
        ValueError: If there are none, or too few for that.
    """
    sources = open_labelled(args.data_path, args.val_path, flag, args.shared_classes_only, **reading(args))
    names = flags_of_run(classifier).get("classes")
    train, val = (match_classifier(source, names, args.shared_classes_only) for source in sources)
    for name, number in asked.items():
        if name == "nb_knn" and number > len(train):
            raise ValueError(f"--nb_knn {number} is more than the {len(train)} images of {train.name}")
        if name != "nb_knn" and number is not None and number < len(train.classes):
            raise ValueError(f"--{name} {number} is less than the {len(train.classes)} classes of {train.name}")
    for source in (train, val):
        distributed.print_once(source.describe())
    return train, val


def eval_transform(card: Card, image_size: int, network: nn.Module) -> EvalTransform:
    """Resize (256 for a crop of 224), crop the centre, normalise, for the channels that the network takes."""
    resize_px = round(image_size * 256 / 224)
    return EvalTransform(resize_px, image_size, card.mean, card.std, input_channels(network), card.interpolation)


def bad_images_of(args: argparse.Namespace, source: ImageSource, list_path: Path | None = None) -> BadImages:
    """The policy that ``--on_bad_image`` and ``--max_bad_fraction`` ask for."""
    return BadImages(len(source), list_path, args.on_bad_image, args.max_bad_fraction)


# --- k-NN -------------------------------------------------------------------------------------------------------------


def eval_knn(
    args: argparse.Namespace, load_frozen: Callable[[argparse.Namespace], tuple[nn.Module, EvalTransform]]
) -> dict[int, tuple[float, float]] | None:
    """Weighted k-NN classification with the features of a frozen network (Caron et al. 2021, section 4.1).

    Each of the k nearest train images, by cosine similarity s, votes for its class with weight exp(s / temperature).

    Args:
        args: Flags of :mod:`shared.evaluation.flags` for labelled images and k-NN.
        load_frozen: The network that the flags choose, and the centre crops that it takes.

    Returns:
        ``{k: (top-1, top-5)}`` in percent on rank 0.
    """
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    store_on = device if args.use_cuda else "cpu"
    if args.load_features:
        features = read_features(Path(args.load_features), store_on)
    else:
        network, transform = load_frozen(args)  # first: the run says how its images are read
        sources = labelled_sources(args, nb_knn=max(args.nb_knn))
        features = ()
        for source in sources:
            images = EvalDataset(source, transform, bad_images_of(args, source))
            vectors, labels = extract_features(
                network.to(device), images, device, args.batch_size, args.num_workers, store_on
            )
            features += (F.normalize(vectors, dim=1), labels)
    if args.dump_features and distributed.is_main_process():
        write_features(Path(args.dump_features), features)
    distributed.print_once("Features are ready! Start the k-NN classification.")
    accuracies = None
    if distributed.is_main_process():
        with torch.inference_mode():
            accuracies = knn_accuracies(*features, args.nb_knn, args.temperature, precision=args.precision)
        for k, (top1, top5) in accuracies.items():
            print(f"{k}-NN classifier result: Top1: {top1:.2f}, Top5: {top5:.2f}", flush=True)
    distributed.barrier()
    return accuracies


def write_features(folder: Path, features: tuple[Tensor, ...]) -> None:
    """Train features, val features, train labels, val labels, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    train_features, train_labels, val_features, val_labels = features
    for name, tensor in zip(FEATURE_FILES, (train_features, val_features, train_labels, val_labels), strict=True):
        torch.save(tensor.cpu(), folder / name)


def read_features(folder: Path, device: torch.device | str) -> tuple[Tensor, ...]:
    """What :func:`write_features` wrote."""
    missing = [name for name in FEATURE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--load_features {folder}: no {', '.join(missing)} in it")
    train_features, val_features, train_labels, val_labels = (
        safe_load(folder / name, map_location=device) for name in FEATURE_FILES
    )
    return train_features, train_labels.long(), val_features, val_labels.long()


# --- Linear probe -----------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> torch.device:
    """Join the processes, seed, and make ``--output_dir``."""
    device = distributed.init(args.dist_url, args.device)
    randomness.seed_everything(args.seed)
    if distributed.is_main_process():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    return device


def val_images(args: argparse.Namespace, source: ImageSource, transform: Callable) -> EvalDataset:
    """The images to classify; those that cannot be read are listed in ``--output_dir``."""
    return EvalDataset(source, transform, bad_images_of(args, source, Path(args.output_dir, "bad_images_val.txt")))


class TrainCrops:
    """Random views of this process's share of the images: called with an epoch, its normalised images and labels.

    Args:
        args: Flags of :mod:`shared.evaluation.flags` for labelled images and probes.
        transform: Of the images to classify, whose size and channels the views have.
        interpolation: Of the resizing of a crop.
        colours: Further changes of the crops: arguments of :class:`shared.images.views.ViewRecipe`.
        drop_single: Leave out the last batch of an epoch if it is a single image, which batch norms that see one pixel
            cannot normalise.

    Attributes:
        bad_images: Policy for images that cannot be read, which are listed in ``--output_dir``.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        card: Card,
        source: ImageSource,
        transform: EvalTransform,
        device: torch.device,
        interpolation: str = "bilinear",
        drop_single: bool = False,
        colours: Mapping | None = None,
    ):
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        per_rank = -(-len(source) // world_size)
        drop_last = drop_single and per_rank > 1 and per_rank % args.batch_size == 1
        self.card, self.device = card, device
        self.bad_images = bad_images_of(args, source, Path(args.output_dir, "bad_images.txt"))
        self.sampler = EpochBatchSampler(len(source), args.batch_size, args.seed, rank, world_size, drop_last)
        recipe = ViewRecipe(transform.crop_px, tuple(args.crop_scale), interpolation=interpolation, **(colours or {}))
        views = MultiCropDataset(source, [recipe], args.seed, in_chans=transform.in_chans, bad_images=self.bad_images)
        self.loader = make_loader(views, batch_sampler=self.sampler, num_workers=args.num_workers, device=device)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device, with a progress bar on a terminal."""
        self.sampler.set_epoch(epoch)
        images = len(self.sampler) * self.sampler.batch_size * self.sampler.world_size
        for views, labels, _ in progress(self.loader, f"epoch {epoch}", len(self.loader), images):
            images = normalize_views(views, self.device, self.card.mean, self.card.std)[0]
            yield images, labels.to(self.device, non_blocking=True)


class LabelledTraining:
    """What learns from labelled images by epochs and is validated: a classifier of features, or a whole network.

    Args:
        args: Flags of :mod:`shared.evaluation.flags` for labelled images and probes.
        module: What learns, on the device.
        features: The frozen network before it; None: it sees the images.
        sources: Images to learn from, and to classify.
        transform: Of the images to classify.
        crops: Options of :class:`TrainCrops`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        card: Card,
        module: nn.Module,
        features: Callable[[Tensor], Tensor] | None,
        sources: Sequence[ImageSource],
        transform: EvalTransform,
        device: torch.device,
        **crops,
    ):
        self.args, self.module, self.features = args, module, features or nn.Identity()
        self.source = sources[0]
        self.open_crops = partial(TrainCrops, args, card, self.source, transform, device, **crops)
        images, batches = val_images(args, sources[1], transform), (args.batch_size, args.num_workers)
        self.validate = partial(linear.validate, module, self.features, images, device, *batches)

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        origin: int,
        file: str = "checkpoint.pth.tar",
        log_file: str = "log.txt",
        flags: Sequence[str] = (),
        batches: Callable[..., Iterator] | None = None,
        **names,
    ) -> dict[str, float]:
        """Go on from the checkpoint in ``--output_dir``; loss and accuracies in percent after the last epoch.

        Args:
            scheduler, origin, names: See :class:`shared.evaluation.linear.EpochTraining`.
            flags: That a run which is resumed must have as they were.
            batches: Of the crops and an epoch, instead of the crops alone.
        """
        args, crops, folder = self.args, self.open_crops(), Path(self.args.output_dir)
        values = {name: getattr(args, name) for name in flags} or None
        files = folder / file, folder / log_file
        training = linear.EpochTraining(
            *files, self.module, optimizer, scheduler, origin, self.source, flags=values, **names
        )
        batches, every = partial(batches, crops) if batches else crops, getattr(args, "val_freq", 1)
        return training.run(batches, self.features, self.validate, args.epochs, crops.bad_images, every)
