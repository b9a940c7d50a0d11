import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.images.decode import ImageError
from swav import clusters
from swav.clustering import Clustering, assign, merge_prototypes, summarise
from swav.clusters import take_prototypes
from swav.hub import CARD
from tests.pictures import write_class_folders
from tests.shared.pictures.test_sheets import read
from tests.swav.tiny import build_small, finetuned_checkpoint, make_network, pretraining_file

SMALL = ["--image_size", "32", "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def unit(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def make_clustering(assigned, num_prototypes, labels=None, confidences=None, entropy=0.5) -> Clustering:
    assigned = np.asarray(assigned)
    if confidences is None:
        confidences = np.linspace(0.9, 0.5, len(assigned))
    labels = None if labels is None else np.asarray(labels)
    indices = np.arange(len(assigned))
    return Clustering(
        assigned, np.asarray(confidences), assigned, entropy, num_prototypes, num_prototypes, indices, labels
    )


# --- Assignment -------------------------------------------------------------------------------------------------------


def test_image_goes_to_the_prototype_with_the_highest_score():
    embeddings, prototypes = unit(50), unit(7, seed=1)
    clustering = assign(embeddings, prototypes, temperature=0.1)
    for i, z in enumerate(embeddings):  # eq. 2, one image at a time
        exponentials = [float(torch.exp(z @ c / 0.1)) for c in prototypes]
        assert clustering.clusters[i] == clustering.prototypes[i] == int(np.argmax(exponentials))
        assert clustering.confidences[i] == pytest.approx(max(exponentials) / sum(exponentials), rel=1e-4)
    assert clustering.num_clusters == clustering.num_prototypes == 7


def test_prototypes_are_normalised_and_chosen_by_head():
    network = make_network(nmb_prototypes=[20, 5])
    with torch.no_grad():
        network.prototypes.prototypes1.weight.mul_(3)
    with pytest.raises(ValueError, match=r"--head 2: the network has 2 set\(s\) of prototypes"):
        take_prototypes(network, 2)
    prototypes = take_prototypes(network, 1)
    assert prototypes.shape == (5, 12)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5))
    with pytest.raises(ValueError, match="holds no prototypes"):
        take_prototypes(finetuned_checkpoint()[0], 0)


def test_merged_clusters_join_close_prototypes():
    axes = torch.eye(8)[:3]
    generator = torch.Generator().manual_seed(0)
    kind = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0])  # of eight prototypes near three axes
    prototypes = F.normalize(axes[kind] + 0.05 * torch.randn(8, 8, generator=generator), dim=1)
    kinds = torch.tensor([0] * 5 + [1] * 30 + [2] * 15)
    embeddings = F.normalize(axes[kinds] + 0.05 * torch.randn(50, 8, generator=generator), dim=1)
    clustering = assign(embeddings, prototypes, temperature=0.1, merge_into=3)
    assert clustering.sizes().tolist() == [30, 15, 5]  # the largest is number 0
    assert [set(kinds[clustering.clusters == c].tolist()) for c in range(3)] == [{1}, {2}, {0}]
    scores = embeddings @ prototypes.T
    nearest = torch.stack([scores[:, kind == k].amax(dim=1) for k in range(3)], dim=1)  # of each axis
    expected = (nearest / 0.1).softmax(dim=1)[range(50), kinds]
    np.testing.assert_allclose(clustering.confidences, expected, rtol=1e-4)
    assert clustering.num_clusters == 3


@pytest.mark.parametrize("number", [2, 5, 12, 20, 29, 30])
def test_every_merged_cluster_has_images_however_flat_the_probabilities_are(number):
    """Summed over its prototypes, the probability of the group with most of them would be the largest everywhere."""
    embeddings, prototypes = unit(400), unit(30, seed=1)
    clustering = assign(embeddings, prototypes, temperature=10, merge_into=number)
    assert (clustering.sizes() > 0).all() and len(clustering.sizes()) == number
    assert len(np.unique(clustering.prototypes)) == 30
    for prototype in range(30):  # what shares a prototype shares a cluster
        assert len(np.unique(clustering.clusters[clustering.prototypes == prototype])) == 1
    assert (clustering.confidences >= 1 / number).all()


def test_unused_prototypes_join_the_group_next_to_them():
    prototypes = F.normalize(torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=1)
    groups = merge_prototypes(prototypes, torch.tensor([3, 0, 4, 0]), 2)
    assert groups[0] == groups[1] != groups[2] == groups[3]
    for number in (1, 3):
        with pytest.raises(
            ValueError, match=f"--merge_into {number}: expected 2 to 2, the number of prototypes in use"
        ):
            merge_prototypes(prototypes, torch.tensor([3, 0, 4, 0]), number)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_summary_counts_prototypes_and_compares_with_the_classes():
    summary = summarise(make_clustering([3, 3, 0, 0], 5, labels=[1, 1, 0, 0]))
    assert (summary["prototypes_used"], summary["dead_prototypes"]) == (2, [1, 2, 4])
    assert summary["prototype_perplexity"] == pytest.approx(2)
    assert (summary["nmi"], summary["ari"], summary["purity"]) == (1, 1, 1)
    assert "nmi" not in summarise(make_clustering([3, 3, 0, 0], 5))
    independent = summarise(make_clustering([0, 0, 1, 1], 2, labels=[0, 1, 0, 1]))
    assert independent["nmi"] == pytest.approx(0, abs=1e-9)
    assert independent["purity"] == 0.5


