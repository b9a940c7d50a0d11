"""Flags of the evaluations on labelled images: the same names, defaults and meaning in every folder."""

import argparse
from collections.abc import Callable, Mapping, Sequence

from shared import distributed
from shared.images.loading import default_num_workers
from shared.run.flags import (
    add_bad_image_flags,
    add_device_flag,
    add_reading_flags,
    bool_flag,
    parse_with_embedded_defaults,
)

MINIMUM = dict.fromkeys("epochs batch_size image_size val_freq num_blocks images_per_sheet max_sheets".split(), 1)
MINIMUM |= {"nb_knn": 1}


def add_labelled_flags(parser: argparse.ArgumentParser, data_flag: str = "--data_path") -> Callable:
    """Images with classes, to learn from and to classify; returns the ``add_argument`` of their group."""
    add = parser.add_argument_group("data").add_argument
    images = "folder with train/ and val/ or with class folders, .txt list or torchvision name; None: embedded ones"
    add(data_flag, dest="data_path", default=None, help=images)
    add("--val_path", default=None, help=f"images to classify; by default those that belong to {data_flag}")
    add_reading_flags(add)
    add_shared_classes_flag(add)
    add_bad_image_flags(add)
    return add


def add_shared_classes_flag(add: Callable) -> None:
    """What to do with parts of other classes, with the ``add_argument`` of a group."""
    shared = "leave out the images of classes that only train or only val has, instead of refusing them"
    add("--shared_classes_only", type=bool_flag, default=False, help=shared)


def add_data_flags(parser: argparse.ArgumentParser, batch_size: int = 128) -> Callable:
    """:func:`add_labelled_flags`, and how the network sees the images."""
    add = add_labelled_flags(parser)
    size = "side of the crops in pixels, 7/8 of the resized short side; None: that of the training, else 224"
    add("--image_size", type=int, default=None, help=size)
    add("--batch_size", "--batch_size_per_gpu", type=int, default=batch_size, help="images per process")
    return add


def add_knn_flags(parser: argparse.ArgumentParser, seed: int = 0) -> argparse.ArgumentParser:
    """The vote of :func:`shared.evaluation.frozen.eval_knn`, its features and its processes; the parser."""
    add = parser.add_argument_group("vote").add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, default=0.07, help="divides the similarities")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the similarities")
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU")
    add("--dump_features", default=None, help="folder to write the features and labels to")
    add("--load_features", default=None, help="folder to read them from instead of extracting them")
    add("--seed", type=int, default=seed, help="of random weights")
    add_process_flags(parser)
    return parser


def add_probe_flags(parser: argparse.ArgumentParser, epochs: int, seed: int = 0) -> Callable:
    """A training on labelled images by epochs; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--epochs", type=int, default=epochs, help="passes over the train images")
    add("--val_freq", type=int, default=1, help="validate every so many epochs, and after the last one")
    add("--seed", type=int, default=seed, help="of what learns, the order of the images and the crops")
    return add


def add_process_flags(
    parser: argparse.ArgumentParser, title: str = "processes", launcher: bool = True, num_workers: int | None = None
) -> None:
    """Device and loader flags, and those of the launchers for scripts that run on several processes.

    Args:
        title: Of the group.
        num_workers: By default this process's share of the cores less one, at most 10.
    """
    add = parser.add_argument_group(title).add_argument
    workers = default_num_workers() if num_workers is None else num_workers
    add("--num_workers", "--workers", type=int, default=workers, help="loader processes per rank")
    add_device_flag(add)
    if launcher:
        add("--dist_url", default="env://", help="rendezvous of the processes")
        for names in (("--local_rank", "--local-rank"), ("--rank",), ("--world_size",)):
            add(*names, type=int, default=None, help="ignored: read from the environment")


def parse_evaluation(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **embedded_defaults
) -> argparse.Namespace:
    """Parse and check; without images the defaults are those of the embedded materials."""
    return parse_with_embedded_defaults(parser, arguments, embedded_defaults, MINIMUM)


# --- Flags that the checkpoint answers --------------------------------------------------------------------------------


def take_from_run(
    args: argparse.Namespace,
    trained_with: Mapping,
    names: Mapping[str, str],
    defaults: Mapping[str, int | str],
) -> None:
    """Fill in the flags that were left open with those of the run whose checkpoint is evaluated, and say so.

    Args:
        trained_with: Flags of that run; {} where the file does not say.
        names: What the run calls each flag; where it has several values, the first one is meant.
        defaults: For what the run does not say.

    Raises:
        ValueError: If a flag was given and the run had another value.
    """
    args.channels = trained_with.get("channels")  # how images that are no RGB are read
    args.classes = trained_with.get("classes")  # of a classifier
    taken = []
    for flag, name in names.items():
        given, of_run = getattr(args, flag), trained_with.get(name)
        of_run = of_run[0] if isinstance(of_run, list | tuple) else of_run
        if of_run is None:
            setattr(args, flag, defaults.get(flag) if given is None else given)
        elif given is None:
            setattr(args, flag, of_run)
            taken.append(f"--{flag} {of_run}")
        elif given != of_run:
            raise ValueError(f"--{flag} {given} contradicts the checkpoint, which was trained with --{name} {of_run}")
    if taken:
        distributed.print_once(f"{' '.join(taken)}, as in the training")
