"""Training functions for jobs under test; each process imports them by name."""

import os
import time
from pathlib import Path


def say_rank(args):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names}


def write_flags(args):
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.output_dir) / "flags.txt").write_text(repr(sorted(vars(args))))


def sum_over_processes(args):
    import torch

    from shared import distributed

    distributed.init(device="cpu", timeout_s=60)
    total = distributed.all_reduce_sum(torch.tensor(10.0 + distributed.get_rank())).item()
    distributed.shutdown()
    return total


def fail_on_rank_1(args):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("a message of rank 1")


def wait_for_a_signal_once(args):
    """The first attempt waits to be interrupted, the second one ends."""
    note = Path(args.output_dir) / f"started-{os.environ['RANK']}"
    if note.exists():
        return "resumed"
    note.write_text(str(os.getpid()))
    time.sleep(60)


def kill_self(args):
    os.kill(os.getpid(), args.number)
    time.sleep(5)
