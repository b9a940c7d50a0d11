"""Command-line flags that every training script has, and types of flags."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from shared import distributed
from shared.images.channels import add_channel_flags
from shared.images.decode import MAX_PIXELS

from .command_line import Parser, add_device_flag
from .loggers import LOGGERS

NOT_NEGATIVE = dict.fromkeys("lr base_lr warmup_steps cooldown_steps warmup_epochs mixup".split(), 0)
NOT_NEGATIVE |= dict.fromkeys(("saveckp_steps", "saveckp_minutes", "max_skipped_steps"), 0)


class AnyDashParser(Parser):
    """A parser to which ``--batch-size`` and ``--batch_size`` are the same flag, whichever of them was declared."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._declared(argument) for argument in arguments], namespace)

    def _declared(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        spellings = ("--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_"))
        if name.startswith("--") and name not in self._option_string_actions:
            name = next((s for s in spellings if s in self._option_string_actions), name)
        return name + equals + value


def bool_flag(text: str) -> bool:
    """An explicit boolean value on the command line: on/true/1 or off/false/0, in any case."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected on/true/1 or off/false/0, got {text!r}")


def add_reading_flags(add: Callable) -> None:
    """What may be read of images, with the ``add_argument`` of a group."""
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    add("--max_megapixels", type=float, default=MAX_PIXELS / 1e6, help="larger images count as unreadable")


def add_bad_image_flags(add: Callable, *choices: str, max_fraction: float = 0.01) -> None:
    """What happens to images that cannot be read, with the ``add_argument`` of a group.

    Args:
        choices: Of ``replace``, ``skip`` and ``error``, the first one is the default; by default the first and last.
    """
    choices = choices or ("replace", "error")
    add("--on_bad_image", default=choices[0], choices=choices, help="what an unreadable image does")
    most = "stop when more images than this share are unreadable"
    add("--max_bad_fraction", type=float, default=max_fraction, help=most)


def add_data_flags(parser: argparse.ArgumentParser) -> Callable:
    """Where the images come from; returns the ``add_argument`` of the group for further flags."""
    add = parser.add_argument_group("data").add_argument
    images = "training images: folder, list or torchvision name; default: the embedded ones"
    add("--data_path", default=None, help=images)
    add("--val_path", default=None, help="images to evaluate on; by default those that belong to --data_path")
    add_reading_flags(add)
    workers = "loader processes per rank; None: cores per rank less one, at most 10"
    add("--num_workers", "--workers", type=int, default=None, help=workers)
    add_channel_flags(add)
    add("--cache", default="none", help="decoded images: none, memory, or a folder for a memory-mapped file")
    add_bad_image_flags(add)
    return add


def add_own_images_flags(parser: Parser, file: str, config: str = "small_data.yaml") -> None:
    """``--small_data``, with its defaults in ``configs/<config>`` of the folder of ``file``, and ``--no_labels``."""
    parser.small_data = Path(file).parent / "configs" / config
    few = "defaults for some hundred to some thousand images; the numbers of images and steps choose some of them"
    parser.add_argument("--small_data", action="store_true", help=few)
    no_classes = "class folders, or the labels of a list or Dataset, are no classes"
    parser.add_argument("--no_labels", action="store_true", help=no_classes)


def add_run_flags(parser: argparse.ArgumentParser, knn: bool = True, pictures: bool = True) -> Callable:
    """Saving, logging and processes; returns the ``add_argument`` of the group for further flags.

    Args:
        knn: Whether there is a k-NN evaluation between epochs.
        pictures: Whether there are pictures of a run.
    """
    add = parser.add_argument_group("run").add_argument
    add("--saveckp_steps", type=int, default=0, help="also save within the epoch every so many steps")
    add("--saveckp_minutes", type=float, default=15, help="also save within the epoch after so many minutes")
    changed = "resume with another batch or number of processes (same_data), with other images too (continue), or never"
    add("--on_changed_run", default="same_data", choices=("same_data", "continue", "refuse"), help=changed)
    if knn:
        when = (
            "k-NN every so many epochs; 0: no evaluation; None: before and after training, with at most 100,000 images"
        )
        add("--eval_knn_freq", type=int, default=None, help=when)
    if pictures:
        add("--pictures", type=bool_flag, default=True, help="write pictures at the end")
    add("--log_freq", type=int, default=10, help="steps per line of the log")
    add("--loggers", nargs="*", default=[], choices=tuple(LOGGERS), help="where the log goes besides")
    add("--tensorboard", action="store_true", help="the same as --loggers tensorboard")
    skipped = "stop after so many steps in a row without finite gradients (exit code 3); 0: never"
    add("--max_skipped_steps", type=int, default=10, help=skipped)
    add_device_flag(add)
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--dist_timeout", type=float, default=1800, help="seconds to wait for other processes")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")
    return add


def parse_with_embedded_defaults(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    embedded_defaults: dict,
    minimum: Mapping[str, float],
    data_flag: str = "data_path",
) -> argparse.Namespace:
    """Parse a command line; without a value of ``data_flag`` the defaults are those of the embedded data.

    Args:
        embedded_defaults: Flags with other defaults then.
        minimum: Least value of each of these flags; less ends the program with a message.
        data_flag: Names the data.
    """
    args = parser.parse_args(arguments)
    if not getattr(args, data_flag):
        parser.set_defaults(**embedded_defaults)
        args = parser.parse_args(arguments)
    check_minimum(parser, args, minimum)
    return args


def check_minimum(parser: argparse.ArgumentParser, args: argparse.Namespace, minimum: Mapping[str, float]) -> None:
    """End the program with a message if a flag is less than it may be; flags without a value are left out.

    Rates, warm-ups and times between saves are not negative, and ``--crop_scale`` is a range of areas, everywhere.
    """
    for flag, least in (NOT_NEGATIVE | minimum).items():
        value = getattr(args, flag, None)
        value = min(value, default=None) if isinstance(value, list | tuple) else value
        if value is not None and not value >= least:  # nor NaN
            parser.error(f"--{flag} {value} is {f'less than {least}' if value < least else 'no number'}")
    low, high = getattr(args, "crop_scale", None) or (1, 1)
    if not 0 < low <= high:
        parser.error(f"--crop_scale {low} {high}: expected a range of areas, 0 < low <= high")


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *flags: str) -> None:
    """End the program with a message if one of these flags, where it has a value, is not above 0."""
    for flag in flags:
        value = getattr(args, flag, None)
        if value is not None and value <= 0:
            parser.error(f"--{flag} {value} is not positive")


def shorten_unset_warmup(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    arguments: Sequence[str] | None,
    warmup: str = "warmup_epochs",
    length: str = "epochs",
    stated: Iterable[str] = (),
) -> None:
    """Make a warm-up longer than the run a tenth of it, and say so, unless it is in ``arguments`` or ``stated``."""
    default, total = getattr(args, warmup), getattr(args, length)
    unset = argparse.Namespace(**{warmup: None})  # what is there keeps the parser from filling in a default
    if default <= total or warmup in stated or getattr(parser.parse_args(arguments, unset), warmup) is not None:
        return
    value = next(action.type for action in parser._actions if action.dest == warmup)(total / 10)
    setattr(args, warmup, value)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # processes have not joined yet
        print(f"--{warmup} is {value}, a tenth of --{length} {total}: the default of {default} would be longer than it")


def tell_embedded_defaults(data: str | None, embedded_defaults: dict, data_flag: str = "--data_path") -> None:
    """Print which flags have other defaults because no data were named."""
    if not data:
        names = " ".join(f"--{name}" for name in embedded_defaults)
        distributed.print_once(f"without {data_flag} these flags have defaults for the embedded data: {names}")
