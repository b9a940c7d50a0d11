"""Unsupervised dense retrieval: train an encoder of texts with Contriever.

Izacard et al., "Unsupervised Dense Information Retrieval with Contrastive Learning", TMLR 2022.

    python train.py                                  # random weights, documentation of packages: minutes on a CPU
    python preprocess.py --datapath my_texts.txt --outdir encoded/my_texts
    python train.py --train_data encoded/my_texts --output_dir run

Two random crops of the same text are a query and the document that answers it; the encoder learns to tell that document
from many others: those in a queue that a slowly moving copy of the encoder has filled (MoCo), or those of the same
batch. Running the same command again resumes the run.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from contriever import new_encoder
from contriever.augmentations import AUGMENTATIONS, Recipe, SpecialTokens
from contriever.encoder import Retriever
from contriever.flags import MINIMUM, check_training_flags, training_parser
from contriever.losses import InBatch, MoCo, batch_statistics, moco_logits
from contriever.report import summary, tell_unsuitable_settings
from contriever.text.documentation import tokenized_documentation
from contriever.text.tokens import check_tokenizer, token_files, vocabulary_fingerprint
from contriever.training.checkpoints import BATCH, TrainingData, finish, keep_numbered, resume, start_retriever
from contriever.training.evaluation import Evaluation
from contriever.training.optimisation import Objective, build_optimizer, contrast, gradient_norms
from contriever.training.pairs import PretrainingPairs, StepSampler, fingerprint, open_datasets, steps_per_epoch
from shared import distributed
from shared.images.loading import make_loader
from shared.networks.compiling import compile_network
from shared.optimisation.accumulation import accumulate
from shared.pictures.report import save_page
from shared.run.flags import bool_flag, parse_with_embedded_defaults, shorten_unset_warmup
from shared.run.run import Run
from shared.run.summary import paragraphs

NETWORK_FLAGS = ("pooling", "random_init", "contrastive_mode", "queue_size")

# What replaces the official defaults when no --train_data is given: some thousand docstrings and a small encoder with
# random weights and a vocabulary of its own. So little text would fill a queue with itself: negatives of the batch.
EMBEDDED_ENCODER = "--vocab_size 8000 --hidden_size 128 --layers 2 --positions 256"
EMBEDDED_DATA_DEFAULTS = {
    "embedded_text": True,
    "train_data": ["runs/documentation"],
    "retriever_model_id": "runs/documentation/encoder",
    "output_dir": "runs/demo",
    "loading_mode": "full",
    "chunks": "document",
    "chunk_length": 128,
    "ratio_min": 0.1,
    "ratio_max": 0.5,
    "augmentation": "delete",
    "prob_augmentation": 0.1,
    "norm_query": True,
    "norm_doc": True,
    "temperature": 0.05,
    "contrastive_mode": "inbatch",
    "per_gpu_batch_size": 64,
    "total_steps": 400,
    "warmup_steps": 40,
    "lr": 1e-3,
    "log_freq": 20,
    "eval_documents": 300,
    "num_workers": 0,
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__)
    parser.set_defaults(embedded_text=False)
    add = parser.add_argument_group("text").add_argument
    add("--train_data", nargs="+", default=[], help="data sets: folders of preprocess.py; none: docs of packages")
    modes = ("split", "full", "single")
    add("--loading_mode", default="split", choices=modes, help="shards of a process: its part of them, all, the first")
    add("--sampling_coefficient", type=float, default=0.0, help="0: every data set alike; 1: by their sizes")
    add("--chunk_length", type=int, default=256, help="tokens of a chunk, from which both views are taken")
    chunks = "packed: chunks may straddle documents, as in the reference; document: none does"
    add("--chunks", default="packed", choices=("packed", "document"), help=chunks)

    add = parser.add_argument_group("views").add_argument
    add("--pairs", default="crop", choices=("crop", "ict"), help="ict: the inverse cloze task, for comparison")
    add("--ratio_min", type=float, default=0.1, help="least length of a crop / chunk")
    add("--ratio_max", type=float, default=0.5, help="greatest length of a crop / chunk")
    add("--augmentation", default="none", choices=AUGMENTATIONS, help="of the tokens of both views")
    add("--prob_augmentation", type=float, default=0.0, help="its probability for each token")

    add = parser.add_argument_group("negatives").add_argument
    add("--contrastive_mode", default="moco", choices=("moco", "inbatch"), help="where negatives come from")
    add("--queue_size", "--moco_queue", type=int, default=65536, help="negatives of moco")
    add("--momentum", type=float, default=0.999, help="of the key encoder")
    dropout = "dropout in the key encoder; the published models were trained with it"
    add("--moco_train_mode_encoder_k", type=bool_flag, nargs="?", const=True, default=True, help=dropout)

    recall = "measure how many of so many training documents are found from one of their sentences; 0: do not"
    parser.add_argument("--eval_documents", type=int, default=0, help=recall)
    return parser


def parse_args(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse and check the command line; without ``--train_data`` the defaults are those of the embedded text."""
    parser = parser or get_args_parser()
    minimum = MINIMUM | {"queue_size": 1, "prob_augmentation": 0, "eval_documents": 0}
    args = parse_with_embedded_defaults(parser, arguments, EMBEDDED_DATA_DEFAULTS, minimum, "train_data")
    shorten_unset_warmup(parser, args, arguments, "warmup_steps", "total_steps")
    check_training_flags(parser, args)
    if not 0 <= args.ratio_min <= args.ratio_max <= 1:
        parser.error(f"--ratio_min {args.ratio_min} --ratio_max {args.ratio_max} are not in order between 0 and 1")
    return args


