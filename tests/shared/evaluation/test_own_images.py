"""Features of a person's own images, in files, and near-duplicates among them."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from shared import distributed
from shared.evaluation import extract_features, near_duplicates
from shared.evaluation.feature_files import SUFFIXES, Features, read_features, write_features
from shared.images.decode import ImageError
from shared.images.sources import FileSource, open_source
from tests.interruption import interrupted
from tests.networks import CARDS, SMALL, card_of, small_network
from tests.processes import free_port, run_processes
from tests.shared.photographs import photograph

from .test_scripts import KNN, data, knn, small_vits, weights  # noqa: F401 (fixtures)

RANDOM = ("dino", "random", "--arch", "vit_tiny", "--image_size", 32)


def extract(*flags) -> Features:
    defaults = "--device cpu --num_workers 0 --batch_size 4".split()
    return extract_features.extract(extract_features.parse_args([*defaults, *map(str, flags)]))


def search(*flags) -> list[list[int]]:
    return near_duplicates.near_duplicates(near_duplicates.parse_args([*map(str, flags)]))


@pytest.fixture
def photos(tmp_path):
    """Six unlabelled photographs, two of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        Image.fromarray(photograph(i, 40, 48)).save(folder / ("more" if i > 3 else "") / f"{i}.png")
    return folder


@pytest.mark.parametrize("method", CARDS)
def test_features_are_the_outputs_of_the_network_of_a_run_that_its_card_describes(method, photos, tmp_path):
    card, network = card_of(method), small_network(method)
    run = tmp_path / "run"
    run.mkdir()
    side = SMALL[method][1].get("img_size", 32)
    args = {card.arch_flag.removeprefix("--"): SMALL[method][0], "image_size": side}
    torch.save({card.checkpoint_key: network.state_dict(), "args": args}, run / "checkpoint.pth")
    features = extract(method, run, "--data_path", photos, "--out", tmp_path / "f.npz")
    source = open_source(photos, "all")
    flags = extract_features.parse_args([method, str(run), "--out", "f.npz"])
    _, transform = extract_features.load_frozen(flags)
    assert transform.crop_px == side and features.labels is None
    assert features.paths == [source.path(i) for i in range(6)]
    expected = network(torch.stack([transform(source.load(i).decode()) for i in range(6)]))
    torch.testing.assert_close(torch.from_numpy(features.embeddings), expected)


