"""How every training script starts."""

import argparse
from pathlib import Path

import torch

from shared import distributed

from . import randomness
from .attempt import Attempt
from .memory import keep_freed_memory


def start_run(args: argparse.Namespace, subfolder: str = "") -> tuple[torch.device, Path]:
    """Join the other processes, seed, and claim the output folder.

    Args:
        args: Flags of :func:`shared.run.flags.add_run_flags`, ``output_dir`` and ``seed``.
        subfolder: Made inside the output folder.

    Returns:
        Device of this process, and the output folder.

    Raises:
        shared.run.attempt.Superseded: If a later attempt at the run owns the folder.
    """
    device = distributed.init(args.dist_url, args.device, args.dist_timeout)
    keep_freed_memory()
    randomness.seed_everything(args.seed)
    output_dir = Path(args.output_dir)
    if distributed.is_main_process():
        (output_dir / subfolder).mkdir(parents=True, exist_ok=True)
        Attempt.current().claim(output_dir)
    distributed.barrier()
    return device, output_dir
