"""Words of a text for lexical search: without case, accents and endings; bigrams where a script has no blanks."""

import functools
import unicodedata
from collections.abc import Iterator

import regex
import Stemmer

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
# a run of Chinese, Japanese or Korean, or a word with its digits and marks, such as C++, F# and Tom's; longer ones are
# cut, because normalisation sorts the combining marks of a word in a time that grows with their square
_WORD = regex.compile(
    rf"[{_CJK}]+|[[\p{{L}}\p{{N}}\p{{M}}]--[{_CJK}]]{{1,255}}(?:(?:[+#]+|['\u2019]s)(?![\p{{L}}\p{{N}}]))?", regex.V1
)
_IS_CJK = regex.compile(rf"[{_CJK}]")
_PHRASE = regex.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')
_STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
_stemmer = Stemmer.Stemmer("english")


@functools.lru_cache(maxsize=1 << 18)
def fold(word: str) -> str:
    """``word`` without case and accents: "Café" becomes "cafe"."""
    parts = unicodedata.normalize("NFKD", word.casefold().replace("\u2019", "'"))
    return unicodedata.normalize("NFC", "".join(c for c in parts if not "\u0300" <= c <= "\u036f"))


@functools.lru_cache(maxsize=1 << 18)
def _term(word: str) -> str | None:
    """A word without case, accents and its English ending (Snowball); empty for a stop word, None for a CJK run."""
    if _IS_CJK.match(word):
        return None
    folded = fold(word)
    return "" if folded in _STOP_WORDS else _stemmer.stemWord(folded)


def find_terms(text: str, single: bool = True) -> Iterator[tuple[int, int, str]]:
    """(start, end, term) for the words of a text but English stop words, and all pairs of neighbours in CJK runs.

    Args:
        single: Single characters of longer runs too, for texts that are searched, so that a query of one finds them.
    """
    for match in _WORD.finditer(text):
        start, end = match.span()
        term = _term(match[0])
        if term:
            yield start, end, term
        if term is not None:
            continue
        if single or end - start == 1:
            yield from ((i, i + 1, fold(text[i])) for i in range(start, end))
        yield from ((i, i + 2, fold(text[i : i + 2])) for i in range(start, end - 1))


def terms(text: str, single: bool = True) -> list[str]:
    return [term for _, _, term in find_terms(text, single)]


def exact_words(text: str) -> list[str]:
    """Folded words as they are, stop words among them; characters of CJK runs one by one."""
    words = (match[0] for match in _WORD.finditer(text))
    return [fold(part) for word in words for part in (word if _term(word) is None else [word])]


def phrases(query: str) -> list[list[str]]:
    """The words of each part of a query in quotation marks, which a passage has to hold one after the other."""
    quoted = (exact_words("".join(part or "" for part in match.groups())) for match in _PHRASE.finditer(query))
    return [words for words in quoted if words]


def contains(words: list[str], part: list[str]) -> bool:
    """Whether ``part`` occurs in ``words`` as it is."""
    return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))
