"""Entries of torch.hub; their packages are needed when one is called."""

from collections.abc import Callable

DOCS = {
    "contriever": "Contriever without labels, BERT-base (nDCG@10 37.7 on 13 BEIR sets)",
    "contriever_msmarco": "Contriever fine-tuned on MS MARCO (nDCG@10 46.6 on 14 BEIR sets)",
    "mcontriever": "mContriever without labels, multilingual BERT-base",
    "mcontriever_msmarco": "mContriever fine-tuned on MS MARCO",
}


def entry(name: str) -> Callable:
    """The function of torch.hub for a released encoder, fetched from the Hugging Face hub."""

    def build(pretrained: bool = True, name_or_path: str | None = None):
        from .encoder import load_retriever

        if not pretrained:
            return load_retriever(name_or_path, random_init=True)
        released = f"facebook/{name.replace('_', '-')}"
        return load_retriever(name_or_path or released, allow_download=name_or_path is None)

    build.__name__ = build.__qualname__ = name
    own = "``name_or_path``: another encoder or checkpoint; ``pretrained=False``: its shape with random weights"
    build.__doc__ = f"{DOCS[name]}: ``.encode(texts)`` gives (N, 768). {own}."
    return build


ENTRIES = {name: entry(name) for name in DOCS}
