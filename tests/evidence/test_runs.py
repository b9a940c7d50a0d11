"""What experiments store of their runs."""

import json

import numpy as np
import pytest

from dino.hub import CARD
from shared.images.labelled import open_labelled
from shared.images.sources import open_source
from tests.evidence import probe, runs
from tests.pictures import write_images


@pytest.fixture
def folder(tmp_path):
    """Three classes of two training images and one test image."""
    write_images(tmp_path / "images/train", per_class=2)
    write_images(tmp_path / "images/test", per_class=1)
    return tmp_path / "images"


@pytest.mark.parametrize("number", [1, (1, 1, 1)])
def test_links_to_few_images_of_every_class_are_labelled_images(folder, tmp_path, number):
    for _ in range(2):  # experiments are started again
        train, test = runs.cifar10_images(folder, tmp_path / "out", number)
    train_images, test_images = open_labelled(str(train), str(test))
    assert (len(train_images), len(test_images)) == (3, 3)
    assert sorted(path.name for path in train.rglob("*.png")) == ["class0_00.png", "class1_01.png", "class2_02.png"]


def test_further_generated_images_have_the_classes_of_the_embedded_ones_and_no_image_of_them(tmp_path):
    further, embedded = (
        open_labelled("materials", str(runs.further_materials(tmp_path, 24)))[1],
        open_source(None, "val"),
    )
    assert (len(further), further.classes) == (24, embedded.classes)
    assert np.bincount(further.labels).tolist() == [2] * 12
    seen = {image.load(i).decode().tobytes() for image in (embedded, open_source(None, "train")) for i in range(360)}
    assert not seen & {further.load(i).decode().tobytes() for i in range(24)}


def test_stored_commands_name_no_folder_of_the_machine(folder, tmp_path, capsys):
    out = tmp_path / "out"
    train, test = runs.cifar10_images(folder, out)
    command = f"python main_dino.py --data_path {train} --val_path {test} --pretrained {out}/0/checkpoint.pth"
    runs.write(out, "cats", [{"command": command, "run": out / "0"}], "a table")
    (result,) = json.loads((out / "cats.json").read_text())["results"]
    images = "--data_path cifar10/train --val_path cifar10/test"
    command = f"python main_dino.py {images} --pretrained 0/checkpoint.pth"
    assert result == {"command": command, "machine": runs.machine("fp32")}
    assert (out / "cats.md").read_text() == capsys.readouterr().out == "a table\n"


def test_a_run_is_stored_with_its_machine_and_not_repeated(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(runs, "run_script", lambda method, command, log: started.append(command))
    variant = runs.Variant("short", "--epochs 1", "main_dino.py")
    first, again = (runs.run("dino", variant, 3, tmp_path / "3", lambda folder: {"knn_last": 50.0}) for _ in range(2))
    assert len(started) == 1 and first == again
    assert (first["command"], first["knn_last"]) == ("python main_dino.py --epochs 1 --seed 3", 50.0)
    assert first["machine"] == runs.machine()


def test_the_linear_classifier_of_the_tables_learns_what_is_in_the_features(tmp_path):
    write_images(tmp_path / "train", per_class=20)
    write_images(tmp_path / "test", per_class=4)
    features = probe.Features(CARD, probe.Pixels(), (str(tmp_path / "train"), str(tmp_path / "test")), 8)
    found = features.linear()
    assert (features.knn(), found["linear"]) == (100, 100) and found == features.linear()
