"""Translate text with a network that ``main.py`` has trained, and score it where the right translations are given.

    python translation/translate.py --weights runs/translation/checkpoint.pth --input test.en --output test.hyp.de
    python translation/translate.py --weights runs/translation/checkpoint.pth --input test.en --reference test.de

Without ``--input`` sentences are read from standard input, one per line.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import shared.run.passive_threads  # noqa: F401

import torch
from sacrebleu.metrics import BLEU
from sentencepiece import SentencePieceProcessor

from resmlp.translation.beam_search import beam_search
from resmlp.translation.corpus import open_vocabulary, pad, read_lines, split_lines
from resmlp.translation.sequence_models import EOS, Translator
from shared import distributed
from shared.networks.weights import safe_load
from shared.run.flags import Parser, add_device_flag, check_minimum

NETWORK_FLAGS = ("network", "dim", "hidden_dim", "depth", "heads", "max_length", "layer_scale")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weights", default="runs/translation/checkpoint.pth", help="checkpoint of a training")
    add("--input", default=None, help="text to translate, one sentence per line; standard input without it")
    add("--output", default=None, help="file to write the translations to; standard output without it")
    add("--reference", default=None, help="right translations: BLEU is printed")
    add("--beam", type=int, default=4, help="hypotheses of the beam search")
    add("--length_penalty", type=float, default=0.6, help="0 prefers short translations, 1 scores per token")
    add("--batch_sentences", type=int, default=64, help="sentences translated at once")
    add_device_flag(add)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(arguments)
    check_minimum(parser, args, {"beam": 1, "length_penalty": 0, "batch_sentences": 1})
    return args


def load_translator(path: str | Path) -> tuple[Translator, SentencePieceProcessor]:
    """The network and the vocabulary of a training checkpoint, the network in evaluation mode.

    Raises:
        ValueError: If the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"--weights {path} is not a file")
    checkpoint = safe_load(path)
    if not isinstance(checkpoint, dict) or not {"network", "vocabulary", "args"} <= checkpoint.keys():
        raise ValueError(f"--weights {path} is no checkpoint of translation/main.py")
    vocabulary = open_vocabulary(checkpoint["vocabulary"].numpy().tobytes(), f"the vocabulary of {path}")
    options = {flag: checkpoint["args"][flag] for flag in NETWORK_FLAGS}
    network = Translator(len(vocabulary), **options)
    network.load_state_dict(checkpoint["network"])
    return network.eval(), vocabulary


def translate_sentences(
    network: Translator,
    vocabulary: SentencePieceProcessor,
    sentences: Sequence[str],
    device: torch.device,
    beam: int = 4,
    length_penalty: float = 0.6,
    batch_sentences: int = 64,
    between_batches: Callable[[], None] | None = None,
) -> list[str]:
    """Translations in the order of the sentences, on every process; the work is shared out.

    Sentences longer than the network takes are cut, and an empty one is translated by an empty one.

    Args:
        between_batches: Called after every batch, equally often on every process; may raise to stop.
    """
    training = network.training
    network.eval()
    most = network.max_length - 1  # and the end
    ids = vocabulary.encode(list(sentences))
    if cut := sum(len(sentence) > most for sentence in ids):
        distributed.print_once(f"{cut} of {len(ids)} sentences are cut to {most} subwords (--max_length)")
    ids = [sentence[:most] for sentence in ids]
    order = sorted((i for i, sentence in enumerate(ids) if sentence), key=lambda i: (len(ids[i]), i))
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    share = order + order[:1] * (-len(order) % world_size)  # equally many on every process
    mine = share[rank::world_size]
    found = []
    for start in range(0, len(mine), batch_sentences):
        batch = mine[start : start + batch_sentences]
        best = beam_search(network, pad([[*ids[i], EOS] for i in batch]).to(device), beam, length_penalty)
        found += zip(batch, vocabulary.decode(best), strict=True)
        if between_batches is not None:
            between_batches()
    network.train(training)
    translations = dict(pair for part in distributed.all_gather_object(found) for pair in part)
    return [translations.get(i, "") for i in range(len(ids))]


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """SacreBLEU's score in 0 .. 100 and a line with its signature."""
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)])
    return score.score, f"{score} ({metric.get_signature()})"


def translate(args: argparse.Namespace) -> None:
    """Translate the sentences of a file or of standard input."""
    if args.output and not Path(args.output).parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    device = distributed.init(device=args.device)
    network, vocabulary = load_translator(args.weights)
    sentences = read_lines(args.input) if args.input else split_lines(sys.stdin.buffer.read(), "standard input")
    references = read_lines(args.reference) if args.reference else None
    if references is not None and len(references) != len(sentences):
        raise ValueError(f"--reference {args.reference} has {len(references)} lines, the text has {len(sentences)}")
    translations = translate_sentences(
        network.to(device), vocabulary, sentences, device, args.beam, args.length_penalty, args.batch_sentences
    )
    if not distributed.is_main_process():
        return
    if args.output:
        Path(args.output).write_text("".join(line + "\n" for line in translations), encoding="utf-8")
    elif references is None:
        print("\n".join(translations))
    if references is not None:
        print(bleu(translations, references)[1])


def main() -> None:
    distributed.run_script(translate, parse_args)


if __name__ == "__main__":
    main()
