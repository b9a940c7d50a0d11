"""Which images have a label: tables, folders, lists and draws; what does not fit is one clear error."""

import numpy as np
import pytest
from PIL import Image

from paws.labels import drawn_by_share, open_partly_labelled
from tests.paws.tiny import write_own_pictures
from tests.reliability.runs import write_images


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own_pictures(tmp_path_factory.mktemp("own"))


def names(images) -> dict[str, str]:
    """File name and class of every labelled image."""
    return {images.source.path(i).rpartition("/")[2]: images.classes[images.labels[i]] for i in images.labelled}


@pytest.mark.parametrize(("file", "separator"), [("labels.csv", ","), ("labels.csv", ";"), ("labels.txt", ",")])
def test_a_table_labels_some_of_a_flat_folder(own, tmp_path, file, separator):
    pictures, labels = own
    table = tmp_path / file
    table.write_text(labels.read_text().replace(",", separator))
    images = open_partly_labelled(str(pictures), labels=[str(table)])
    assert images.classes == ["bright", "dark"] and images.truth is None
    assert names(images) == {f"{i}.png": ("dark", "bright")[i % 2] for i in range(12)}
    assert len(images.unlabelled) == 20


def test_a_table_needs_no_heading_and_knows_paths(images, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("class0/0.png,cat\n./class1/1.png,dog\n2.png,dog\n")
    assert names(open_partly_labelled(str(images), labels=[str(table)])) == {
        "0.png": "cat",
        "1.png": "dog",
        "2.png": "dog",
    }


PSEUDO = "image,label,confidence\n20.png,dark,0.95\n21.png,bright,0.9\n22.png,dark,0.4\n23.png,bright,0.8\n"


def test_pseudo_labels_are_labels_from_a_confidence_on(own, tmp_path):
    pictures, labels = own
    table = tmp_path / "pseudo_labels.csv"
    table.write_text(PSEUDO)
    images = open_partly_labelled(str(pictures), labels=[str(table)])
    assert names(images) == {"20.png": "dark", "21.png": "bright", "22.png": "dark", "23.png": "bright"}
    images = open_partly_labelled(str(pictures), labels=[str(labels), str(table)], min_confidence=0.9)
    assert set(names(images)) == {f"{i}.png" for i in (*range(12), 20, 21)}
    table.write_text(PSEUDO.replace("confidence\n", "confidence,class\n").replace("5\n", "5,dark\n"))
    with pytest.raises(ValueError, match=r"line 3: expected image, label, confidence, class, got \['21.png'"):
        open_partly_labelled(str(pictures), labels=[str(table)])


@pytest.mark.parametrize(
    ("text", "min_confidence", "message"),
    [
        (PSEUDO, 0.93, r"1 of 2 classes have no labelled image \(.*with --min_confidence 0.93\), .* 'bright'"),
        (PSEUDO.replace("0.4", "low"), None, r"line 4: the confidence 'low' is no number"),
        (PSEUDO.replace("confidence", "size"), None, "expected two columns, .* got image, label, size"),
        ("20.png,dark\n21.png,bright\n", 0.5, "--min_confidence 0.5: --labels .* has no column confidence"),
        ("20.png,dark,0.9\n", None, r"line 1: expected an image and its label, got \['20.png', 'dark', '0.9'\]"),
    ],
)
def test_pseudo_labels_that_do_not_fit_are_one_clear_error(own, tmp_path, text, min_confidence, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_partly_labelled(str(own[0]), labels=[str(tmp_path / "table.csv")], min_confidence=min_confidence)


@pytest.mark.parametrize("folder", ["unlabeled", "unlabelled"])
def test_class_folders_beside_a_folder_without_labels(tmp_path, folder):
    write_images(tmp_path, 9)
    (tmp_path / folder).mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / folder / f"u{i}.png")
    images = open_partly_labelled(str(tmp_path))
    assert images.classes == ["class0", "class1", "class2"]
    assert len(images.labelled) == 9 and len(images.unlabelled) == 4 and images.truth is None
    assert all(name.startswith("class") for name in names(images).values())


def test_so_many_of_every_class_are_drawn_and_stay_drawn(images):
    draws = [open_partly_labelled(str(images), labels_per_class=2, data_seed=seed) for seed in (0, 0, 1)]
    for found in draws:
        assert np.bincount(found.labels[found.labelled]).tolist() == [2, 2, 2]
        assert (found.labels[found.labelled] == found.truth[found.labelled]).all()
    assert (draws[0].labels == draws[1].labels).all() and (draws[0].labels != draws[2].labels).any()


def test_a_share_is_drawn_when_nothing_else_is_said():
    keep = drawn_by_share(10_000, 0.9)
    assert 900 < len(keep) < 1100 and (keep == drawn_by_share(10_000, 0.9)).all()
    images = open_partly_labelled(None, unlabeled_frac=0.9)
    assert 0.07 < len(images.labelled) / len(images.source) < 0.13 and images.classes == images.source.classes


def test_official_lists_are_found_by_the_share_without_labels(images, tmp_path):
    (tmp_path / "90percent.txt").write_text("class0/0.png\nclass1/1.png\nclass2/2.png\n")
    found = open_partly_labelled(str(images), subset_path=str(tmp_path), unlabeled_frac=0.9)
    assert set(names(found)) == {"0.png", "1.png", "2.png"}
    with pytest.raises(ValueError, match=r"holds no 58percent.txt, the list for --unlabeled_frac 0.58"):
        open_partly_labelled(str(images), subset_path=str(tmp_path), unlabeled_frac=0.58)  # not 57: no truncation


def test_official_lists_of_indices_are_found_by_their_number(tmp_path):
    (tmp_path / "spc.4000_split.91.txt").write_text("\n".join(str(i) for i in range(60)))
    images = open_partly_labelled(None, subset_path=str(tmp_path), unlabeled_frac=0.92, data_seed=91)
    assert images.labelled.tolist() == list(range(60))
    with pytest.raises(ValueError, match=r"holds no spc.4000_split.152.txt"):
        open_partly_labelled(None, subset_path=str(tmp_path), unlabeled_frac=0.92)
    with pytest.raises(ValueError, match=r"--unlabeled_frac 0.5: the official lists"):
        open_partly_labelled(None, subset_path=str(tmp_path), unlabeled_frac=0.5, data_seed=91)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0.png,dark\nnowhere.png,dark\n1.png,bright\n",
            r"line 2: 'nowhere.png' is not in --data_path, .* 1 of the 3 images",
        ),
        ("nowhere.png,dark\n1.png,bright\n", r"line 1: 'nowhere.png' is not in --data_path"),
        ("0.png,dark\n0.png,bright\n", r"line 2: 0.png has the label 'dark' already"),
        ("0.png\n", r"line 1: expected an image and its label, got \['0.png'\]"),
        ("0.png,\n", r"line 1: expected an image and its label"),
        ("", "is empty"),
        ("0.png,dark\n1.png,dark\n", "there is only one class, 'dark'"),
    ],
)
def test_a_table_that_does_not_fit_is_one_clear_error(own, tmp_path, text, message):
    table = tmp_path / "labels.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_partly_labelled(str(own[0]), labels=[str(table)])


