"""Fine-tune an encoder on questions whose answering passages are known, with negatives of the batch and hard ones.

    python mine_negatives.py --data train.jsonl --passages passages.tsv --output_path train_hard.jsonl
    python finetuning.py --train_data train_hard.jsonl --eval_data dev.jsonl --model_path run/encoder \\
        --temperature 0.05 --negative_hard_ratio 0.1 --output_dir finetuned

Section 4.4 of the paper: the scores of each question with the positives and negatives of all questions of the batch, on
all processes, enter one softmax. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import nn

from contriever.encoder import Retriever
from contriever.flags import MINIMUM, check_training_flags, training_parser
from contriever.losses import InBatch, batch_statistics
from contriever.training.checkpoints import BATCH, TrainingData, finish, keep_numbered, resume, start_retriever
from contriever.training.evaluation import Evaluation
from contriever.training.optimisation import Objective, SharpnessAware, build_optimizer, contrast, gradient_norms
from contriever.training.questions import FineTuningPairs, read_examples
from shared import distributed
from shared.images.loading import EpochBatchSampler, make_loader
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.run.flags import parse_with_embedded_defaults
from shared.run.run import Run

NETWORK_FLAGS = ("pooling", "random_init")


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, ("adamw", "sam", "asam"))
    add = parser.add_argument_group("examples").add_argument
    records = ".json or .jsonl files of questions with positive_ctxs and, optionally, (hard_)negative_ctxs"
    add("--train_data", nargs="+", required=True, help=records)
    add("--eval_data", nargs="+", default=[], help="the same, to measure accuracy and MRR")
    add("--maxload", type=int, default=None, help="read so many training records at most")
    add("--chunk_length", type=int, default=256, help="most tokens of a question or passage")
    add("--negative_ctxs", type=int, default=1, help="negatives per question")
    add("--negative_hard_ratio", type=float, default=0.0, help="chance of each negative to be a hard one")
    add("--negative_hard_min_idx", type=int, default=0, help="leave out so many leading hard negatives")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = get_args_parser()
    minimum = MINIMUM | {"negative_ctxs": 0, "negative_hard_min_idx": 0}
    args = parse_with_embedded_defaults(parser, arguments, {}, minimum, "train_data")
    check_training_flags(parser, args)
    return args


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune from the newest checkpoint in ``args.output_dir``, or the encoder that is named."""
    run = Run(args, args.amp, subfolder="checkpoint")

    # encoder and examples
    retriever = start_retriever(args, run.device)
    data = open_data(args, retriever)

    # network, loss, optimiser
    encoder = retriever.model
    if args.compile:
        compile_network(encoder, "vectors", dynamic=True)
    accumulate(encoder, args.accumulate)
    trained = distributed.wrap(InBatch(encoder), run.device)
    optimizer = build_optimizer(encoder, args)
    objective = Objective(args)
    sharpness = None
    if args.optim != "adamw":
        if run.precision.name == "fp16":
            raise ValueError(f"--optim {args.optim} needs --amp bf16 or fp32: two passes do not share a loss scale")
        sharpness = SharpnessAware(encoder.parameters(), args.rho or 0.05, adaptive=args.optim == "asam")

    # checkpoints under the names of the official ones, monitoring
    resume(run, data, NETWORK_FLAGS, retriever, encoder, optimizer)
    held_out = None
    if args.eval_data:
        records = read_examples(args.eval_data)
        held_out = FineTuningPairs(records, retriever, args.chunk_length, normalize_text=args.eval_normalize_text)
    evaluation = Evaluation(args, retriever, examples=held_out)

    with run:
        if run.is_new:
            evaluation.run(encoder, run)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(trained, data.loader, optimizer, objective, sharpness, evaluation, run)
            run.log_epoch()
            run.end_epoch()
    if distributed.is_main_process():
        finish(run, retriever)
        print(f"fine-tuned encoder: {run.output_dir / 'encoder'}")


def open_data(args: argparse.Namespace, retriever: Retriever) -> TrainingData:
    """The batches of questions and passages that this process trains with."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if args.chunk_length > retriever.max_length:
        raise ValueError(f"--chunk_length {args.chunk_length}: the encoder reads {retriever.max_length} tokens at most")
    examples = read_examples(args.train_data, args.maxload, rank, world_size)
    most, fewest = distributed.max_over_processes(len(examples)), -distributed.max_over_processes(-len(examples))
    if not fewest:
        raise ValueError(f"--train_data {' '.join(args.train_data)}: fewer records than the {world_size} processes")
    if most < args.per_gpu_batch_size:
        raise ValueError(f"--per_gpu_batch_size {args.per_gpu_batch_size}: there are {most} records per process")
    negatives = args.negative_ctxs, args.negative_hard_ratio, args.negative_hard_min_idx
    texts = args.chunk_length, *negatives, args.eval_normalize_text
    pairs = FineTuningPairs(examples, retriever, *texts, args.seed, stream=rank)
    # each process has its own records; one with fewer than the others starts again before the epoch ends
    sampler = EpochBatchSampler(most, args.per_gpu_batch_size, seed=args.seed + 1_000_003 * rank)
    loader = make_loader(pairs, batch_sampler=sampler, num_workers=args.num_workers, device=retriever.device)
    distributed.print_once(f"{len(examples)} training records per process: {len(sampler)} steps per epoch")
    records = sum(distributed.all_gather_object(len(examples)))
    return TrainingData(loader, sampler, len(sampler), args.per_gpu_batch_size * world_size, records)


def train_one_epoch(
    trained: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    sharpness: SharpnessAware | None,
    evaluation: Evaluation,
    run: Run,
) -> None:
    """The steps of an epoch.

    Args:
        trained: A :class:`contriever.losses.InBatch`, wrapped for several processes.
        loader: Yields batches of :func:`contriever.training.questions.FineTuningPairs`.
    """
    trained.train()
    for step, batch in run.steps(loader):
        lr = objective.set_learning_rate(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        texts = [batch[name].to(run.device, non_blocking=True) for name in BATCH]
        distributed.check_same_on_all_processes(
            len(batch["k_tokens"]), "the number of passages of a step (hard negatives missing?)"
        )

        q, k, logits, labels, loss = contrast(trained, texts, objective, run.precision)
        run.backward(loss, optimizer)
        if sharpness is not None:
            sharpness.ascend()
            optimizer.zero_grad(set_to_none=True)
            *_, worst = contrast(trained, texts, objective, run.precision)
            run.backward(worst, optimizer)
            sharpness.descend()  # the gradient of the worst place nearby is used at the weights from before
        run.update(gradient_norms(optimizer), optimizer)

        run.end_step(len(labels), {"loss": loss, **batch_statistics(logits, labels, q, k)}, {"lr": lr})
        if evaluation.is_due(run.steps_done):
            evaluation.run(distributed.unwrap(trained).encoder, run)
        keep_numbered(run)


def main() -> None:
    distributed.run_script(finetune, parse_args)


if __name__ == "__main__":
    main()
