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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.evaluation import Evaluation
from contriever.finetuning_data import FineTuningPairs, read_examples
from contriever.flags import add_run_flags, check_flags_make_sense, training_parser
from contriever.losses import InBatch, batch_statistics, inbatch_logits
from contriever.sam import SharpnessAware
from contriever.training_setup import (
    Objective,
    OnPair,
    Resumable,
    build_optimizer,
    link_latest,
    save,
    start_retriever,
    update,
)
from shared import distributed
from shared.images.loading import EpochBatchSampler, make_loader
from shared.optimisation.precision import Precision
from shared.run import randomness
from shared.run.checkpoint import Checkpointer
from shared.run.log import RunLog
from shared.run.not_finite import FiniteGuard
from shared.run.start import start_run

BATCH = ("q_tokens", "q_mask", "k_tokens", "k_mask")


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, "Contriever fine-tuning", ("adamw", "sam", "asam"))
    add = parser.add_argument_group("examples").add_argument
    add("--train_data", nargs="+", required=True, help=".json or .jsonl files of questions with positive_ctxs and, "
        "optionally, negative_ctxs and hard_negative_ctxs")  # fmt: skip
    add("--eval_data", nargs="+", default=[], help="the same, to measure accuracy and MRR")
    add("--maxload", type=int, default=None, help="read so many training records at most")
    add("--chunk_length", type=int, default=256, help="most tokens of a question or passage")
    add("--negative_ctxs", type=int, default=1, help="negatives per question")
    add("--negative_hard_ratio", type=float, default=0.0, help="chance of each negative to be a hard one")
    add("--negative_hard_min_idx", type=int, default=0, help="leave out so many leading hard negatives")
    add_run_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser or get_args_parser()
    args = parser.parse_args(arguments)
    check_flags_make_sense(parser, args)
    return args


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune from the newest checkpoint in ``args.output_dir``, or the encoder that is named."""
    device, output_dir = start_run(args, "checkpoint")
    if distributed.is_main_process():
        link_latest(output_dir)
    precision = Precision(args.amp, device)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()

    # encoder and examples
    retriever = start_retriever(args, device)
    if args.chunk_length > retriever.max_length:
        raise ValueError(f"--chunk_length {args.chunk_length}: the encoder reads {retriever.max_length} tokens at most")
    examples = read_examples(args.train_data, args.maxload, rank, world_size)
    most, fewest = distributed.max_over_processes(len(examples)), -distributed.max_over_processes(-len(examples))
    if not fewest:
        raise ValueError(f"--train_data {' '.join(args.train_data)}: fewer records than the {world_size} processes")
    if most < args.per_gpu_batch_size:
        raise ValueError(
            f"--per_gpu_batch_size {args.per_gpu_batch_size}: there are {most} training records per process"
        )
    pairs = FineTuningPairs(
        examples,
        retriever,
        args.chunk_length,
        args.negative_ctxs,
        args.negative_hard_ratio,
        args.negative_hard_min_idx,
        args.eval_normalize_text,
        args.seed,
        stream=rank,
    )
    # each process has its own records; one with fewer than the others starts again before the epoch ends
    sampler = EpochBatchSampler(most, args.per_gpu_batch_size, seed=args.seed + 1_000_003 * rank)
    epoch_steps = len(sampler)
    loader = make_loader(pairs, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    distributed.print_once(f"{len(examples)} training records per process: {epoch_steps} steps per epoch")

    # network and optimiser
    encoder = retriever.model
    trained = distributed.wrap(InBatch(encoder), device)
    optimizer = build_optimizer(encoder, args)
    sharpness = None
    if args.optim != "adamw":
        if precision.name == "fp16":
            raise ValueError(f"--optim {args.optim} needs --amp bf16 or fp32: two passes do not share a loss scale")
        sharpness = SharpnessAware(encoder.parameters(), args.rho or 0.05, adaptive=args.optim == "asam")

    networks = {"questions": OnPair(encoder), "passages": OnPair(encoder)}
    records = sum(distributed.all_gather_object(len(examples)))
    must_match = ("pooling", "random_init")
    run = Resumable(
        args, output_dir, retriever, encoder, optimizer, precision, networks, epoch_steps, records, must_match
    )
    evaluation = Evaluation.of(args, retriever, datasets=())
    if args.eval_data:
        held_out = read_examples(args.eval_data)
        evaluation.examples = FineTuningPairs(
            held_out, retriever, args.chunk_length, normalize_text=args.eval_normalize_text
        )

    # epochs
    with run.checkpointer() as checkpointer:
        if run.is_new:
            evaluation.run(encoder, run.first_epoch * epoch_steps + run.first_step, run.first_epoch, run.log)
        for epoch in range(run.first_epoch, -(-args.total_steps // epoch_steps)):
            first_step = run.first_step if epoch == run.first_epoch else 0
            sampler.set_epoch(epoch, first_step)
            train_one_epoch(
                trained,
                loader,
                optimizer,
                Objective.from_args(args),
                sharpness,
                epoch=epoch,
                first_step=first_step,
                steps_per_epoch=epoch_steps,
                total_steps=args.total_steps,
                save_freq=args.save_freq,
                seed=args.seed,
                precision=precision,
                log=run.log,
                guard=run.guard,
                evaluation=evaluation,
                checkpointer=checkpointer,
            )
            run.log.end_epoch(epoch)
            checkpointer.after_epoch(epoch)
    run.log.close()
    if distributed.is_main_process():
        retriever.save(output_dir / "encoder")
        print(f"fine-tuned encoder: {output_dir / 'encoder'}")


def train_one_epoch(
    trained: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    sharpness: SharpnessAware | None,
    *,
    epoch: int,
    first_step: int,
    steps_per_epoch: int,
    total_steps: int,
    save_freq: int,
    seed: int,
    precision: Precision,
    log: RunLog,
    guard: FiniteGuard,
    evaluation: Evaluation,
    checkpointer: Checkpointer,
) -> None:
    """The steps of an epoch from ``first_step`` on, up to step ``total_steps`` of the run.

    Args:
        trained: A :class:`contriever.losses.InBatch`, wrapped for several processes.
        loader: Yields batches of :func:`contriever.finetuning_data.collate`.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    trained.train()
    start = epoch * steps_per_epoch + first_step

    def contrast(q_ids: Tensor, q_mask: Tensor, k_ids: Tensor, k_mask: Tensor) -> tuple[Tensor, ...]:
        """Loss of a batch, with what it was computed from."""
        with precision.autocast():
            q, k = trained(q_ids, q_mask, k_ids, k_mask, objective.norm_query, objective.norm_doc)
        all_keys = distributed.all_gather_with_grad(k.float())
        logits, labels = inbatch_logits(q, all_keys, objective.temperature, rank, world_size)
        return F.cross_entropy(logits, labels, label_smoothing=objective.label_smoothing), logits, labels, q, k

    for step, batch in enumerate(log.batches(loader), start=start):
        if step == total_steps:
            return
        randomness.seed_step(seed, step, rank)
        optimizer.zero_grad(set_to_none=True)
        q_ids, q_mask, k_ids, k_mask = inputs = [batch[name].to(precision.device, non_blocking=True) for name in BATCH]
        distributed.check_same_on_all_processes(
            len(k_ids), "the number of passages of a step (hard negatives missing?)"
        )

        loss, logits, labels, q, k = contrast(*inputs)
        worst = loss
        if sharpness is not None:
            loss.backward()
            sharpness.ascend()
            optimizer.zero_grad(set_to_none=True)
            worst = contrast(*inputs)[0]  # its gradient is used at the weights from before
        skipped = update(worst, optimizer, objective.lr(step), precision, sharpness)
        guard.count(skipped)

        averages = {"loss": loss, **batch_statistics(logits, labels, q, k), "skipped": skipped}
        line = log.step(step, epoch, len(labels), averages, lr=objective.lr(step))
        if line is not None and guard.too_many():
            randomness.seed_step(seed, step, rank)
            sides = {"questions": (q_ids, q_mask), "passages": (k_ids, k_mask)}
            with precision.autocast():
                guard.stop({**batch, "step": step, "epoch": epoch}, [q_ids, k_ids], sides, loss)
        if evaluation.is_due(step + 1):
            evaluation.run(distributed.unwrap(trained).encoder, step + 1, epoch, log)
        save(checkpointer, epoch, step + 1 - epoch * steps_per_epoch, step + 1, save_freq)


def main() -> None:
    with distributed.clean_exit():
        finetune(parse_args())


if __name__ == "__main__":
    main()
