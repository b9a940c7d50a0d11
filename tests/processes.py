"""Functions and commands in processes of their own, which start in no time."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import PIL
import torch
import torch.multiprocessing as mp

from shared import distributed

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")  # its processes start in no time: it has imported torch already
SCRIPTS = [f"{file.parent.name}.{file.stem}" for file in ROOT.glob("*/main*.py")]
SLOW_TO_IMPORT = ["timm", "sklearn.cluster", *(f"PIL.{name}" for name in PIL._plugins)]  # seconds, as soon as needed
SERVER.set_forkserver_preload([*SCRIPTS, *SLOW_TO_IMPORT, __name__])
os.fsync = lambda descriptor: None  # a kill loses nothing that was written; a power cut would (test_outside_judge.py)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Variables as torchrun sets them for the processes of one machine."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in values.items()}


def run_processes(function: Callable, world_size: int, *args) -> list:
    """Call the module-level ``function(rank, *args)`` in ``world_size`` joined processes; its results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, free_port(), folder, args)
        mp.start_processes(_run, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pth", weights_only=True) for rank in range(world_size)]


def _run(rank: int, function: Callable, world_size: int, port: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, world_size, port)
    distributed.init(device="cpu", timeout_s=60)
    distributed.init = lambda *_, **__: torch.device("cpu")  # a script called here finds its processes joined already
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pth")
    distributed.barrier()
    distributed.shutdown()


def run_script(*command, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """What ``python *command``, a script or ``-m module`` with its flags, does in the folder ``cwd``.

    Libraries are there already, for which a fresh Python needs five seconds; modules of this repository are not, nor
    are they found unless ``cwd`` leads to them.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_run_script, args=([str(word) for word in command], cwd, printed))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        stdout, stderr = (path.read_text() if path.exists() else "" for path in printed)
        return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def _run_script(command: list[str], cwd: Path, printed: list[Path]) -> None:
    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a fresh Python
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    # `pip install -e` knows of them too
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    os.chdir(cwd)
    if command[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
