"""Images of other channels than RGB: files, range and normalisation, views, and whole runs."""

import argparse
import importlib
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dino import eval_linear
from shared.evaluation import extract_features
from shared.images import sources
from shared.images.cache import cache_images
from shared.images.channels import Channels, measure, read_values
from shared.images.decode import ImageError, read_image
from shared.images.loading import EvalTransform
from shared.images.sources import FileSource, open_source, reading
from shared.multicrop import MultiCropDataset, ViewRecipe
from shared.pictures.sheets import thumbnail
from tests.run_folders import losses, state_of, stopped_after
from tests.tiny_training import trainings

LEVELS = 3020  # of a camera of 12 bits
TRAININGS = {name: run for name, run in trainings().items() if " " not in name and "{images}" in "".join(run.data)}


def write_plates(folder, number=5, count=24, suffix=".tif"):
    """Squares at random places of as many channels, in two class folders: uint16 of 12 bits, or float32."""
    rng = np.random.default_rng(0)
    for i in range(count):
        values = rng.integers(100, 300, (number, 24, 20)).astype(np.uint16)
        for c in range(number):
            top, left = rng.integers(0, 12, 2)
            values[c, top : top + 8, left : left + 8] += np.uint16(LEVELS // (c + 2) * (1 + i % 2) // 2)
        path = folder / f"kind{i % 2}" / f"{i:02}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, values.astype(np.float32) / 7 - 50)
        else:
            tifffile.imwrite(path, values)
    return folder


def flags(data_path, value_range=None):
    options = {"in_chans": 5, "value_range": value_range, "data_path": str(data_path), "max_megapixels": 1}
    return argparse.Namespace(allow_absolute_paths=False, **options)


def test_values_are_those_that_were_written(tmp_path):
    values = np.random.default_rng(0).integers(0, LEVELS, (6, 7, 5)).astype(np.uint16)
    planes = np.moveaxis(values, 2, 0)
    written = {
        "pages.tif": (tifffile.imwrite, planes, {}),
        "planes.tif": (tifffile.imwrite, planes, {"photometric": "minisblack", "planarconfig": "separate"}),
        "pixels.tiff": (tifffile.imwrite, values, {"photometric": "minisblack", "planarconfig": "contig"}),
        "imagej.tif": (tifffile.imwrite, planes, {"imagej": True}),
        "deflate.tif": (tifffile.imwrite, planes.astype(np.float32), {"compression": "zlib"}),
        "last.npy": (np.save, values, {}),
        "first.npy": (np.save, planes.astype(np.int16), {}),
    }
    for name, (write, array, options) in written.items():
        write(tmp_path / name, array, **options)
        read = read_values(tmp_path / name, 5)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, values, err_msg=name)
    for number in (1, 3):  # 16 bits in every channel, of which Pillow keeps 8 where there are three
        cv2.imwrite(str(tmp_path / "a.png"), values[..., :number][..., ::-1])
        np.testing.assert_array_equal(read_values(tmp_path / "a.png", number), values[..., :number])


def test_tiff_files_stand_upright_and_are_no_negatives(tmp_path):
    values = np.random.default_rng(0).integers(0, LEVELS, (6, 7)).astype(np.uint16)
    turned = [(274, "H", 1, 6, True)]  # 90 degrees clockwise make it upright
    tifffile.imwrite(tmp_path / "a.tif", 65535 - values, photometric="miniswhite", extratags=turned)
    np.testing.assert_array_equal(read_values(tmp_path / "a.tif", 1)[..., 0], np.rot90(values, -1))
    tifffile.imwrite(tmp_path / "b.tif", values.astype(np.float32), photometric="miniswhite")
    with pytest.raises(ImageError, match=r"b\.tif: 0 is white, which is not defined for float32"):
        read_values(tmp_path / "b.tif", 1)


def write_bad(path, kind):
    grey = np.arange(42, dtype=np.uint8).reshape(6, 7)
    broken = np.ones((6, 7, 5), np.float32)
    broken[2, 3, 1] = np.nan
    if kind == "palette":
        Image.fromarray(grey).convert("P").save(path)
    elif kind == "truncated":
        tifffile.imwrite(path, broken)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "huge":
        tifffile.imwrite(path, np.zeros((5, 1100, 1000), np.uint8), compression="zlib")
    else:
        arrays = {"channels": grey[..., None].repeat(3, 2), "pages": np.stack([grey] * 6), "type": broken + 0j}
        array = arrays.get(kind, broken)
        (np.save if path.suffix == ".npy" else tifffile.imwrite)(path, array)


