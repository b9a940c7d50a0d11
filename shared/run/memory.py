"""Memory of a training process."""

import ctypes
import math
import os
import platform
import resource
import sys
from argparse import Namespace
from pathlib import Path

NO_SHARED_MEMORY = 77  # exit code of a loader process that cannot hand over its batch


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory of the host or of a GPU could not be had."""
    torch = sys.modules.get("torch")  # scripts that do without it do not wait for it here
    return isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else []))) or (
        "DefaultCPUAllocator" in str(error)
    )


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Whether a loader process could not hand over its batch; torch may raise that anywhere in the main process."""
    signs = "shared memory", f"exit code {NO_SHARED_MEMORY}", "SIGBUS"
    return "DataLoader worker" in str(error) and any(sign in str(error) for sign in signs)


def memory_of(device) -> int:
    """Bytes of a GPU, or this process's share of those of the host, of which a container may have less."""
    if device.type == "cuda":
        import torch  # here: see is_out_of_memory

        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(host, container_limit()) / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def container_limit() -> float:
    """Bytes of memory that the control group of this process may take; infinite without a limit."""
    limit = Path("/sys/fs/cgroup/memory.max")
    return float(limit.read_text().replace("max", "inf")) if limit.exists() else math.inf


def peak_memory() -> tuple[int, int]:
    """The most bytes that this process has held of its GPU, or of the host without one, and how many there are."""
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved(), memory_of(torch.device("cuda", torch.cuda.current_device()))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, memory_of(torch.device("cpu"))


def batch_flags(args: Namespace) -> str:
    """The flags of a script that say how much passes through its network at once."""
    return " or ".join(f"--{name}" for name, value in vars(args).items() if "batch" in name and type(value) is int)


def name_batch_flags(error: BaseException | None, args: Namespace) -> None:
    """Raise ``ValueError`` that says which flags to lower if ``error`` is one of memory; let any other one pass."""
    if is_out_of_memory(error):
        what = f"lower {batch_flags(args)}" if batch_flags(args) else "take smaller images, or fewer at once"
        if (pieces := getattr(args, "accumulate", None)) is not None:
            what += f" or raise --accumulate, which is {pieces} (the same updates)"
        raise ValueError(f"out of memory: {what} ({str(error).splitlines()[0]})") from error


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for its next allocation, until it ends.

    By default glibc returns large blocks to the system as soon as they are free. Training frees all activations once
    per step, and getting them back costs a page fault per 4 KiB: a tenth of a step on a CPU. The peak stays the same.

    Returns:
        Whether this C library can be told; others than glibc are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    # never return the top of the heap, take nothing from elsewhere, and let the thread of the backward pass use the
    # same heap: one of its own would be returned as soon as it is empty
    return bool(mallopt(m_trim_threshold, -1) and mallopt(m_mmap_max, 0) and mallopt(m_arena_max, 1))
