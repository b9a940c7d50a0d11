import errno
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import tarfile
import time
import urllib.error
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from shared.images import materials
from shared.images.decode import ImageError
from shared.images.labelled import open_labelled
from shared.images.sources import (
    TORCHVISION,
    ArraySource,
    FileSource,
    _lock_file,
    check_same_classes,
    locked,
    open_source,
)
from tests.shared.photographs import photograph

PICTURE = Image.fromarray(photograph(0, 6, 8))


def write(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(path)


def names(source: FileSource) -> list[str]:
    return list(source.names)


def test_nothing_means_the_embedded_materials(monkeypatch, tmp_path):
    monkeypatch.setattr(materials, "NUMBERS", {"train": 24, "val": 12})
    train, val, whole = (open_source(None, split, download_root=tmp_path) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(whole)) == (24, 12, 36)
    assert train.classes == val.classes == [*materials.MATERIALS]
    assert train.load(13).decode().shape == (32, 32, 3) and (train.label(13), val.label(11)) == (1, 11)
    np.testing.assert_array_equal(whole.load(24).decode(), val.load(0).decode())
    assert (
        open_source("", "val", download_root=tmp_path).describe() == "embedded materials (val): 12 images, 12 classes"
    )


def test_the_digits_are_known_by_name():
    train, val, whole = (open_source("digits", split) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(whole)) == (1438, 359, 1797)
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    np.testing.assert_array_equal(whole.labels, load_digits().target)
    np.testing.assert_array_equal(val.labels, whole.labels[4::5])
    digit = whole.load(17)
    assert (digit.height, digit.width) == (8, 8) and digit.decode().shape == (8, 8, 3)
    expected = np.rint(load_digits().images[17] * 255 / 16)
    np.testing.assert_array_equal(digit.decode(), expected[..., None].repeat(3, axis=-1))
    assert open_source("Digits", "val").describe() == "embedded digits (val): 359 images, 10 classes"


def test_class_folders_are_read_as_image_folder_reads_them(tmp_path):
    files = "dog/1.png dog/deep/er/0.JPG cat/b.jpeg cat/a.png cat-x/z.bmp cat/a/c.png cat/a-b/d.png"
    write(*(tmp_path / name for name in files.split()))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    source = open_source(tmp_path)
    reference = torchvision.datasets.ImageFolder(tmp_path)
    assert source.classes == reference.classes == ["cat", "cat-x", "dog"]
    assert [source.path(i) for i in range(len(source))] == [path for path, _ in reference.samples]
    np.testing.assert_array_equal(source.labels, reference.targets)
    assert source.labels.dtype == np.int64 and source.label(0) == 0
    assert source.describe() == f"{tmp_path}: 7 images, 3 classes (left out: 1 .txt)"


def test_images_directly_inside_mean_no_classes_at_any_depth(tmp_path):
    write(tmp_path / "b.png", tmp_path / "a.png", tmp_path / "sub" / "deeper" / "c.png")
    source = open_source(str(tmp_path))
    assert names(source) == ["a.png", "b.png", "sub/deeper/c.png"]
    assert source.labels is None and source.classes is None and source.label(1) == -1
    assert source.load(2).decode().shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("train", "val"), [("train", "test"), ("train", "validation"), ("Train", "Val"), ("training", "Test")]
)
def test_a_parent_folder_stands_for_its_parts_which_have_their_usual_names_in_any_case(tmp_path, train, val):
    write(*(tmp_path / split / c / "1.png" for split in (train, val) for c in "ab"), tmp_path / train / "a/2.png")
    assert names(open_source(tmp_path, "train")) == ["a/1.png", "a/2.png", "b/1.png"]
    assert names(open_source(tmp_path, "val")) == ["a/1.png", "b/1.png"]
    assert open_source(tmp_path, "val").path(0) == str(tmp_path / val / "a" / "1.png")
    assert len(open_source(tmp_path / val, "all")) == 2
    with pytest.raises(ValueError, match=rf"--data_path .* has a {train} folder"):
        open_source(tmp_path, "all")