# --- The command ------------------------------------------------------------------------------------------------------


def run(*flags):
    return clusters.cluster_images(clusters.parse_args([*SMALL, *map(str, flags)]))


@pytest.fixture
def weights(tmp_path):
    torch.save(pretraining_file(make_network(nmb_prototypes=[20, 6])), tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_folder_of_unlabelled_pictures_with_a_broken_one(weights, tmp_path, capsys):
    folder = write_class_folders(tmp_path / "pictures", 4)
    for path in list(folder.rglob("*.png")):  # a flat folder: no classes
        path.rename(folder / f"{path.parent.name}, {path.name}")
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()
    (folder / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    summary = run("--pretrained", weights, "--data_path", folder, "--output_dir", out, "--head", 1)
    assert (summary["images"], summary["prototypes"]) == (12, 6)
    assert "nmi" not in summary
    assert summary == json.loads((out / "summary.json").read_text())

    header, *rows = read_csv(out / "assignments.csv")
    assert header == ["path", "cluster", "confidence"]
    names = sorted(str(path) for path in folder.iterdir() if path.name != "broken.png")
    assert [row[0] for row in rows] == names
    network = make_network(nmb_prototypes=[20, 6])
    embedding, _ = network(clusters.eval_transform(CARD, 32, network)(read(names[3]))[None])
    prototypes = F.normalize(network.prototypes.prototypes1.weight, dim=1)
    expected = (embedding @ prototypes.T / 0.1).softmax(dim=1)[0]
    assert int(rows[3][1]) == int(expected.argmax())
    assert float(rows[3][2]) == pytest.approx(expected.max().item(), abs=1e-3)

    used = sorted({int(row[1]) for row in rows})
    assert [path.name for path in sorted((out / "sheets").iterdir())] == [f"cluster_{c}.png" for c in used]
    header, *table = read_csv(out / "clusters.csv")
    assert header == ["cluster", "images", "mean_confidence"]
    assert sum(int(row[1]) for row in table) == 12
    assert (out / "unreadable.txt").read_text() == f"{folder / 'broken.png'}\tnot an image of a known format\n"
    assert f"broken.png; left out, see {out / 'unreadable.txt'}" in capsys.readouterr().out
    assert {path.name for path in out.glob("*.png")} == {"overview.png", "usage.png"}


def test_labelled_images_are_compared_with_their_classes_and_a_second_run_leaves_nothing_old(tmp_path):
    folder = write_class_folders(tmp_path / "pictures", 2)
    network = make_network(nmb_prototypes=6)
    images = clusters.EvalDataset(clusters.open_source(str(folder), "all"), clusters.eval_transform(CARD, 32, network))
    embeddings, _ = network(torch.stack([image for image, _, _ in images]))
    network.prototypes.weight.copy_(3 * embeddings)  # every image has a prototype of its own
    torch.save(pretraining_file(network), tmp_path / "weights.pth.tar")
    out = tmp_path / "out"
    (out / "sheets").mkdir(parents=True)
    (out / "sheets" / "cluster_77.png").write_bytes(b"old")
    (out / "unreadable.txt").write_text("old")
    flags = ["--pretrained", tmp_path / "weights.pth.tar", "--data_path", folder, "--output_dir", out]
    summary = run(*flags, "--merge_into", 3, "--max_sheets", 1)
    assert (summary["clusters"], summary["prototypes_used"], summary["classes"]) == (3, 6, 3)
    header, *rows = read_csv(out / "assignments.csv")
    assert header == ["path", "cluster", "confidence", "class"]
    assert [row[3] for row in rows] == ["blue"] * 2 + ["green"] * 2 + ["red"] * 2
    assert [path.name for path in (out / "sheets").iterdir()] == ["cluster_0.png"]
    assert not (out / "unreadable.txt").exists()

    summary = run(*flags, "--max_sheets", 2)
    assert (summary["clusters"], summary["purity"], summary["dead_prototypes"]) == (6, 1, [])
    assert [int(row[1]) for row in read_csv(out / "assignments.csv")[1:]] == list(range(6))


def test_bad_input_is_one_clear_error(weights, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    flags = ["--pretrained", weights, "--data_path", folder, "--output_dir", tmp_path / "out"]
    with pytest.raises(ImageError, match=r"broken.png and 100 replacements for it cannot be read"):
        run(*flags)
    with pytest.raises(ImageError, match=r"broken.png: not an image of a known format"):
        run(*flags, "--on_bad_image", "error")
    with pytest.raises(ValueError, match=r"--temperature 0.0 is not positive"):
        run(*flags, "--temperature", 0)
    with pytest.raises(SystemExit):
        run(*flags, "--max_sheets", 0)
