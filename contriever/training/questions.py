"""Questions with passages that answer them and passages that do not: records, draws and batches of fine-tuning."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..augmentations import Draws
from ..encoder import Retriever
from ..text.files import check_list, read_records, text_field, titled
from ..text.normalize import clean
from .pairs import collate

ITEM = 2  # kind of draws, with seeds of its own


def read_examples(
    paths: Iterable[str | Path], maxload: int | None = None, rank: int = 0, world_size: int = 1
) -> list[dict]:
    """The records of one process: of all files together every ``world_size``-th.

    Args:
        paths: ``.jsonl`` files, or ``.json`` files that hold a list, of objects with ``question``, ``positive_ctxs``
            and, optionally, ``negative_ctxs`` and ``hard_negative_ctxs``: lists of passages with ``text`` and,
            optionally, ``title``.
        maxload: Records that are read at most, those of other processes among them.
    """
    examples = []
    records = (found for path in paths for found in read_records(path))
    for count, (where, record) in enumerate(records, start=1):
        if maxload is not None and count > maxload:
            break
        check_example(record, where)
        if count % world_size == rank:
            examples.append(record)
    return examples


def check_example(record: dict, where: str) -> None:
    """Raise ``ValueError`` if a record lacks its question or a positive, or a passage its text."""
    text_field(record, "question", where)
    for key in ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs"):
        if key not in record:
            continue
        check_list(record, key, dict, "passages", where)
        for passage in record[key]:
            text_field(passage, "text", f"{where}, {key}")
            text_field(passage, "title", f"{where}, {key}", "")
    if not record.get("positive_ctxs"):
        raise ValueError(f'{where}: no passage under "positive_ctxs"')


class FineTuningPairs(Dataset):
    """Batches of questions, a positive each, and negatives.

    Args:
        examples: From :func:`read_examples`.
        max_length: Tokens of a question or passage.
        negatives: Per question.
        hard_ratio: Chance of each negative to be a hard one.
        hard_min_idx: The first hard ones that are never taken, as they may be unmarked positives.
        stream: Distinguishes processes.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        retriever: Retriever,
        max_length: int,
        negatives: int = 1,
        hard_ratio: float = 0.0,
        hard_min_idx: int = 0,
        normalize_text: bool = False,
        seed: int = 0,
        stream: int = 0,
    ):
        self.examples, self.retriever, self.max_length = examples, retriever, max_length
        self.negatives, self.hard_ratio, self.hard_min_idx = negatives, hard_ratio, hard_min_idx
        self.normalize_text, self.seed, self.stream = normalize_text, seed, stream

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, example: dict, draws: Draws) -> dict:
        """A question, a positive, and negatives, random ones first: ``query``, ``gold``, ``negatives``.

        There are fewer negatives if the record has fewer.
        """
        py = draws.py
        positive = py.choice(example["positive_ctxs"])
        random_ones, hard_ones = example.get("negative_ctxs", []), []
        hard = 0
        if "hard_negative_ctxs" in example:
            hard = sum(py.random() < self.hard_ratio for _ in range(self.negatives))
            hard_ones = example["hard_negative_ctxs"][self.hard_min_idx :]
            hard = min(hard, len(hard_ones))
        plain = min(self.negatives - hard, len(random_ones))
        chosen = py.sample(random_ones, plain) + py.sample(hard_ones, hard)
        return self._texts(example, positive, chosen)

    def _texts(self, example: dict, positive: dict, negatives: list[dict]) -> dict:
        passages = [titled(passage.get("title"), passage["text"]) for passage in (positive, *negatives)]
        query, gold, *others = clean([example["question"], *passages], False, self.normalize_text)
        return {"query": query, "gold": gold, "negatives": others}

    def evaluation_item(self, index: int) -> dict:
        """The first positive and the first negative, if there is one."""
        example = self.examples[index]
        return self._texts(example, example["positive_ctxs"][0], example.get("negative_ctxs", [])[:1])

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of the examples with these (epoch, number); a shorter part of a process starts again."""
        items = []
        for epoch, number in keys:
            draws = Draws.seeded(self.seed, ITEM, self.stream, epoch, number)
            items.append(self.draw(self.examples[number % len(self.examples)], draws))
        return collate(*self.tokenize(items), self.retriever.tokenizer.pad_token_id)

    def tokenize(self, items: Sequence[dict]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the questions, and of all positives followed by all negatives."""
        passages = [item["gold"] for item in items] + [text for item in items for text in item["negatives"]]
        questions = [item["query"] for item in items]
        return self.retriever.tokenize(questions, self.max_length), self.retriever.tokenize(passages, self.max_length)
