"""Flags of both training scripts, with the names and defaults of the official ones."""

import argparse
from collections.abc import Callable

from shared.run.flags import bool_flag

MINIMUM = {
    "per_gpu_batch_size": 1,
    "per_gpu_eval_batch_size": 1,
    "total_steps": 1,
    "chunk_length": 2,
    "queue_size": 1,
    "log_freq": 1,
    "negative_ctxs": 0,
    "prob_augmentation": 0,
    "save_freq": 0,
    "eval_freq": 0,
    "eval_documents": 0,
    "warmup_steps": -1,
    "negative_hard_min_idx": 0,
    "num_workers": 0,
}


def training_parser(docstring: str, name: str, optimisers: tuple[str, ...] = ("adamw",)) -> argparse.ArgumentParser:
    """A parser with the flags that ``train.py`` and ``finetuning.py`` share.

    Args:
        docstring: Of the script; its first paragraph is the description.
        name: For the help text.
        optimisers: Choices of ``--optim``.
    """
    parser = argparse.ArgumentParser(
        name, description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("encoder").add_argument
    add("--retriever_model_id", default=None, help="folder, or name in the local cache of Hugging Face, of the encoder "
        "to start from; by default the one that comes as a package")  # fmt: skip
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
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> Callable:
    """Saving, logging and processes; returns the ``add_argument`` of the group."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./checkpoint/my_experiments", help="checkpoints and logs; the same command resumes")
    add("--model_path", default="none", help="checkpoint, its folder, or an encoder to start from")
    add("--continue_training", action="store_true", help="take optimiser and step from --model_path as well")
    add("--save_freq", type=int, default=50000, help="keep a numbered checkpoint every so many steps; 0: none")
    add("--saveckp_steps", type=int, default=0, help="also save every so many steps")
    add("--saveckp_minutes", type=float, default=15, help="also save after so many minutes")
    add("--on_changed_run", default="continue", choices=("continue", "refuse"),
        help="when the checkpoint was written with another batch, number of processes or text")  # fmt: skip
    add("--log_freq", type=int, default=100, help="steps per line of the log")
    add("--tensorboard", action="store_true", help="also log to TensorBoard")
    add("--max_skipped_steps", type=int, default=10,
        help="stop after so many steps in a row without finite gradients (exit code 3); 0: never")  # fmt: skip
    add("--seed", type=int, default=0, help="of the weights, the queue, the views and dropout")
    add("--num_workers", type=int, default=5, help="loader processes per rank")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--dist_timeout", type=float, default=1800, help="seconds to wait for other processes")
    add("--local_rank", "--local-rank", type=int, default=-1, help="ignored: read from the environment")
    add("--main_port", type=int, default=10001, help="ignored: MASTER_PORT or the job's number decide")
    return add


def check_flags_make_sense(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message that names the flag and its value."""
    for flag, least in MINIMUM.items():
        if hasattr(args, flag) and getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)} is less than {least}")
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
    if hasattr(args, "ratio_min") and not 0 <= args.ratio_min <= args.ratio_max <= 1:
        parser.error(f"--ratio_min {args.ratio_min} --ratio_max {args.ratio_max} are not in order between 0 and 1")


__all__ = ["add_run_flags", "bool_flag", "check_flags_make_sense", "training_parser"]
