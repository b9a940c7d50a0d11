import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dino import eval_image_retrieval
from dino.eval_image_retrieval import score_ranks, shrink_and_normalize
from dino.ground_truth import GroundTruth, read_ground_truth
from shared.images.decode import ImageError
from shared.networks.weights import UnsafeFileError
from tests.pictures import COLOURS, picture, write_image

IMAGES = [f"{colour}_{i:06d}" for colour in COLOURS for i in range(4)]  # 4 images of each of 3 buildings
QUERIES = [f"query_{colour}" for colour in COLOURS]


def ground_truth(as_index=list):
    """Of each building one image is hard, one is junk, the others are easy."""
    gnd = [
        {
            "easy": as_index([4 * c, 4 * c + 1]),
            "hard": as_index([4 * c + 2]),
            "junk": as_index([4 * c + 3]),
            "bbx": [1.5, 2.0, 30.0, 30.0],
        }
        for c in range(len(COLOURS))
    ]
    return {"imlist": IMAGES, "qimlist": QUERIES, "gnd": gnd}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("revisited") / "roxford5k"
    for c, (colour, rgb) in enumerate(COLOURS.items()):
        for i in range(4):
            write_image(folder / "jpg" / f"{colour}_{i:06d}.jpg", picture(10 * c + i, rgb, 64 + 8 * i, 96 - 8 * i))
        write_image(folder / "jpg" / f"query_{colour}.jpg", picture(10 * c, rgb, 64, 96))  # a copy of an easy image
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(ground_truth(np.array)))
    return folder.parent


def run(data, *flags):
    small = ["--arch", "vit_tiny", "--pretrained_weights", "random", "--num_workers", "0", "--device", "cpu"]
    arguments = [*small, "--data_path", data, "--imsize", 48, *flags]
    parser = eval_image_retrieval.get_args_parser()
    return eval_image_retrieval.eval_image_retrieval(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("multiscale", [0, 1])
def test_buildings_of_one_colour_are_found(data, multiscale, capsys):
    torch.manual_seed(0)
    results = run(data, "--multiscale", multiscale)
    assert results["medium"].mean_ap > 0.9
    assert results["medium"].mean_precision[0] == 1  # the copy comes first
    assert results["hard"].mean_ap > 0.9
    output = capsys.readouterr().out
    assert f">> roxford5k: mAP M: {100 * results['medium'].mean_ap:.2f}, H: " in output
    assert ">> roxford5k: mP@k[1, 5, 10] M: [" in output


def test_queries_without_positives_are_left_out_of_the_mean():
    relevance = [{"easy": [0], "hard": [], "junk": []}, {"easy": [1], "hard": [2], "junk": []}]
    truth, ranks = GroundTruth([""] * 3, [""] * 2, relevance), np.array([[0, 1, 2], [2, 1, 0]])
    hard = score_ranks(ranks, truth, "hard")
    assert np.isnan(hard.ap[0])
    assert hard.mean_ap == 1
    relevance[1]["hard"] = []
    with pytest.raises(ValueError, match="no query has a positive image in the hard protocol"):
        score_ranks(ranks, truth, "hard")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("as_index", [list, np.array, lambda indices: [np.int64(i) for i in indices]])
def test_ground_truth_is_read_from_pickles_of_every_age(tmp_path, protocol, as_index):
    (tmp_path / "gnd_rparis6k.pkl").write_bytes(pickle.dumps(ground_truth(as_index), protocol=protocol))
    truth = read_ground_truth(tmp_path, "rparis6k")
    assert truth.images == IMAGES
    assert truth.queries == QUERIES
    assert truth.relevance[1] == {"easy": [4, 5], "hard": [6], "junk": [7]}


def test_ground_truth_of_python_2_is_read(tmp_path):
    """Byte strings of protocol 2, and an array whose data is such a string."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\n"
        b"tR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntb"
    )
    content = b"(dS'imlist'\n(lS'a'\naS'b'\nasS'qimlist'\n(lS'q'\nasS'gnd'\n(l(dS'easy'\n" + array
    content += b"sS'hard'\n(lsS'junk'\n(lsas."
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(content)
    truth = read_ground_truth(tmp_path, "roxford5k")
    assert truth == GroundTruth(["a", "b"], ["q"], [{"easy": [1, 0], "hard": [], "junk": []}])


class Runs:
    """Pickles as a call of ``os.mkdir``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    content = ground_truth() | {"imlist": [Runs(str(tmp_path / "was here"))]}
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UnsafeFileError, match=r"gnd_roxford5k.pkl is refused: it asks for \w+.mkdir"):
        read_ground_truth(tmp_path, "roxford5k")
    assert not (tmp_path / "was here").exists()


def test_bad_input_is_one_clear_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"--data_path: neither .*gnd_roxford5k.pkl nor"):
        run(tmp_path)
    file = tmp_path / "gnd_roxford5k.pkl"
    for content, message in (
        (b"\x80\x04nonsense", "damaged or no pickle"),
        (pickle.dumps({"imlist": []}), "is not the ground truth"),
        (pickle.dumps(np.array(["text"], dtype=object)), "refused"),
        (pickle.dumps(ground_truth() | {"qimlist": []}), "0 queries and 3 ground truths"),
        (pickle.dumps(ground_truth() | {"imlist": IMAGES[:9]}), "query_red is outside the 9 images"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_ground_truth(tmp_path, "roxford5k")


def test_a_missing_image_is_named(data, tmp_path):
    (tmp_path / "roxford5k").mkdir()
    (tmp_path / "roxford5k" / "gnd_roxford5k.json").write_text(json.dumps(ground_truth()))
    with pytest.raises(ValueError, match=r"blue_000000\.jpg"):
        run(tmp_path)


def test_shrinking_equals_pillow_on_the_file(data):
    path = data / "roxford5k" / "jpg" / "green_000002.jpg"
    with Image.open(path) as image:
        image = image.convert("RGB")
    pixels = np.array(image)
    image.thumbnail((48, 48), Image.Resampling.LANCZOS)
    expected = (np.asarray(image) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(shrink_and_normalize(pixels, 48).permute(1, 2, 0), expected, atol=1e-5)


def test_an_unreadable_image_is_an_error_or_junk_and_an_unreadable_query_is_not_asked(data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "revisited")
    for name in (IMAGES[1], QUERIES[2]):
        (root / "roxford5k/jpg" / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=IMAGES[1]):
        run(root)
    found = run(root, "--on_bad_image", "skip")
    assert capsys.readouterr().out.count(" (without 1 images and 1 queries)\n") == 2
    for name in ("medium", "hard"):
        assert np.isnan(found[name].ap).tolist() == [False, False, True]
    truth = GroundTruth(IMAGES, QUERIES, ground_truth()["gnd"]).without([1], [2])
    assert truth.relevance[0] == {"easy": [0], "hard": [2], "junk": [1, 3]} and truth.relevance[1]["junk"] == [1, 7]
