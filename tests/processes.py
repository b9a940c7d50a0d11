"""Running a test function in several gloo processes."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from shared import distributed

SERVER = multiprocessing.get_context("forkserver")  # its processes start in no time: it has imported torch already
SERVER.set_forkserver_preload(
    [
        "dino.main_dino",
        "swav.main_deepclusterv2",
        "deepcluster.main",
        "msn.main",
        "paws.paws_train",
        "xcit.main",
        "contriever.train",
        "tests.processes",
    ]
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(function: Callable, world_size: int, *args) -> list:
    """Call the module-level ``function(rank, *args)`` in ``world_size`` joined processes; its results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, free_port(), folder, args)
        mp.start_processes(_run, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pth", weights_only=True) for rank in range(world_size)]


def _run(rank: int, function: Callable, world_size: int, port: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init(device="cpu", timeout_s=60)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pth")
    distributed.barrier()
    distributed.shutdown()
