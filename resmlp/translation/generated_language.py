"""A small language pair with an exact translation, for training without data.

The source says *subject verb object* with adjectives before nouns. The target says *verb subject object*, with
adjectives after nouns; an ending marks the object, another one the plural, and adjectives agree in number:

    small dogs see cat    ->    see dog-PLURAL small-PLURAL cat-OBJECT
"""

import itertools
import random
from dataclasses import dataclass

NOUNS, VERBS, ADJECTIVES = 12, 8, 6
SOURCE_PLURAL, TARGET_PLURAL, TARGET_OBJECT = "s", "ri", "ko"


@dataclass(frozen=True)
class Word:
    source: str
    target: str


def generate_pairs(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """``count`` different sentences and their translations.

    The words are always the same; the sentences depend on ``seed``.
    """
    nouns, verbs, adjectives = _lexicon()
    draw = random.Random(seed)

    def noun_phrase() -> tuple[Word, Word | None, bool]:
        return draw.choice(nouns), draw.choice([None, *adjectives]), draw.random() < 0.5

    pairs: dict[str, str] = {}
    while len(pairs) < count:
        subject, verb, obj = noun_phrase(), draw.choice(verbs), noun_phrase()
        source = " ".join([_source_phrase(*subject), verb.source, _source_phrase(*obj)])
        pairs[source] = " ".join([verb.target, _target_phrase(*subject), _target_phrase(*obj, ending=TARGET_OBJECT)])
    return list(pairs), list(pairs.values())


def _source_phrase(noun: Word, adjective: Word | None, plural: bool) -> str:
    words = [] if adjective is None else [adjective.source]
    return " ".join([*words, noun.source + SOURCE_PLURAL * plural])


def _target_phrase(noun: Word, adjective: Word | None, plural: bool, ending: str = "") -> str:
    words = [noun.target + ending + TARGET_PLURAL * plural]
    if adjective is not None:
        words.append(adjective.target + TARGET_PLURAL * plural)
    return " ".join(words)


def _lexicon() -> tuple[list[Word], list[Word], list[Word]]:
    """Nouns, verbs and adjectives of two syllables, none twice."""
    draw = random.Random(0)
    words = []
    for consonants in ("bdfglm", "kprtvz"):  # of the source, of the target
        words.append(["".join(letters) for letters in itertools.product(consonants, "aiu", consonants, "ae")])
        draw.shuffle(words[-1])
    lexicon = [Word(*pair) for pair in zip(*words, strict=True)]
    return lexicon[:NOUNS], lexicon[NOUNS : NOUNS + VERBS], lexicon[NOUNS + VERBS : NOUNS + VERBS + ADJECTIVES]
