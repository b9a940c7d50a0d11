"""Checks of parsed command lines, and what scripts say to mistakes."""

import argparse
import contextlib
import io
from collections.abc import Callable

import pytest

from shared.run.flags import bool_flag


def assert_values_arrive(
    parser: argparse.ArgumentParser, command: list[str], args: argparse.Namespace, changed: tuple[str, ...] = ()
) -> None:
    """Every value of the command line is in ``args``, under the name of its flag, as it was given.

    Args:
        changed: Flags whose value is another one after parsing.
    """
    starts = [i for i, word in enumerate(command) if word.startswith("--")]
    assert starts
    for start, end in zip(starts, [*starts[1:], len(command)], strict=True):
        flag, equals, value = command[start].partition("=")
        if flag in changed:
            continue
        words = [value] if equals else command[start + 1 : end]
        actions = {name.replace("_", "-"): action for name, action in parser._option_string_actions.items()}
        action = actions[flag.replace("_", "-")]
        found = getattr(args, action.dest)
        if words:
            found = found if isinstance(found, list | tuple) else [found]
            if action.type is bool_flag:  # 1 for true
                words = [str(bool_flag(word)) for word in words]
            assert [_plain(word) for word in words] == [_plain(str(word)) for word in found], flag
        elif isinstance(action, argparse.BooleanOptionalAction):
            assert found is not flag.startswith("--no-"), flag
        else:
            assert found == action.const, flag


def error_of(main: Callable[[], object], *arguments) -> str:
    """What a script prints that ends because of a mistake of its user."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2 and "Traceback" not in printed.getvalue()
    return printed.getvalue()


def _plain(word: str) -> float | str:
    """A number as such, whatever its spelling, and a truth value in small letters."""
    try:
        return float(word)
    except ValueError:
        return word.lower()
