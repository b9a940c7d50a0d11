import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dino import eval_video_segmentation
from dino.eval_video_segmentation import (
    hard_mask,
    neighborhood_window,
    propagate_masks,
    write_mask,
)
from shared.images.decode import ImageError
from tests.pictures import picture


def write_video(root, name, height, width, num_frames=4, size=32):
    """Two textured squares that move 2 and 4 pixels per frame over a dark background."""
    background = picture(0, (40, 40, 40), height, width)
    squares = [picture(1, (220, 60, 40), size, size), picture(2, (40, 80, 230), size, size)]
    masks = []
    for t in range(num_frames):
        pixels, mask = background.copy(), np.zeros((height, width), dtype=np.uint8)
        for i, square in enumerate(squares):
            top, left = 8 + i * (height - size - 16), 8 + 2 * t * (i + 1)
            pixels[top : top + size, left : left + size] = square
            mask[top : top + size, left : left + size] = i + 1
        path = root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
        masks.append(mask)
    annotation = root / "Annotations" / "480p" / name / "00000.png"
    annotation.parent.mkdir(parents=True, exist_ok=True)
    write_mask(annotation, masks[0])
    return masks


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("DAVIS")
    masks = {
        "wide": write_video(root, "wide", 96, 144),
        "tall": write_video(root, "tall", 144, 96),
        "square": write_video(root, "square", 128, 128),
    }
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("wide\ntall\nsquare\n")
    return root, masks


def run(root, output_dir, *flags):
    small = ["--arch", "vit_tiny", "--patch_size", "8", "--pretrained_weights", "random", "--image_size", "96"]
    arguments = [*small, "--device", "cpu", "--data_path", root, "--output_dir", output_dir, *flags]
    parser = eval_video_segmentation.get_args_parser()
    return eval_video_segmentation.eval_video_segmentation(parser.parse_args([str(a) for a in arguments]))


def test_moving_objects_are_followed(davis, tmp_path):
    root, masks = davis
    torch.manual_seed(0)
    run(root, tmp_path, "--n_last_frames", 2)
    for name, true_masks in masks.items():
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png", "00003.png"]
        for t, (file, true_mask) in enumerate(zip(files, true_masks, strict=True)):
            with Image.open(file) as image:
                assert image.mode == "P"
                assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
                mask = np.array(image)
            assert mask.shape == true_mask.shape
            overlap = [((mask == i) & (true_mask == i)).sum() / ((mask == i) | (true_mask == i)).sum() for i in (1, 2)]
            assert min(overlap) > (0.5 if t else 0.999), (name, t, overlap)


def test_fewer_context_patches_than_matches_are_all_used():
    features, masks = torch.randn(1, 3), torch.tensor([[[[0.25]], [[0.75]]]])
    propagated = propagate_masks(features, features[None], masks, neighborhood_window(1, 1, 0), topk=5)
    torch.testing.assert_close(propagated, masks[0])


def test_a_constant_channel_does_not_win_everywhere():
    """Stretching it to [0, 1] would divide 0 by 0."""
    soft_mask = torch.stack([torch.full((4, 4), 0.2), torch.zeros(4, 4), torch.eye(4)])
    mask = hard_mask(soft_mask, patch_size=2)
    assert mask.shape == (8, 8)
    assert set(mask.unique().tolist()) == {0, 2}


def test_an_object_that_is_too_small_for_the_grid_does_not_stop_the_run(tmp_path):
    masks = write_video(tmp_path, "tiny", 96, 96, num_frames=2)
    masks[0][0, 0] = 5
    write_mask(tmp_path / "Annotations" / "480p" / "tiny" / "00000.png", masks[0])
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("tiny\n")
    run(tmp_path, tmp_path / "out")
    with Image.open(tmp_path / "out" / "tiny" / "00001.png") as mask:
        assert np.array(mask).max() <= 5


def test_bad_input_is_one_clear_error(davis, tmp_path):
    with pytest.raises(ValueError, match=r"--data_path .*val.txt does not exist"):
        run(tmp_path, tmp_path)
    file = tmp_path / "ImageSets" / "2017" / "val.txt"
    file.parent.mkdir(parents=True)
    for content, message in (
        ("", "names no video"),
        ("missing", "no frames"),
        ("../../elsewhere", "leads out of the folder"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, tmp_path)
    write_video(tmp_path, "v", 64, 64)
    (tmp_path / "Annotations" / "480p" / "v" / "00000.png").unlink()
    file.write_text("v")
    with pytest.raises(ValueError, match=r"00000.png does not exist"):
        run(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="video segmentation needs a ViT"):
        run(davis[0], tmp_path, "--arch", "resnet18")


@pytest.mark.parametrize("name", ["JPEGImages/480p/wide/00002.jpg", "Annotations/480p/wide/00000.png"])
def test_a_frame_or_mask_that_cannot_be_read_is_named(name, davis, tmp_path):
    root = shutil.copytree(davis[0], tmp_path / "DAVIS")
    (root / name).write_bytes((root / name).read_bytes()[:60])
    with pytest.raises(ImageError, match=name):
        run(root, tmp_path / "masks")
