import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

import shared.images.cache
from shared.images.cache import CachedSource, cache_images
from shared.images.decode import ImageError
from shared.images.sources import FileSource, open_source
from shared.multicrop import MultiCropDataset, ViewRecipe
from tests.shared.photographs import encoded, photograph


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encoded(photograph(i, 20 + i, 30), "JPEG"))
    return tmp_path / "images"


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return "memory" if request.param == "memory" else str(tmp_path / "cache")


def test_a_cache_changes_no_view(folder, cache):
    source = open_source(folder)
    cached = cache_images(source, cache)
    assert isinstance(cached, CachedSource) and cached.describe() == source.describe()
    recipes = [ViewRecipe(size_px=12, scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8)]
    keys = [(0, i) for i in range(5)]
    expected, views = (MultiCropDataset(s, recipes).__getitems__(keys)[0][0] for s in (source, cached))
    assert (expected == views).all()


def test_cached_images_are_not_read_again(folder, cache):
    cached = cache_images(open_source(folder), cache)
    pixels = [cached.load(i).decode().copy() for i in range(5)]
    for file in folder.iterdir():
        file.unlink()
    assert all((cached.load(i).decode() == pixels[i]).all() for i in range(5))


def test_bad_images_are_still_reported(folder, cache):
    (folder / "0.jpg").write_bytes(b"no image")
    (folder / "3.jpg").write_bytes(encoded(photograph(9, 60, 70), "JPEG")[:-400])  # a good header
    cached = cache_images(open_source(folder), cache)
    for i, name in ((0, "0.jpg"), (3, "3.jpg")):
        with pytest.raises(ImageError, match=name):
            cached.load(i).decode()
    good = Image.open(folder / "4.jpg")
    np.testing.assert_array_equal(cached.load(4).decode(), np.asarray(good))


def test_the_file_is_made_once_and_again_when_an_image_changes(folder, tmp_path, monkeypatch):
    source = FileSource("folder", folder, [f"{i}.jpg" for i in range(5)])
    fills = []
    fill = shared.images.cache._fill_files
    monkeypatch.setattr(shared.images.cache, "_fill_files", lambda *args: (fills.append(1), fill(*args)))
    for _ in range(2):
        cache_images(source, str(tmp_path / "cache"))
    assert len(fills) == 1
    (folder / "2.jpg").write_bytes(encoded(photograph(11, 21, 31), "JPEG"))
    assert cache_images(source, str(tmp_path / "cache")).load(2).height == 21
    assert len(fills) == 2


def test_a_file_is_kept_only_for_images_whose_changes_show(tmp_path, monkeypatch):
    source = FileSource("zip", "", [str(tmp_path / "a.zip/1.jpg"), str(tmp_path / "a.zip/2.jpg")])
    keys = []
    for content in (b"one", b"another"):
        (tmp_path / "a.zip").write_bytes(content)
        keys.append(shared.images.cache._fingerprint(source))
    assert keys[0] != keys[1]
    monkeypatch.setattr(source, "path", lambda i: f"module:function[{i}]")
    with pytest.raises(ValueError, match=r"--cache FOLDER: images of zip are no files.*take --cache memory"):
        cache_images(source, str(tmp_path / "cache"))


def test_an_interrupted_file_is_made_anew(folder, tmp_path, monkeypatch):
    source = open_source(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shared.images.cache, "_decode_all", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache_images(source, str(tmp_path / "cache"))
    cached = cache_images(source, str(tmp_path / "cache"))
    np.testing.assert_array_equal(cached.load(1).decode(), source.load(1).decode())


def checksum(folder, cache_folder, results):
    cached = cache_images(open_source(folder), cache_folder)
    results.put(sum(int(cached.load(i).decode().sum()) for i in range(len(cached))))


def test_several_processes_can_ask_for_the_file_at_once(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cache_folder = str(tmp_path / "cache")
    processes = [context.Process(target=checksum, args=(folder, cache_folder, results)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    source = open_source(folder)
    assert sums == {sum(int(source.load(i).decode().sum()) for i in range(5))}
    assert len([name for name in os.listdir(cache_folder) if name.endswith(".pixels")]) == 1


def test_what_does_not_fit_is_refused(folder, cache, monkeypatch):
    monkeypatch.setattr(shared.images.cache, "_free_memory", lambda: 1000)
    monkeypatch.setattr(shared.images.cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=f"--cache {cache}: .*images: 5 images, no classes, take 0.0 GiB"):
        cache_images(open_source(folder), cache)


def test_memory_is_shared_out_between_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = shared.images.cache._free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < shared.images.cache._free_memory() < alone / 2
