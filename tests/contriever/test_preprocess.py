import gzip
import hashlib
import json
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from contriever import preprocess
from contriever.text.tokens import ChunkedText, Shard, open_shard, token_files
from tests.contriever.tiny import make_shards, tiny_retriever, write_texts
from tests.interruption import interrupted
from tests.processes import run_processes  # noqa: F401 - sets what the server of processes imports


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tiny_retriever(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    return write_texts(tmp_path / "text.txt")


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def all_documents(folder) -> list[list[int]]:
    text = ChunkedText([open_shard(file) for file in token_files(folder)], 1)
    return [document.tolist() for document in text.documents()]


def test_every_document_keeps_its_tokens_and_borders(text, encoder, tmp_path):
    make_shards(text, tmp_path / "one", encoder)
    make_shards(text, tmp_path / "many", encoder, "--shard_mb", "0.001")
    tokenizer = preprocess.read_tokenizer(encoder)
    expected = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in text.read_text().splitlines()]
    assert all_documents(tmp_path / "one") == all_documents(tmp_path / "many") == expected
    assert len(token_files(tmp_path / "one")) == 1 and len(token_files(tmp_path / "many")) > 3
    assert np.load(token_files(tmp_path / "one")[0], mmap_mode="r").dtype == np.uint16


def test_compressed_text_makes_the_same_shards(text, encoder, tmp_path):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    for source, name in ((text, "plain"), (packed, "packed")):
        make_shards(source, tmp_path / name, encoder, "--shard_mb", "0.001")
    plain, packed = digests(tmp_path / "plain"), digests(tmp_path / "packed")
    assert plain.keys() == packed.keys()  # the json files name their sources
    assert [d for n, d in plain.items() if n.endswith("npy")] == [d for n, d in packed.items() if n.endswith("npy")]
    (tmp_path / "none.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"none\.txt\.gz is empty"):
        make_shards(tmp_path / "none.txt.gz", tmp_path / "none", encoder)


def test_a_killed_run_ends_with_the_same_files(text, encoder, tmp_path):
    make_shards(text, tmp_path / "whole", encoder, "--shard_mb", "0.001")
    for call in (2, 3):
        with interrupted(preprocess, "write_shard", call):
            make_shards(text, tmp_path / "killed", encoder, "--shard_mb", "0.001")
    make_shards(text, tmp_path / "killed", encoder, "--shard_mb", "0.001")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_several_processes_make_the_same_files(text, encoder, tmp_path):
    make_shards(text, tmp_path / "one", encoder, "--shard_mb", "0.003")
    forkserver.ensure_running()  # with what tests.processes has it import, for the tests that come after this one
    make_shards(text, tmp_path / "two", encoder, "--shard_mb", "0.003", "--num_workers", "2")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_shards_of_another_text_are_not_replaced_in_silence(text, encoder, tmp_path):
    make_shards(text, tmp_path / "out", encoder, "--shard_mb", "0.001")
    before = len(token_files(tmp_path / "out"))
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        make_shards(text, tmp_path / "out", encoder)
    make_shards(text, tmp_path / "out", encoder, "--overwrite")
    assert len(token_files(tmp_path / "out")) == 1 < before
    other = write_texts(tmp_path / "other.txt", documents=3)
    make_shards(other, tmp_path / "out", encoder)  # another file of the same data set
    assert len(token_files(tmp_path / "out")) == 2


def test_json_lines_with_titles_and_blank_lines(encoder, tmp_path):
    file = tmp_path / "text.jsonl"
    records = [{"title": "wing", "text": "the flow"}, {"text": "heat"}]
    file.write_text(json.dumps(records[0]) + "\n\n" + json.dumps(records[1]) + "\n")
    make_shards(file, tmp_path / "out", encoder)
    tokenizer = preprocess.read_tokenizer(encoder)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("wing the flow", "heat")]
    assert all_documents(tmp_path / "out") == expected
    assert json.loads((tmp_path / "out/text-00000.json").read_text())["documents"] == 3  # the blank one counts


BAD = {
    "bytes": (b"the wing\nheat\nb\xff\xfe\n", r"text.txt, line 3: byte 2 of the line is not UTF-8"),
    "json": (b'{"text": "a"}\n{"text": \n', r"text.jsonl, line 2: not JSON"),
    "no text": (b'{"text": "a"}\n{"title": "b"}\n', r"text.jsonl, line 2: no \"text\""),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named_with_the_line(what, encoder, tmp_path):
    content, message = BAD[what]
    file = tmp_path / ("text.txt" if what in ("bytes", "empty") else "text.jsonl")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make_shards(file, tmp_path / "out", encoder)
    if what == "bytes":
        make_shards(file, tmp_path / "out", encoder, "--on_bad_bytes", "replace")
        assert len(all_documents(tmp_path / "out")) == 3


@pytest.mark.parametrize("damage", ["unfinished", "short", "no npy"])
def test_half_written_shards_are_not_trained_on(damage, text, encoder, tmp_path):
    make_shards(text, tmp_path / "out", encoder)
    (file,) = token_files(tmp_path / "out")
    if damage == "unfinished":
        (tmp_path / "out/text-00000.json").unlink()
    if damage == "short":
        np.save(file, np.load(file)[:-5])
    if damage == "no npy":
        file.write_bytes(b"x" * 50)
    message = {"unfinished": "unfinished shard", "short": "is damaged: .* tokens", "no npy": "is damaged"}[damage]
    with pytest.raises(ValueError, match=message):
        open_shard(file)


# --- Chunks -----------------------------------------------------------------------------------------------------------


def shards(*lengths, borders=True) -> list[Shard]:
    """Shards of documents with these lengths, two to a shard; all tokens count up from 0."""
    found, start = [], 0
    for i in range(0, len(lengths), 2):
        pair = lengths[i : i + 2]
        tokens = np.arange(start, start + sum(pair), dtype=np.uint16)
        start += sum(pair)
        edges = np.cumsum([0, *pair]) if borders else None
        found.append(Shard(Path(f"data/{i}"), tokens, edges))
    return found


def test_packed_chunks_are_slices_of_the_whole_text():
    text = ChunkedText(shards(13, 20, 7, 31), 10)
    for offset in (0, 3, 9):
        for i in range(text.num_chunks(offset)):
            assert text.chunk(i, offset).tolist() == list(range(offset + 10 * i, offset + 10 * i + 10))
        assert text.num_chunks(offset) == (71 - offset) // 10


def test_no_chunk_within_documents_crosses_a_border():
    lengths = (13, 20, 7, 31, 0, 9)
    text = ChunkedText(shards(*lengths), 10, within_documents=True)
    chunks = [text.chunk(i).tolist() for i in range(len(text))]
    starts = np.cumsum([0, *lengths])
    expected = [list(range(a, b)) for a, b, n in zip(starts, starts[1:], lengths, strict=False) if n >= 8]
    joined = [token for document in expected for token in document]
    assert [token for chunk in chunks for token in chunk] == joined  # all of it, once, in order
    assert all(len(chunk) <= 10 for chunk in chunks)
    inside = [{int(np.searchsorted(starts, t, side="right")) for t in chunk} for chunk in chunks]
    assert all(len(documents) == 1 for documents in inside)


def test_text_without_borders_or_too_short_is_refused():
    with pytest.raises(ValueError, match="does not say where its documents begin"):
        ChunkedText(shards(30, borders=False), 10, within_documents=True)
    with pytest.raises(ValueError, match="has 15 tokens, fewer than two chunks of --chunk_length 10"):
        ChunkedText(shards(15), 10)
    with pytest.raises(ValueError, match="no document of 8 tokens"):
        ChunkedText(shards(5, 3), 10, within_documents=True)


def test_files_of_the_reference_are_read(tmp_path):
    for i in range(2):
        torch.save(torch.arange(10 * i, 10 * i + 10, dtype=torch.int32), tmp_path / f"{i}.pkl")
    text = ChunkedText([open_shard(file) for file in token_files(tmp_path)], 4)
    assert text.read(7, 13).tolist() == [7, 8, 9, 10, 11, 12]
    torch.save({"tokens": torch.arange(3)}, tmp_path / "2.pkl")
    with pytest.raises(ValueError, match="no one-dimensional tensor"):
        open_shard(tmp_path / "2.pkl")
    np.save(tmp_path / "x.tokens.npy", np.arange(3))
    with pytest.raises(ValueError, match="two layouts"):
        token_files(tmp_path)
