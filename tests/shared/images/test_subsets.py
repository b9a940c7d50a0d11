"""Lists of labelled images: both ways to name one, the order and labels of the source, and lists that do not fit."""

import numpy as np
import pytest
from PIL import Image

from shared.images.sources import open_source
from shared.images.subsets import Subset, listed_images


@pytest.fixture
def source(tmp_path):
    for name in ("n1", "n2"):
        for number in range(3):
            path = tmp_path / "images" / name / f"{name}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 10 * number, dtype=np.uint8)).save(path)
    return open_source(str(tmp_path / "images"), "all")


def test_names_with_and_without_their_folder_are_found_in_the_order_of_the_source(source, tmp_path):
    (tmp_path / "list.txt").write_text("n2/n2_0.png\n\n n1_2.png \n")
    indices = listed_images(source, str(tmp_path / "list.txt"))
    assert indices.tolist() == [2, 3]
    subset = Subset(source, indices, "two images")
    assert len(subset) == 2 and subset.labels.tolist() == [0, 1] and subset.classes == ["n1", "n2"]
    assert subset.path(1) == source.path(3) and subset.load(0).decode()[0, 0, 0] == 20


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("n1_0.png\nn3_0.png\n", "1 of its 2 images are not in")]
)
def test_a_list_that_does_not_fit_names_itself_and_the_flag(source, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        listed_images(source, str(tmp_path / "list.txt"), "--labels")
    assert f"--labels {tmp_path / 'list.txt'}" in str(error.value)
