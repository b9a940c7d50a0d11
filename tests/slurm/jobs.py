"""Training functions for jobs under test; each process imports them by name."""

import os
import signal
import time
from pathlib import Path


def say_rank(args):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names}


def write_flags(args):
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.output_dir) / "flags.txt").write_text(repr(sorted(vars(args))))


def sum_over_processes(args):
    import torch

    from shared import distributed

    distributed.init(device="cpu", timeout_s=180)
    total = distributed.all_reduce_sum(torch.tensor(10.0 + distributed.get_rank())).item()
    distributed.shutdown()
    return total


def fail_on_rank_1(args):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("a message of rank 1")


def fail_in_the_first_attempt(args):
    """Rank 1 leaves an error, rank 0 is still there."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return f"attempt {os.environ['SLURM_RESTART_COUNT']}"
    if os.environ["RANK"] == "1":
        raise ArithmeticError
    time.sleep(60)


def wait_for_a_signal_once(args):
    """The first attempt waits to be interrupted, the second one ends."""
    note = Path(args.output_dir) / f"started-{os.environ['RANK']}"
    if note.exists():
        return "resumed"
    note.write_text(str(os.getpid()))
    time.sleep(60)


def count(args):
    """A training in miniature: ``args.steps`` steps of ``args.step_s`` seconds, each with a collective and a log line.

    The state after step t is the sum over steps of (rank + 1) * step over all ranks, so a repeated or lost step shows.
    """
    import torch

    from shared import distributed
    from shared.run.checkpoint import Checkpointer, load_latest
    from shared.run.log import RunLog

    distributed.init(device="cpu", timeout_s=120)
    path = Path(args.output_dir) / "checkpoint.pth"
    checkpoint = load_latest(path)
    log = RunLog(args.output_dir, args.steps, log_freq=1, resumed=checkpoint is not None)
    total = torch.zeros(())
    if checkpoint is not None:
        total = checkpoint["total"]
        log.load_state_dict(checkpoint["log"])
    first = 0 if checkpoint is None else checkpoint["step"]

    def state(epoch: int, step: int) -> dict:
        return {"total": total, "step": step, "log": log.state_dict()}

    with Checkpointer(path, state, every_steps=args.save_every) as checkpointer:
        for step in range(first, args.steps):
            time.sleep(args.step_s)
            total = total + distributed.all_reduce_sum(torch.tensor((distributed.get_rank() + 1.0) * step))
            log.step(step, epoch=0, images=1, averages={"total": total})
            checkpointer.after_step(0, step + 1)
    log.close()
    distributed.shutdown()
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)), total.item()


def kill_self(args):
    os.kill(os.getpid(), args.number)
    time.sleep(5)


def be_warned_and_terminated(args):
    """Both signals are there when Python comes to look."""
    signals = {signal.SIGUSR2, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    time.sleep(5)