@pytest.mark.parametrize(
    ("kind", "suffix", "reason"),
    [
        ("channels", ".npy", r"shape \(6, 7, 3\) is not that of --in_chans 5, \(H, W, 5\) or \(5, H, W\)"),
        ("pages", ".tif", r"shape \(6, 6, 7\) is not that of --in_chans 5"),
        ("type", ".npy", "pixels of complex64; --in_chans takes uint8, uint16, int16, float16, float32"),
        ("palette", ".tif", "a palette, whose numbers are no intensities"),
        ("palette", ".png", "pixels of Pillow's mode P; --in_chans takes"),
        ("nan", ".tif", "NaN or infinity in channel 2 of 5"),
        ("truncated", ".tif", ""),
        ("huge", ".tif", "5 x 1100 x 1000 values are more than --max_megapixels allows"),
    ],
)
def test_bad_files_are_one_sentence_with_file_flag_and_value(tmp_path, kind, suffix, reason):
    write_bad(tmp_path / f"bad{suffix}", kind)
    with pytest.raises(ImageError, match=f"bad{suffix}: {reason}") as caught:
        reading(flags(tmp_path))
    assert str(caught.value).count("bad.") == 1 and "\n" not in str(caught.value)


def test_without_the_flags_files_of_other_channels_and_black_ones_name_them(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match=r"no images .*; --in_chans N reads .npy"):
        open_source(tmp_path)
    tifffile.imwrite(tmp_path / "b.tif", np.ones((4, 4, 5), np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageError, match=r"b.tif: an array or TIFF file .*--in_chans N reads it"):
        read_image(tmp_path / "b.tif")
    cv2.imwrite(str(tmp_path / "c.png"), np.full((4, 4), LEVELS, np.uint16))
    with pytest.warns(UserWarning, match=r"nearly black; --in_chans 1 --value_range 0.1% 99.9% keeps"):
        read_image(tmp_path / "c.png").decode()
    for data_path in (None, "digits"):
        with pytest.raises(ValueError, match=r"--in_chans 5: the images of .* are RGB; name others as --data_path"):
            open_source(data_path, channels=Channels(5))


def test_every_level_stays_and_channels_have_mean_0_and_variance_1(tmp_path, capsys):
    write_plates(tmp_path)
    args = flags(tmp_path, ["0", "4095"])
    source = open_source(tmp_path, **reading(args))
    assert json.loads(json.dumps(args.channels)) == args.channels and "WARNING" not in capsys.readouterr().out
    pixels = np.stack([source.load(i).decode() for i in range(len(source))])
    raw = np.stack([read_values(source.path(i), 5) for i in range(len(source))])
    x = raw / 4095.0
    np.testing.assert_allclose(pixels, (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), atol=1e-4)
    for c in range(5):
        assert len(np.unique(pixels[..., c])) == len(np.unique(raw[..., c])) > 256

    narrow = flags(tmp_path, ["0", "65535"])
    reading(narrow)
    assert "WARNING: the images use 1.1 %" in (told := capsys.readouterr().out) and "--value_range 0.1% 99.9%" in told
    reading(automatic := flags(tmp_path))
    expected = np.percentile(raw.reshape(-1, 5), (0.1, 99.9), axis=0)
    np.testing.assert_allclose([automatic.channels["low"], automatic.channels["high"]], expected)
    assert "WARNING" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--value_range 4095 0 is 4095 to 0 in channel 1"):
        reading(flags(tmp_path, ["4095", "0"]))
    with pytest.raises(ValueError, match=r"--value_range 9000 9999: channel 1 .* has a single value in it"):
        reading(flags(tmp_path, ["9000", "9999"]))


def test_views_of_three_channels_are_those_of_colours_up_to_rounding(tmp_path):
    """The same draws, crops, flips, brightness and blur; and every channel by itself."""
    rng = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8), (0, 0), 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., [2, 0, 1]]).save(tmp_path / "b.png")
    colours, raw = (FileSource("", tmp_path, ["a.png"], channels=how) for how in (None, Channels(3)))
    how = Channels(**measure(raw, ("0", "255")))
    three = FileSource("", tmp_path, ["a.png"], channels=how)
    order = {name: [getattr(how, name)[i] for i in (2, 0, 1)] for name in ("mean", "std")}
    swapped = FileSource("", tmp_path, ["b.png"], channels=replace(how, **order))
    brightness = {"jitter": (0.4, 0.0, 0.0, 0.0), "jitter_p": 0.8}
    recipes = [ViewRecipe(24, (0.3, 1.0), blur_p=0.5, **brightness)] * 6
    views, plain, other = (MultiCropDataset(s, recipes)[(0, 0)][0][0].numpy() for s in (three, colours, swapped))
    assert views.dtype == np.float32
    mean, std = (np.array(part)[:, None, None] for part in (how.mean, how.std))
    assert np.abs(255 * (views * std + mean) - plain).max() < 2.5
    np.testing.assert_allclose(other, views[:, [2, 0, 1]], atol=1e-5)

    colourful = {"jitter": (0.4, 0.0, 0.3, 0.1), "grey_p": 1.0, "solarize_p": 1.0, "equalize_p": 1.0}
    recipes = [replace(recipe, **colourful) for recipe in recipes]
    drawn, of_colours = (MultiCropDataset(source, recipes).draw(60, 50, (0, 0, 0)) for source in (three, colours))
    assert [(*view[:5], view.blur_radius) for view in drawn] == [(*view[:5], view.blur_radius) for view in of_colours]
    assert not any(view.grey or view.solarize or view.equalize or len(view.jitter) > 1 for view in drawn)
    with pytest.raises(ValueError, match="--augmentation pil"):
        MultiCropDataset(three, recipes, backend="pil")