def test_val_is_preferred_to_test(tmp_path):
    write(*(tmp_path / split / "a" / "1.png" for split in ("train", "val", "test")))
    assert open_source(tmp_path, "val").path(0) == str(tmp_path / "val" / "a" / "1.png")


@pytest.mark.parametrize("folders", [("train", "bus"), ("val", "test"), ("Valid",)])
def test_a_part_is_no_class(tmp_path, folders):
    write(*(tmp_path / folder / "1.png" for folder in folders))
    with pytest.raises(ValueError, match=f"--data_path .* {folders[0]} would be a class"):
        open_source(tmp_path)


def test_hidden_and_system_entries_are_no_data(tmp_path):
    write(tmp_path / "cat/1.png", tmp_path / "dog/2.png", tmp_path / "cat/._1.png", tmp_path / ".git/annex/3.png")
    write(tmp_path / "__MACOSX/cat/1.png", tmp_path / ".ipynb_checkpoints/4.png", tmp_path / ".hidden.png")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    source = open_source(tmp_path)
    assert names(source) == ["cat/1.png", "dog/2.png"] and source.classes == ["cat", "dog"] and not source.remarks


def test_an_image_beside_class_folders_is_named(tmp_path):
    write(tmp_path / "cat/1.png", tmp_path / "dog/2.png", tmp_path / "stray.png")
    assert open_source(tmp_path).describe() == (
        f"{tmp_path}: 3 images, no classes (no classes: stray.png lies beside the folders)"
    )


def test_the_folders_of_runs_are_no_data(tmp_path):
    write(
        tmp_path / "cat/1.png", tmp_path / "dog/2.png", tmp_path / "run/pictures/views.png", tmp_path / "pictures/c.png"
    )
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / "run", tmp_path / "runs" / "first"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "attempt.json").write_text("{}")
    assert open_source(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "attempt.json").unlink()
    with pytest.raises(ValueError, match=r"class folder\(s\) checkpoints of"):
        open_source(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    assert open_source(tmp_path / ".").classes == ["cat", "dog", "pictures"]


def test_links_to_a_folder_above_are_left_out(tmp_path):
    write(tmp_path / "cat/1.png", tmp_path / "dog/2.png")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "latest").symlink_to(".")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "dog" / "again").symlink_to("../cat")
    source = open_source(tmp_path)
    assert names(source) == ["cat/1.png", "dog/2.png", "dog/again/1.png"] and source.classes == ["cat", "dog"]
    assert f"the link {tmp_path}/latest to a folder above it" in source.describe()
    assert f"the link {tmp_path}/cat/up" in source.describe()


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_folder_that_has_changed_since_it_was_read_is_read_again(tmp_path, age_s):
    write(tmp_path / "cat/1.png", tmp_path / "dog/2.png")
    for folder in (tmp_path, tmp_path / "cat", tmp_path / "dog"):
        os.utime(folder, (0, time.time() - age_s))
    open_source(tmp_path).labels[:] = 9
    assert open_source(tmp_path).labels.tolist() == [0, 1]
    write(tmp_path / "dog/3.png")
    assert names(open_source(tmp_path)) == ["cat/1.png", "dog/2.png", "dog/3.png"]
    (tmp_path / "cat/1.png").rename(tmp_path / "cat/4.png")
    shutil.rmtree(tmp_path / "dog")
    assert names(open_source(tmp_path)) == ["cat/4.png"]


