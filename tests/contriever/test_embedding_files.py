"""Vectors on disk: what is written is read, in any number of attempts; anything else is an error."""

import errno
import os
import pickle

import numpy as np
import pytest

from contriever.index.embeddings import Ids, Shard, ShardWriter, missing_shards, open_shard, open_shards

N, D = 10, 4
SETTINGS = {"model": 17, "passages": 3, "shard_id": 0, "num_shards": 1}
VECTORS = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
IDS = [f"p{i}" if i else "Zürich 北京" for i in range(N)]


def writer(folder, settings=SETTINGS, count=N, dtype="float16") -> ShardWriter:
    return ShardWriter(folder, count, D, dtype, settings)


def fill(shard: ShardWriter, upto: int = N, chunk: int = 3) -> ShardWriter:
    while shard.done < upto:
        part = slice(shard.done, min(shard.done + chunk, N))
        shard.append(IDS[part], VECTORS[part])
    return shard


def write_shard(folder, **settings):
    fill(writer(folder, SETTINGS | settings)).finish()
    return folder


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path, dtype):
    fill(writer(tmp_path / "s", dtype=dtype)).finish()
    shard = open_shard(tmp_path / "s")
    assert isinstance(shard.vectors, np.memmap) and shard.vectors.dtype == dtype
    assert np.array_equal(shard.vectors, VECTORS.astype(dtype))
    assert [shard.ids[i] for i in range(N)] == IDS and len(shard.ids) == N
    assert shard.settings == SETTINGS
    shard.verify()


def test_a_finished_shard_is_left_alone(tmp_path):
    before = files(write_shard(tmp_path / "s"))
    again = writer(tmp_path / "s")
    assert again.finished and again.done == N
    assert files(tmp_path / "s") == before


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_their_name(tmp_path, finished):
    shard = fill(writer(tmp_path / "s"), upto=3)
    if finished:
        fill(shard).finish()
    shard.close()
    with pytest.raises(ValueError, match="model was 17 and is 18"):
        writer(tmp_path / "s", SETTINGS | {"model": 18})
    with pytest.raises(ValueError, match="count was 10 and is 11"):
        writer(tmp_path / "s", count=N + 1)


def test_two_processes_cannot_write_one_shard(tmp_path):
    first = writer(tmp_path / "s")
    with pytest.raises(ValueError, match="another process is writing"):
        writer(tmp_path / "s")
    first.close()
    writer(tmp_path / "s")


def test_a_file_system_without_locks_is_told_of_and_written_to(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    fill(writer(tmp_path / "s")).finish()
    open_shard(tmp_path / "s").verify()
    assert "this file system knows no locks" in capsys.readouterr().out


def test_a_shard_that_has_lost_bytes_is_not_continued(tmp_path):
    fill(writer(tmp_path / "s"), upto=6).close()
    os.truncate(tmp_path / "s" / "embeddings.npy", 140)
    with pytest.raises(ValueError, match=r"embeddings\.npy is shorter than"):
        writer(tmp_path / "s")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_vectors_that_float16_cannot_hold_are_refused(tmp_path, value):
    vectors = VECTORS[:2].copy()
    vectors[1, 2] = value
    with pytest.raises(ValueError, match="passage 'b' is not finite in float16"), np.errstate(over="ignore"):
        writer(tmp_path / "s").append(["a", "b"], vectors)


def test_ids_are_single_lines(tmp_path):
    with pytest.raises(ValueError, match="line break"):
        writer(tmp_path / "s").append(["a", "b\nc"], VECTORS[:2])


def test_half_written_missing_and_damaged_shards(tmp_path):
    fill(writer(tmp_path / "half"), upto=3)
    with pytest.raises(ValueError, match=r"half-written \(3 of 10 passages\)"):
        open_shard(tmp_path / "half")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no embeddings"):
        open_shard(tmp_path / "empty")
    with pytest.raises(ValueError, match="nothing there"):
        open_shards(str(tmp_path / "none*"))

    for name, keep in (("embeddings.npy", 150), ("ids.txt", 10), ("shard.json", 20)):
        folder = write_shard(tmp_path / f"cut {name}")
        os.truncate(folder / name, keep)
        with pytest.raises(ValueError, match="damaged"):
            open_shard(folder)


def test_shards_must_belong_together(tmp_path):
    write_shard(tmp_path / "s_00", num_shards=3)
    write_shard(tmp_path / "s_02", num_shards=3, shard_id=2)
    (tmp_path / "s_index").mkdir()
    (tmp_path / "s_index" / "index.json").write_text("{}")  # an index beside the shards is no shard
    shards = open_shards(str(tmp_path / "s_*"))
    assert [shard.path.name for shard in shards] == ["s_00", "s_02"]
    assert missing_shards(shards) == [1]
    write_shard(tmp_path / "s_03", num_shards=3, model=99)
    with pytest.raises(ValueError, match="do not belong together: model is 17 and 99"):
        open_shards(str(tmp_path / "s_*"))
    write_shard(tmp_path / "t_00")
    write_shard(tmp_path / "t_01", normalized=True)
    with pytest.raises(ValueError, match="do not belong together: normalized is None and True"):
        open_shards(str(tmp_path / "t_*"))


def test_a_part_of_the_collection_is_searched_once(tmp_path):
    write_shard(tmp_path / "s_00")
    write_shard(tmp_path / "old_00")
    with pytest.raises(ValueError, match=r"old_00 and .*s_00 are the same part 0 of the collection"):
        open_shards(str(tmp_path / "*"))


def test_ids_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("contriever.index.embeddings.BLOCK_BYTES", 5)
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(100)))
    ids = Ids(tmp_path / "ids.txt")
    assert [ids[i] for i in range(len(ids))] == [str(i) for i in range(100)]


# --- The reference's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_official_files_are_read(tmp_path, dtype, protocol):
    (tmp_path / "passages_00").write_bytes(pickle.dumps((IDS, VECTORS.astype(dtype)), protocol=protocol))
    shard = open_shards(str(tmp_path / "*"))[0]
    assert isinstance(shard, Shard) and shard.ids == IDS
    assert np.array_equal(shard.vectors, VECTORS.astype(dtype)) and shard.vectors.dtype == dtype
    shard.verify()


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        lambda marker: (IDS, Attack(os.mkdir, marker)),
        lambda marker: (Attack(os.mkdir, marker), VECTORS),
        lambda marker: (IDS, np.array([[Attack(os.mkdir, marker)]], dtype=object)),
        lambda marker: (IDS, VECTORS.astype(np.int64)),
        lambda marker: (IDS[1:], VECTORS),
        lambda marker: ([1] * N, VECTORS),
        lambda marker: IDS,
    ],
)
def test_other_pickles_are_refused_without_running(tmp_path, content):
    marker = tmp_path / "marker"
    (tmp_path / "passages_00").write_bytes(pickle.dumps(content(str(marker))))
    with pytest.raises(ValueError, match=r"passages_00 (is no file of embeddings|does not hold a vector)"):
        open_shard(tmp_path / "passages_00")
    assert not marker.exists()
