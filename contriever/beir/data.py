"""Reading a data set in the layout of BEIR: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from dataclasses import dataclass
from pathlib import Path

from ..index.passages import Passage
from ..text.files import read_json_lines, read_lines, text_field


@dataclass(frozen=True)
class BeirDataset:
    """A collection with judged queries.

    Attributes:
        name: Of the folder.
        documents: The collection, in the order of the file.
        queries: Query id to text, for the queries with judgements.
        qrels: Query id to document id to grade; 0 means judged and not relevant.
    """

    name: str
    documents: list[Passage]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def describe(self) -> list[str]:
        """One line on its size, and one on everything that could surprise."""
        ids = {document.id for document in self.documents}
        judged = {document for grades in self.qrels.values() for document in grades}
        counts = {
            "documents are empty": sum(not document.full_text().strip() for document in self.documents),
            "judged documents are not in the collection": len(judged - ids),
            "queries have the id of a document, which is left out of their results": len(ids & self.queries.keys()),
        }
        sizes = f"{self.name}: {len(self.documents)} documents, {len(self.queries)} judged queries"
        return [sizes, *(f"{self.name}: {count} {what}" for what, count in counts.items() if count)]


def read_beir(folder: str | Path, split: str = "test") -> BeirDataset:
    """Read one data set.

    Raises:
        ValueError: If a file is missing or malformed, or an id occurs twice; the message names file and line.
    """
    folder = Path(folder)
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} is not in the layout of BEIR: there is no {', no '.join(missing)}")
    documents = {
        record_id: Passage(record_id, text_field(record, "text", where), text_field(record, "title", where, ""))
        for record_id, record, where in _with_ids(files[0])
    }
    queries = {record_id: text_field(record, "text", where) for record_id, record, where in _with_ids(files[1])}
    qrels = read_qrels(files[2])
    unknown = next((query for query in qrels if query not in queries), None)
    if unknown is not None:
        raise ValueError(f"{files[2]} judges the query {unknown!r}, which is not in {files[1]}")
    return BeirDataset(folder.name, list(documents.values()), {query: queries[query] for query in qrels}, qrels)


def _with_ids(path: Path):
    """(id, record, file and line) of every line; ids must differ."""
    seen = {}
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        record_id = text_field(record, "_id", where)
        if record_id in seen:
            raise ValueError(f"{where}: the id {record_id!r} stands in line {seen[record_id]} already")
        seen[record_id] = number
        yield record_id, record, where
    if not seen:
        raise ValueError(f"{path} is empty")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements of a tab-separated file with a header: query id, document id, grade.

    Raises:
        ValueError: With the file and the line, for a malformed line or two different grades of one document.
    """
    qrels = {}
    for number, (_, line) in enumerate(read_lines(path), start=1):
        columns = line.rstrip("\r\n").split("\t")
        is_judgement = len(columns) == 3 and columns[2].strip().lstrip("-").isdigit()
        if number == 1 and is_judgement:
            raise ValueError(f"{path}, line 1: expected a header (query-id, corpus-id, score), got a judgement")
        if number == 1 or not line.strip():
            continue
        if not is_judgement:
            raise ValueError(
                f"{path}, line {number}: expected query id, document id and an integer, got {line.rstrip()[:80]!r}"
            )
        query, document, grade = columns[0], columns[1], int(columns[2])
        # published collections repeat some lines; only a second opinion is a mistake
        before = qrels.setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            raise ValueError(
                f"{path}, line {number}: document {document!r} is judged twice for query {query!r}: {before}, {grade}"
            )
    if not qrels:
        raise ValueError(f"{path} has no judgements")
    return qrels
