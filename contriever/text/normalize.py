"""Text normalisation of the released models: one form for every dash, quotation mark, apostrophe and ellipsis.

mContriever was trained and evaluated on normalised text. 59 characters change; nothing is lowercased, and accents,
ligatures, tildes and no-break spaces stay as they are.
"""

from collections.abc import Iterable

_FORMS = {
    "": [*range(0x01, 0x09), 0x0E, 0x0F, *range(0x11, 0x1C), 0xAD],  # control characters, soft hyphen
    " ": [0x0B, 0x0C, 0x85],  # vertical tab, form feed, next line; tab and newline stay
    "-": [*range(0x2010, 0x2016), 0x2043, 0x207B, 0x2212, 0xFF0D],
    '"': range(0x201C, 0x2020),
    "'": [0x60, 0xB4, 0x055A, *range(0x2018, 0x201C), 0x2032, 0x2035, 0xA78B, 0xA78C, 0xFF07],
    "''": [0x2033, 0x2036],  # double primes
    "'''": [0x2034, 0x2037],
    "''''": [0x2057],
    "...": [0x2026],
    "/": [0x2044, 0x2215],
}
_CHARACTERS = {point: form for form, points in _FORMS.items() for point in points}


def normalize(text: str) -> str:
    """``text`` with its typographic variants in one form; " . . . " becomes " ... "."""
    return text.translate(_CHARACTERS).replace(" . . . ", " ... ")


def clean(texts: Iterable[str], lowercase: bool, normalize_text: bool) -> list[str]:
    """Lowercase and normalise texts, in this order."""
    texts = [text.lower() for text in texts] if lowercase else list(texts)
    return [normalize(text) for text in texts] if normalize_text else texts
