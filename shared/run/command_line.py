"""Command lines of scripts that may not need torch: their parser, and one line for whatever ends them."""

import argparse
import contextlib
import difflib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from .memory import is_out_of_memory


def printable(text: str) -> str:
    """``text`` on one line, without the characters that a terminal obeys and bytes of names that are not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]", "\ufffd", text)


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults in its help, and mistakes in one line with the nearest flag.

    Args:
        docstring: Of the script; its first paragraph is the description.
    """

    def __init__(self, docstring: str = "", **options):
        options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | options
        super().__init__(**{"description": docstring.split("\n\n")[0]} | options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self.arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):  # a typo of one of them or of another flag
            for action in self._actions:
                action.required = False
            unknown = [word for word in self.parse_known_args(self.arguments)[1] if word.startswith("--")]
            message += f"; unrecognized arguments: {' '.join(unknown)}" if unknown else ""
        _, _, unknown = message.partition("unrecognized arguments: ")
        unknown = re.findall(r"--[^\s=]+", unknown)
        close = [match for name in unknown for match in difflib.get_close_matches(name, self._option_string_actions, 1)]
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
        say(error)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        say("stopped by Ctrl-C")
        raise SystemExit(128 + signal.SIGINT) from error
