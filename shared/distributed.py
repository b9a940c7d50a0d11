"""Joining the processes of a run, and the few collectives that the methods use.

The same calls work for one process (every collective is the identity), under ``torchrun`` and under ``srun``.
"""

import contextlib
import datetime
import os
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .run.attempt import NotFinite
from .run.command_line import plain_exit, say
from .run.memory import is_out_of_shared_memory, name_batch_flags

_control_group: dist.ProcessGroup | None = None  # gloo, for messages that must not wait for the GPU


class WorldNotFormed(RuntimeError):
    """The processes that the launcher asked for did not come together; the message names the rank and the reason."""


def init(dist_url: str = "env://", device: str = "auto", timeout_s: float = 1800) -> torch.device:
    """Join the process group that the launcher asked for and return this process's device.

    The launcher is recognised by its variables: RANK, WORLD_SIZE and LOCAL_RANK (torchrun), a SLURM job step
    (srun), or none of them (a single process, no group). GPUs talk through NCCL, CPUs through gloo.

    Args:
        dist_url: Rendezvous address; ``env://`` reads MASTER_ADDR and MASTER_PORT.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        timeout_s: How long to wait for the other processes, here and in every later collective.

    Raises:
        WorldNotFormed: If the requested processes do not come up.
        ValueError: If ``device`` asks for a GPU that this process cannot have.
    """
    if not 0 < timeout_s < threading.TIMEOUT_MAX:
        raise ValueError(f"--dist_timeout {timeout_s}: expected a number of seconds above 0")
    rank, world_size, local_rank = _launched_as()
    chosen = _choose_device(device, rank, local_rank)
    if world_size == 1:
        return chosen
    if dist_url == "env://" and "MASTER_ADDR" not in os.environ:
        if "SLURM_STEP_NODELIST" not in os.environ:
            raise WorldNotFormed(
                f"rank {rank} of {world_size}: MASTER_ADDR is not set, nor are srun's variables, such as "
                "SLURM_STEP_NODELIST; start the run with torchrun or srun"
            )
        os.environ["MASTER_ADDR"] = _first_slurm_host()
        # steps of one job, which may run side by side, have ports of their own
        number = 97 * _number("SLURM_JOB_ID") + _number("SLURM_STEP_ID")
        os.environ.setdefault("MASTER_PORT", str(20000 + number % 20000))
    where = dist_url
    if dist_url == "env://":
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store, _, _ = _hearing_signals(lambda: next(dist.rendezvous(dist_url, rank, world_size, timeout=timeout)))
        # torchrun may keep its store when it restarts the workers: addresses of dead ones must not be found there
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        global _control_group
        _control_group = dist.new_group(backend="gloo", timeout=timeout) if chosen.type == "cuda" else None
        barrier()
    except (RuntimeError, ValueError) as error:
        raise WorldNotFormed(
            f"rank {rank} of {world_size} could not form the process group at {where}: {error}"
        ) from error
    return chosen


def _launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher's environment variables state them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", "0")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_STEP_ID" in env:  # set by srun for each task, not in the batch script itself
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1"))  # such as 4(x3),2
        largest = max(int(count.partition("(")[0]) for count in per_node.split(","))
        env.setdefault("LOCAL_WORLD_SIZE", str(largest))  # as torchrun says how many share memory and cores
        return _number("SLURM_PROCID"), _number(tasks), _number("SLURM_LOCALID")
    if _number("SLURM_NTASKS", "1") > 1:
        raise WorldNotFormed(
            f"this job has SLURM_NTASKS={env['SLURM_NTASKS']} but was not started by srun or torchrun: "
            "it would train as a single process"
        )
    return 0, 1, 0


def _number(variable: str, default: str | None = None) -> int:
    """The value of a launcher's variable."""
    text = os.environ.get(variable, default)
    if text is None or not text.isdecimal():
        raise WorldNotFormed(f"the launcher's variable {variable} should be a number, but is {text!r}")
    return int(text)


