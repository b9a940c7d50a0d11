"""Entries of torch.hub; their packages are needed when one is called."""


def entry(name: str, pretrained: bool, name_or_path: str | None):
    from .encoder import load_retriever

    if not pretrained:
        return load_retriever(name_or_path, random_init=True)
    return load_retriever(name_or_path or name, allow_download=name_or_path is None)


def contriever(pretrained: bool = True, name_or_path: str | None = None):
    """Contriever without labels, BERT-base (nDCG@10 37.7 on 13 BEIR sets): ``.encode(texts)`` gives (N, 768).

    Args:
        pretrained: False: random weights, the shape of ``name_or_path`` or, without it, of the packaged small encoder.
        name_or_path: Another encoder or checkpoint; the released one is fetched from the Hugging Face hub without it.
    """
    return entry("facebook/contriever", pretrained, name_or_path)


def contriever_msmarco(pretrained: bool = True, name_or_path: str | None = None):
    """Contriever fine-tuned on MS MARCO (nDCG@10 46.6 on 14 BEIR sets); arguments as of :func:`contriever`."""
    return entry("facebook/contriever-msmarco", pretrained, name_or_path)


def mcontriever(pretrained: bool = True, name_or_path: str | None = None):
    """mContriever without labels, multilingual BERT-base; arguments as of :func:`contriever`."""
    return entry("facebook/mcontriever", pretrained, name_or_path)


def mcontriever_msmarco(pretrained: bool = True, name_or_path: str | None = None):
    """mContriever fine-tuned on MS MARCO; arguments as of :func:`contriever`."""
    return entry("facebook/mcontriever-msmarco", pretrained, name_or_path)


ENTRIES = {f.__name__: f for f in (contriever, contriever_msmarco, mcontriever, mcontriever_msmarco)}