def train_contriever(args: argparse.Namespace) -> None:
    """Train from the newest checkpoint in ``args.output_dir``, or from the encoder that is named."""
    run = Run(args, args.amp, subfolder="checkpoint")

    # encoder and text
    if args.retriever_model_id == EMBEDDED_DATA_DEFAULTS["retriever_model_id"]:
        make_embedded_encoder(Path(args.retriever_model_id))
    retriever = start_retriever(args, run.device)
    pairs = open_pairs(args, retriever)
    data = open_data(args, pairs, run.device)
    tell_unsuitable_settings(args, len(pairs), data.batch_size)

    # networks, loss, optimiser
    model, trained = build_model(args, retriever)
    if args.compile:
        for encoder in model.children():
            compile_network(encoder, "vectors", dynamic=True)
    accumulate(retriever.model, args.accumulate)
    optimizer = build_optimizer(model, args)
    objective = Objective(args)

    # checkpoints under the names of the official ones, monitoring
    resume(run, data, NETWORK_FLAGS, retriever, model, optimizer)
    evaluation = Evaluation(args, retriever, pairs.datasets)
    if evaluation.disabled_reason:
        distributed.print_once(f"no evaluation: {evaluation.disabled_reason}")

    with run:
        if run.is_new:
            evaluation.run(retriever.model, run)
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(model, trained, data.loader, optimizer, objective, evaluation, run)
            run.log_epoch()
            run.end_epoch()
    if distributed.is_main_process():
        finish(run, retriever)
        fill_steps = args.queue_size // data.batch_size if args.contrastive_mode == "moco" else None
        print(summary(run.output_dir, args, fill_steps))
        print(paragraphs({"Page": save_page(run)}))


def make_embedded_encoder(folder: Path) -> None:
    """A small encoder with random weights, unless it is there."""
    if distributed.is_main_process() and not (folder / "config.json").exists():
        flags = ["--outdir", str(folder), *EMBEDDED_ENCODER.split()]
        new_encoder.new_encoder(new_encoder.get_args_parser().parse_args(flags))
    distributed.barrier()


def open_pairs(args: argparse.Namespace, retriever: Retriever) -> PretrainingPairs:
    """The text of ``--train_data`` as pairs of views."""
    if args.embedded_text and distributed.is_main_process():
        tokenized_documentation(Path(args.train_data[0]), retriever.tokenizer)
    distributed.barrier()
    longest_view = args.chunk_length if args.pairs == "ict" else int(args.chunk_length * args.ratio_max)
    if longest_view + 2 > retriever.max_length:
        raise ValueError(f"--chunk_length {args.chunk_length}: the encoder reads {retriever.max_length} tokens at most")
    vocabulary = vocabulary_fingerprint(retriever.tokenizer)
    for folder in args.train_data:
        check_tokenizer(token_files(folder), vocabulary)
    return PretrainingPairs(
        open_datasets(args.train_data, args.loading_mode, args.chunk_length, args.chunks == "document"),
        Recipe(args.ratio_min, args.ratio_max, args.augmentation, args.prob_augmentation, args.pairs),
        SpecialTokens.of(retriever.tokenizer),
        args.sampling_coefficient,
        retriever.tokenizer.pad_token_id,
        args.seed,
        stream=distributed.get_rank() if args.loading_mode == "split" else 0,
    )


