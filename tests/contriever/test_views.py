import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contriever.augmentations import Draws, Recipe, SpecialTokens, augment, crop, inverse_cloze, two_views
from contriever.losses import MoCo, inbatch_logits, moco_logits
from contriever.training.evaluation import SentenceRecall, sentences
from contriever.training.optimisation import cosine, linear
from contriever.training.pairs import StepSampler, sampling_probabilities
from tests.contriever.tiny import tiny_retriever

SPECIAL = SpecialTokens(bos=2, eos=3, mask=4, first_ordinary=5, vocab_size=50)


def draws(seed: int = 0) -> Draws:
    return Draws(random.Random(seed), np.random.RandomState(seed))


def test_crops_are_independent_parts_of_the_chunk():
    chunk, generator = np.arange(100), draws()
    crops = [crop(chunk, 0.1, 0.5, generator) for _ in range(500)]
    assert all(np.array_equal(view, np.arange(view[0], view[0] + len(view))) for view in crops)
    assert {10, 49} <= {len(view) for view in crops} <= set(range(10, 51))
    assert min(view[0] for view in crops) == 0 and max(view[-1] for view in crops) == 99


@pytest.mark.parametrize("name", ["delete", "replace", "mask", "shuffle"])
def test_augmentations_touch_the_share_of_tokens_they_are_told(name):
    tokens = np.arange(5, 45).repeat(500)
    result = augment(tokens, name, 0.2, draws(), SPECIAL)
    changed = {
        "delete": lambda: 1 - len(result) / len(tokens),
        "replace": lambda: (result != tokens).mean() * 45 / 44,
        "mask": lambda: (result == SPECIAL.mask).mean(),
        "shuffle": lambda: (result != tokens).mean() * 40 / 39,
    }[name]()
    assert changed == pytest.approx(0.2, abs=0.01)
    assert np.array_equal(augment(tokens, name, 0.0, draws(), SPECIAL), tokens)
    if name == "shuffle":
        assert np.array_equal(np.sort(result), np.sort(tokens))
    if name == "replace":
        assert result.min() >= 5 and result.max() == 49


def test_a_mask_needs_a_mask_token():
    with pytest.raises(ValueError, match="no mask token"):
        augment(np.arange(9), "mask", 0.5, draws(), SpecialTokens(2, 3, None, 5, 50))


def test_inverse_cloze_takes_the_span_out_of_nine_chunks_of_ten():
    chunk, generator, kept = np.arange(100), draws(), 0
    for _ in range(500):
        span, rest = inverse_cloze(chunk, 0.1, 0.5, generator)
        if len(rest) == 100:
            kept += 1
        else:
            assert sorted([*span, *rest]) == list(range(100))
    assert 30 < kept < 70


def test_views_lie_between_the_special_tokens(tmp_path):
    special = SpecialTokens.of(tiny_retriever(tmp_path).tokenizer)
    assert (special.bos, special.eos, special.mask, special.first_ordinary) == (2, 3, 4, 5)
    for view in two_views(np.arange(5, 45), Recipe(0.1, 0.5, "delete", 1.0), draws(), special):
        assert view.tolist() == [2, 3]  # nothing is left of a view, and it can be encoded all the same


def test_data_sets_are_drawn_alike_or_by_size():
    assert sampling_probabilities([1, 9], 0).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(sampling_probabilities([1, 9], 1), [0.1, 0.9])
    np.testing.assert_allclose(sampling_probabilities([1, 9], 0.5), [0.25, 0.75])


def test_processes_share_the_pairs_of_a_step():
    whole = StepSampler(4, steps_per_epoch=5, total_steps=8, rank=0, world_size=1)
    parts = [StepSampler(2, 5, 8, rank, 2) for rank in (0, 1)]
    for sampler in (whole, *parts):
        sampler.set_epoch(1, 1)
    assert len(list(whole)) == 2  # steps 6 and 7
    for together, *apart in zip(whole, *parts, strict=True):
        assert together == [key for part in apart for key in part]


