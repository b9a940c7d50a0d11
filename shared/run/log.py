"""The log of a run: JSON lines always, a progress bar on a terminal, TensorBoard and other services by flag."""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shared import distributed

from .attempt import Attempt
from .estimate import NEXT_S, duration_text, final_bytes, size_text
from .loggers import IDENTITIES, LOGGERS, check_installed
from .memory import peak_memory

SETTLED_S = 10  # of steps, after which it is known how long the run takes
LONG_S = 1800


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means over steps and processes of (sum, count) pairs; NaN where no step was finite."""
    if not sums:
        return {}
    device = next(iter(sums.values())).device
    totals = distributed.all_reduce_sum(torch.stack([pair.to(device) for pair in sums.values()]))
    return dict(zip(sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))


def _jsonable(value):
    """The value itself; None for a NaN or an infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file into an error that does not name it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _free_name(path: Path) -> Path:
    return next(p for i in itertools.count(1) if not (p := path.with_name(f"{path.name}.{i}")).exists())


def read_log(path: str | Path) -> list[dict]:
    """Lines of a JSON-lines file; a last line that is still being written is left out.

    Raises:
        ValueError: If another line is no JSON object.
    """
    lines = []
    for number, text in enumerate(Path(path).read_text().splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        lines.append(line)
    return lines


class RunLog:
    """Averages of a run, in two files of JSON lines inside ``output_dir``.

    ``metrics.jsonl`` gets one line per ``log_freq`` steps and one per evaluation; ``log.txt`` one per epoch. Both are
    written by rank 0 with values averaged over processes. The state (sums since the last line and the lengths of the
    files) belongs into the checkpoint: after a resume the files are cut back to it, so no line is lost, doubled or
    reordered.

    Args:
        output_dir: Folder of the run.
        total_steps: Length of the whole run, for the progress bar.
        log_freq: Steps per line of ``metrics.jsonl``.
        loggers: Names in ``LOGGERS``, which get the lines of ``metrics.jsonl`` too.
        resumed: Whether :meth:`load_state_dict` will follow; otherwise files that exist are put aside.
        name: Of a run beside the one that owns the folder: the files are ``<name>.jsonl`` and ``<name>.txt``.
        flags: Of the run, for those of the loggers that show them.

    Attributes:
        unit: What a batch consists of; lines state how many of them per second.
    """

    unit = "images"

    def __init__(
        self,
        output_dir: str | Path,
        total_steps: int,
        log_freq: int = 10,
        loggers: Sequence[str] = (),
        resumed: bool = False,
        name: str | None = None,
        flags: Mapping | None = None,
    ):
        self.files = {
            file: Path(output_dir) / (file if name is None else name + Path(file).suffix)
            for file in ("metrics.jsonl", "log.txt")
        }
        self.attempt = Attempt.current() if name is None else None
        self.total_steps = total_steps
        self.log_freq = log_freq
        self.window: dict[str, Tensor] = {}  # (sum, count) of each average since the last line
        self.epoch: dict[str, Tensor] = {}  # the same since the start of the epoch
        self.images = 0
        self.waited_s = self.before_s = 0.0  # of the line that is being counted; before_s: in earlier epochs
        self.line_start = time.perf_counter()
        self.step_start = self.line_start  # when the batch of the step had come
        self.first: tuple[int, float] | None = None  # steps done after the first one of this process, and when
        self.said = self.line_start  # when a line was printed
        self.final_bytes: Callable[[], int] | None = None
        self.is_settled = False
        self.bar = None
        self.logger_arguments = Path(output_dir), name or "", flags or {}
        self.loggers, self.open_loggers = dict.fromkeys(loggers), []
        check_installed(self.loggers)
        self.kept: list[str] = []  # names under which the lines of an earlier attempt stay
        if distributed.is_main_process():
            for path in self.files.values():
                if path.exists() and path.stat().st_size and not resumed:
                    os.replace(path, kept := _free_name(path))  # lines of another run are not mixed with ours
                    self.kept.append(kept.name)
                path.touch()
            if name is None and not resumed:
                (Path(output_dir) / IDENTITIES).unlink(missing_ok=True)
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)

    def start(self, data, parts: dict, args: Namespace) -> None:
        """Say how many steps there are; the first ones tell how long the run takes and how large it becomes."""
        self.final_bytes = partial(final_bytes, parts, args, data.steps_per_epoch, self.total_steps)
        if self.kept:
            self.say(f"no checkpoint here: from the beginning; the log before is kept as {', '.join(self.kept)}")
        few = data.steps_per_epoch * data.batch_size <= 5000
        self.hint = "; try --small_data" if few and getattr(args, "small_data", True) is False else ""
        self.say(f"{self.total_steps} steps in all, {data.steps_per_epoch} per epoch, of {data.batch_size} {self.unit}")

    def batches(self, loader: Iterable) -> Iterator:
        """Iterate over ``loader`` and measure how long the training waits for data.

        What happens between two epochs, such as an evaluation, takes no time of a line that goes on after it.
        """
        self.line_start = time.perf_counter()
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                self.before_s += time.perf_counter() - self.line_start
                return
            self.step_start = time.perf_counter()
            self.waited_s += self.step_start - start
            yield batch

    def is_due(self, step: int) -> bool:
        """Whether the step with this global index ends with a line, so that costly statistics are wanted."""
        return (step + 1) % self.log_freq == 0 or step + 1 == self.total_steps

    def step(self, step: int, epoch: int, images: int, averages: dict[str, Tensor | float], **values) -> dict | None:
        """Count one step of ``images`` images per process; when a line is due, write it and return it.

        Args:
            averages: Quantities to average over steps and processes, e.g. the loss; steps where one is not finite do
                not count. 0-d tensors are read only when a line is due.
            values: Quantities of this very step that the line states as they are, averaged over processes.
        """
        for name, value in averages.items():
            value = torch.as_tensor(value, dtype=torch.double).detach()
            finite = value.isfinite()
            # (sum, count) stay on the device: reading them would wait for it
            pair = torch.stack([torch.where(finite, value, 0.0), finite.double()])
            for sums in (self.window, self.epoch):
                sums[name] = sums[name].to(pair.device, non_blocking=pair.is_cuda) + pair if name in sums else pair
        self.images += images
        if self.bar is not None:
            self.bar.update(step + 1 - self.bar.n)
        if self.final_bytes is not None:
            self._estimate(step + 1)
        if not self.is_due(step):
            left_s = self._left_s(step + 1)
            if self.bar is None and left_s is not None and time.perf_counter() - self.said >= NEXT_S:
                self.say(f"step {step + 1}  {duration_text(left_s)} left")
            return None
        line = {"step": step + 1, "epoch": epoch}
        one = torch.ones((), dtype=torch.double)
        current = {name: torch.as_tensor(value, dtype=torch.double) for name, value in values.items()}
        line |= _means(self.window | {k: torch.stack([v, one.to(v.device)]) for k, v in current.items()})
        elapsed = self.before_s + time.perf_counter() - self.line_start
        line[f"{self.unit}_per_s"] = round(self.images * distributed.get_world_size() / elapsed, 2)
        line["data_wait"] = round(self.waited_s / elapsed, 4)
        self.window, self.images, self.waited_s, self.before_s = {}, 0, 0.0, 0.0
        self.line_start = time.perf_counter()
        self._write("metrics.jsonl", line)
        self._show(line, self._left_s(step + 1))
        return line

    def _left_s(self, done: int) -> float | None:
        """Seconds until the end, by the time of the steps after the first one and of all that was between them."""
        first, start = self.first or (done, 0)
        return (time.perf_counter() - start) / (done - first) * (self.total_steps - done) if done > first else None

    def _estimate(self, done: int) -> None:
        """Say how long the run takes, its size and memory: by its first step, and once more by some seconds."""
        now, left_s = time.perf_counter(), self._left_s(done)
        if self.first is None:
            self.first, needed = (done, now), self.final_bytes()
            self.size, folder = size_text(needed), self.files["log.txt"].parent
            taken = sum(file.stat().st_size for file in folder.glob("*.pth*"))  # by what is replaced
            if needed > (room := shutil.disk_usage(folder).free + taken):
                self.say(f"WARNING: checkpoints will take {self.size}, and {folder} has room for {size_text(room)}")
            if any(pair.is_cuda for pair in self.window.values()):
                return  # the GPU may not have begun yet
            left_s = (now - self.step_start) * (self.total_steps - done)
        elif self.is_settled or now - self.first[1] < SETTLED_S:
            return
        else:
            self.is_settled = True
        hint = self.hint if left_s > LONG_S else ""
        folder, (held, memory) = self.files["log.txt"].parent, peak_memory()
        so_far = f"memory so far {size_text(held)} of {size_text(memory)}"
        self.say(f"about {duration_text(left_s)} to go, and {self.size} in {folder} in the end; {so_far}{hint}")

    def evaluation(self, step: int, epoch: int, **values: float) -> None:
        """Write the result of an evaluation after ``step`` steps."""
        self._write("metrics.jsonl", {"step": step, "epoch": epoch, **values})
        self._show({"step": step, "epoch": epoch, **values})

    def end_epoch(self, epoch: int, **values: float) -> dict:
        """Write the averages of the epoch as ``train_<name>``, and ``values``, to ``log.txt``; start the next one."""
        line = {f"train_{name}": value for name, value in _means(self.epoch).items()} | {"epoch": epoch, **values}
        self.epoch = {}
        self._write("log.txt", line)
        return line

    def state_dict(self) -> dict:
        """Sums of this rank and the lengths of the files, which are on the disk when this returns."""
        lengths = {}
        for name, path in self.files.items() if distributed.is_main_process() else ():
            with _naming(path), open(path, "r+b") as file:  # some file systems flush no file that is open for reading
                os.fsync(file.fileno())
                lengths[name] = os.fstat(file.fileno()).st_size
        sums = {name: {k: v.tolist() for k, v in getattr(self, name).items()} for name in ("window", "epoch")}
        return {"lengths": lengths, "sums": distributed.all_gather_object(sums)}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the lines that ``state`` knows; later ones belong to steps that will be repeated."""
        if distributed.get_rank() < len(state["sums"]):
            for name, sums in state["sums"][distributed.get_rank()].items():
                setattr(self, name, {k: torch.tensor(v, dtype=torch.double) for k, v in sums.items()})
        for name, length in state["lengths"].items() if distributed.is_main_process() else ():
            path = self.files[name]
            if path.stat().st_size < length:
                distributed.print_once(
                    f"WARNING: {path} is shorter than when the checkpoint was written: lines are gone"
                )
                length = path.read_bytes().rfind(b"\n") + 1  # without a torn last line
            os.truncate(path, length)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for logger in self.open_loggers:
            logger.close()

    def _write(self, name: str, line: dict) -> None:
        if not distributed.is_main_process():
            return
        path = self.files[name]
        if self.attempt is not None:
            self.attempt.check(path.parent)  # a newer one may be writing its own lines by now
        with _naming(path), open(path, "a") as file:
            file.write(json.dumps({k: _jsonable(v) for k, v in line.items()}) + "\n")
        if "step" in line:
            if len(self.open_loggers) < len(self.loggers):
                self.open_loggers = [LOGGERS[name](*self.logger_arguments, line["step"]) for name in self.loggers]
            for logger in self.open_loggers:
                logger.write(line["step"], {k: v for k, v in line.items() if k not in ("step", "epoch")})

    def _show(self, line: dict, left_s: float | None = None) -> None:
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()]
        self.say("  ".join(shown if left_s is None else [*shown, f"{duration_text(left_s)} left"]))

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar."""
        self.said = time.perf_counter()
        if not distributed.is_main_process():
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
