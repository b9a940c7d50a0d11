"""How well an encoder finds a document from one of its own sentences: a measure that needs no labels.

One sentence is taken out of each document; it is the query, and what is left of the document is to be found among those
of all others. An encoder that only compares exact words does well already, so read it as a difference between encoders
on the same text.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .augmentations import Draws, SpecialTokens, add_bos_eos
from .encoder import pad

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\u0964")  # the last two of Chinese and Japanese, of Hindi and Bengali
FEWEST, MOST = 6, 64  # tokens of a sentence that is asked for


def sentences(document: np.ndarray, ends: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 token of the sentences of ``FEWEST`` to ``MOST`` tokens.

    Args:
        document: Token ids.
        ends: Ids of the tokens that end a sentence.
    """
    borders = [0, *(np.flatnonzero(np.isin(document, ends)) + 1).tolist()]
    return [(a, b) for a, b in itertools.pairwise(borders) if FEWEST <= b - a <= MOST]


class SentenceRecall:
    """Queries and documents, always the same ones.

    Args:
        documents: Token ids of one document after the other; those with fewer than three sentences are left out.
        tokenizer: Of the encoder.
        most_documents: Take the first ones only.
        max_length: Tokens of a document that are read.
        seed: Of the choice of the sentences.

    Attributes:
        off: Why there is nothing to measure; None if there is.
    """

    def __init__(self, documents: Iterable[np.ndarray], tokenizer, most_documents: int, max_length: int, seed: int = 0):
        special = SpecialTokens.of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        ends = [vocabulary[mark] for mark in SENTENCE_ENDS if mark in vocabulary]
        self.pad_id, self.queries, self.documents = tokenizer.pad_token_id, [], []
        for number, document in enumerate(documents):
            if len(self.queries) == most_documents:
                break
            found = sentences(document[: max_length - 2], ends)
            if len(found) < 3:
                continue
            start, end = found[Draws.seeded(seed, number).py.randrange(len(found))]
            rest = np.concatenate([document[:start], document[end : max_length - 2]])
            self.queries.append(add_bos_eos(document[start:end], special.bos, special.eos))
            self.documents.append(add_bos_eos(rest, special.bos, special.eos))
        self.disabled_reason = None if len(self.queries) > 1 else "no two documents of three sentences"

    @torch.inference_mode()
    def run(self, encoder: nn.Module, norm_query: bool, norm_doc: bool, batch_size: int = 64) -> dict[str, float]:
        """Share of the documents that are first, and among the first ten, in percent."""
        was_training = encoder.training
        encoder.eval()
        queries = self._encode(encoder, self.queries, norm_query, batch_size)
        documents = self._encode(encoder, self.documents, norm_doc, batch_size)
        encoder.train(was_training)
        scores = queries @ documents.T
        own = scores.diagonal()[:, None]
        ranks = (scores >= own).sum(dim=1)  # a tie counts against the encoder: equal vectors find nothing
        return {f"recall_at_{k}": 100 * (ranks <= k).float().mean().item() for k in (1, 10)}

    def _encode(self, encoder: nn.Module, texts: list[np.ndarray], normalize: bool, batch_size: int) -> Tensor:
        device = next(encoder.parameters()).device
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = torch.empty(len(texts), encoder.config.hidden_size)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad([texts[i] for i in chosen], self.pad_id)
            vectors[chosen] = encoder(ids.to(device), mask.to(device), normalize=normalize).float().cpu()
        return vectors
