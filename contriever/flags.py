"""Flags that several scripts share, with the names and defaults of the official ones, and the encoder they choose."""

import argparse
import os
from collections.abc import Callable

import torch

from shared import distributed
from shared.optimisation.precision import fast_bf16
from shared.run.flags import Parser

from .encoder import Retriever, load_retriever


def script_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser without flags; the first paragraph of the script's docstring is the description."""
    return Parser(docstring)


def check_minimum(args: argparse.Namespace, **minimum: float) -> None:
    """Raise ``ValueError`` if a flag that was given is less than it may be."""
    for flag, least in minimum.items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)} is less than {least}")


# --- Training ---------------------------------------------------------------------------------------------------------

MINIMUM = {
    "per_gpu_batch_size": 1,
    "per_gpu_eval_batch_size": 1,
    "total_steps": 1,
    "chunk_length": 2,
    "log_freq": 1,
    "save_freq": 0,
    "eval_freq": 0,
    "warmup_steps": -1,
    "num_workers": 0,
}


def training_parser(docstring: str, optimisers: tuple[str, ...] = ("adamw",)) -> argparse.ArgumentParser:
    """A parser with the flags that ``train.py`` and ``finetuning.py`` share.

    Args:
        docstring: Of the script.
        optimisers: Choices of ``--optim``.
    """
    parser = script_parser(docstring)
    add = parser.add_argument_group("encoder").add_argument
    add(
        "--retriever_model_id",
        default=None,
        help="encoder to start from, folder or cached name; None: the packaged one",
    )
    add("--allow_download", action="store_true", help="ask the hub for a model that is not on this machine")
    add("--random_init", action="store_true", help="its configuration and tokenizer only, with random weights")
    add("--pooling", default="average", choices=("average", "cls"), help="from the states of tokens to one vector")
    add("--norm_query", action="store_true", help="divide the vectors of queries by their norms")
    add("--norm_doc", action="store_true", help="divide the vectors of documents by their norms")
    add("--dropout", type=float, default=0.1, help="of every dropout layer")
    add("--projection_size", type=int, default=None, help="must be the width of the encoder: there is no projection")

    add = parser.add_argument_group("optimisation").add_argument
    add("--temperature", type=float, default=1.0, help="divisor of the scores")
    add("--label_smoothing", type=float, default=0.0, help="in the cross entropy")
    add("--per_gpu_batch_size", type=int, default=64, help="queries per process")
    add("--total_steps", type=int, default=1000, help="number of updates")
    add("--warmup_steps", type=int, default=-1, help="updates with a rising learning rate")
    add("--optim", default="adamw", choices=optimisers, help="sam, asam: sharpness-aware AdamW (fine-tuning)")
    add("--scheduler", default="linear", choices=("linear", "cosine"), help="of the learning rate")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--lr_min_ratio", type=float, default=0.0, help="last learning rate / peak")
    add("--weight_decay", type=float, default=0.01, help="of all parameters, biases and norms among them")
    add("--beta1", type=float, default=0.9, help="of AdamW")
    add("--beta2", type=float, default=0.98, help="of AdamW")
    add("--eps", type=float, default=1e-6, help="of AdamW")
    add("--rho", type=float, default=None, help="radius of --optim sam or asam; 0.05 without it")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_freq", type=int, default=500, help="evaluate every so many steps; 0: before and after only")
    add("--eval_datasets", nargs="+", default=[], help="folders in BEIR's layout, below --eval_datasets_dir")
    add("--eval_datasets_dir", default="./", help="where they are")
    add("--per_gpu_eval_batch_size", type=int, default=256, help="texts at once")
    add("--score_function", default="dot", choices=("dot", "cos_sim"), help="of the evaluation")
    add("--lower_case", action="store_true", help="lowercase texts in the evaluation")
    add("--eval_normalize_text", action="store_true", help="one form for dashes, quotation marks, ...")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./checkpoint/my_experiments", help="checkpoints and logs; the same command resumes")
    add("--model_path", default="none", help="checkpoint, its folder, or an encoder to start from")
    add("--continue_training", action="store_true", help="take optimiser and step from --model_path as well")
    add("--save_freq", type=int, default=50000, help="keep a numbered checkpoint every so many steps; 0: none")
    add("--saveckp_steps", type=int, default=0, help="also save every so many steps")
    add("--saveckp_minutes", type=float, default=15, help="also save after so many minutes")
    changed = "when the checkpoint was written with another batch, number of processes or text"
    add("--on_changed_run", default="continue", choices=("continue", "refuse"), help=changed)
    add("--log_freq", type=int, default=100, help="steps per line of the log")
    add("--tensorboard", action="store_true", help="also log to TensorBoard")
    skipped = "stop after so many steps in a row without finite gradients (exit code 3); 0: never"
    add("--max_skipped_steps", type=int, default=10, help=skipped)
    add("--seed", type=int, default=0, help="of the weights, the queue, the views and dropout")
    add("--num_workers", type=int, default=5, help="loader processes per rank")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--dist_timeout", type=float, default=1800, help="seconds to wait for other processes")
    add("--local_rank", "--local-rank", type=int, default=-1, help="ignored: read from the environment")
    add("--main_port", type=int, default=10001, help="ignored: MASTER_PORT or the job's number decide")
    return parser


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message that names the flag and its value."""
    if args.model_path == "none" and args.continue_training:
        parser.error("--continue_training needs --model_path")
    if args.model_path != "none" and args.random_init:
        parser.error(f"--random_init has no effect with --model_path {args.model_path}")
    if args.temperature <= 0:
        parser.error(f"--temperature {args.temperature} is not positive")
    if args.rho is not None and (args.optim == "adamw" or args.rho <= 0):
        parser.error(f"--rho {args.rho} must be positive and needs --optim sam or asam, which finetuning.py has")
    if args.warmup_steps > args.total_steps:
        parser.error(f"--warmup_steps {args.warmup_steps} is more than --total_steps {args.total_steps}")
    for flag in ("dropout", "prob_augmentation", "negative_hard_ratio", "label_smoothing", "momentum"):
        if hasattr(args, flag) and not 0 <= getattr(args, flag) <= 1:
            parser.error(f"--{flag} {getattr(args, flag)} is not between 0 and 1")


# --- Retrieval --------------------------------------------------------------------------------------------------------


def add_encoder_flags(parser: argparse.ArgumentParser, kinds: tuple[str, ...] = ("query", "passage")) -> Callable:
    """Which encoder, and where it computes; returns the ``add_argument`` of the group for further flags.

    Args:
        kinds: Of texts that the script encodes.
    """
    add = parser.add_argument_group("encoder").add_argument
    add("--model_name_or_path", default=None, help="folder, checkpoint, or cached name; None: the packaged encoder")
    add("--allow_download", action="store_true", help="ask the Hugging Face hub for a name that is not in the cache")
    add("--no_fp16", action="store_true", help="float32; else vectors are stored, and where fast computed, in 16 bits")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add_prefix_flags(add, kinds)
    return add


def add_prefix_flags(add: Callable, kinds: tuple[str, ...]) -> None:
    """What is put before texts of these kinds."""
    for kind in kinds:
        add(f"--{kind}_prefix", default=None, help=f"put before each {kind}; None: what the model's folder says")


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
    """The encoder of the flags; says so when it expects normalised vectors and does not get them."""
    retriever = load_retriever(args.model_name_or_path, allow_download=args.allow_download, device=device)
    for kind in ("query", "passage"):
        if getattr(args, f"{kind}_prefix", None) is not None:
            retriever.prompts = {**retriever.prompts, kind: getattr(args, f"{kind}_prefix")}
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
