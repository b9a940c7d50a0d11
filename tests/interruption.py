"""Runs that end in the middle."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def interrupted(owner: object, name: str, call: int) -> Iterator[None]:
    """The block ends with a ``KeyboardInterrupt`` in call number ``call``, from 1, of a function of ``owner``."""
    calls, function = itertools.count(1), getattr(owner, name)

    def interrupting(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupting)
        yield