def test_names_of_jpegs_and_first_frames_are_read_and_the_rest_is_counted(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for name in ("b.jfif", "c.jpe", "d.mpo"):
        frames[0].save(tmp_path / name, "MPO" if name.endswith("mpo") else "JPEG")
    for name in ("e.heic", "f.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    source = open_source(tmp_path)
    assert names(source) == ["a.gif", "b.jfif", "c.jpe", "d.mpo"]
    assert source.describe().endswith("(left out: 2 .heic, 1 .txt)")
    for index in range(4):
        assert np.abs(source.load(index).decode().reshape(-1, 3).mean(0) - (255, 0, 0)).max() < 3


def test_a_missing_val_part_is_an_error_unless_a_holdout_is_asked_for(tmp_path):
    write(*(tmp_path / "train" / c / f"{i}.png" for c in "ab" for i in range(40)))
    for folder in (tmp_path, tmp_path / "train"):
        with pytest.raises(ValueError, match=r"--data_path .* no val part"):
            open_source(folder, "val")
        train, val = (open_source(folder, split, holdout=True) for split in ("train", "val"))
        assert names(val) == [n for n in names(open_source(folder)) if zlib.crc32(n.encode()) % 10 == 0]
        assert sorted(names(train) + names(val)) == sorted(names(open_source(folder)))
        assert 1 <= len(val) <= 20
        assert train.classes == val.classes == ["a", "b"]
        assert [train.classes[label] for label in train.labels] == [name[0] for name in names(train)]
        assert len(open_source(folder, "train")) == 80


@pytest.mark.parametrize(("inside", "path"), [(".", "."), (".", "train"), ("train", ".")])
def test_a_holdout_never_splits_what_has_a_val_part(inside, path, tmp_path, monkeypatch):
    write(*(tmp_path / split / c / f"{i}.png" for split in ("train", "val") for c in "ab" for i in range(10)))
    assert [len(open_source(tmp_path, split, holdout=True)) for split in ("train", "val")] == [20, 20]
    monkeypatch.chdir(tmp_path / inside)
    assert [len(source) for source in open_labelled(path, None)] == [20, 20]


def test_a_text_list_names_files_and_labels(tmp_path):
    write(tmp_path / "x" / "1.png", tmp_path / "x" / "2 b.png", tmp_path / "3.png")
    (tmp_path / "list.txt").write_text("x/1.png\tzebra\n\nx/2 b.png\tape\r\n3.png\tzebra\n".replace("\r", ""))
    source = open_source(tmp_path / "list.txt")
    assert source.classes == ["ape", "zebra"] and source.labels.tolist() == [1, 0, 1]
    assert source.load(1).decode().shape == (6, 8, 3)
    (tmp_path / "plain.txt").write_text("3.png\nx/../x/1.png")
    source = open_source(tmp_path / "plain.txt")
    assert source.labels is None and len(source) == 2 and source.load(1).height == 6
    (tmp_path / "numbers.txt").write_text("3.png\t10\nx/1.png\t9\n")
    assert open_source(tmp_path / "numbers.txt").classes == ["9", "10"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.png cat\n", "line 1: there is no 'a.png cat' beside the list; a tab separates"),
        ("a.png,cat\n", "a tab separates"),
        ("sub\\a.png\n", "and / one folder from the next"),
        ("a.png\t\n", "line 1: expected a label, got none"),
        ("a.png\tcat\t0.9\n", "line 1: expected a file name and a label, got 3 columns"),
        ("../secret.png\n", "line 1: ../secret.png leads out of the list's folder"),
        ("a.png\nx/../../secret.png\n", "line 2: x/../../secret.png leads out of the list's folder"),
        ("a.png\n/etc/passwd.png\n", "line 2: /etc/passwd.png is absolute"),
        ("a.png\t1\nb.png\n", "line 2: either all lines have a label or none"),
        ("a.png\nb.png\t1\n", "line 2: either all lines have a label or none"),
        ("a\0.png\n", "line 1: not a text list"),
        ("\n\n", "an empty list"),
    ],
)
def test_wrong_lists_are_refused_with_the_line_and_what_is_wanted(tmp_path, text, reason):
    write(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--data_path {tmp_path / 'list.txt'}") + ".*" + re.escape(reason)):
        open_source(tmp_path / "list.txt")


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"a.png", b"x/1.png\t3", b"../b.png", b"x/../../c", b"/etc/passwd", b"d\t--5", b"e\t\xc2\xb2"]
        ),
        st.binary(max_size=20),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LINES)
