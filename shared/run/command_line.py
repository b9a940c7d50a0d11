"""Command lines of scripts that may not need torch: their parser, and one line for whatever ends them."""

import argparse
import contextlib
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from .memory import is_out_of_memory


def printable(text: str) -> str:
    """``text`` on one line, without the characters that a terminal obeys and bytes of names that are not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]", "\ufffd", text)


MOST_USED = """folder weights data_path train_data val_path small_data arch model_name pretrained_weights pretrained
    model patch_size epochs total_steps batch_size_per_gpu per_gpu_batch_size batch_size batch unsupervised_batch_size
    lr base_lr out output_dir fname num_workers device seed""".split()


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with the flags that people use, and that tells mistakes with the nearest flag.

    Args:
        docstring: Of the script; its first paragraph is the description.
        most_used: Names of flags; the first ten that there are begin the help.

    Attributes:
        small_data: YAML file with the defaults of ``--small_data``, where there is such a flag.
        of_file: Flags to which a file of ``--fname`` gives values.
    """

    small_data: Path | None = None
    of_file: Iterable[str] = ()

    def __init__(self, docstring: str = "", most_used: Sequence[str] = MOST_USED, **options):
        options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | options
        super().__init__(**{"description": docstring.split("\n\n")[0]} | options)
        self.most_used = most_used
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)  # argparse's lacks -1e6
        self.official: dict | None = None  # defaults, once those for few images have taken their place

    def format_help(self) -> str:
        flags = {action.dest: action for action in self._actions}
        first = [flags[name] for name in self.most_used if name in flags][:10]
        places = [f"[{action.metavar or action.dest}]" for action in self._actions if not action.option_strings]
        groups = [("most used", first)] + [
            (group.title, [action for action in group._group_actions if action not in first])
            for group in self._action_groups
        ]
        formatter = self._get_formatter()
        formatter.add_usage(" ".join(["%(prog)s", *places, "[flags]"]), (), ())
        formatter.add_text(self.description)
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        arguments = self.arguments = sys.argv[1:] if args is None else args
        is_asked = any(len(word) > 2 and "--small_data".startswith(word) for word in arguments)  # argparse abbreviates
        if self.small_data is None or not is_asked:
            return super().parse_known_args(arguments, namespace)
        if self.official is None:
            from .yaml_config import read_config  # which imports this module

            self.official = {action.dest: action.default for action in self._actions if action.dest != "help"}
            self.set_defaults(**read_config(self.small_data, self))
        nothing = argparse.Namespace(**dict.fromkeys(self.official))  # keeps the parser from filling in defaults
        found = vars(super().parse_known_args(arguments, nothing)[0])
        namespace, rest = super().parse_known_args(arguments, namespace)
        is_set = {name for name, value in found.items() if value is not None}.union(self.of_file)
        namespace.unset = {name: value for name, value in self.official.items() if name not in is_set}
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):  # a typo of one of them or of another flag
            for action in self._actions:
                action.required = False
            unknown = [word for word in self.parse_known_args(self.arguments)[1] if word.startswith("--")]
            message += f"; unrecognized arguments: {' '.join(unknown)}" if unknown else ""
        _, _, unknown = message.partition("unrecognized arguments: ")
        unknown = re.findall(r"--[^\s=]+", unknown)
        flags = self._option_string_actions
        close = [match for name in unknown for match in difflib.get_close_matches(name, flags, n=1, cutoff=0.7)]
        hint = f"; did you mean {' and '.join(close)}?" if close else ""
        self.exit(2, f"error: {printable(message)}{hint} (--help lists all flags)\n")


def add_device_flag(add: Callable) -> None:
    """A device as released configuration files name it, with the ``add_argument`` of a group."""
    number = "auto: a GPU if there is one; the number of cuda:0 is ignored: launchers choose among GPUs"
    kinds = ("auto", "cpu", "cuda")
    add("--device", type=lambda text: text.split(":")[0], default="auto", choices=kinds, help=number)


def say(error: Exception | str, where: str = "") -> None:
    lines = "\n".join(map(printable, str(error).split("\n")))
    print(f"error{where}: {lines}", file=sys.stderr, flush=True)


def file_error(error: OSError) -> str:
    """What the system says of a file, and the flag of the command line whose value it is or lies in."""
    if not isinstance(error.filename, str | bytes) or error.strerror is None:  # none, or a number of an open file
        return str(error)
    path = Path(os.fsdecode(error.filename)).absolute()
    words = [(flag, Path(value)) for flag, value in itertools.pairwise(sys.argv[1:]) if flag.startswith("--")]
    words += [(flag, Path(value)) for flag, _, value in (word.partition("=") for word in sys.argv[1:]) if value]
    found = [f"{flag} {value}: " for flag, value in words if path.is_relative_to(value.absolute())]
    return f"{found[-1] if found else ''}{error.strerror}: {printable(os.fsdecode(error.filename))}"


@contextlib.contextmanager
def plain_exit(say: Callable[[Exception | str], object] = say) -> Iterator[None]:
    """For scripts of one process: an error of the user, too little memory and Ctrl-C are one line and an exit code.

    The codes are those of :func:`shared.distributed.clean_exit`. Names of files, which may hold any bytes, can be
    printed in here.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        say(f"out of memory, a smaller batch needs less: {reason}")
        raise SystemExit(2) from error
    except (ValueError, OSError) as error:
        say(file_error(error) if isinstance(error, OSError) else error)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        say("stopped by Ctrl-C")
        raise SystemExit(128 + signal.SIGINT) from error
