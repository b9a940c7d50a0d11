"""Start from nothing but text: a WordPiece vocabulary trained on it, and a BERT of any size with random weights.

    python new_encoder.py --text my_texts.txt --outdir my_encoder --vocab_size 8000 --hidden_size 256 --layers 4
    python preprocess.py --datapath my_texts.txt --outdir encoded/my_texts --tokenizer my_encoder
    python train.py --train_data encoded/my_texts --retriever_model_id my_encoder --output_dir run

Files with one document per line, or ``.jsonl`` with ``text`` and ``title``; without ``--text`` the documentation of
installed packages. The folder is in the layout of Hugging Face, which every other script reads.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from contriever.encoder import Retriever, build_encoder
from contriever.flags import check_minimum
from contriever.text.documentation import documentation
from contriever.text.files import read_documents
from contriever.text.normalize import normalize
from shared import distributed
from shared.run.flags import Parser

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", nargs="+", default=[], help="files to train the vocabulary on; documentation of packages without it")
    add("--outdir", required=True, help="folder of the new encoder")
    add("--vocab_size", type=int, default=30522, help="words and parts of words, special tokens among them")
    add("--cased", action="store_true", help="keep capital letters and accents")
    add("--normalize_text", action="store_true", help="one form for dashes, quotation marks, ... (mContriever)")
    add("--hidden_size", type=int, default=768, help="width: length of the vectors")
    add("--layers", type=int, default=12, help="number of transformer blocks")
    add("--heads", type=int, default=None, help="of the attention; by default one per 64 of the width")
    add("--positions", type=int, default=512, help="most tokens of a text")
    add("--seed", type=int, default=0, help="of the weights")
    return parser


def train_tokenizer(texts: Iterator[str], vocab_size: int, cased: bool = False) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT has it, with a vocabulary trained on ``texts``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased, strip_accents=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(SPECIAL):
        raise ValueError("--text holds no words to make a vocabulary of")
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True)))


def read_texts(files: list[str], normalize_text: bool) -> Iterator[str]:
    """The documents of text files, or those that come with the dependencies."""
    if not files:
        yield from (document["text"] for document in documentation())
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"--text {file} is no file")
        for text in read_documents(file):
            yield normalize(text) if normalize_text else text


def new_encoder(args: argparse.Namespace) -> Retriever:
    """Train the vocabulary, build the network and write both."""
    check_minimum(args, vocab_size=len(SPECIAL) + 1, hidden_size=1, layers=1, positions=8)
    outdir = Path(args.outdir)
    if (outdir / "config.json").exists():
        raise ValueError(f"--outdir {outdir} holds an encoder already")
    tokenizer = train_tokenizer(read_texts(args.text, args.normalize_text), args.vocab_size, args.cased)
    torch.manual_seed(args.seed)
    heads = args.heads or max(1, args.hidden_size // 64)
    if args.hidden_size % heads:
        raise ValueError(f"--hidden_size {args.hidden_size} is not a multiple of --heads {heads}")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=args.positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    retriever = Retriever(build_encoder(config).eval(), tokenizer, "a new encoder")
    outdir.mkdir(parents=True, exist_ok=True)
    retriever.save(outdir)
    parameters = sum(p.numel() for p in retriever.model.parameters())
    print(f"{outdir}: {len(tokenizer)} tokens in the vocabulary, {parameters / 1e6:.1f} million random weights")
    return retriever


def main() -> None:
    distributed.run_script(new_encoder, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
