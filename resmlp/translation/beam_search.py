"""Beam search: the translations with the highest probability that a search of limited width finds."""

import torch
from torch import Tensor

from .sequence_models import BOS, EOS, PAD, Translator

EXTRA_TOKENS = 50  # a translation may be so much longer than its source (Vaswani et al. 2017, section 6.1)


@torch.no_grad()
def beam_search(network: Translator, source: Tensor, beam: int = 4, length_penalty: float = 0.6) -> list[list[int]]:
    """The best translation of every sentence.

    A translation of n tokens, its end included, scores log p / ((5 + n) / 6) ** length_penalty (Wu et al. 2016, eq. 14
    without coverage). The decoder sees the whole prefix at every step: its matrices have no state to keep.

    Args:
        network: In evaluation mode.
        source: Ids (B, M), each row ending in EOS and then PAD.
        beam: Hypotheses kept per sentence; 1 is greedy.
        length_penalty: 0 prefers short translations, 1 compares log-probabilities per token.

    Returns:
        B lists of ids without BOS and EOS.
    """
    if beam < 1 or length_penalty < 0:
        raise ValueError(f"--beam {beam} and --length_penalty {length_penalty}: expected at least 1 and at least 0")
    sentences, device = len(source), source.device
    memory, padding = (t.repeat_interleave(beam, dim=0) for t in network.encode(source))
    limits = ((source != PAD).sum(dim=1) + EXTRA_TOKENS).clamp(max=network.max_length)  # tokens, EOS included
    longest = int(limits.max())

    minus_infinity = float("-inf")
    tokens = torch.full((sentences, beam, longest + 1), PAD, device=device)
    tokens[..., 0] = BOS
    scores = torch.full((sentences, beam), minus_infinity, device=device)
    scores[:, 0] = 0  # all hypotheses are the same at the start
    finished, finished_scores = tokens.clone(), torch.full_like(scores, minus_infinity)

    for length in range(1, longest + 1):
        prefixes = tokens[..., :length].flatten(0, 1)
        logits = network.decode(prefixes, memory, padding)[:, -1].float()
        log_p = logits.log_softmax(dim=-1).unflatten(0, (sentences, beam))
        log_p[..., [PAD, BOS]] = minus_infinity
        # twice as many candidates as hypotheses: at most one of each hypothesis ends
        totals = (scores[..., None] + log_p).flatten(1)
        candidate_scores, indices = totals.topk(min(2 * beam, totals.shape[1]), dim=1)
        parents, words = indices // log_p.shape[-1], indices % log_p.shape[-1]
        candidates = _rows(tokens, parents)
        candidates[..., length] = words
        ends = (words == EOS) | (limits == length)[:, None]  # at its limit a hypothesis ends as it is

        penalized = candidate_scores / _penalty(length, length_penalty)
        finished_scores, finished = _best(
            torch.cat([finished_scores, penalized.masked_fill(~ends, minus_infinity)], dim=1),
            torch.cat([finished, candidates], dim=1),
            beam,
        )
        scores, tokens = _best(candidate_scores.masked_fill(ends, minus_infinity), candidates, beam)
        # log-probabilities only fall and the penalty only grows: nothing alive can become better than this
        attainable = scores[:, 0] / _penalty(longest, length_penalty)
        if (attainable <= finished_scores[:, 0]).all():
            break
    return [[t for t in row if t not in (PAD, BOS, EOS)] for row in finished[:, 0].tolist()]


def _penalty(length: int, exponent: float) -> float:
    return ((5 + length) / 6) ** exponent


def _best(scores: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest scores (B, count) with their tokens (B, count, length), best first."""
    scores, indices = scores.topk(count, dim=1)
    return scores, _rows(tokens, indices)


def _rows(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