def test_any_file_is_a_list_inside_its_folder_or_an_error_that_names_it(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lists" / "list.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    try:
        source = open_source(path)
    except ValueError as error:
        assert str(error).startswith(f"--data_path {path}")
        return
    for index in range(len(source)):
        inside = os.path.normpath(source.path(index))
        assert inside == str(path.parent) or inside.startswith(f"{path.parent}{os.sep}")
        with pytest.raises(ImageError, match=re.escape(str(path.parent))):  # there are no images
            source.load(index)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("list.txt", "\ufeffa.png\tcat\nb.png\tcat \nc.png\tdog\n"),
        ("list.txt", "image\tlabel\r\na.png\tcat\r\nb.png\tcat\r\nc.png\tdog\r\n"),
        ("list.csv", "a.png,cat\nb.png,cat\nc.png,dog\n"),
        ("list.csv", 'file;class\n"a.png";cat\nb.png;"cat"\nc.png;dog\n'),
        ("list.tsv", "a.png\tcat\nb.png\tcat\n\nc.png\tdog\n"),
    ],
)
def test_lists_and_tables_as_people_and_spreadsheets_write_them(tmp_path, file, text):
    write(*(tmp_path / f"{name}.png" for name in "abc"))
    (tmp_path / file).write_text(text, newline="")
    source = open_source(tmp_path / file)
    assert names(source) == ["a.png", "b.png", "c.png"]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_still_keeps_processes_apart(tmp_path, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", unsupported)
    held = []

    def hold(number):
        with locked(tmp_path / "file"):
            held.append(number)
            time.sleep(0.02)
            assert held[-1] == number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(8)))
    assert sorted(held) == list(range(8)) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_locks_a_living_process_is_waited_for_and_a_killed_one_is_told_of(tmp_path):
    path = tmp_path / "file.locked"

    def hold(seconds):
        with _lock_file(path, patience_s=1):
            time.sleep(seconds)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(hold, (1.5, 1.5)))
    path.touch()
    with pytest.raises(ValueError, match=r"file\.locked is 1 s old; remove it if no run uses it"):
        hold(0)


