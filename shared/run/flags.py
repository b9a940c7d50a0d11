"""Command-line flags that every training script has, and types of flags."""

import argparse
import sys
from collections.abc import Callable, Sequence


class AnyDashParser(argparse.ArgumentParser):
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


def add_data_flags(parser: argparse.ArgumentParser) -> Callable:
    """Where the images come from; returns the ``add_argument`` of the group for further flags."""
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="training images: a folder, a .txt list or a torchvision data set name; "
        "without it the embedded digits are used and the defaults fit them")  # fmt: skip
    add("--val_path", default=None, help="images to evaluate on; by default those that belong to --data_path")
    add("--allow_absolute_paths", action="store_true", help="in .txt lists")
    add("--in_chans", type=int, default=3, choices=(1, 3), help="channels of the images")
    add("--cache", default="none", help="decoded images: none, memory, or a folder for a memory-mapped file")
    add("--on_bad_image", default="replace", choices=("replace", "error"), help="what an unreadable image does")
    add("--max_bad_fraction", type=float, default=0.01, help="stop when more images than this share are unreadable")
    return add


def add_run_flags(parser: argparse.ArgumentParser, knn: bool = True) -> Callable:
    """Saving, logging and processes; returns the ``add_argument`` of the group for further flags.

    Args:
        knn: Whether there is a k-NN evaluation between epochs.
    """
    add = parser.add_argument_group("run").add_argument
    add("--saveckp_steps", type=int, default=0, help="also save within the epoch every so many steps")
    add("--saveckp_minutes", type=float, default=15, help="also save within the epoch after so many minutes")
    add("--on_changed_run", default="continue", choices=("continue", "refuse"),
        help="when the checkpoint was written with another batch or number of processes")  # fmt: skip
    if knn:
        add("--eval_knn_freq", type=int, default=None, help="k-NN every so many epochs; 0: never; by default before "
            "and after training when there are at most 100,000 images")  # fmt: skip
    add("--pictures", type=bool_flag, default=True, help="write pictures at the end")
    add("--log_freq", type=int, default=10, help="steps per line of the log")
    add("--tensorboard", action="store_true", help="also log to TensorBoard")
    add("--max_skipped_steps", type=int, default=10,
        help="stop after so many steps in a row without finite gradients (exit code 3); 0: never")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--dist_timeout", type=float, default=1800, help="seconds to wait for other processes")
    add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")
    return add
