"""The encoder without torch: an ONNX file that onnxruntime reads in a tenth of the time that importing torch takes.

It is made once for every model, in ``~/.cache/contriever``, and used if it gives the vectors that torch gives.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.networks.onnx_session import onnx_session

from .text.batches import MOST_TOKENS, longest_first, padded
from .text.files import read_json, write_json
from .text.normalize import clean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .encoder import Retriever

FORMAT = 1
TOKENIZER, NETWORK, WEIGHTS, FACTS = "tokenizer.json", "encoder.onnx", "weights.bin", "facts.json"


class OnnxEncoder:
    """What :class:`contriever.encoder.Retriever` is to searches, on the CPU in float32.

    Args:
        facts: Those of :func:`contriever.export.write_for_search`.
    """

    def __init__(self, folder: Path, facts: dict):
        self.folder, self.facts = folder, facts
        self.normalized, self.max_tokens = facts["normalized"], facts["max_tokens"]
        self.prompts = dict(facts["prompts"])
        self.session = onnx_session(folder / NETWORK)
        self.tokenizer = self._read_tokenizer()  # cuts texts

    def _read_tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    @functools.cached_property
    def _uncut(self) -> "Tokenizer":
        tokenizer = self._read_tokenizer()
        tokenizer.no_truncation()
        return tokenizer

    def identity(self) -> dict[str, object]:
        """That of the model, see :meth:`contriever.encoder.Retriever.identity`."""
        return self.facts["identity"] | ({"prefix": prompt} if (prompt := self.prompts.get("passage")) else {})

    def tokenize(self, texts: list[str], kind: str = "") -> list[list[int]]:
        texts = clean((self.prompts.get(kind, "") + text for text in texts), self.facts["lowercase"], False)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def token_ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
        return [end for _, end in self._uncut.encode(text, add_special_tokens=False).offsets]

    def encode(self, texts: list[str], batch_size: int = 64, kind: str = "") -> np.ndarray:
        """Vectors of texts (N, D) float32, of length 1 if the model was trained on such."""
        sequences, order = self.tokenize(texts, kind), []
        parts = [np.empty((0, self.facts["dim"]), np.float32)]
        for rows in longest_first(sequences, batch_size, MOST_TOKENS["cpu"]):
            ids, mask = padded([sequences[i] for i in rows], self.facts["pad_id"])
            parts += self.session.run(None, {"input_ids": ids, "attention_mask": mask.astype(np.int64)})
            order += rows
        return np.concatenate(parts)[np.argsort(order)]


def missing_packages() -> list[str]:
    return [package for package in ("onnxruntime", "tokenizers") if find_spec(package) is None]


def folder_of(model: Path) -> Path:
    """Where the files of a model are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "contriever" / hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:16]


def state_of(model: Path) -> list:
    """Changes with the files of a model."""
    files = [model] if model.is_file() else [*model.iterdir(), *model.glob("[0-9]_*/*")]
    states = {os.path.relpath(file, model): file.stat() for file in files if file.is_file()}
    return [FORMAT, *([name, states[name].st_size, states[name].st_mtime_ns] for name in sorted(states))]


def read(model: Path) -> OnnxEncoder | str | None:
    """The encoder of a model that was made before, or why there cannot be one, or None if nobody has tried."""
    folder = folder_of(model)
    try:
        facts = read_json(folder / FACTS, {})
        complete = all((folder / name).stat().st_size == size for name, size in facts.get("sizes", {}).items())
    except (ValueError, OSError):
        return None
    if not complete or facts.get("made_from") != state_of(model):
        return None
    return facts.get("problem") or OnnxEncoder(folder, facts)


def make(model: Path, retriever: "Retriever") -> OnnxEncoder | str:
    """Export a model for later searches, compared with torch once; the reason if that cannot be."""
    from .export import write_for_search

    folder = folder_of(model)
    facts = {"made_from": state_of(model)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            try:
                facts |= write_for_search(retriever, Path(temporary))
            except (ValueError, RuntimeError) as error:
                facts["problem"] = str(error).split("\n")[0]
            write_json(Path(temporary) / FACTS, facts)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == FACTS):  # the facts last
                file.chmod(0o600)  # a model may have learned what only its owner may read
                os.replace(file, folder / file.name)
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return facts.get("problem") or OnnxEncoder(folder, facts)
