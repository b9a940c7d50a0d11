"""Flags that the retrieval scripts have in common, and the encoder that they choose."""

import argparse
import os
from collections.abc import Callable

import torch

from shared import distributed
from shared.optimisation.precision import fast_bf16

from .encoder import Retriever, load_retriever


def retrieval_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser without flags; the first paragraph of the script's docstring is the description."""
    return argparse.ArgumentParser(
        description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_encoder_flags(parser: argparse.ArgumentParser) -> Callable:
    """Which encoder, and where it computes; returns the ``add_argument`` of the group for further flags."""
    add = parser.add_argument_group("encoder").add_argument
    add("--model_name_or_path", default=None, help="folder in the Hugging Face layout, training checkpoint, or name of "
        "a model in the local cache; without it the encoder that comes as a Python package")  # fmt: skip
    add("--allow_download", action="store_true", help="ask the Hugging Face hub for a name that is not in the cache")
    add("--no_fp16", action="store_true", help="compute and store in float32; by default vectors are stored in "
        "float16, and computed in half precision where the device is fast in it")  # fmt: skip
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    return add


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ``ValueError`` if a flag that was given is less than it may be."""
    for flag, value in least.items():
        if getattr(args, flag) is not None and getattr(args, flag) < value:
            raise ValueError(f"--{flag} {getattr(args, flag)} is less than {value}")


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the old launcher; torchrun and srun need neither."""
    add = parser.add_argument_group("processes").add_argument
    add("--local_rank", "--local-rank", type=int, default=-1, help="ignored: read from the environment")
    add("--main_port", type=int, default=-1, help="rendezvous port under srun")


def join_processes(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if there are any; the device of this one."""
    if getattr(args, "main_port", -1) > 0:
        os.environ.setdefault("MASTER_PORT", str(args.main_port))
    return distributed.init(device=args.device)


def load_encoder(args: argparse.Namespace, device: torch.device, normalized: bool) -> Retriever:
    """The encoder of the flags; says so when it expects normalised vectors and does not get them, or the reverse."""
    retriever = load_retriever(args.model_name_or_path, allow_download=args.allow_download, device=device)
    if retriever.normalized and not normalized:
        distributed.print_once(
            f"NOTE: {retriever.origin} was trained on vectors of unit length; without --norm_query --norm_doc it finds "
            "much less"
        )
    return retriever


def amp_of(no_fp16: bool, device: torch.device) -> str:
    """Number format of the encoder's products: half precision where the device is fast in it."""
    if no_fp16 or (device.type == "cpu" and not fast_bf16(device)):
        return "fp32"
    return "fp16" if device.type == "cuda" else "bf16"


def max_length_of(requested: int, retriever: Retriever, flag: str) -> int:
    """Most tokens per text; the default of 512 shrinks to what the encoder reads.

    Raises:
        ValueError: If any other number is more than that.
    """
    if requested > retriever.max_length and requested != 512:
        raise ValueError(f"{flag} {requested}: {retriever.origin} reads at most {retriever.max_length} tokens")
    return min(requested, retriever.max_length)