def test_moco_scores_equal_a_slow_loop():
    torch.manual_seed(0)
    q, k, queue = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 5)
    logits, labels = moco_logits(q, k, queue, temperature=0.5)
    loss = F.cross_entropy(logits, labels)
    expected = 0.0
    for i in range(3):
        scores = [q[i] @ k[i] / 0.5, *(q[i] @ queue[:, j] / 0.5 for j in range(5))]
        expected += -(scores[0] - torch.logsumexp(torch.stack(scores), 0)) / 3
    torch.testing.assert_close(loss, expected)


def test_every_rank_knows_its_own_keys_in_batch():
    q, keys = torch.eye(4)[:2], torch.cat([torch.zeros(3, 4), torch.eye(4)[:2], torch.zeros(1, 4)])
    logits, labels = inbatch_logits(q, keys, 1.0, rank=1, world_size=2)
    assert labels.tolist() == [3, 4] == logits.argmax(dim=1).tolist()


def test_the_queue_is_a_ring_that_refuses_what_is_not_finite(tmp_path):
    model = MoCo(tiny_retriever(tmp_path).model, 6)
    for i in range(4):
        model.enqueue(torch.full((2, 16), float(i)))
    assert model.queue[0].tolist() == [3, 3, 1, 1, 2, 2] and model.queue_ptr.item() == 2
    model.enqueue(torch.full((2, 16), float("nan")))
    assert model.queue[0].tolist() == [3, 3, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="--queue_size 6 is not a multiple of the 4 texts"):
        model.enqueue(torch.zeros(4, 16))


def test_the_key_encoder_is_a_moving_average(tmp_path):
    model = MoCo(tiny_retriever(tmp_path).model, 2)
    before = [p.clone() for p in model.encoder_k.parameters()]
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(1.0)
    model.update_key_encoder(0.9)
    for p, old in zip(model.encoder_k.parameters(), before, strict=True):
        torch.testing.assert_close(p, old + 0.1)


def test_schedules_start_peak_and_end():
    assert [linear(n, 10, 50, 0.0) for n in (0, 5, 10, 30, 50)] == [0, 0.5, 1, 0.5, 0]
    assert linear(0, -1, 20, 0.0) == pytest.approx(1 - 1 / 21)
    assert [round(cosine(n, 10, 50, 0.1), 3) for n in (0, 10, 50)] == [0, 1, 0.1]


# --- Recall of a document from its own sentence -----------------------------------------------------------------------


def test_sentences_end_at_their_marks_and_have_a_length():
    document = np.array([9] * 6 + [1] + [9] * 2 + [1] + [9] * 70 + [1] + [9] * 8)
    assert sentences(document, ends=[1]) == [(0, 7)]


def test_recall_tells_an_encoder_that_matches_words_from_one_that_does_not(tmp_path):
    retriever = tiny_retriever(tmp_path)
    end = retriever.tokenizer.get_vocab()["."]
    documents = [np.array([*[20 + i] * 7, end] * 4) for i in range(20)]
    recall = SentenceRecall(documents, retriever.tokenizer, most_documents=15, max_length=64)
    assert len(recall.queries) == 15 and not recall.disabled_reason
    assert all(len(rest) == 3 * 8 + 2 for rest in recall.documents)  # without the sentence that is asked for

    found = recall.run(BagOfWords(len(retriever.tokenizer)), True, True)
    assert found == {"recall_at_1": 100.0, "recall_at_10": 100.0}
    nothing = recall.run(BagOfWords(len(retriever.tokenizer), scale=0.0), False, False)
    assert nothing == {"recall_at_1": 0.0, "recall_at_10": 0.0}  # equal vectors find nothing
    assert SentenceRecall([np.arange(9)], retriever.tokenizer, 5, 64).disabled_reason


class BagOfWords(torch.nn.Module):
    """Counts tokens."""

    def __init__(self, vocab_size: int, scale: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(scale * torch.eye(vocab_size))

    def forward(self, ids, mask, normalize=False):
        counts = F.embedding(ids, self.weight).masked_fill(~mask[..., None], 0).sum(dim=1)
        return F.normalize(counts, dim=-1) if normalize else counts
