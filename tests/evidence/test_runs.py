"""What experiments store of their runs."""

import json

import numpy as np
import pytest
from PIL import Image

from shared.evaluation.knn_monitor import open_labelled
from tests.evidence import runs


@pytest.fixture
def folder(tmp_path):
    """Two classes of two training images and one test image."""
    for split, images in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(images):
                picture = Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8))
                picture.save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def test_links_to_few_images_of_every_class_are_labelled_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "IMAGES_PER_CLASS", 1)
    for _ in range(2):  # experiments are started again
        train, test = runs.cifar10_images(folder, tmp_path / "out")
    train_images, test_images = open_labelled(str(train), str(test))
    assert (len(train_images), len(test_images)) == (2, 2)
    assert sorted(path.name for path in train.rglob("*.png")) == ["0.png", "0.png"]


def test_stored_commands_name_no_folder_of_the_machine(folder, tmp_path, capsys):
    out = tmp_path / "out"
    train, test = runs.cifar10_images(folder, out)
    command = f"python main_dino.py --data_path {train} --val_path {test} --pretrained {out}/0/checkpoint.pth"
    runs.write(out, "cats", [{"command": command, "run": out / "0"}], "a table")
    (result,) = json.loads((out / "cats.json").read_text())["results"]
    images = "--data_path cifar10/train --val_path cifar10/test"
    assert result == {"command": f"python main_dino.py {images} --pretrained 0/checkpoint.pth"}
    assert (out / "cats.md").read_text() == capsys.readouterr().out == "a table\n"


def test_a_run_is_stored_with_its_machine_and_not_repeated(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(runs, "run_script", lambda method, command, log: started.append(command))
    variant = runs.Variant("short", "--epochs 1", "main_dino.py")
    first, again = (runs.run("dino", variant, 3, tmp_path / "3", lambda folder: {"knn_last": 50.0}) for _ in range(2))
    assert len(started) == 1 and first == again
    assert (first["command"], first["knn_last"]) == ("python main_dino.py --epochs 1 --seed 3", 50.0)
    assert first["machine"] == runs.machine()