@pytest.mark.parametrize("call", [2, 3])
def test_an_interrupted_extraction_goes_on_and_writes_the_same_bytes(call, photos, tmp_path, monkeypatch, capsys):
    """Batches of 2 of the 6 images, of which one cannot be read; a kill after the first or the second."""
    (photos / "1.png").write_bytes(b"damaged")
    flags = (*RANDOM, "--data_path", photos, "--batch_size", 2, "--layer", "norm")
    extract(*flags, "--out", tmp_path / "whole.npy")
    monkeypatch.setattr(extract_features, "PART_S", 0)
    with interrupted(extract_features.Parts, "add", call):
        extract(*flags, "--out", tmp_path / "parts.npy")
    assert not (tmp_path / "parts.npy").exists()
    capsys.readouterr()
    read, load = [], FileSource.load
    monkeypatch.setattr(FileSource, "load", lambda source, i: read.append(i) or load(source, i))
    extract(*flags, "--out", tmp_path / "parts.npy")
    assert f"{2 * (call - 1)} of 6 images are done already" in capsys.readouterr().out
    assert sorted({*read}) == list(range(2 * (call - 1), 6))
    for ending in ("npy", "paths.txt", "bad_images.txt", "npy.json"):
        assert (tmp_path / f"parts.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes(), ending
    assert not (tmp_path / "parts.npy.parts").exists()


def test_parts_of_another_extraction_are_replaced(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_features, "PART_S", 0)
    flags = (*RANDOM, "--data_path", photos, "--out", tmp_path / "f.npz")
    with interrupted(extract_features, "write_features", 1):
        extract(*flags)
    found = extract(*flags, "--seed", 1)
    assert "holds parts of another extraction: they are replaced" in capsys.readouterr().out
    np.testing.assert_array_equal(found.embeddings, extract(*flags, "--seed", 1).embeddings)


def test_layers_and_tokens_are_those_of_the_network(photos, tmp_path):
    flags = ("--data_path", photos, "--out", tmp_path / "f.npz")
    of_output, last, cls, mean = (
        extract(*RANDOM, *flags, *more).embeddings
        for more in (
            (),
            ("--layer", "norm"),
            ("--layer", "blocks.11", "--token", "cls"),
            ("--layer", "norm", "--token", "mean"),
        )
    )
    np.testing.assert_allclose(last, of_output, rtol=1e-5, atol=1e-6)
    network, transform = extract_features.load_frozen(
        extract_features.parse_args([*map(str, RANDOM), "--out", "f.npz"])
    )
    images = torch.stack([transform(open_source(photos, "all").load(i).decode()) for i in range(6)])
    tokens = network.get_intermediate_layers(images, 1)[0]
    np.testing.assert_allclose(mean, tokens[:, 1:].mean(dim=1).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network.norm(torch.from_numpy(cls)).numpy(), of_output, rtol=1e-4, atol=1e-5)
    resnet = ("swav", "random", "--arch", "test_resnet", "--image_size", 32)
    with pytest.raises(ValueError, match=r"--layer blocks.3.attn.attn_drop --token None: .* shape None"):
        extract(*RANDOM, *flags, "--layer", "blocks.3.attn.attn_drop")
    maps = extract(*resnet, *flags, "--layer", "backbone.layer4").embeddings
    np.testing.assert_allclose(maps, extract(*resnet, *flags).embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("labels", [None, ["a", "b,\t", "ä"]])
def test_files_hold_what_was_written_and_appear_when_they_are_complete(suffix, labels, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"features{suffix}"
    features = Features(["1.png", 'x, "2"\n.png', "ü\r.png"], labels, np.random.randn(3, 5).astype(np.float32))
    write_features(file, features)
    found = read_features(file)
    assert found[:2] == features[:2]
    np.testing.assert_array_equal(found.embeddings, features.embeddings)
    content = file.read_bytes()
    with interrupted(os, "replace", 1):  # written, but not in its place yet
        write_features(file, Features(features.paths, labels, 2 * features.embeddings))
    assert file.read_bytes() == content and not list(tmp_path.glob(".*"))


def test_pandas_opens_the_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    paths = ["a.png", os.fsdecode(b"\xe9.png")]
    write_features(tmp_path / "f.parquet", Features(paths, ["x", "y"], np.eye(2)))
    table = pandas.read_parquet(tmp_path / "f.parquet")
    assert list(table.columns) == ["path", "label", "embedding"] and list(table["path"]) == ["a.png", "\\xe9.png"]
    assert np.stack(table["embedding"]).dtype == np.float32 and table["embedding"][1].tolist() == [0, 1]


def test_unreadable_images_are_left_out_and_listed(photos, tmp_path):
    (photos / "2.png").write_bytes(b"damaged")
    found = extract(*RANDOM, "--data_path", photos, "--out", tmp_path / "f.npy")
    assert [path[-5:] for path in found.paths] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert (tmp_path / "f.bad_images.txt").read_text().startswith(str(photos / "2.png"))
    with pytest.raises(ImageError, match=r"2\.png"):
        extract(*RANDOM, "--data_path", photos, "--out", tmp_path / "f.npy", "--on_bad_image", "error")


def _extract(rank: int, photos: str, out: str, port: int) -> torch.Tensor:
    distributed.shutdown()  # the command joins its processes itself
    os.environ["MASTER_PORT"] = str(port)
    return torch.from_numpy(extract(*RANDOM, "--data_path", photos, "--out", out).embeddings)


def test_two_processes_write_the_file_of_one(photos, tmp_path):
    alone = extract(*RANDOM, "--data_path", photos, "--out", tmp_path / "f.npz")
    for features in run_processes(_extract, 2, str(photos), str(tmp_path / "two.npz"), free_port()):
        torch.testing.assert_close(features, torch.from_numpy(alone.embeddings))
    assert read_features(tmp_path / "two.npz").paths == alone.paths


def test_groups_are_what_links_connect_whatever_the_blocks(monkeypatch):
    vectors = F.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    monkeypatch.setattr(near_duplicates, "BLOCK", 150)
    for threshold, found in near_duplicates.find_groups(vectors, (0.9, 0.98)).items():
        reach = (vectors @ vectors.T >= threshold).double()
        for _ in range(6):
            reach = (reach @ reach > 0).double()
        groups = {tuple(row.nonzero().flatten().tolist()) for row in reach if row.sum() > 1}
        assert {tuple(group) for group in found} == groups and len(groups) > 1


@pytest.mark.parametrize("alike", [False, True])
def test_features_that_are_too_alike_for_a_search_for_copies_are_told(alike, tmp_path, capsys):
    vectors = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) + 9.0 * alike
    vectors[1] = vectors[0]
    paths = [f"{i}.png" for i in range(60)]
    for path in paths:
        Image.fromarray(photograph(1, 16, 16)).save(tmp_path / path)
    names = [str(tmp_path / path) for path in paths]
    write_features(tmp_path / "features.npz", Features(names, None, F.normalize(vectors, dim=1).numpy()))
    search(tmp_path / "features.npz", "--threshold", 0.9, "--out", tmp_path / "groups.csv")
    assert ("WARNING: most images are in groups" in capsys.readouterr().out) == alike


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("din", "random"), "din is none of deepcluster, deepercluster, dino, "),
        (("contriever", "random"), "contriever is none of"),
        (("dino", "dino_vit16"), "dino_vit16 is neither a file nor a release .*dino_vits16"),
        (("dino", "{tmp}"), "is a folder with no checkpoint"),
        (("resmlp", "random", "--arch", "vit"), "vit is none of resmlp_12"),
        (("dino", "random", "--data_path", "{tmp}"), "holds no images|no images"),
        (("dino", "random", "--out", "f.txt"), "--out f.txt: not a file that ends in .parquet"),
        (("random",), "random: say the folder, too"),
        ((*RANDOM, "--token", "cls"), "--token cls: --layer says of which module, such as norm"),
        ((*RANDOM, "--layer", "block.3"), "--layer block.3: the network has no such module, but .*blocks.3.*norm"),
        (("resmlp", "random", "--layer", "norm", "--token", "cls"), "tokens of --layer norm are patches alone"),
    ],
)
def test_what_cannot_be_extracted_is_one_sentence(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract(*(str(flag).format(tmp=tmp_path) for flag in ("--out", tmp_path / "f.npz", *flags)))


def test_files_that_hold_no_features_of_one_network_are_refused(tmp_path):
    write_features(tmp_path / "a.npz", Features(["1", "2"], None, np.ones((2, 3))))
    write_features(tmp_path / "b.npz", Features(["1", "2"], None, np.ones((2, 4))))
    with pytest.raises(ValueError, match=r"b\.npz has 4 dimensions, .*a\.npz 3"):
        search(tmp_path / "a.npz", tmp_path / "b.npz", "--out", tmp_path / "d.csv")
    for name, crc in (("i.npz", 1), ("j.csv", 2)):
        write_features(tmp_path / name, Features(["1", "2"], None, np.ones((2, 3)), {"weights_crc32": crc}))
    with pytest.raises(ValueError, match=r"j\.csv has weights_crc32 2, .*i\.npz 1: features of different networks"):
        search(tmp_path / "i.npz", tmp_path / "j.csv", "--out", tmp_path / "d.csv")
    np.savez(tmp_path / "c.npz", x=1)
    (tmp_path / "d.csv").write_text("path,embedding_0,embedding_1\na,1,2\nb,1\n")
    np.save(tmp_path / "e.npy", np.ones((2, 3)))
    write_features(tmp_path / "f.npz", Features(["1"], None, np.zeros((1, 3))))
    (tmp_path / "k.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    for name, said in (("l.npz", "{"), ("m.npz", "[1]")):
        write_features(tmp_path / name, Features(["1"], None, np.ones((1, 3))))
        (tmp_path / f"{name}.json").write_text(said)
    messages = {"k.npz": "k.npz holds no features", "l.npz": "l.npz.json: ", "m.npz": "m.npz.json says nothing"}
    messages |= {"c.npz": "no features", "d.csv": "no features", "e.npy": "paths.txt", "f.npz": "all zeros"}
    for name, message in (messages | {"g.npz": "not a file", "h.txt": "ends in .parquet"}).items():
        with pytest.raises(ValueError, match=message):
            search(tmp_path / name, "--out", tmp_path / "out.csv")