def _hearing_signals(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, made in a thread: while it waits in C++, Python could handle no signal."""
    answer = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result()


def _choose_device(device: str, rank: int, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to this process")
    # launchers that give each task its own GPU show it as device 0
    index = local_rank if torch.cuda.device_count() > 1 else 0
    if index >= torch.cuda.device_count() or (local_rank > 0 and torch.cuda.device_count() == 1 and _shares_gpu()):
        raise ValueError(
            f"rank {rank}: local rank {local_rank} has no GPU, {torch.cuda.device_count()} visible on this node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _shares_gpu() -> bool:
    """Whether several local processes would land on the one visible GPU (torchrun shows all GPUs to each)."""
    by_srun_alone = "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return not by_srun_alone and _number("LOCAL_WORLD_SIZE", "1") > 1


def _first_slurm_host() -> str:
    nodes = os.environ["SLURM_STEP_NODELIST"]
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return hosts.stdout.split()[0]


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def print_once(*args, **kwargs) -> None:
    """``print`` on rank 0, flushed."""
    if is_main_process():
        print(*args, **kwargs, flush=True)


def barrier() -> None:
    if is_initialized():
        dist.barrier(group=_control_group)


def shutdown() -> None:
    """Leave the process group (nothing to do for a single process)."""
    global _control_group
    if is_initialized():
        dist.destroy_process_group()
    _control_group = None


class RankLost(RuntimeError):
    """Another process of the run has died; the message names its rank."""


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn the error of a collective that a dead process has broken off into :class:`RankLost`."""
    try:
        yield
    except RuntimeError as error:
        broken_off = "gloo" in str(error) or isinstance(error, dist.DistError)
        if broken_off and (lost := lost_ranks()):
            ranks = ", ".join(map(str, lost))
            raise RankLost(
                f"lost the connection to rank {ranks} of {get_world_size()}: the process or its host has died"
            ) from error
        raise


def lost_ranks() -> list[int]:
    """Ranks to which the connection of this process is closed, because their processes have ended."""
    time.sleep(0.2)  # gloo's own thread notices the end of a connection a little later than the kernel
    lost = []
    for rank in range(get_world_size()):
        if rank != get_rank():
            try:
                dist.isend(torch.zeros(1), rank, group=_control_group)  # waits for nobody
            except RuntimeError:
                lost.append(rank)
    return lost


@contextlib.contextmanager
def clean_exit() -> Iterator[None]:
    """For scripts: whatever can stop a run is one line on standard error and an exit code, not a traceback.

    ========  ==========================================================================================
    code      why
    ========  ==========================================================================================
    2         a mistake of the user, a file that cannot be read or written (ValueError, OSError), too little memory
    3         gradients or weights are not finite (:class:`shared.run.attempt.NotFinite`)
    4         another process of the run, or a process that loads images, has died or has not come up
    128 + n   stopped by signal n, in training after saving (:class:`shared.run.attempt.Interrupted`)
    1         anything else: a bug, with its traceback
    ========  ==========================================================================================

    Names of files, which may hold any bytes, can be printed in here.
    """
    try:
        with plain_exit(_say), naming_lost_ranks():
            yield
    except RankLost as error:
        _say(error)
        os._exit(4)  # a regular end of the process could wait for the one that is lost
    except NotFinite as error:
        _say(error)
        raise SystemExit(3) from error
    except RuntimeError as error:
        if is_out_of_shared_memory(error):
            _say(
                "the shared memory (/dev/shm) is too small for the batches of the loader processes; start the "
                "container with --shm-size=8g or --ipc=host, or take fewer --num_workers"
            )
            raise SystemExit(4) from error
        if not isinstance(error, WorldNotFormed) and not str(error).startswith("DataLoader worker"):
            raise
        _say(error)
        raise SystemExit(4) from error
    finally:
        shutdown()


def run_script(function: Callable[[Namespace], object], parse_args: Callable[[], Namespace]) -> None:
    """``function(parse_args())`` in :func:`clean_exit`; where memory runs out the flags of the batch are named."""
    with clean_exit():
        args = parse_args()
        try:
            function(args)
        except (MemoryError, RuntimeError) as error:
            name_batch_flags(error, args)
            raise


def _say(error: Exception | str) -> None:
    say(error, "" if get_world_size() == 1 else f" (rank {get_rank()})")


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel around ``module``, or the module itself for a single process."""
    if get_world_size() == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def neighbours(size: int) -> dist.ProcessGroup | None:
    """The group of ``size`` processes of consecutive ranks that this one belongs to; None when it is all of them.

    Raises:
        ValueError: If the processes cannot be divided into such groups.
    """
    world_size = get_world_size()
    if size == world_size:
        return None
    if size < 1 or world_size % size:
        raise ValueError(f"{world_size} processes cannot be divided into groups of {size}")
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world_size, size)]
    return groups[get_rank() // size]


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over all processes, or those of ``group``, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if get_world_size() > 1:
        dist.all_reduce(total, group=group)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over processes, as a new tensor without gradient."""
    return all_reduce_sum(tensor) / get_world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of all ranks (same shape on each) joined on dimension 0 in rank order, without gradient."""
    if get_world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        start = get_rank() * ctx.rows
        return all_reduce_sum(grad)[start : start + ctx.rows]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Like :func:`all_gather`; the gradient of a row is the sum of its gradients on all ranks."""
    return _AllGather.apply(tensor) if get_world_size() > 1 else tensor


def gather_on_main(tensor: Tensor, every: int = 1) -> Tensor | None:
    """Tensors of all ranks (same shape on each) stacked in rank order on rank 0 and its CPU; None on the others.

    Args:
        every: Only those of ranks 0, ``every``, 2 * ``every``, ...
    """
    tensor = tensor.detach().cpu().contiguous()
    if not is_main_process():
        if get_rank() % every == 0:
            dist.send(tensor, 0, group=_control_group)
        return None
    gathered = tensor.new_empty(get_world_size() // every, *tensor.shape)
    gathered[0] = tensor
    for i in range(1, len(gathered)):  # one at a time: no other process holds more than its own
        dist.recv(gathered[i], i * every, group=_control_group)
    return gathered


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank; the others pass one of the same shape and type."""
    tensor = tensor.detach().clone()
    if get_world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather_object(value) -> list:
    """One small picklable value of each rank, in rank order."""
    values = [value] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(values, value, group=_control_group)
    return values


def broadcast_object(value, src: int = 0):
    """The value that rank ``src`` passed, on every rank."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values, src=src, group=_control_group)
    return values[0]


def max_over_processes(number: int) -> int:
    """The largest value that any rank passed; every rank must call this."""
    if get_world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_control_group)
    return int(largest.item())


def check_same_on_all_processes(value, what: str) -> None:
    """Raise ``ValueError`` on every rank if ``value`` (small, comparable) differs between ranks."""
    values = all_gather_object(value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise ValueError(
            f"{what} differs between processes: rank 0 has {values[0]!r}, "
            f"rank {different[0]} has {values[different[0]]!r}"
        )
