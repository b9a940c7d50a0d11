"""Two views of a chunk of text: random cropping, then deletion, replacement, masking or shuffling (section 3.1, 6.2).

Every function draws from the generators it is given, in the order of the reference.
"""

import random
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.run.randomness import derive_seed

AUGMENTATIONS = ("none", "delete", "replace", "mask", "shuffle")


@dataclass(frozen=True)
class Draws:
    """The two generators that a view is drawn with."""

    py: random.Random
    np: np.random.RandomState

    @classmethod
    def seeded(cls, *numbers: int) -> "Draws":
        """Generators that are a function of these numbers."""
        seed = derive_seed(*numbers)
        return cls(random.Random(seed), np.random.RandomState(seed % 2**32))


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the augmentations and the views need; None where a vocabulary has no such token."""

    bos: int | None  # put before each view
    eos: int | None  # put after it
    mask: int | None
    first_ordinary: int  # replacements are drawn from this id on
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Those of a tokenizer. BERT has no bos and eos: [CLS] and [SEP] take their places."""
        bos = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        eos = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        # XLM-RoBERTa's mask is its last token; all others come first
        leading = [i for i in tokenizer.all_special_ids if i < len(tokenizer) // 2]
        return cls(bos, eos, tokenizer.mask_token_id, max(leading, default=-1) + 1, len(tokenizer))


@dataclass(frozen=True)
class Recipe:
    """How two views are made: two independent crops, or a span and the text around it (the inverse cloze task)."""

    ratio_min: float  # length of a crop as a part of the chunk
    ratio_max: float
    augmentation: str  # one of ``AUGMENTATIONS``, done to both views
    prob_augmentation: float  # of each token
    pairs: str = "crop"  # or ``ict``


def draw_span(length: int, recipe: Recipe, draws: Draws) -> tuple[int, int]:
    """First token and number of tokens of a random part of ``length`` tokens."""
    span = int(length * draws.py.uniform(recipe.ratio_min, recipe.ratio_max))
    return draws.py.randint(0, length - span), span


def crop(tokens: np.ndarray, recipe: Recipe, draws: Draws) -> np.ndarray:
    """A random contiguous part: its length is a random ratio of the chunk's, its place uniform."""
    start, length = draw_span(len(tokens), recipe, draws)
    return tokens[start : start + length]


def inverse_cloze(tokens: np.ndarray, recipe: Recipe, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """A span, and the chunk without it; in one of ten pairs the chunk keeps it (Lee et al. 2019, section 4)."""
    start, length = draw_span(len(tokens), recipe, draws)
    span = tokens[start : start + length]
    keep = draws.py.random() < 0.1
    return span, tokens if keep else np.concatenate([tokens[:start], tokens[start + length :]])


def delete(tokens: np.ndarray, p: float, draws: Draws, special: SpecialTokens) -> np.ndarray:
    """Without each token with probability ``p``."""
    return tokens[draws.np.rand(len(tokens)) > p]


def replace(tokens: np.ndarray, p: float, draws: Draws, special: SpecialTokens) -> np.ndarray:
    """A random ordinary token in the place of each one with probability ``p``."""
    tokens, (places,) = tokens.copy(), np.nonzero(draws.np.rand(len(tokens)) <= p)
    tokens[places] = [draws.py.randint(special.first_ordinary, special.vocab_size - 1) for _ in places]
    return tokens


def mask(tokens: np.ndarray, p: float, draws: Draws, special: SpecialTokens) -> np.ndarray:
    """The mask token in the place of each one with probability ``p``."""
    return np.where(draws.np.rand(len(tokens)) > p, tokens, special.mask)


def shuffle(tokens: np.ndarray, p: float, draws: Draws, special: SpecialTokens) -> np.ndarray:
    """A random permutation of tokens that are chosen with probability ``p`` each; the others stay."""
    count = int((draws.np.rand(len(tokens)) < p).sum())
    places = draws.py.sample(range(len(tokens)), count)
    moved = [int(tokens[place]) for place in places]  # numbers: the reference shuffles views and duplicates tokens
    draws.py.shuffle(moved)
    tokens = tokens.copy()
    tokens[places] = moved
    return tokens


def augment(tokens: np.ndarray, name: str, p: float, draws: Draws, special: SpecialTokens) -> np.ndarray:
    """One of ``AUGMENTATIONS``."""
    if name == "none":
        return tokens
    if name == "mask" and special.mask is None:
        raise ValueError("--augmentation mask: the vocabulary has no mask token")
    return {"delete": delete, "replace": replace, "mask": mask, "shuffle": shuffle}[name](tokens, p, draws, special)


def add_bos_eos(tokens: np.ndarray, bos: int | None, eos: int | None) -> np.ndarray:
    """``tokens`` between the two, where they exist."""
    before, after = ([] if i is None else [i] for i in (bos, eos))
    return np.concatenate([before, tokens, after]).astype(np.int64)


def two_views(chunk: np.ndarray, recipe: Recipe, draws: Draws, special: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
    """Query and key of one chunk, int64, each between bos and eos."""
    if recipe.pairs == "ict":
        q, k = inverse_cloze(chunk, recipe, draws)
    else:
        q, k = (crop(chunk, recipe, draws) for _ in range(2))
    q, k = (augment(view, recipe.augmentation, recipe.prob_augmentation, draws, special) for view in (q, k))
    return add_bos_eos(q, special.bos, special.eos), add_bos_eos(k, special.bos, special.eos)
