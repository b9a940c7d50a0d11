"""Translation with ResMLP: an encoder-decoder whose tokens communicate through linear layers, not self-attention.

Touvron et al., "ResMLP: Feedforward networks for image classification with data-efficient training", 2021, section 3.6.

    python translation/main.py                                # a generated language pair, a minute on a CPU
    python translation/main.py --network transformer --output_dir runs/transformer      # a Transformer of equal size
    torchrun --nproc_per_node=8 translation/main.py --train_source train.en --train_target train.de \\
        --valid_source valid.en --valid_target valid.de --test_source test.en --test_target test.de --output_dir run

Files hold one sentence per line. The joint vocabulary of subwords is learned from them. The result is BLEU, of the test
sentences where there are some. Running the same command again resumes. The settings are ours: they were not verified
against the authors' code.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmlp.translation.corpus import (
    EncodedPairs,
    TokenBatchSampler,
    open_vocabulary,
    read_parallel_text,
    train_vocabulary,
)
from resmlp.translation.generated_language import generate_pairs
from resmlp.translation.sequence_models import NETWORKS, PAD, Translator
from resmlp.translation.translate import NETWORK_FLAGS, bleu, translate_sentences
from shared import distributed
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.precision import Precision
from shared.run.checkpoint import load_latest
from shared.run.flags import Parser, add_run_flags, parse_with_embedded_defaults
from shared.run.run import Run
from shared.run.settings import long_warmup, tell_settings
from shared.run.summary import command

# What replaces the defaults when no files are given: 2,000 sentences of five to eight subwords
GENERATED_DATA_DEFAULTS = {
    "vocabulary_size": 150,
    "max_length": 16,
    "dim": 64,
    "hidden_dim": 256,
    "depth": 2,
    "heads": 4,
    "dropout": 0.0,
    "epochs": 12,
    "max_tokens": 512,
    "optimizer": "adam",
    "lr": 0.004,
    "warmup_steps": 50,
    "output_dir": "runs/translation",
}
GENERATED_PAIRS = {"train": 2000, "valid": 100, "test": 100}
PARTS = ("train", "valid", "test")
MINIMUM = {"epochs": 1, "max_tokens": 1, "vocabulary_size": 8, "max_length": 2, "dim": 1, "hidden_dim": 1, "depth": 1}
MINIMUM |= {"heads": 1, "warmup_steps": 0, "beam": 1, "length_penalty": 0, "bleu_freq": 0, "log_freq": 1}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    for part in PARTS:
        for side in ("source", "target"):
            add(f"--{part}_{side}", default=None, help=f"{side} sentences for {part}; none: a generated language")
    add("--vocabulary", default=None, help="a SentencePiece model; by default one is learned from the training text")
    add("--vocabulary_size", type=int, default=32000, help="subwords to learn, of both languages together")
    longest = "most subwords of a sentence with its end; longer ones are left out, or cut where they are translated"
    add("--max_length", type=int, default=128, help=longest)

    add = parser.add_argument_group("network").add_argument
    add("--network", default="resmlp", choices=NETWORKS, help="transformer: of as many parameters")
    add("--dim", type=int, default=512, help="channels")
    add("--hidden_dim", type=int, default=2048, help="hidden channels of ResMLP's MLPs")
    add("--depth", type=int, default=6, help="layers of the encoder, and of the decoder")
    add("--heads", type=int, default=8, help="heads of every attention")
    add("--dropout", type=float, default=0.15, help="on residual branches and embeddings")
    add("--layer_scale", type=float, default=0.2, help="initial LayerScale of ResMLP")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=30, help="passes over the training pairs")
    add("--max_tokens", type=int, default=4096, help="tokens of a batch per process, on its longer side with padding")
    add("--optimizer", default="adagrad", choices=("adagrad", "adam"), help="adam: the rate falls after its warm-up")
    add("--lr", type=float, default=0.2, help="learning rate after the warm-up")
    add("--warmup_steps", type=int, default=32000, help="steps of linear warm-up")
    add("--label_smoothing", type=float, default=0.1, help="share of the target spread over the vocabulary")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the sentences and dropout")

    add = parser.add_argument_group("translation").add_argument
    add("--beam", type=int, default=4, help="hypotheses of the beam search")
    add("--length_penalty", type=float, default=0.6, help="0 prefers short translations, 1 scores per token")
    add("--bleu_freq", type=int, default=0, help="BLEU of the valid sentences also every so many epochs; 0: at the end")

    add = add_run_flags(parser, knn=False, pictures=False)
    add("--output_dir", default=".", help="checkpoint and logs")
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; without files the defaults are those of the generated language pair."""
    parser = get_args_parser()
    args = parse_with_embedded_defaults(parser, arguments, GENERATED_DATA_DEFAULTS, MINIMUM, "train_source")
    for flag in ("dropout", "label_smoothing"):
        if not 0 <= getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} is outside [0, 1)")
    for part in PARTS:
        if (getattr(args, f"{part}_source") is None) != (getattr(args, f"{part}_target") is None):
            parser.error(f"--{part}_source and --{part}_target belong together")
    if (args.train_source is None) != (args.valid_source is None):
        parser.error("--train_source and --valid_source belong together")
    if args.train_source is None and args.test_source is not None:
        parser.error("--test_source needs --train_source; translate.py translates with a network that is trained")
    return args


