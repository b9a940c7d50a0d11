"""One training run: its processes, precision, log and checkpoints, and where in the data it stands.

The loop stays in the method's script and reads like its paper; a run calls nothing of the method:

    run = Run(args, args.amp)  # then data, networks, loss, optimiser, schedules
    run.resume(data, total_steps, NETWORK_FLAGS, network=network, optimizer=optimizer)
    with run:                                            # a signal finishes the step, saves and stops
        for epoch in run.epochs():
            data.set_epoch(epoch, run.step_in_epoch)
            for step, (images, labels, indices) in run.steps(data.loader):
                ...
                run.backward(loss, optimizer)
                run.update(grad_norms, optimizer)        # left out when a gradient is not finite
                run.end_step(len(images), {"loss": loss})  # a line of the log, if it is due
            run.log_epoch()
            run.end_epoch()                              # saves
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.images.channels import are_asked_for, keep_channels
from shared.networks.weights import flags_of_training
from shared.optimisation.optim import step_unless_not_finite
from shared.optimisation.precision import Precision

from . import randomness
from .attempt import Attempt
from .checkpoint import Checkpointer, check_flags, check_folder, is_at_start, load_latest, restore, resume_position
from .health import HealthMonitor
from .log import RunLog
from .memory import keep_freed_memory, name_batch_flags
from .not_finite import FiniteGuard, NonFiniteSearch


class Run:
    """What all trainings do in the same way: join the processes, seed, claim the output folder, log, save, stop.

    Args:
        args: Flags of ``add_run_flags``, ``output_dir`` and ``seed``.
        amp: Precision of the forward passes, see :class:`shared.optimisation.precision.Precision`.
        file, subfolder: Newest checkpoint, and a folder that is made; both in the output folder.
        owns_folder: False beside another run, which may go on: the log has the name of the checkpoint.

    Attributes:
        device, output_dir, precision, path: Of this process; ``path`` is that of the newest checkpoint.
        health, log: What looks at every line, by rules of the method, and what writes them (from :meth:`resume` on).
        is_new, classes: Whether no step had been done before; names of a classifier's classes, for evaluations of it.
        epoch, step_in_epoch: Where a run goes on that is saved now; in the body of a step, the step after it.
    """

    epoch = step_in_epoch = 0
    search: NonFiniteSearch | None = None
    classes: Sequence[str] | None = None

    def __init__(self, args: Namespace, amp: str, file="checkpoint.pth", subfolder="", owns_folder: bool = True):
        self.args, self.owns_folder = args, owns_folder
        self.device = distributed.init(args.dist_url, args.device, args.dist_timeout)
        keep_freed_memory()
        randomness.seed_everything(args.seed)
        self.output_dir, self.path = Path(args.output_dir), Path(args.output_dir, file)
        if owns_folder:
            check_folder(self.path)
        if distributed.is_main_process():
            (self.output_dir / subfolder).mkdir(parents=True, exist_ok=True)
            if owns_folder:
                Attempt.current().claim(self.output_dir)
        distributed.barrier()
        self.precision = Precision(amp, self.device)
        if are_asked_for(args):
            keep_channels(args, flags_of_training(load_latest(self.path)))
        self.health = HealthMonitor()

    def resume(
        self,
        data,
        total_steps: int,
        network_flags: tuple[str, ...],
        *,
        checkpoint: dict | None = None,
        to_official: Callable[[dict], dict] = dict,
        from_official: Callable[[dict], dict] = dict,
        scheduled: tuple[str, ...] = ("lr",),
        **parts,
    ) -> None:
        """Go on where the newest checkpoint was written, or start where there is none.

        Args:
            data: States ``steps_per_epoch``, ``batch_size`` (of all processes together) and ``checksum``.
            total_steps: Of the whole run.
            network_flags: Flags that shape the networks: a checkpoint with other ones is refused.
            checkpoint: Instead of the newest one in the output folder; empty: start.
            to_official: Brings the state of a run into the layout of the official checkpoints.
            from_official: The way back; takes official files as well.
            scheduled: Options of optimisers that the steps set and a checkpoint restores; the flags set all others.
            parts: What checkpoints hold, under these names: networks, losses, optimisers, anything with a state dict.

        Raises:
            ValueError: If the checkpoint was written with another network, or the run is to be refused as changed.
        """
        args, self.data, self.total_steps, self.to_official = self.args, data, total_steps, to_official
        self.parts = {name: distributed.unwrap(part) for name, part in parts.items()}
        found = load_latest(self.path) if checkpoint is None else checkpoint
        checkpoint = from_official(found) if found else {}
        if checkpoint and ("args" in checkpoint or "epoch" not in checkpoint):  # some official files have no args
            check_flags(checkpoint, args, network_flags)
        self.is_new = is_at_start(checkpoint or None)
        name = None if self.owns_folder else self.path.name.removesuffix(".tar").removesuffix(".pth")
        resumed, loggers = "log" in checkpoint, [*args.loggers, *["tensorboard"] * args.tensorboard]
        self.log = RunLog(self.output_dir, total_steps, args.log_freq, loggers, resumed, name, vars(args))
        if checkpoint:
            restore(checkpoint, scheduled, **self.parts)
            if checkpoint.get("fp16_scaler"):
                self.precision.scaler.load_state_dict(checkpoint["fp16_scaler"])
            if resumed:
                self.log.load_state_dict(checkpoint["log"])
            position = resume_position(checkpoint, data.batch_size, data.checksum, args.on_changed_run)
            self.epoch, self.step_in_epoch = position
            where = "resuming at epoch {}, step {}".format(*position)
            distributed.print_once(where if self.steps_done < total_steps else f"{where}: the run is finished")
        networks = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        self.guard = FiniteGuard(networks, args.max_skipped_steps, self.device, checkpoint.get("skipped_steps", 0))

    def state(self, epoch: int, step_in_epoch: int) -> dict:
        """What a checkpoint holds of a run that goes on at this step; every process calls this."""
        state = {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "args": vars(self.args),
            "fp16_scaler": self.precision.scaler.state_dict(),
            "skipped_steps": int(self.guard.in_a_row),
            "batch_size": self.data.batch_size,
            "world_size": distributed.get_world_size(),
            "images": self.data.checksum,
            "log": self.log.state_dict(),
            **({} if self.classes is None else {"classes": self.classes}),
        }
        return self.to_official(state)

    def __enter__(self) -> "Run":
        every = self.args.saveckp_steps, self.args.saveckp_minutes
        checkpointer = Checkpointer(self.path, self.state, *every, self.guard.is_good, self.owns_folder)
        self.checkpointer = checkpointer.__enter__()
        self.log.start(self.data, self.parts, self.args)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.log.close()
        self.checkpointer.__exit__(kind, error, traceback)
        name_batch_flags(error, self.args)

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to be done, the first one from ``step_in_epoch`` on."""
        yield from range(self.epoch, -(-self.total_steps // self.data.steps_per_epoch))

    def steps(self, loader: Iterable) -> Iterator[tuple[int, tuple]]:
        """(step of the run, batch) for what ``loader`` yields, which starts at ``step_in_epoch``; ends with the run.

        Random numbers of a step come from (seed, step, rank). After the body, or ``continue``, what is due is saved,
        and the run stops if a signal has asked for it; ``break`` leaves the save to :meth:`end_epoch`. The last of too
        many steps without finite gradients is yielded again, with every module watched, and ``end_step`` ends the run.
        """
        for step, batch in enumerate(self.log.batches(loader), start=self.steps_done):
            if step == self.total_steps:
                return
            self.step = step
            self.step_in_epoch += 1
            seed = self.args.seed, step, distributed.get_rank()
            randomness.seed_step(*seed)
            yield step, batch
            if self.search is not None:
                randomness.seed_step(*seed)
                with self.search.of({"step": step, "epoch": self.epoch}, batch):
                    yield step, batch
            self.save_if_due()

    def backward(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Gradients in float32 and at their true scale."""
        self.precision.backward(loss, *optimizers)
        if self.search is not None:
            self.search.see_loss(loss)

    def update(self, grad_norms: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """One step of the optimisers, left out as a whole when a gradient is not finite."""
        for optimizer in optimizers:
            self.skipped = step_unless_not_finite(optimizer, grad_norms)
        self.precision.update()
        if self.search is None:
            self.guard.count(self.skipped)

    @property
    def logs_this_step(self) -> bool:
        """Whether this step ends with a line of the log, so that costly statistics are wanted."""
        return self.log.is_due(self.step)

    def end_step(self, images: int, averages: dict, health: dict | None = None) -> None:
        """Count the step in the log; where a line is due, look for a collapse and for gradients that stay NaN.

        Args:
            images: Of this process.
            averages: Numbers or 0-d tensors by name, averaged over the steps of a line.
            health: The same, stated by the line as of its last step.
        """
        if self.search is not None:
            self.search.stop(int(self.guard.in_a_row))
        line = self.log.step(self.step, self.epoch, images, averages | {"skipped": self.skipped}, **(health or {}))
        if line is not None:
            self.check_health(line)
        if line is not None and self.guard.too_many():
            self.search = NonFiniteSearch(self.guard.networks, self.output_dir / "nonfinite.pth")

    @property
    def steps_done(self) -> int:
        return self.epoch * self.data.steps_per_epoch + self.step_in_epoch

    def log_evaluation(self, **values: float) -> None:
        """Write the result of an evaluation after the steps done; the last epoch may be a short one."""
        self.log.evaluation(self.steps_done, -(-self.steps_done // self.data.steps_per_epoch), **values)

    def check_health(self, line: dict) -> None:
        """Say what a line shows about the health of the training, once for each kind of failure."""
        if problem := self.health.check({"step": self.steps_done, **line}):
            self.log.say(problem)

    def log_epoch(self, **values: float) -> dict:
        """Write the averages of the epoch, and ``values``, and return the line."""
        return self.log.end_epoch(self.epoch, **values)

    def end_epoch(self, keep_as: str | None = None) -> None:
        """Save, unless that was done less than a minute ago and more epochs follow, and stop if asked to."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.checkpointer.after_epoch(self.epoch - 1, keep_as, self.steps_done >= self.total_steps)

    def save(self, keep_as: str | None = None) -> None:
        """Save now, under a second name too if given."""
        self.checkpointer.save(self.epoch, self.step_in_epoch, keep_as)

    def save_if_due(self) -> None:
        """Save if that is due, and stop if a signal has arrived on any process."""
        self.checkpointer.after_step(self.epoch, self.step_in_epoch)

    def stop_if_asked(self) -> None:
        """Save and stop if a signal has arrived: on every process, in work that starts again if the run comes back."""
        self.checkpointer.stop_if_asked(self.epoch, self.step_in_epoch)
