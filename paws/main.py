"""Any of the training programs of this folder, chosen by ``--sel`` as in the official code.

    python main.py                                                 # PAWS on the embedded materials
    python main.py --sel suncet_train --fname configs/suncet/imgnt_train.yaml ...

See ``paws_train.py`` (the default), ``suncet_train.py``, ``fine_tune.py`` and ``snn_fine_tune.py``, which can also be
started directly, for their flags; ``--sel few_labels`` is the demonstration of ``few_labels.py``.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

from shared import distributed
from shared.run.flags import Parser

# Name of a program, which is that of its module, and of the function that runs it.
PROGRAMS = {
    "paws_train": "train_paws",
    "suncet_train": "train_suncet",
    "fine_tune": "fine_tune",
    "snn_fine_tune": "snn_fine_tune",
    "few_labels": "compare",
}


def selected(arguments: list[str] | None) -> str:
    """The program that the command line chooses."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--sel", default="paws_train", choices=PROGRAMS)
    return first.parse_known_args(arguments)[0].sel


def get_args_parser(program: str = "paws_train") -> argparse.ArgumentParser:
    """The parser of a program with the flags of this script."""
    parser = importlib.import_module(f"paws.{program}").get_args_parser()
    parser.add_argument("--sel", default=program, choices=PROGRAMS, help="which program to run")
    devices = "cuda:0 or cpu, the same as --device; torchrun starts a process on each of several GPUs"
    parser.add_argument("--devices", nargs="+", default=None, help=devices)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse the command line with the flags of the program that it chooses."""
    program = selected(arguments)
    args = importlib.import_module(f"paws.{program}").parse_args(arguments, parser or get_args_parser(program))
    del args.sel
    if args.devices:
        args.device = kind_of(args.devices)
    del args.devices
    return args


def kind_of(devices: list[str]) -> str:
    """``cpu`` or ``cuda`` for ``--devices``.

    Raises:
        ValueError: If these are several, or another GPU than the first: launcher and environment choose those.
    """
    given = f"--devices {' '.join(devices)}"
    if len(devices) > 1:
        raise ValueError(f"{given}: start one process for each with torchrun --nproc_per_node={len(devices)} main.py")
    kind, _, number = devices[0].partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdigit())):
        raise ValueError(f"{given}: expected cuda:0 or cpu")
    if number not in ("", "0"):
        raise ValueError(f"{given}: set CUDA_VISIBLE_DEVICES={number} to use this GPU, and say cuda:0")
    return kind


def program_function(program: str) -> Callable[[argparse.Namespace], object]:
    """The function that runs a program with its parsed flags."""
    return getattr(importlib.import_module(f"paws.{program}"), PROGRAMS[program])


def main() -> None:
    distributed.run_script(program_function(selected(None)), parse_args)


if __name__ == "__main__":
    main()