def train_translation(args: argparse.Namespace) -> dict[str, float]:
    """Train from the newest checkpoint in ``args.output_dir``, or from scratch; BLEU of the valid and test parts."""
    run = Run(args, args.amp)
    checkpoint = load_latest(run.path) or {}

    # data and vocabulary
    text = read_text(args)
    subword_model = find_vocabulary(args, checkpoint, text["train"])
    vocabulary = open_vocabulary(subword_model, f"--vocabulary {args.vocabulary}" if args.vocabulary else "vocabulary")
    train, valid = (EncodedPairs(vocabulary, *text[part], args.max_length, part) for part in ("train", "valid"))
    checksum, world_size = train.checksum(), distributed.get_world_size()
    distributed.check_same_on_all_processes((len(train), checksum), "the training text (pairs, checksum)")
    sampler = TokenBatchSampler(train.lengths, args.max_tokens, args.seed, distributed.get_rank(), world_size)
    data = SimpleNamespace(steps_per_epoch=len(sampler), batch_size=args.max_tokens * world_size, checksum=checksum)
    for part, pairs in (("train", train), ("valid", valid)):
        distributed.print_once(f"{part}: {pairs.describe()}")
    distributed.print_once(f"{len(vocabulary)} subwords, {data.steps_per_epoch} steps per epoch")
    total_steps = args.epochs * data.steps_per_epoch
    tell_settings(args, long_warmup("--warmup_steps", args.warmup_steps, total_steps, "steps"))

    # network and optimiser
    options = {flag: getattr(args, flag) for flag in NETWORK_FLAGS}
    network = Translator(len(vocabulary), dropout=args.dropout, **options).to(run.device)
    distributed.print_once(f"{args.network}: {sum(p.numel() for p in network.parameters()):,} parameters")
    wrapped = distributed.wrap(network, run.device)
    optimizer = build_optimizer(args.optimizer, network)
    lr = partial(learning_rate, peak=args.lr, warmup_steps=args.warmup_steps, falls=args.optimizer == "adam")

    run.resume(
        data,
        total_steps,
        ("vocabulary_size", "optimizer", *NETWORK_FLAGS),
        checkpoint=checkpoint,
        to_official=partial(add_vocabulary, subword_model=subword_model),
        network=network,
        optimizer=optimizer,
    )
    run.log.unit = "sentences"
    with run:
        for epoch in run.epochs():
            sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(run, wrapped, train, sampler, optimizer, lr, args.label_smoothing)
            result = {"valid_loss": validation_loss(network, valid, args.max_tokens, run.precision)}
            if args.bleu_freq and (epoch + 1) % args.bleu_freq == 0:
                result["valid_bleu"], _ = score(args, network, vocabulary, text["valid"], run.device, run.stop_if_asked)
            run.log_evaluation(**result)
            run.log_epoch(**result)
            run.end_epoch()

    results = {}
    for part in (part for part in ("valid", "test") if part in text):
        results[part], line = score(args, network, vocabulary, text[part], run.device)
        distributed.print_once(f"{args.network}, {part}: {line}")
    translation = command("resmlp/translation/translate.py", weights=run.path, input="YOUR_TEXT")
    distributed.print_once(f"next: {translation}")
    return results


def find_vocabulary(args: argparse.Namespace, checkpoint: dict, train: tuple[list[str], list[str]]) -> bytes:
    """The SentencePiece model of the checkpoint if there is one, else a given or a new one.

    Raises:
        ValueError: If the checkpoint was trained with another one than ``--vocabulary``.
    """
    if not checkpoint:
        learned = read_vocabulary(args, train) if distributed.is_main_process() else None
        return distributed.broadcast_object(learned)
    subword_model = checkpoint["vocabulary"].numpy().tobytes()
    if args.vocabulary is not None and read_vocabulary(args, train) != subword_model:
        raise ValueError(
            f"--vocabulary {args.vocabulary} is not the vocabulary of the checkpoint in {args.output_dir}; "
            "leave it out or use another --output_dir"
        )
    return subword_model


