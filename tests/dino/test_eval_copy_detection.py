import shutil

import pytest
import torch
from PIL import Image

from dino import eval_copy_detection
from dino.eval_copy_detection import Whitening
from shared.images.decode import ImageError
from tests.pictures import COLOURS, picture, write_image

NAMES = [f"20{i:02d}00.jpg" for i in range(6)]


def save_jpeg(path, image, quality=95):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Copydays' layout with six originals: two JPEG qualities, one crop, strong edits of the first three."""
    root = tmp_path_factory.mktemp("copydays")
    colours = list(COLOURS.values())
    for i, name in enumerate(NAMES):
        image = Image.fromarray(picture(i, colours[i % 3], height=64, width=80))
        save_jpeg(root / "original" / name, image)
        save_jpeg(root / "jpegqual" / "75" / name, image, quality=75)
        save_jpeg(root / "jpegqual" / "3" / name, image, quality=3)
        save_jpeg(root / "crops" / "10" / name, image.crop((4, 3, 78, 61)))
    for i in (0, 0, 1, 2):
        edited = Image.fromarray(255 - picture(i, colours[i % 3], height=64, width=80))
        save_jpeg(root / "strong" / f"20{i:02d}{len(list(root.glob('strong/*'))) + 1:02d}.jpg", edited)
    for i in range(5):
        write_image(root / "distractors" / f"{i}.png", picture(100 + i))
        write_image(root / "whitening" / f"{i}.png", picture(200 + i))
    return root


def run(data, *flags):
    small = ["--arch", "vit_tiny", "--patch_size", "16", "--pretrained_weights", "random", "--imsize", "32"]
    arguments = [*small, "--num_workers", "0", "--device", "cpu", "--data_path", data, *flags]
    parser = eval_copy_detection.get_args_parser()
    return eval_copy_detection.eval_copy_detection(parser.parse_args([str(argument) for argument in arguments]))


def test_copies_find_their_originals(data, capsys):
    torch.manual_seed(0)
    result = run(data, "--distractors_path", data / "distractors")
    assert set(result) == {"original", "strong", "jpegqual/3", "jpegqual/75", "crops/10"}
    assert result["original"] == result["jpegqual/75"] == 1
    assert 0 < result["strong"] <= 1
    output = capsys.readouterr().out
    assert "eval on original mAP=1.000" in output
    assert "not in" in output
    assert "jpegqual/50" in output


def test_whitening_does_not_blow_up_directions_without_variance():
    features = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert Whitening(features)(features).abs().max() < 10


def test_bad_input_is_one_clear_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"--data_path .*: expected original/ and some of strong"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"--whitening_path .* is not a folder"):
        run(data, "--whitening_path", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="copy detection needs a ViT"):
        run(data, "--arch", "resnet18")

    write_image(tmp_path / "original" / "200000.jpg", picture(0))
    write_image(tmp_path / "crops" / "10" / "200000.jpg", picture(0))
    write_image(tmp_path / "crops" / "10" / "200100.jpg", picture(1))
    with pytest.raises(ValueError, match=r"crops/10 has 2 images, .*original has 1"):
        run(tmp_path)
    (tmp_path / "crops" / "10" / "200100.jpg").unlink()
    write_image(tmp_path / "strong" / "999900.jpg", picture(0))
    with pytest.raises(ValueError, match=r"999900\.jpg: no original has the same first four characters"):
        run(tmp_path)


def test_an_unreadable_image_is_an_error_or_as_if_it_were_not_there(data, tmp_path, capsys):
    damaged, without = (shutil.copytree(data, tmp_path / name) for name in ("damaged", "without"))
    for name in (f"original/{NAMES[2]}", "distractors/3.png", "whitening/1.png"):
        (damaged / name).write_bytes(b"")
        (without / name).unlink()
    for copy in (*without.glob(f"*/*/{NAMES[2]}"), *without.glob("strong/2002*")):
        copy.unlink()  # there is nothing that it could find

    def search(root, *flags):
        folders = ("--whitening_path", root / "whitening", "--distractors_path", root / "distractors")
        return run(root, *folders, *flags)

    with pytest.raises(ImageError, match=f"original/{NAMES[2]}"):
        search(damaged)
    expected = search(without)
    capsys.readouterr()
    assert search(damaged, "--on_bad_image", "skip") == expected
    printed = capsys.readouterr().out
    for name, copies in (("crops/10", "1 of 6"), ("strong", "1 of 4")):
        note = f"(without {copies} copies and 2 images of the database)"
        assert f"eval on {name} mAP={expected[name]:.3f} {note}" in printed
    (damaged / "original" / NAMES[3]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"--max_bad_fraction 0.01 allows 1"):
        search(damaged, "--on_bad_image", "skip")
