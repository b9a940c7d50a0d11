"""Pictures of what a detector and a segmenter find."""

import numpy as np
import torch

from xcit.prediction_pictures import MIN_PX, color_of, paint_labels, paint_objects


def test_twenty_classes_have_colours_of_their_own():
    assert len({color_of(label) for label in range(20)}) == 20


def test_labels_colour_their_pixels_and_no_others():
    labels = torch.full((64, 64), 255)
    labels[:32, :16] = 3
    painted = paint_labels(torch.full((3, 64, 64), 0.5), labels)
    factor = MIN_PX // 64
    assert painted.shape == (MIN_PX, MIN_PX, 3)
    expected = np.full_like(painted, 127)
    expected[: 32 * factor, : 16 * factor] = (127 + np.array(color_of(3))) // 2
    assert np.abs(painted.astype(int) - expected).max() <= 1


def test_objects_have_masks_boxes_and_names_and_uncertain_ones_are_left_out():
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, 0, 8:40, 8:56] = 0.9
    masks[1, 0, 50:60, 2:12] = 0.9
    found = {
        "boxes": torch.tensor([[4.0, 4.0, 60.0, 44.0], [1.0, 48.0, 14.0, 62.0]]),
        "labels": torch.tensor([2, 1]),
        "masks": masks,
        "scores": torch.tensor([0.9, 0.4]),
    }
    image = torch.zeros(3, 64, 64)
    painted = paint_objects(image, found, ["disc", "square"])
    inside = painted[30 * 4, 30 * 4].astype(int)
    assert np.abs(inside - np.array(color_of(1)) // 2).max() <= 1  # half of the class's colour on black
    assert tuple(painted[4 * 4, 30 * 4]) == color_of(1)  # the upper edge of the box
    assert not painted[46 * 4 :].any()  # nothing of the second object
    assert not np.array_equal(painted, paint_objects(image, found, ["disc", "circle"]))  # names are written

    certain = found | {"scores": torch.tensor([0.4, 0.4])}
    assert not paint_objects(image, certain, ["disc", "square"]).any()
