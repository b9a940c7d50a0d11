"""Questions with passages that answer them and passages that do not: records, draws and batches of fine-tuning."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..augmentations import Draws
from ..encoder import Retriever, pad
from ..text.files import check_list, read_records, text_field
from ..text.normalize import normalize

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

    Raises:
        ValueError: If a record is malformed; the message names file and line.
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


def passage_text(passage: dict, normalize_text: bool) -> str:
    """Title, if there is one, and text."""
    text = f"{passage['title']} {passage['text']}" if passage.get("title") else passage["text"]
    return normalize(text) if normalize_text else text


class FineTuningPairs(Dataset):
    """Batches of questions, a positive each, and negatives.

    Args:
        examples: From :func:`read_examples`.
        retriever: Its tokenizer makes the batches.
        max_length: Tokens of a question or passage.
        negatives: Per question.
        hard_ratio: Chance of each negative to be a hard one.
        hard_min_idx: The first hard ones that are never taken, as they may be unmarked positives.
        normalize_text: One form for dashes, quotation marks, ...
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
        gold = py.choice(example["positive_ctxs"])
        random_ones, hard_ones = example.get("negative_ctxs", []), []
        hard = 0
        if "hard_negative_ctxs" in example:
            hard = sum(py.random() < self.hard_ratio for _ in range(self.negatives))
            hard_ones = example["hard_negative_ctxs"][self.hard_min_idx :]
            hard = min(hard, len(hard_ones))
        plain = min(self.negatives - hard, len(random_ones))
        chosen = py.sample(random_ones, plain) + py.sample(hard_ones, hard)
        return self._texts(example, gold, chosen)

    def _texts(self, example: dict, gold: dict, negatives: list[dict]) -> dict:
        question = example["question"]
        return {
            "query": normalize(question) if self.normalize_text else question,
            "gold": passage_text(gold, self.normalize_text),
            "negatives": [passage_text(passage, self.normalize_text) for passage in negatives],
        }

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
        return collate(items, self.retriever, self.max_length)


def collate(items: Sequence[dict], retriever: Retriever, max_length: int) -> dict[str, Tensor]:
    """Token ids and masks: of the questions (``q_*``), and of all positives followed by all negatives (``k_*``)."""
    passages = [item["gold"] for item in items] + [text for item in items for text in item["negatives"]]
    pad_id = retriever.tokenizer.pad_token_id
    q_tokens, q_mask = pad(retriever.tokenize([item["query"] for item in items], max_length), pad_id)
    k_tokens, k_mask = pad(retriever.tokenize(passages, max_length), pad_id)
    return {"q_tokens": q_tokens, "q_mask": q_mask, "k_tokens": k_tokens, "k_mask": k_mask}
