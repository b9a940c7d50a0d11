"""The smallest run of every training script, as each ``tests/<method>/tiny.py`` states it in its ``TRAININGS``."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Training:
    """A training script and the flags of a run of seconds, for the suites that kill, launch and compare runs.

    Attributes:
        module: Of the script.
        flags: Of two epochs that save after every step.
        data: Flags that lead to the data: ``{images}``, ``{tokens}`` and ``{encoder}`` are filled in.
        pair: Flags that give each of two processes half of the batch.
        prepare: Called before the training, to make its networks smaller.
        whole: Flags of a network that is small as it is.
        has_workers: Whether there are loader processes.
        check_pair: Looks at the newest checkpoint of two processes.
        exact: Flags without which a GPU draws other random numbers than a CPU.
        rounding: What rounding does to the first loss, relatively, where nothing after it can be compared: batch norm
            of four images, or clusters of features that hardly differ, make the next losses other ones at once.
        launcher: Module of the script that submits jobs, and its function.
        launch_flags: Of the launcher alone.
        job: Flags, beside ``whole``, of a run that is long enough to be interrupted as a job.
    """

    module: str
    flags: tuple[str, ...]
    data: tuple[str, ...] = ("--data_path", "{images}")
    pair: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    whole: tuple[str, ...] = ()
    has_workers: bool = True
    check_pair: Callable[[dict], None] | None = None
    exact: tuple[str, ...] = ()
    rounding: float | None = None
    launcher: tuple[str, str] | None = None
    launch_flags: tuple[str, ...] = ()
    job: tuple[str, ...] = ()

    def data_flags(self, places: dict[str, Path]) -> tuple[str, ...]:
        return tuple(flag.format(**places) for flag in self.data)

    def launch(self, arguments: list[str]) -> None:
        """Submit a job with these flags and those of the launcher."""
        module, function = self.launcher
        getattr(importlib.import_module(module), function)([*arguments, *self.launch_flags])


def trainings() -> dict[str, Training]:
    """Those of all methods, by name."""
    found = {}
    for file in sorted(TESTS.glob("*/tiny.py")):
        found |= importlib.import_module(f"tests.{file.parent.name}.tiny").TRAININGS
    return found
