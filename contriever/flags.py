"""Flags that several scripts share, with the names and defaults of the official ones, and the encoder they choose.

No torch before it is needed.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared.run.command_line import Parser, add_device_flag

if TYPE_CHECKING:
    import torch

    from .encoder import Retriever


def check_minimum(args: argparse.Namespace, **minimum: float) -> None:
    """Raise ``ValueError`` if a flag that was given is less than it may be."""
    for flag, least in minimum.items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)} is less than {least}")


# --- Training ---------------------------------------------------------------------------------------------------------

MINIMUM = {"per_gpu_batch_size": 1, "per_gpu_eval_batch_size": 1, "total_steps": 1, "chunk_length": 2, "log_freq": 1}
MINIMUM |= {"save_freq": 0, "eval_freq": 0, "num_workers": 0, "warmup_steps": -1}


def training_parser(docstring: str, optimisers: tuple[str, ...] = ("adamw",)) -> argparse.ArgumentParser:
    """A parser with the flags that ``train.py`` and ``finetuning.py`` share."""
    from shared.optimisation.accumulation import add_accumulation_flag
    from shared.run.flags import add_run_flags

    parser = Parser(docstring)
    add = parser.add_argument_group("encoder").add_argument
    start = "encoder to start from, folder or cached name; None: the packaged one"
    add("--retriever_model_id", default=None, help=start)
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
    add_accumulation_flag(add)
    add("--compile", action="store_true", help="torch.compile the encoder; dropout then draws otherwise")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_freq", type=int, default=500, help="evaluate every so many steps; 0: before and after only")
    add("--eval_datasets", nargs="+", default=[], help="folders in BEIR's layout, below --eval_datasets_dir")
    add("--eval_datasets_dir", default="./", help="where they are")
    add("--per_gpu_eval_batch_size", type=int, default=256, help="texts at once")
    add("--score_function", default="dot", choices=("dot", "cos_sim"), help="of the evaluation")
    add("--lower_case", action="store_true", help="lowercase texts in the evaluation")
    add("--eval_normalize_text", action="store_true", help="one form for dashes, quotation marks, ...")

    add = add_run_flags(parser, knn=False, pictures=False)
    parser.set_defaults(log_freq=100, local_rank=-1)
    add("--output_dir", default="./checkpoint/my_experiments", help="checkpoints and logs; the same command resumes")
    add("--model_path", default="none", help="checkpoint, its folder, or an encoder to start from")
    add("--continue_training", action="store_true", help="take optimiser and step from --model_path as well")
    add("--save_freq", type=int, default=50000, help="keep a numbered checkpoint every so many steps; 0: none")
    add("--seed", type=int, default=0, help="of the weights, the queue, the views and dropout")
    add("--num_workers", type=int, default=5, help="loader processes per rank")
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
    """Which encoder of texts of these kinds, and where it computes; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("encoder").add_argument
    add("--model_name_or_path", default=None, help="folder, checkpoint, or cached name; None: the packaged encoder")
    add("--allow_download", action="store_true", help="ask the Hugging Face hub for a name that is not in the cache")
    add("--no_fp16", action="store_true", help="float32; else vectors are stored, and where fast computed, in 16 bits")
    add_device_flag(add)
    for kind in kinds:
        add(f"--{kind}_prefix", default=None, help=f"put before each {kind}; None: what the model's folder says")
    return add


def with_prefixes(args: argparse.Namespace, encoder: Any) -> Any:
    """An encoder of either kind with the prompts that the flags give it."""
    own = ((kind, getattr(args, f"{kind}_prefix", None)) for kind in ("query", "passage"))
    encoder.prompts = encoder.prompts | {kind: prefix for kind, prefix in own if prefix is not None}
    return encoder


def load_encoder(args: argparse.Namespace, device: "torch.device", normalized: bool) -> "Retriever":
    """The encoder of the flags; says so when it expects normalised vectors and does not get them."""
    from shared import distributed

    from .encoder import load_retriever

    retriever = load_retriever(args.model_name_or_path, allow_download=args.allow_download, device=device)
    with_prefixes(args, retriever)
    if retriever.normalized and not normalized:
        distributed.print_once(
            f"NOTE: {retriever.origin} was trained on vectors of unit length; without --norm_query --norm_doc it finds "
            "much less"
        )
    return retriever