def test_other_mistakes_are_one_clear_error(own, images, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("class0/0.png\nclass0/3.png\n")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("n01440764_1.JPEG\n")
    for arguments, message in (
        ({"data_path": str(own[0])}, "the images have no labels; give them as --labels labels.csv"),
        ({"data_path": str(images), "labels": ["nowhere.csv"]}, "--labels nowhere.csv cannot be read"),
        ({"data_path": None, "labels": [str(own[1])]}, "has no files that it could name"),
        ({"data_path": str(images), "subset_path": "nowhere"}, "--subset_path nowhere: no such file or folder"),
        (
            {"data_path": str(images), "subset_path": str(wrong)},
            "1 of its 1 images are not in .*, the first is n01440764/n01440764_1.JPEG",
        ),
        ({"data_path": str(images), "subset_path": str(few)}, "2 of 3 classes have no labelled image .* 'class1'"),
        ({"data_path": str(images), "min_confidence": 0.9}, "--min_confidence 0.9: there is no table of --labels"),
        ({"data_path": str(images), "labels_per_class": 9}, "--labels_per_class 9: class 'class0' has 8 images"),
        ({"data_path": str(images), "labels_per_class": 0}, "--labels_per_class 0 is less than 1"),
        ({"data_path": str(images), "labels_per_class": 1, "subset_path": str(few)}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            open_partly_labelled(**arguments)