def add_vocabulary(state: dict, subword_model: bytes) -> dict:
    """The state of a run with what :mod:`translate` needs besides."""
    return state | {"vocabulary": torch.frombuffer(bytearray(subword_model), dtype=torch.uint8)}


def read_text(args: argparse.Namespace) -> dict[str, tuple[list[str], list[str]]]:
    """Source and target sentences of each part that there is."""
    if args.train_source is not None:
        files = {part: (getattr(args, f"{part}_source"), getattr(args, f"{part}_target")) for part in PARTS}
        return {part: read_parallel_text(*pair) for part, pair in files.items() if pair[0] is not None}
    source, target = generate_pairs(sum(GENERATED_PAIRS.values()))
    ends = np.cumsum(list(GENERATED_PAIRS.values())).tolist()
    ranges = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return {part: (source[r], target[r]) for part, r in zip(GENERATED_PAIRS, ranges, strict=True)}


def read_vocabulary(args: argparse.Namespace, train: tuple[list[str], list[str]]) -> bytes:
    """The SentencePiece model of ``--vocabulary``, or one that is learned from the training text."""
    if args.vocabulary is None:
        return train_vocabulary([*train[0], *train[1]], args.vocabulary_size)
    if not Path(args.vocabulary).is_file():
        raise ValueError(f"--vocabulary {args.vocabulary} is not a file")
    return Path(args.vocabulary).read_bytes()


def build_optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    """Adagrad, or Adam with the betas of the Transformer; the rate is set at every step."""
    if name == "adagrad":
        return torch.optim.Adagrad(network.parameters(), lr=0.0)
    return torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def learning_rate(step: int, peak: float, warmup_steps: int, falls: bool) -> float:
    """Linear warm-up to ``peak``; then constant, or falling with the inverse square root of the step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (max(warmup_steps, 1) / (step + 1)) ** 0.5 if falls else peak


def token_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Sum over the tokens of the cross-entropy against (1 - e) of the right subword and e spread over all.

    Args:
        logits: Shape (B, N, vocabulary).
        targets: Ids, shape (B, N); padding does not count.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def train_one_epoch(
    run: Run,
    network: nn.Module,
    pairs: EncodedPairs,
    sampler: TokenBatchSampler,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    label_smoothing: float,
) -> None:
    """One epoch of teacher forcing."""
    parameters = list(network.parameters())
    network.train()
    for step, indices in run.steps(sampler):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.zero_grad(set_to_none=True)
        source, target_in, target_out = (ids.to(run.device, non_blocking=True) for ids in pairs.batch(indices))
        # every token of the step counts the same, on whichever process it is
        tokens = distributed.all_reduce_mean((target_out != PAD).sum().float())
        with run.precision.autocast():
            loss = token_loss(network((source, target_in)), target_out, label_smoothing) / tokens

        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, 0), optimizer)
        run.end_step(len(indices), {"loss": loss, "lr": lr(step)})


@torch.no_grad()
def validation_loss(network: Translator, pairs: EncodedPairs, max_tokens: int, precision: Precision) -> float:
    """Mean negative log-probability of a token, in nats, over all pairs and processes."""
    network.eval()
    order = np.argsort(pairs.lengths, kind="stable")
    cuts = TokenBatchSampler(pairs.lengths, max(max_tokens, int(pairs.lengths.max()))).cuts
    totals = torch.zeros(2, dtype=torch.double, device=precision.device)  # loss, tokens
    for cut in cuts[distributed.get_rank() :: distributed.get_world_size()]:
        batch = pairs.batch(order[cut].tolist())
        source, target_in, target_out = (ids.to(precision.device, non_blocking=True) for ids in batch)
        with precision.autocast():
            loss = token_loss(network((source, target_in)), target_out, label_smoothing=0.0)
        totals += torch.stack([loss, (target_out != PAD).sum()])
    loss, tokens = distributed.all_reduce_sum(totals).tolist()
    return loss / tokens


def score(
    args: argparse.Namespace,
    network: nn.Module,
    vocabulary,
    text: tuple[list[str], list[str]],
    device: torch.device,
    between_batches: Callable[[], None] | None = None,
) -> tuple[float, str]:
    """BLEU of the translated sources, and a line that says how it was computed."""
    translations = translate_sentences(
        distributed.unwrap(network),
        vocabulary,
        text[0],
        device,
        args.beam,
        args.length_penalty,
        between_batches=between_batches,
    )
    return bleu(translations, text[1])


def main() -> None:
    distributed.run_script(train_translation, parse_args)


if __name__ == "__main__":
    main()
