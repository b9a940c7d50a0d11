"""Runs that end in the middle."""

import itertools
from collections.abc import Callable


def interrupting(function: Callable, call: int) -> Callable:
    """``function``, except that its call number ``call``, counted from 1, raises ``KeyboardInterrupt``."""
    calls = itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted
