"""From a passage file to result files: the embedding of a corpus, killed and resumed, and the retrieval."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from contriever import generate_passage_embeddings, passage_retrieval
from contriever.encoder import load_retriever
from contriever.index.embeddings import open_shards
from contriever.index.passages import PassageFile
from shared.run.log import read_log
from tests.contriever.tiny import WORDS, tiny_retriever
from tests.processes import SERVER, run_processes

N = 23


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with an encoder, passages of all lengths (one is empty) and questions."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_retriever(folder / "model").save(folder / "model")
    tiny_retriever(folder / "other", seed=1).save(folder / "other")
    draw = np.random.default_rng(0)
    lines = ["id\ttext\ttitle"]
    for i in range(N):
        words = [WORDS[j] for j in draw.integers(len(WORDS) - 6, size=3 * i % 20)]
        lines.append(f"p{i}\t{' '.join(['w' + str(i), *words]) if i else ''}\t{'Plate' if i % 2 else ''}")
    (folder / "passages.tsv").write_text("\n".join(lines) + "\n")
    questions = [{"question": f"w{i} Wing", "answers": [f"W{i}"], "more": i} for i in (3, 8, 20)]
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


def embed(corpus: Path, output_dir: Path, *flags: str) -> list[Path]:
    flags = ("--chunk_size", "4", "--per_gpu_batch_size", "2", "--passage_maxlength", "16", *flags)
    command = ["--model_name_or_path", str(corpus / "model"), "--passages", str(corpus / "passages.tsv")]
    parser = generate_passage_embeddings.get_args_parser()
    args = parser.parse_args([*command, "--output_dir", str(output_dir), "--device", "cpu", *flags])
    return generate_passage_embeddings.generate_passage_embeddings(args)


@pytest.fixture(scope="module")
def embeddings(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    embed(corpus, folder, "--num_shards", "3")
    return folder


def retrieve(corpus: Path, embeddings: Path | str, output_dir: Path, *flags: str) -> list[dict]:
    values = {
        "--model_name_or_path": corpus / "model",
        "--passages": corpus / "passages.tsv",
        "--data": corpus / "questions.json",
        "--passages_embeddings": f"{embeddings}/*",
        "--output_dir": output_dir,
        "--n_docs": 6,
        "--device": "cpu",
    }
    command = [str(word) for pair in values.items() for word in pair]
    args = passage_retrieval.get_args_parser().parse_args([*command, *flags])
    passage_retrieval.passage_retrieval(args)
    return read_log(output_dir / "questions.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- Embedding --------------------------------------------------------------------------------------------------------


def test_every_passage_gets_the_vector_of_its_title_and_text(corpus, embeddings):
    shards = open_shards(f"{embeddings}/*")
    assert [len(shard.ids) for shard in shards] == [7, 7, 9]
    ids = [shard.ids[i] for shard in shards for i in range(len(shard.ids))]
    passages = list(PassageFile(corpus / "passages.tsv").read())
    assert ids == [passage.id for passage in passages]
    encoder = load_retriever(corpus / "model")
    one_by_one = np.concatenate([encoder.encode([p.full_text()], max_length=16, amp="fp32") for p in passages])
    found = np.concatenate([shard.vectors for shard in shards]).astype(np.float32)
    np.testing.assert_allclose(found, one_by_one, atol=2e-2 if shards[0].vectors.dtype == np.float16 else 1e-5)
    assert shards[0].vectors.dtype == np.float16


def killed_in_a_write(corpus: Path, output_dir: Path) -> None:
    torch.set_num_threads(1)
    fsync, count = os.fsync, 0

    def kill(descriptor: int) -> None:
        nonlocal count
        fsync(descriptor)
        count += 1
        if count == 5:  # vectors of the second chunk are on the disk, its ids and the record of it are not
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = kill
    embed(corpus, output_dir, "--num_shards", "3")


@pytest.mark.usefixtures("on_a_cpu")
def test_killed_in_the_middle_of_a_write_it_resumes_to_the_same_bytes(corpus, embeddings, tmp_path):
    process = SERVER.Process(target=killed_in_a_write, args=(corpus, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"half-written \(4 of 7 passages\)"):
        open_shards(f"{tmp_path}/*")
    embed(corpus, tmp_path, "--num_shards", "3")
    assert contents(tmp_path) == contents(embeddings)


def embed_on_rank(rank: int, corpus: Path, output_dir: Path) -> int:
    return len(embed(corpus, output_dir, "--num_shards", "3"))


@pytest.mark.usefixtures("on_a_cpu")
def test_two_processes_share_the_shards(corpus, embeddings, tmp_path):
    assert run_processes(embed_on_rank, 2, corpus, tmp_path) == [2, 1]
    assert contents(tmp_path) == contents(embeddings)


def test_one_shard_at_a_time(corpus, embeddings, tmp_path):
    (folder,) = embed(corpus, tmp_path, "--num_shards", "3", "--shard_id", "1")
    assert folder.name == "passages_01"
    assert contents(folder) == contents(embeddings / "passages_01")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_shards", "24"), "--num_shards 24 is more than the 23 passages"),
        (("--num_shards", "2", "--shard_id", "2"), "--shard_id 2 is not one of the 2 shards"),
        (("--passage_maxlength", "100"), "--passage_maxlength 100: .* reads at most 64 tokens"),
        (("--num_shards", "-1"), "--num_shards -1 is less than 1"),
        (("--chunk_size", "0"), "--chunk_size 0 is less than 1"),
        (("--lowercase", "--num_shards", "3"), "other settings: lowercase was False and is True"),
    ],
)
def test_bad_flags_of_the_embedding(corpus, embeddings, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        embed(corpus, embeddings if "--lowercase" in flags else tmp_path, *flags)


# --- Retrieval --------------------------------------------------------------------------------------------------------


def test_results_are_the_best_passages_in_the_format_of_the_reference(corpus, embeddings, tmp_path):
    results = retrieve(corpus, embeddings, tmp_path)
    passages = list(PassageFile(corpus / "passages.tsv").read())
    encoder = load_retriever(corpus / "model")
    vectors = encoder.encode([p.full_text() for p in passages], max_length=16, amp="fp32")
    for i, result in zip((3, 8, 20), results, strict=True):
        assert list(result) == ["question", "answers", "more", "ctxs"] and result["more"] == i
        assert list(result["ctxs"][0]) == ["id", "title", "text", "score", "hasanswer"]
        products = encoder.encode([result["question"]], amp="fp32")[0] @ vectors.T
        scores = [float(ctx["score"]) for ctx in result["ctxs"]]
        np.testing.assert_allclose(scores, np.sort(products)[::-1][:6], atol=0.1)
        assert scores == sorted(scores, reverse=True) and isinstance(result["ctxs"][0]["score"], str)
        for ctx in result["ctxs"]:
            passage = passages[int(ctx["id"][1:])]
            assert (ctx["text"], ctx["title"]) == (passage.text, passage.title)
            assert ctx["hasanswer"] == (f"w{i}" in passage.text.split())


def test_a_stored_index_is_used_again_and_is_no_shard(corpus, embeddings, tmp_path):
    shards = tmp_path / "embeddings"
    for path in embeddings.iterdir():
        os.makedirs(shards / path.name)
        for file in path.iterdir():
            os.link(file, shards / path.name / file.name)
    first = retrieve(corpus, shards, tmp_path / "a", "--save_or_load_index")
    assert sorted(p.name for p in (shards / "index-flat").iterdir())[:2] == ["index.json", "passages_00.faiss"]
    assert retrieve(corpus, shards, tmp_path / "b", "--save_or_load_index") == first
    scanned = retrieve(corpus, shards, tmp_path / "c", "--index", "scan")
    assert [ranking(record) for record in scanned] == [ranking(record) for record in first]
    for of_scan, of_flat in zip(scanned, first, strict=True):  # torch and faiss round in their own ways
        np.testing.assert_allclose(scores(of_scan), scores(of_flat), rtol=1e-5)


def ranking(record: dict) -> list[str]:
    return [ctx["id"] for ctx in record["ctxs"]]


def scores(record: dict) -> list[float]:
    return [float(ctx["score"]) for ctx in record["ctxs"]]


def retrieve_on_rank(rank: int, corpus: Path, embeddings: Path, output_dir: Path) -> None:
    if rank == 0:
        retrieve(corpus, embeddings, output_dir)
    else:
        with pytest.raises(FileNotFoundError):  # only rank 0 writes
            retrieve(corpus, embeddings, output_dir / "rank1")


@pytest.mark.usefixtures("on_a_cpu")
def test_two_processes_write_what_one_writes(corpus, embeddings, tmp_path):
    alone = retrieve(corpus, embeddings, tmp_path / "alone")
    run_processes(retrieve_on_rank, 2, corpus, embeddings, tmp_path / "two")
    assert read_log(tmp_path / "two" / "questions.json") == alone


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model_name_or_path", "other"), "made by another model .* its model is"),
        (("--norm_query",), "its normalized is False, that of the questions is True"),
        (("--lang", "en"), "--lang is not supported"),
        (("--projection_size", "768"), "--projection_size 768: vectors have 16 numbers"),
        (("--n_docs", "0"), "--n_docs 0 is less than 1"),
        (("--data", "nothing*"), "--data nothing.*: no such file"),
    ],
)
def test_bad_flags_of_the_retrieval(corpus, embeddings, tmp_path, flags, message):
    flags = [str(corpus / "other") if flag == "other" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        retrieve(corpus, embeddings, tmp_path, *flags)


def test_results_never_overwrite_their_input(corpus, embeddings):
    with pytest.raises(ValueError, match="would overwrite"):
        retrieve(corpus, embeddings, corpus)


def test_another_passage_file_is_noticed(corpus, embeddings, tmp_path):
    (tmp_path / "few.tsv").write_text("p0\tx\t\n")
    with pytest.raises(
        ValueError, match=r"few.tsv is not the file that .*passages_00 was made of, or has changed since"
    ):
        retrieve(corpus, embeddings, tmp_path, "--passages", str(tmp_path / "few.tsv"))