def test_absolute_paths_in_a_list_need_permission(tmp_path):
    write(tmp_path / "1.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text(f"{tmp_path / '1.png'}\n")
    source = open_source(tmp_path / "lists" / "list.txt", allow_absolute_paths=True)
    assert source.load(0).height == 6


def test_missing_and_empty_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noimages" / "a").mkdir(parents=True)
    (tmp_path / "noimages" / "a" / "readme.md").write_text("text")
    (tmp_path / "archive.zip").write_bytes(b"zip")
    write(tmp_path / "hollow" / "full" / "1.png")
    (tmp_path / "hollow" / "empty_class").mkdir()
    for name, reason in {
        "missing": "no such file or folder",
        "empty": "no images",
        "noimages": "no images",
        "archive.zip": "neither a folder nor a list of images",
        "hollow": "no images in the class folder.* empty_class",
    }.items():
        with pytest.raises(ValueError, match=f"--train_data {re.escape(str(tmp_path / name))}: {reason}"):
            open_source(tmp_path / name, flag="--train_data")
    with pytest.raises(ValueError, match="split 'valid'"):
        open_source(tmp_path / "hollow", "valid")


def test_different_classes_in_train_and_val_are_an_error():
    def source(name, classes):
        return ArraySource(name, np.zeros((2, 4, 4), np.uint8), [0, 1], classes)

    check_same_classes(source("train", ["a", "b"]), source("val", ["a", "b"]))
    with pytest.raises(ValueError, match="val has other classes than train: 2 against 3, missing b, c, additional d"):
        check_same_classes(source("train", ["a", "b", "c"]), source("val", ["a", "d"]))
    with pytest.raises(ValueError, match="val has other classes"):
        check_same_classes(source("train", ["a", "b"]), source("val", ["b", "a"]))
    with pytest.raises(ValueError, match="flat has no classes to evaluate"):
        check_same_classes(source("train", ["a", "b"]), ArraySource("flat", np.zeros((1, 4, 4), np.uint8)))


def test_file_names_that_are_no_utf8_can_be_read(tmp_path):
    path = tmp_path / "odd\udcff.png"
    write(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(path)
    assert open_source(tmp_path).load(0).height == 6


# ------------------------------------------------------------------------------------------- torchvision's data sets


def write_cifar10(root, monkeypatch):
    """A CIFAR-10 of ten images in the layout of the download, with checksums to match."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    files = {"batches.meta": {"label_names": list("abcdefghij")}}
    files["data_batch_1"] = {"data": pixels[:6], "labels": [3, 1, 4, 1, 5, 9]}
    files["test_batch"] = {"data": pixels[6:], "labels": [2, 7, 1, 8]}
    sums = {}
    for name, content in files.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(cifar, "meta", meta)
    return pixels.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)


def test_a_torchvision_data_set_on_disk_is_found_by_its_name(tmp_path, monkeypatch):
    pixels = write_cifar10(tmp_path, monkeypatch)
    train, val = (open_source("CIFAR10", split, download_root=tmp_path) for split in ("train", "val"))
    assert train.describe() == "cifar10 (train): 6 images, 10 classes" and val.labels.tolist() == [2, 7, 1, 8]
    np.testing.assert_array_equal(train.load(5).decode(), pixels[5])
    np.testing.assert_array_equal(val.load(0).decode(), pixels[6])
    assert train.label(0) == 3 and train.path(2) == "cifar10 (train)[2]"


def test_a_data_set_of_files_keeps_them_encoded(tmp_path):
    wnids = [wnid for wnid, _ in zip(torchvision.datasets.Imagenette._WNID_TO_CLASS, range(10), strict=True)]
    for split in ("train", "val"):
        for wnid in wnids:
            path = tmp_path / "imagenette2" / split / wnid / f"{split}_{wnid}.JPEG"
            path.parent.mkdir(parents=True)
            PICTURE.save(path)
    source = open_source("imagenette", "val", download_root=tmp_path)
    assert isinstance(source, FileSource) and len(source) == 10 and len(source.classes) == 10
    assert source.path(0).startswith(str(tmp_path / "imagenette2" / "val")) and source.load(0).height == 6


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def test_a_forged_archive_of_a_data_set_is_not_unpacked(tmp_path, no_network):
    for name, archive in (("cifar10", "cifar-10-python.tar.gz"), ("imagenette", "imagenette2.tgz")):
        root = tmp_path / name
        root.mkdir()
        with tarfile.open(root / archive, "w:gz") as tar:
            for member in ("../outside", "cifar-10-batches-py/data_batch_1", "imagenette2/train/a/1.JPEG"):
                tar.addfile(tarfile.TarInfo(member))
        with pytest.raises(ValueError, match=f"--data_path {name}: could not be downloaded"):
            open_source(name, download_root=root)
    assert not {path.name for path in tmp_path.rglob("*")} & {"outside", "data_batch_1", "1.JPEG"}


def test_every_torchvision_name_exists_and_takes_its_arguments(tmp_path, no_network):
    for name in TORCHVISION:
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=rf"(?s){name}: could not be downloaded.*Name or service not known"):
                open_source(name, split, download_root=tmp_path / name)
    with pytest.raises(ValueError, match="ask for the train or the val part"):
        open_source("cifar10", "all", download_root=tmp_path)


def test_a_folder_goes_before_a_data_set_of_the_same_name(tmp_path, monkeypatch):
    write(tmp_path / "cifar10" / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert names(open_source("cifar10")) == ["a/1.png"]


def download_count(root, downloads, results):
    class Slow(torchvision.datasets.CIFAR10):
        def download(self):
            with downloads.get_lock():
                downloads.value += 1
            shutil.copytree(root / "stored" / "cifar-10-batches-py", root / "cifar-10-batches-py")

    torchvision.datasets.CIFAR10 = Slow
    results.put(len(open_source("cifar10", download_root=root)))


def test_only_one_process_downloads(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "stored", monkeypatch)
    context = multiprocessing.get_context("fork")
    downloads, results = context.Value("i", 0), context.Queue()
    processes = [context.Process(target=download_count, args=(tmp_path, downloads, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [6, 6, 6]
    for process in processes:
        process.join()
    assert downloads.value == 1
