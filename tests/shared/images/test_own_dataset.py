"""``--data_path module:function``: data sets of other people's code."""

import sys

import numpy as np
import pytest
import torch

from dino import main_dino
from dino.losses import DINOLoss
from shared.images.decode import ImageError
from shared.images.labelled import open_labelled
from shared.images.sources import open_source
from tests.dino import tiny
from tests.interruption import interrupted

MODULE = """
import numpy as np, torch
from PIL import Image

class Plates:
    classes = ["dark", "light"]

    def __init__(self, split):
        self.targets = [i % 2 for i in range(20 if split == "train" else 10)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 100, (24, 20, 3), dtype=np.uint8) + np.uint8(100 * self.targets[i])
        return Image.fromarray(pixels), self.targets[i]

class Bare(list):
    pass

def plates(split):
    return Plates(split)

def only_train(split):
    if split != "train":
        raise ValueError(f"no {split} part")
    return Plates(split)

def kinds(split):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    tensor = torch.from_numpy(grey)[None].repeat(3, 1, 1)
    return Bare([grey, grey[..., None], tensor, tensor[:1], Image.fromarray(grey), (grey, 3), grey / 255])

def torn(split):
    class Torn(Plates):
        def __getitem__(self, i):
            return Image.open("torn.jpg") if i == 1 else super().__getitem__(i)
    return Torn(split)

def stream(split):
    return (i for i in range(3))

def empty(split):
    return Bare()

def unlabelled_end(split):
    plates = Plates(split)
    plates.targets = plates.targets[:-1] + [2]
    return plates
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_plates.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_plates", None)


def test_labels_classes_and_pixels_are_those_of_the_data_set():
    source = open_source("my_plates:plates", "val")
    assert source.describe() == "my_plates:plates (val): 10 images, 2 classes"
    assert source.classes == ["dark", "light"] and source.labels.tolist() == [0, 1] * 5
    pixels = source.load(3).decode()
    assert pixels.shape == (24, 20, 3) and pixels.dtype == np.uint8 and pixels.min() >= 100
    assert source.path(3) == "my_plates:plates (val)[3]"
    assert source.checksum() == open_source("my_plates:plates", "val").checksum()
    assert source.checksum() != open_source("my_plates:plates", "train").checksum()


def test_every_usual_kind_of_image_gives_the_same_pixels():
    source = open_source("my_plates:kinds")
    assert source.classes is None
    expected = np.arange(12, dtype=np.uint8).reshape(3, 4, 1).repeat(3, axis=2)
    for i in range(6):
        np.testing.assert_array_equal(source.load(i).decode(), expected)
    with pytest.raises(ImageError, match=r"kinds \(train\)\[6\]: expected an image of Pillow, or uint8 .*float64"):
        source.load(6)


def test_a_file_that_the_data_set_cannot_read_is_an_unreadable_image(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    source = open_source("my_plates:torn")
    assert source.load(0)
    with pytest.raises(ImageError, match=r"my_plates:torn \(train\)\[1\]: cannot identify image file .*torn.jpg"):
        source.load(1)


def test_every_tenth_image_is_held_out_where_there_is_no_val_part():
    train, val = open_labelled("my_plates:only_train", None)
    assert len(train) == 18 and len(val) == 2 and val.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(val.load(0).decode(), open_source("my_plates:only_train").load(9).decode())
    assert len(open_labelled("my_plates:plates", None)[1]) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:plates", "--data_path not_there:plates: No module named 'not_there'"),
        ("my_plates:not_there", "my_plates:not_there: .* has no attribute 'not_there'"),
        ("my_plates:stream", "generator is no map-style data set"),
        ("my_plates:empty", "an empty data set"),
        ("my_plates:unlabelled_end", "a target is 2, but there are 2 classes"),
    ],
)
def test_what_is_no_data_set_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        open_source(name)


def test_dino_trains_on_it_and_resumes(tmp_path):
    """Interrupted in the second epoch, and resumed with loader processes: the weights of the whole run."""
    shrunk = {name: getattr(main_dino, name) for name in ("build_backbone", "DINOHead")}
    tiny.shrink_networks()

    def train(folder: str, workers: int) -> dict[str, torch.Tensor]:
        flags = [
            "--data_path",
            "my_plates:plates",
            "--output_dir",
            str(tmp_path / folder),
            "--num_workers",
            str(workers),
        ]
        main_dino.train_dino(main_dino.parse_args([*tiny.FLAGS.split(), *flags]))
        return torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)["student"]

    try:
        whole = train("whole", 0)
        with interrupted(DINOLoss, "forward", 8):
            train("parts", 0)
        resumed = train("parts", 2)
    finally:
        vars(main_dino).update(shrunk)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