def test_contrast_moves_each_channel_from_its_own_mean(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.random.default_rng(0).random((5, 16, 16), np.float32) * 0.2 + 0.4)
    source = FileSource("", tmp_path, ["a.tif"], channels=Channels(5, *([value] * 5 for value in (0.0, 1.0, 0.5, 0.1))))
    recipe = ViewRecipe(16, (1.0, 1.0), (1.0, 1.0), flip_p=0.0, jitter=(0.0, 0.4, 0.0, 0.0), jitter_p=1.0)
    dataset = MultiCropDataset(source, [recipe])
    ((_, factor),) = dataset.draw(16, 16, (0, 0, 0))[0].jitter
    image = source.load(0).decode().transpose(2, 0, 1)
    middle = image.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(dataset[(0, 0)][0][0][0], middle + factor * (image - middle), atol=1e-5)


def test_evaluations_and_caches_see_the_same_pixels(tmp_path):
    write_plates(tmp_path / "images", count=4)
    source = open_source(tmp_path / "images", **reading(flags(tmp_path / "images")))
    image = EvalTransform(16, 16, (0.5,) * 3, (0.2,) * 3)(source.load(1).decode())
    assert image.shape == (5, 16, 16) and image.dtype == torch.float32
    for cache in ("memory", str(tmp_path / "cache")):
        cached = cache_images(source, cache)
        assert cached.channels == source.channels
        np.testing.assert_array_equal(cached.load(1).decode(), source.load(1).decode())
    for known in (source, FileSource("", "", [source.path(0)])):  # which the sheets of a table of features are drawn of
        assert thumbnail(known, 0).std() > 30


def train(name, output_dir, data_path, *more):
    run = TRAININGS[name]
    script = importlib.import_module(run.module)
    (function,) = (getattr(script, f) for f in dir(script) if f in (f"train_{name}", f"train_{name.split('_')[0]}"))
    options = [flag.format(images=data_path) for flag in run.data]
    function(script.parse_args([*run.flags, *run.whole, *options, "--output_dir", str(output_dir), *map(str, more)]))


def extract(folder, run, data_path):
    out = run.with_name("features.npz")
    command = f"{folder} {run} --data_path {data_path} --out {out} --num_workers 0 --device cpu"
    return extract_features.extract(extract_features.parse_args(command.split())).embeddings


def test_dino_learns_from_five_channels_resumes_and_is_evaluated(tmp_path, monkeypatch):
    data_path, whole, parts = write_plates(tmp_path / "plates"), tmp_path / "whole", tmp_path / "parts"
    more = ("--arch", "vit_micro", "--in_chans", 5, "--epochs", 1)
    train("dino", whole, data_path, *more, "--eval_knn_freq", 1, "--pictures", "on")
    with stopped_after(4):
        train("dino", parts, data_path, *more)
    with monkeypatch.context() as patched:  # what was measured is in the checkpoint
        patched.setattr(sources, "measure", None)
        train("dino", parts, data_path, *more, "--num_workers", 1)
    states = [state_of(run) for run in (whole, parts)]
    assert states[0]["args"]["channels"] == states[1]["args"]["channels"] and losses(whole) == losses(parts)
    for name, value in states[0]["student"].items():
        assert torch.equal(value, states[1]["student"][name]), name
    for picture in ("views.png", "neighbours.png"):
        assert np.asarray(Image.open(whole / "pictures" / picture).convert("L")).std() > 20
    assert (whole / "report.html").stat().st_size > 50_000
    with pytest.raises(ValueError, match="--value_range 0 4095 does not fit the checkpoint in --output_dir"):
        train("dino", parts, data_path, *more, "--value_range", 0, 4095)

    features = extract("dino", whole, data_path)
    assert features.shape == (24, 128) and np.isfinite(features).all()
    probe = f"--pretrained_weights {whole}/checkpoint.pth --data_path {data_path} --num_labels 2 --epochs 1"
    probe += f" --output_dir {tmp_path / 'linear'} --num_workers 0 --device cpu"
    result = eval_linear.eval_linear(eval_linear.parse_args(probe.split()))
    assert np.isfinite(result["loss"])


def test_swav_learns_from_floats_of_two_channels(tmp_path):
    data_path = write_plates(tmp_path / "arrays", number=2, suffix=".npy")
    train("swav", tmp_path / "run", data_path, "--in_chans", 2, "--value_range", -40, 250)
    assert state_of(tmp_path / "run")["args"]["channels"]["low"] == [-40.0, -40.0]
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAININGS if name not in ("dino", "swav")])
def test_every_training_takes_five_channels_and_gives_features(tmp_path, name):
    data_path = write_plates(tmp_path / "plates")
    train(name, tmp_path / "run", data_path, "--in_chans", 5)
    assert np.isfinite(losses(tmp_path / "run")).all()
    features = extract(TRAININGS[name].module.partition(".")[0], tmp_path / "run", data_path)
    assert len(features) == 24 and np.isfinite(features).all()
