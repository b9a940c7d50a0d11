"""Retrieval on generated buildings with ground truth of the published layout."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from deepcluster.eval_retrieval import (
    MapsWithoutLastPooling,
    eval_retrieval,
    get_args_parser,
    load_resized,
    read_benchmark,
    score,
)
from deepcluster.hub import build_network, load_network
from shared.images.decode import ImageError
from tests.deepcluster.tiny import write_checkpoint


def write_benchmark(folder, prefix="", seed=0, buildings=3, each=4):
    """Pictures of coarse blocks; those of one building differ by noise. The first of each is the query."""
    rng = np.random.default_rng(seed)
    (folder / "jpg").mkdir(parents=True)
    (folder / "lab").mkdir()
    for b in range(buildings):
        blocks = rng.integers(0, 256, size=(6, 8, 3))
        names = [f"place{b}_{i:06d}" for i in range(each)]
        for name in names:
            noisy = np.clip(blocks + rng.normal(0, 8, size=blocks.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy.repeat(10, axis=0).repeat(10, axis=1)).save(folder / "jpg" / f"{name}.png")
        lab = folder / "lab"
        (lab / f"place{b}_1_query.txt").write_text(f"{prefix}{names[0]} 5.4 3.2 70.1 55.9\n")
        (lab / f"place{b}_1_good.txt").write_text("\n".join(names[:2]))
        (lab / f"place{b}_1_ok.txt").write_text("\n".join(names[2:]))
        (lab / f"place{b}_1_junk.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def oxford(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("oxford") / "Oxford", prefix="oxc1_")


@pytest.fixture(scope="module")
def paris(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("paris") / "Paris", seed=1)


def run_all(oxford, paris, model, temp, *policy) -> float:
    """All stages; the mean average precision."""
    stages = [("extract_train", oxford), ("train_pca", oxford), ("q_features", paris), ("db_features", paris)]
    for stage, folder in (*stages, ("eval", paris)):
        flags = f"--stage {stage} --dataset {folder} --dataset_name {folder.name} --model {model} --S 128 --n_pca 16"
        found = eval_retrieval(get_args_parser().parse_args([*flags.split(), "--temp_dir", str(temp), *policy]))
    return found


def test_unreadable_images_are_errors_or_junk_and_unreadable_queries_are_not_asked(
    oxford, paris, tmp_path, small_layers, capsys
):
    model = write_checkpoint(tmp_path / "checkpoint.pth.tar")
    oxford, paris = (shutil.copytree(folder, tmp_path / folder.name) for folder in (oxford, paris))
    for file in (oxford / "jpg/place1_000002.png", paris / "jpg/place0_000000.png"):  # the latter is a query as well
        file.write_bytes(b"")
    with pytest.raises(ImageError, match=r"place1_000002\.png"):
        run_all(oxford, paris, model, tmp_path / "temp")
    capsys.readouterr()
    found = run_all(oxford, paris, model, tmp_path / "temp", "--on_bad_image", "skip")
    printed = capsys.readouterr().out
    assert f"mAP on Paris: {found:.2f} % (2 queries, without 1 images and 1 queries)" in printed and found > 90
    assert "12 files in" in printed and ", 1 of them of unreadable images" in printed


def test_all_stages_find_the_buildings(oxford, paris, tmp_path, small_layers):
    model = write_checkpoint(tmp_path / "checkpoint.pth.tar")

    assert run_all(oxford, paris, model, tmp_path / "temp") > 90
    files = {path.name for path in (tmp_path / "temp").iterdir()}
    assert files == {"Oxford_S128_L3_regions", "Oxford_S128_PCA.npz", "Paris_S128_L3_q", "Paris_S128_L3_db"}
    descriptors = np.stack([np.load(path) for path in (tmp_path / "temp/Paris_S128_L3_db").iterdir()])
    assert descriptors.shape == (12, 16)
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("train_pca", "run --stage extract_train with the same"),
        ("db_features", "run --stage extract_train and train_pca on the other data set first"),
        ("eval", "run --stage db_features with the same"),
    ],
)
def test_a_stage_before_its_turn_says_which_one_is_missing(stage, message, oxford, tmp_path, small_layers):
    model = write_checkpoint(tmp_path / "checkpoint.pth.tar")
    flags = f"--stage {stage} --dataset {oxford} --model {model} --temp_dir {tmp_path}"
    with pytest.raises(ValueError, match=message):
        eval_retrieval(get_args_parser().parse_args(flags.split()))


def test_the_ground_truth_is_read_as_published(oxford):
    benchmark = read_benchmark(oxford, "Oxford")
    assert [path.stem for path in benchmark.images[:2]] == ["place0_000000", "place0_000001"]
    query = benchmark.queries[1]
    assert query.image.stem == "place1_000000" and query.box == (5.4, 3.2, 70.1, 55.9)
    assert query.positives == {4, 5, 6, 7} and query.junk == set()


def test_ground_truth_that_does_not_fit_is_refused(oxford, tmp_path):
    with pytest.raises(ValueError, match="0 images and 0 files"):
        read_benchmark(tmp_path, "Oxford")
    folder = write_benchmark(tmp_path / "one", buildings=1)
    (folder / "lab/place0_1_ok.txt").write_text("elsewhere_000001")
    with pytest.raises(ValueError, match=r"place0_1_ok.txt names elsewhere_000001, which is not among"):
        read_benchmark(folder, "Oxford")
    (folder / "lab/place0_1_ok.txt").unlink()
    with pytest.raises(ValueError, match=r"place0_1_ok.txt is missing"):
        read_benchmark(folder, "Oxford")


def test_broken_images_of_paris_are_left_out(tmp_path):
    folder = write_benchmark(tmp_path / "Paris", buildings=1)
    source = folder / "jpg/place0_000001.png"
    source.rename(folder / "jpg/paris_louvre_000136.png")
    for kind in ("good", "ok"):
        path = folder / f"lab/place0_1_{kind}.txt"
        path.write_text(path.read_text().replace("place0_000001", "paris_louvre_000136"))
    benchmark = read_benchmark(folder, "Paris")
    assert len(benchmark.images) == 3 and benchmark.queries[0].positives == {0, 1, 2}


def test_junk_is_taken_out_of_the_ranking(oxford):
    benchmark = read_benchmark(oxford, "Oxford")
    benchmark.queries = benchmark.queries[:1]
    query = benchmark.queries[0]
    query.positives, query.junk = {0, 2}, {1}
    ranking = [1, 0, 5, 2, *[i for i in range(12) if i not in (0, 1, 2, 5)]]
    similarities = np.empty((1, 12))
    similarities[0, ranking] = -np.arange(12.0)
    # positives at places 0 and 2 once the junk is gone: (1 + 1) / 2 and (1/2 + 2/3) / 2, each over two positives
    assert score(similarities, benchmark)[0] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)


@pytest.mark.parametrize("flags", [["--multires"], ["--aqe", "5"], ["--dbe", "2"]])
def test_flags_that_do_nothing_in_the_official_code_are_an_error(flags, oxford):
    with pytest.raises(ValueError, match=f"{flags[0]} does nothing in the official code"):
        eval_retrieval(get_args_parser().parse_args(["--dataset", str(oxford), *flags]))


def test_a_query_is_the_box_of_the_resized_image(oxford):
    path = read_benchmark(oxford, "Oxford").images[0]
    whole, box = load_resized(path, 160), load_resized(path, 160, (5.4, 3.2, 70.1, 55.9))
    assert whole.shape == (3, 120, 160)  # 80 x 60 pixels in the file
    assert torch.equal(box, whole[:, 6:112, 11:140])


def test_maps_keep_the_resolution_before_the_last_pooling(checkpoint):
    network = load_network(checkpoint)
    images = torch.randn(1, 3, 100, 120)
    maps = MapsWithoutLastPooling(network)(images)
    torch.testing.assert_close(network.features[-1](maps), network.maps(images))
    with pytest.raises(ValueError, match="retrieval needs alexnet or vgg16"):
        MapsWithoutLastPooling(build_network("resnet18"))
