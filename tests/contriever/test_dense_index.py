"""The index against a matrix product: exact kinds exactly, the others nearly; stored, sharded, on several processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from contriever.index import dense
from contriever.index.dense import DenseIndex, IndexSettings
from contriever.index.embeddings import Shard, ShardWriter, open_shard
from tests.processes import run_processes

D, K = 16, 5
rng = np.random.default_rng(0)
LOW_RANK = rng.standard_normal((4, D))  # as real embeddings, these fill only few directions: codes can be good
VECTORS = (rng.standard_normal((600, 4)) @ LOW_RANK + 0.1 * rng.standard_normal((600, D))).astype(np.float16)
QUERIES = rng.standard_normal((7, D)).astype(np.float32)
APPROXIMATE = {
    "ivf": IndexSettings("ivf", nlist=8, nprobe=8),
    "hnsw": IndexSettings("hnsw", hnsw_m=8),
    "pq": IndexSettings("pq", n_subquantizers=8, n_bits=4),
    "ivfpq": IndexSettings("ivfpq", n_subquantizers=8, n_bits=4, nlist=4, nprobe=4),
}


def in_memory(*sizes: int) -> list[Shard]:
    parts = np.split(VECTORS[: sum(sizes)], np.cumsum(sizes)[:-1])
    ids = iter(range(len(VECTORS)))
    return [Shard(Path(f"s_{i}"), p, [f"id{next(ids)}" for _ in p], {}, None) for i, p in enumerate(parts)]


def on_disk(folder: Path, *sizes: int) -> list[Shard]:
    for i, shard in enumerate(in_memory(*sizes)):
        writer = ShardWriter(folder / f"s_{i}", len(shard.vectors), D, "float16", {})
        writer.append(shard.ids, shard.vectors)
        writer.finish()
    return [open_shard(folder / f"s_{i}") for i in range(len(sizes))]


def exact(count: int, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    products = QUERIES @ VECTORS[:count].astype(np.float32).T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, rows, axis=1), rows


def assert_exact(found, count: int, k: int = K) -> None:
    scores, rows = exact(count, k)
    assert np.array_equal(found[1], rows)
    np.testing.assert_allclose(found[0], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(600,), (100, 300, 200), (1, 599)])
@pytest.mark.parametrize("kind", ["flat", "scan"])
def test_exact_kinds_equal_the_matrix_product(kind, sizes, monkeypatch):
    monkeypatch.setattr(dense, "SCAN_BLOCK", 128)
    monkeypatch.setattr(dense, "QUERY_BLOCK", 3)
    index = DenseIndex(in_memory(*sizes), IndexSettings(kind), batch_size=150)
    assert len(index) == 600
    assert_exact(index.search(QUERIES, K), 600)
    assert [index.id(row) for row in (0, 1, 100, 399, 400, 599)] == [f"id{i}" for i in (0, 1, 100, 399, 400, 599)]


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_kinds_find_most_of_it(kind):
    scores, rows = DenseIndex(in_memory(400, 200), APPROXIMATE[kind]).search(QUERIES, K)
    found = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows, exact(600)[1], strict=True)])
    assert found == 1 if kind == "ivf" else found > 0.4
    assert (np.diff(scores) <= 0).all()
    true = np.take_along_axis(QUERIES @ VECTORS.astype(np.float32).T, rows, axis=1)
    assert np.corrcoef(scores.ravel(), true.ravel())[0, 1] > 0.7


def test_cells_that_hold_too_few_are_told(capsys):
    shards = in_memory(250, 350)
    _, rows = DenseIndex(shards, IndexSettings("ivf", nlist=8, nprobe=1)).search(QUERIES, 500)
    counts = (rows >= 0).sum(axis=1)
    assert 0 < counts.min() <= counts.max() < 500
    told = f"NOTE: 7 of 7 queries found fewer than 500 passages, one of them {counts.min()}: raise --nprobe, now 1\n"
    assert capsys.readouterr().out == told
    DenseIndex(shards, IndexSettings("ivf", nlist=8, nprobe=8)).search(QUERIES, 1000)  # finds all there are
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_stored_index_gives_the_same_answers(kind, tmp_path, monkeypatch):
    shards = on_disk(tmp_path, 400, 200)
    settings = APPROXIMATE.get(kind, IndexSettings(kind))
    built = DenseIndex(shards, settings, tmp_path / "index").search(QUERIES, K)
    assert not list((tmp_path / "index").glob(".*"))
    monkeypatch.setattr(dense, "_filled", None)  # building again would fail
    again = DenseIndex(shards, settings, tmp_path / "index").search(QUERIES, K)
    monkeypatch.undo()
    assert all(np.array_equal(a, b) for a, b in zip(built, again, strict=True))
    fresh = DenseIndex(shards, settings).search(QUERIES, K)
    assert all(np.array_equal(a, b) for a, b in zip(built, fresh, strict=True))


def test_a_stale_or_half_written_index_is_built_again(tmp_path, capsys):
    (old,) = on_disk(tmp_path / "old", 300)
    DenseIndex([old], IndexSettings("flat"), tmp_path / "index")
    (new,) = on_disk(tmp_path / "new", 400)
    assert_exact(DenseIndex([new], IndexSettings("flat"), tmp_path / "index").search(QUERIES, K), 400)
    assert "belongs to other embeddings or settings: it is built again" in capsys.readouterr().out

    file = tmp_path / "index" / "s_0.faiss"
    file.write_bytes(file.read_bytes()[:-100])
    assert_exact(DenseIndex([new], IndexSettings("flat"), tmp_path / "index").search(QUERIES, K), 400)
    assert "half-written: it is built again" in capsys.readouterr().out


def test_other_settings_build_another_index(tmp_path, capsys):
    shards = on_disk(tmp_path, 600)
    DenseIndex(shards, IndexSettings("ivf", nlist=8), tmp_path / "index")
    DenseIndex(shards, IndexSettings("ivf", nlist=8, nprobe=3), tmp_path / "index")  # may change between searches
    assert "built again" not in capsys.readouterr().out
    assert DenseIndex(shards, IndexSettings("ivf", nlist=4), tmp_path / "index").parts[0].nlist == 4
    assert "built again" in capsys.readouterr().out


def test_damaged_vectors_do_not_get_into_an_index(tmp_path):
    on_disk(tmp_path, 100)
    file = tmp_path / "s_0" / "embeddings.npy"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        DenseIndex([open_shard(tmp_path / "s_0")], IndexSettings("flat"))


def test_queries_of_another_length_are_an_error():
    with pytest.raises(ValueError, match="queries have 8 dimensions, the index has 16"):
        DenseIndex(in_memory(10), IndexSettings("flat")).search(QUERIES[:, :8], K)


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        (IndexSettings("pq", n_subquantizers=5), 600, "--n_subquantizers 5 does not divide the 16 dimensions"),
        (IndexSettings("pq", n_bits=8), 255, "--n_bits 8 needs at least 256 passages, there are 255"),
        (IndexSettings("ivf", nlist=11), 10, "--nlist 11 is more than the 10 passages"),
    ],
)
def test_settings_that_do_not_fit_name_their_flag(settings, count, message):
    with pytest.raises(ValueError, match=message):
        DenseIndex(in_memory(count), settings)


def search_on_rank(rank: int, folder: str, kind: str) -> tuple:
    shards = [open_shard(Path(folder) / f"s_{i}") for i in range(3)]
    settings = APPROXIMATE.get(kind, IndexSettings(kind))
    index = DenseIndex(shards, settings, Path(folder) / f"index-{kind}")
    assert kind == "scan" or sorted(index.parts) == [[0, 2], [1]][rank]
    return tuple(torch.from_numpy(a) for a in index.search(QUERIES, K))


@pytest.mark.parametrize("kind", ["scan", "ivf"])
def test_two_processes_find_what_one_finds(kind, tmp_path):
    shards = on_disk(tmp_path, 100, 300, 200)
    results = run_processes(search_on_rank, 2, str(tmp_path), kind)
    alone = DenseIndex(shards, APPROXIMATE.get(kind, IndexSettings(kind))).search(QUERIES, K)
    for scores, rows in results:
        assert np.array_equal(scores.numpy(), alone[0]) and np.array_equal(rows.numpy(), alone[1])
