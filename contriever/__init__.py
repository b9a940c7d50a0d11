"""Contriever: unsupervised dense retrieval."""

from shared.run.packages import need_packages

need_packages(
    "contriever",
    transformers="'transformers>=5'",
    tokenizers="tokenizers",
    bm25s="bm25s",
    pytrec_eval="pytrec-eval-terrier",
    regex="regex",
    Stemmer="PyStemmer",
)
