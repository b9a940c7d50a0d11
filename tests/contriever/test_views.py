import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contriever.losses import MoCo
from contriever.training.evaluation import SentenceRecall
from contriever.training.pairs import StepSampler
from tests.contriever.tiny import tiny_retriever


def test_processes_share_the_pairs_of_a_step():
    whole = StepSampler(4, steps_per_epoch=5, total_steps=8, rank=0, world_size=1)
    parts = [StepSampler(2, 5, 8, rank, 2) for rank in (0, 1)]
    for sampler in (whole, *parts):
        sampler.set_epoch(1, 1)
    assert len(list(whole)) == 2  # steps 6 and 7
    for together, *apart in zip(whole, *parts, strict=True):
        assert together == [key for part in apart for key in part]


def test_the_queue_is_a_ring_that_refuses_what_is_not_finite(tmp_path):
    model = MoCo(tiny_retriever(tmp_path).model, 6)
    for i in range(4):
        model.enqueue(torch.full((2, 16), float(i)))
    assert model.queue[0].tolist() == [3, 3, 1, 1, 2, 2] and model.queue_ptr.item() == 2
    model.enqueue(torch.full((2, 16), float("nan")))
    assert model.queue[0].tolist() == [3, 3, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="--queue_size 6 is not a multiple of the 4 texts"):
        model.enqueue(torch.zeros(4, 16))


# --- Recall of a document from its own sentence -----------------------------------------------------------------------


def test_recall_tells_an_encoder_that_matches_words_from_one_that_does_not(tmp_path):
    retriever = tiny_retriever(tmp_path)
    end = retriever.tokenizer.get_vocab()["."]
    documents = [np.array([*[20 + i] * 7, end] * 4) for i in range(20)]
    recall = SentenceRecall(documents, retriever.tokenizer, most_documents=15, max_length=64)
    assert len(recall.queries) == 15 and not recall.disabled_reason
    assert all(len(rest) == 3 * 8 + 2 for rest in recall.documents)  # without the sentence that is asked for

    found = recall.run(BagOfWords(len(retriever.tokenizer)), True, True)
    assert found == {"recall_at_1": 100.0, "recall_at_10": 100.0, "recall_chance": 100 / 15}
    nothing = recall.run(BagOfWords(len(retriever.tokenizer), scale=0.0), False, False)
    assert nothing == {"recall_at_1": 0.0, "recall_at_10": 0.0, "recall_chance": 100 / 15}  # equal vectors find nothing
    assert SentenceRecall([np.arange(9)], retriever.tokenizer, 5, 64).disabled_reason


class BagOfWords(torch.nn.Module):
    """Counts tokens."""

    def __init__(self, vocab_size: int, scale: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(scale * torch.eye(vocab_size))

    def forward(self, ids, mask, normalize=False):
        counts = F.embedding(ids, self.weight).masked_fill(~mask[..., None], 0).sum(dim=1)
        return F.normalize(counts, dim=-1) if normalize else counts
