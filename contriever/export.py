"""Write a trained encoder for other programs; every file is read back and has to give the same vectors.

    python -m contriever.export --model_name_or_path run/checkpoint.pth --output_dir out

Writes a folder that transformers and sentence-transformers read (``encoder/``) and an ONNX file (``encoder.onnx``:
``input_ids`` and ``attention_mask`` (B, N) int64 to ``vectors`` (B, D)). Both give vectors of length 1 if the encoder
was trained on such, and raw ones if not. Needs the packages of ``pip install -e '.[contriever,export]'``.
"""

import argparse
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from contriever.encoder import Retriever, load_retriever, pad
from contriever.onnx_encoder import NETWORK, TOKENIZER, WEIGHTS, OnnxEncoder
from contriever.text.files import replacing
from shared import distributed
from shared.networks.export import check_equal, read_onnx, trace_onnx
from shared.run.files import atomic_file
from shared.run.flags import Parser

TEXTS = ("a short text", "A longer one, with more words than the other: it fills a batch that is padded.", "?")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", default=None, help="encoder or checkpoint; the packaged encoder without it")
    add("--retriever_model_id", default=None, help="configuration and tokenizer of an official checkpoint")
    add("--allow_download", action="store_true", help="ask the hub for a model that is not on this machine")
    add("--output_dir", default=".", help="where the files go")
    return parser


def vectors_of(retriever: Retriever, texts: Sequence[str], kind: str = "") -> Tensor:
    """Those that every file has to give."""
    return torch.from_numpy(retriever.encode(texts, normalize=retriever.normalized, amp="fp32", kind=kind))


class _Plain(nn.Module):
    """The encoder with two positional arguments."""

    def __init__(self, encoder: nn.Module, normalize: bool):
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids, attention_mask, normalize=self.normalize)


def write_onnx(retriever: Retriever, path: Path) -> None:
    """ONNX file for any number of texts of any length that the encoder reads; it is not compared."""
    network = copy.deepcopy(retriever.model).cpu().eval()
    network.set_attn_implementation("eager")  # the fused kernel chooses its path by what is in the mask
    dimensions = {0: "batch", 1: "tokens"}
    axes = {"input_ids": dimensions, "attention_mask": dimensions, "vectors": {0: "batch"}}
    trace_onnx(_Plain(network, retriever.normalized), _tokens(retriever, TEXTS), axes, path)


def _tokens(retriever: Retriever, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    ids, mask = pad(retriever.tokenize(texts), retriever.tokenizer.pad_token_id)
    return ids, mask.long()


def export_onnx(retriever: Retriever, path: Path) -> None:
    """:func:`write_onnx`, and read it back."""
    with atomic_file(path) as temporary:
        write_onnx(retriever, temporary)
        written = read_onnx(temporary)
        both = ((written(*_tokens(retriever, t)), vectors_of(retriever, t)) for t in (TEXTS, TEXTS[:1]))
        check_equal(path.name, both)


def write_for_search(retriever: Retriever, folder: Path) -> dict:
    """Network and tokenizer for :class:`contriever.onnx_encoder.OnnxEncoder`, and what it has to know.

    Raises:
        ExportMismatch: If it gives other vectors than torch.
        ValueError: If the tokenizer is none of the tokenizers library, or a package is missing.
    """
    tokenizer = getattr(retriever.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{type(retriever.tokenizer).__name__} is no tokenizer of the tokenizers library")
    retriever = dataclasses.replace(retriever, model=copy.deepcopy(retriever.model).cpu())
    retriever.tokenize(TEXTS)  # now the tokenizer cuts where the encoder does
    with replacing(folder / TOKENIZER) as file:
        file.write(tokenizer.to_str())
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_onnx(retriever, Path(temporary) / NETWORK)
        import onnx  # an optional dependency, which write_onnx has asked for

        # weights in a file of their own are mapped into memory instead of parsed
        network = onnx.load(Path(temporary) / NETWORK)
        onnx.save(network, folder / NETWORK, save_as_external_data=True, location=WEIGHTS)
    facts = {
        "sizes": {file.name: file.stat().st_size for file in folder.iterdir()},
        "identity": {name: value for name, value in retriever.identity().items() if name != "prefix"},
        "normalized": retriever.normalized,
        "dim": retriever.dim,
        "max_tokens": retriever.max_tokens,
        "pad_id": retriever.tokenizer.pad_token_id,
        "lowercase": retriever.lowercase,
        "prompts": retriever.prompts,
    }
    written, longest = OnnxEncoder(folder, facts), "word " * retriever.max_length
    both = (
        (torch.from_numpy(written.encode(texts, kind=kind)), vectors_of(retriever, texts, kind))
        for texts in ([*TEXTS, longest], TEXTS[:1])
        for kind in ("query", "passage")
    )
    check_equal(NETWORK, both)
    return facts


def export(retriever: Retriever, output_dir: str | Path) -> dict[str, Path]:
    """Write an encoder as a ``folder`` of Hugging Face and as ``onnx``; ``ExportMismatch`` if one differs."""
    files = {"folder": Path(output_dir) / "encoder", "onnx": Path(output_dir) / "encoder.onnx"}
    files["folder"].mkdir(parents=True, exist_ok=True)
    retriever.save(files["folder"])
    check_equal("encoder", [(vectors_of(load_retriever(files["folder"]), TEXTS), vectors_of(retriever, TEXTS))])
    export_onnx(retriever, files["onnx"])
    return files


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        options = {"architecture": args.retriever_model_id, "allow_download": args.allow_download}
        export(load_retriever(args.model_name_or_path, **options), args.output_dir)


if __name__ == "__main__":
    main()
