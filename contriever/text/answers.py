"""Does a passage contain an answer? Matching by words, as DPR evaluates open-domain question answering. No torch.

The accuracy of a retriever at k is the share of questions with a matching passage among the first k
(Contriever, section 4.2, table 3).
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import regex

from .words import contains

# a run of letters, digits and combining marks, or any single character that is no separator and no control character
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
PASSAGES_PER_WORKER = 50_000  # about three seconds of matching: fewer are not worth another process


def tokenize(text: str) -> list[str]:
    """Words and punctuation marks of the NFD-normalised text, in their case."""
    return _TOKEN.findall(unicodedata.normalize("NFD", text))


def has_answer(answers: Iterable[str], text: str) -> bool:
    """Whether the words of one of the answers follow each other in the text, in any case.

    Lowercasing is not case folding, so "Straße" is not in "STRASSE". An answer without words, such as "", is in every
    text.
    """
    words = _lowercase(text)
    return any(contains(words, _lowercase(answer)) for answer in answers)


def _lowercase(text: str) -> list[str]:
    return [token.lower() for token in tokenize(text)]


def match_questions(questions: Sequence[tuple[list[str], list[str]]], workers: int = 1) -> list[list[bool]]:
    """:func:`has_answer` for every passage of every question.

    Args:
        questions: (answers, texts of the retrieved passages, best first) per question.
        workers: At most so many processes; small tasks take fewer.
    """
    num_passages = sum(len(texts) for _, texts in questions)
    workers = min(workers, os.cpu_count() or 1, 1 + num_passages // PASSAGES_PER_WORKER)
    if workers <= 1:
        return [match_question(question) for question in questions]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(match_question, questions, chunksize=64))


def match_question(question: tuple[list[str], list[str]]) -> list[bool]:
    answers, texts = question
    return [has_answer(answers, text) for text in texts]


def hits_within(hits: Iterable[Sequence[bool]]) -> np.ndarray:
    """How many questions have a hit among their first k passages, for every k from 1 on.

    Args:
        hits: :func:`match_questions`' result; questions may have different numbers of passages.
    """
    found = [np.maximum.accumulate(np.array(row, dtype=int)) for row in hits]  # 1 from the first hit on
    counts = np.zeros(max(map(len, found), default=0), dtype=int)
    for row in found:
        counts[: len(row)] += row
        counts[len(row) :] += row[-1] if len(row) else 0
    return counts