def open_data(args: argparse.Namespace, pairs: PretrainingPairs, device: torch.device) -> TrainingData:
    """The batches of pairs that this process trains with."""
    for name, dataset, share in zip(pairs.names, pairs.datasets, pairs.probabilities, strict=True):
        distributed.print_once(f"{name}: {dataset.num_tokens} tokens, {len(dataset)} chunks, {share:.1%} of the pairs")
    text = fingerprint(args.train_data)
    distributed.check_same_on_all_processes(text, "the training text (files, sizes and ends)")
    batch_size, rank, world_size = args.per_gpu_batch_size, distributed.get_rank(), distributed.get_world_size()
    epoch_steps = steps_per_epoch(pairs, batch_size, args.loading_mode)
    sampler = StepSampler(batch_size, epoch_steps, args.total_steps, rank, world_size)
    loader = make_loader(pairs, batch_sampler=sampler, num_workers=args.num_workers, device=device)
    return TrainingData(loader, sampler, epoch_steps, batch_size * world_size, text)


def build_model(args: argparse.Namespace, retriever: Retriever) -> tuple[MoCo | InBatch, nn.Module]:
    """What is saved, and the part of it that gets gradients, wrapped for several processes."""
    device = retriever.device
    if args.contrastive_mode == "inbatch":
        model = InBatch(retriever.model).to(device)
        return model, distributed.wrap(model, device)
    texts_per_step = args.per_gpu_batch_size * distributed.get_world_size()
    if args.queue_size % texts_per_step:
        raise ValueError(
            f"--queue_size {args.queue_size} is not a multiple of the {texts_per_step} texts of one step "
            "(--per_gpu_batch_size times processes)"
        )
    model = MoCo(retriever.model, args.queue_size, args.momentum).to(device)
    model.encoder_k.train(args.moco_train_mode_encoder_k)
    return model, distributed.wrap(model.encoder_q, device)


def train_one_epoch(
    model: MoCo | InBatch,
    trained: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    evaluation: Evaluation,
    run: Run,
) -> None:
    """The steps of an epoch.

    Args:
        trained: What gets gradients, wrapped for several processes: the query encoder of MoCo, or the whole of InBatch.
        loader: Yields batches of :class:`contriever.training.pairs.PretrainingPairs`.
    """
    moco = isinstance(model, MoCo)
    trained.train()
    for step, batch in run.steps(loader):
        lr = objective.set_learning_rate(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        texts = q_ids, q_mask, k_ids, k_mask = [batch[name].to(run.device, non_blocking=True) for name in BATCH]

        if moco:
            with run.precision.autocast():
                model.update_key_encoder()  # before this step's keys and before its update
                q = trained(q_ids, q_mask, normalize=objective.norm_query)
                with torch.no_grad():
                    k = model.encoder_k(k_ids, k_mask, normalize=objective.norm_doc)
            # the other documents of the batch are no negatives: all of them come from the queue
            logits, labels = moco_logits(q, k, model.queue, objective.temperature)
            loss = F.cross_entropy(logits, labels, label_smoothing=objective.label_smoothing)
        else:
            q, k, logits, labels, loss = contrast(trained, texts, objective, run.precision)

        run.backward(loss, optimizer)
        run.update(gradient_norms(optimizer), optimizer)
        if moco:
            model.enqueue(distributed.all_gather(k.float()))

        run.end_step(len(labels), {"loss": loss, **batch_statistics(logits, labels, q, k)}, {"lr": lr})
        if evaluation.is_due(run.steps_done):  # before the save: a run that is killed in it comes back to it
            evaluation.run(model.encoder_q if moco else model.encoder, run)
        keep_numbered(run)


def main() -> None:
    distributed.run_script(train_contriever, parse_args)


if __name__ == "__main__":
    main()
