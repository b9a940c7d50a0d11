"""DeepCluster against arrays measured on the reference (those of DeepCluster-v2, ``v2/``, belong to SwAV's folder)."""

import numpy as np
import pytest
import torch
from torch import nn

from deepcluster.clustering import (
    climb,
    diffuse,
    kmeans_faiss,
    kmeans_torch,
    neighbour_graph,
    pca_whiten,
    power_iteration_clustering,
    symmetric_affinity,
)
from deepcluster.convnets import sobel_filter
from deepcluster.eval_linear import LayerFeatures, learning_rate, score_crops
from deepcluster.gradient_ascent import deprocess
from deepcluster.hub import build_network
from deepcluster.main import build_sgd, train_one_epoch
from deepcluster.rmac import Whitening, region_vectors, rmac, rmac_regions
from deepcluster.sampling import pseudo_labels
from shared.evaluation.partitions import nmi
from shared.evaluation.voc import average_precisions
from shared.images.cluster_draws import cluster_lists, draw_uniformly
from tests.golden.golden_file import GoldenFile
from tests.golden.hash_fill import hash_filled, hash_input
from tests.loop_run import LoopRun

GOLDEN = GoldenFile("deepcluster")


# --- Clustering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases("", "preprocess"))
def test_pca_whitening(case):
    y, components = pca_whiten(GOLDEN.tensor(f"{case}/in/x"), GOLDEN.scalar(f"{case}/in/pca"))
    expected, gram = GOLDEN.tensor(f"{case}/out/y"), GOLDEN.tensor(f"{case}/out/gram")
    assert components == y.shape[1]
    signs = (y * expected).sum(dim=0).sign()
    torch.testing.assert_close(y * signs, expected, rtol=0, atol=2e-3)
    rows = y[: len(gram)]
    torch.testing.assert_close(rows @ rows.t(), gram, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", [kmeans_torch, kmeans_faiss])
@pytest.mark.parametrize("case", GOLDEN.cases("", "kmeans"))
def test_kmeans_from_the_centroids_of_the_reference(case, backend):
    x, start = GOLDEN.tensor(f"{case}/in/x"), GOLDEN.tensor(f"{case}/out/init_centroids")
    found = backend(x, start)
    assert len(found.centroids) == GOLDEN.scalar(f"{case}/in/k")
    assert torch.equal(found.assignments, GOLDEN.tensor(f"{case}/out/assign"))
    torch.testing.assert_close(found.centroids, GOLDEN.tensor(f"{case}/out/final_centroids"), rtol=0, atol=1e-4)
    expected = GOLDEN[f"{case}/out/obj"]
    steps = min(len(expected), len(found.objective))  # implementations differ in when they notice convergence
    np.testing.assert_allclose(found.objective[:steps], expected[:steps], rtol=1e-4)
    assert found.objective[-1] == pytest.approx(GOLDEN.scalar(f"{case}/out/loss"), rel=1e-4)
    # the reference starts from rows of x, drawn by faiss with a seed from numpy's legacy stream
    np.random.seed(GOLDEN.scalar(f"{case}/in/np_seed"))
    assert np.random.randint(1234) == GOLDEN.scalar(f"{case}/out/faiss_seed")
    assert all((x == row).all(dim=1).any() for row in start)


@pytest.mark.parametrize("case", GOLDEN.cases("", "pic"))
def test_power_iteration_clustering(case):
    x, num_neighbours = GOLDEN.tensor(f"{case}/in/x"), GOLDEN.scalar(f"{case}/in/nnn")
    sigma, alpha = GOLDEN.number(case, "sigma"), GOLDEN.number(case, "alpha")
    neighbours, distances = neighbour_graph(x, num_neighbours)
    assert np.array_equal(GOLDEN[f"{case}/out/nn_index"][:, 0], np.arange(len(x)))
    assert np.array_equal(neighbours, GOLDEN[f"{case}/out/nn_index"][:, 1:])
    np.testing.assert_allclose(distances, GOLDEN[f"{case}/out/nn_sqdist"][:, 1:], rtol=1e-4, atol=1e-6)

    rows, columns, weights = symmetric_affinity(neighbours, np.exp(-distances.astype(float) / sigma**2))
    dense = np.zeros((len(x), len(x)))
    dense[rows, columns] = weights
    np.testing.assert_allclose(dense, GOLDEN[f"{case}/out/affinity_dense"], rtol=1e-4, atol=1e-12)
    raw = climb(rows, columns, weights, diffuse(rows, columns, weights, len(x), alpha))
    assert np.array_equal(raw, GOLDEN[f"{case}/out/cluster_raw"])

    for merged, name in ((True, "singletons_merged"), (False, "no_merge")):
        found = power_iteration_clustering(x, num_neighbours, sigma, alpha, merged).numpy()
        expected = lists_of(f"{case}/out/{name}_flat", f"{case}/out/{name}_offsets")
        assert partition(cluster_lists(found, found.max() + 1)) == partition(expected)


def lists_of(flat: str, offsets: str) -> list[np.ndarray]:
    return np.split(GOLDEN[flat], GOLDEN[offsets][1:-1])


def partition(clusters: list[np.ndarray]) -> set[frozenset[int]]:
    return {frozenset(images.tolist()) for images in clusters}


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases("", "sampler"))
def test_sampler_and_pseudo_labels(case):
    clusters = lists_of(f"{case}/in/flat", f"{case}/in/offsets")
    num_draws = GOLDEN.scalar(f"{case}/in/N")
    drawn = draw_uniformly(clusters, num_draws, np.random.RandomState(GOLDEN.scalar(f"{case}/in/np_seed")))
    assert np.array_equal(drawn, GOLDEN[f"{case}/out/indexes"])
    assert len(drawn) == GOLDEN.scalar(f"{case}/out/length")

    assignments = GOLDEN.tensor(f"{case}/out/arranged")
    counts = assignments[torch.from_numpy(drawn)].bincount(minlength=len(clusters))
    assert torch.equal(counts, GOLDEN.tensor(f"{case}/out/counts_per_cluster"))

    in_cluster_order = np.concatenate(clusters)  # the order in which the released sampler's numbers are looked up
    assert np.array_equal(in_cluster_order, GOLDEN[f"{case}/out/dataset_image"])
    labels = pseudo_labels(assignments, len(clusters))
    assert torch.equal(labels[torch.from_numpy(in_cluster_order)], GOLDEN.tensor(f"{case}/out/dataset_label"))


def test_normalised_mutual_information():
    a, b = GOLDEN.tensor("nmi/in/a"), GOLDEN.tensor("nmi/in/b")
    assert nmi(a, b) == pytest.approx(GOLDEN.scalar("nmi/out/geometric"), abs=1e-6)
    # the other mean of the two entropies gives the other convention from the same mutual information
    entropies = [-(p * p.log()).sum().item() for p in (x.bincount()[x.unique()] / len(x) for x in (a, b))]
    information = nmi(a, b) * np.sqrt(np.prod(entropies))
    assert information / np.mean(entropies) == pytest.approx(GOLDEN.scalar("nmi/out/arithmetic"), abs=1e-6)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_sobel_filter():
    sobel = sobel_filter()
    for name, value in (("w0", sobel[0].weight), ("b0", sobel[0].bias), ("w1", sobel[1].weight), ("b1", sobel[1].bias)):
        torch.testing.assert_close(value, GOLDEN.tensor(f"sobel/out/{name}"), rtol=0, atol=0)
        assert not value.requires_grad
    torch.testing.assert_close(sobel(GOLDEN.tensor("sobel/in/x")), GOLDEN.tensor("sobel/out/y"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN.cases("", "alexnet", "vgg16"))
@torch.no_grad()
def test_official_networks(case):
    assert GOLDEN.scalar(f"{case}/in/dummy") == 0
    arch, sobel, bn = case.split("_")
    expected = GOLDEN.tensor(f"{case}/out/logits")
    with torch.device("meta"):
        network = build_network(arch, sobel == "sobel1", expected.shape[1], bn=bn == "bn1")
    network = network.to_empty(device="cpu")
    if network.sobel is not None:
        network.sobel.load_state_dict(sobel_filter().state_dict())
    assert sum(p.numel() for p in network.parameters()) == GOLDEN.scalar(f"{case}/out/nparams")
    network.load_state_dict(hash_filled(network.state_dict()), assign=True)
    network.eval()
    image = hash_input("image", (1, 3, 224, 224))
    close = {"rtol": 2e-3, "atol": 1e-4}
    torch.testing.assert_close(network(image), expected, **close)
    means = GOLDEN.tensor(f"{case}/out/features_mean_per_channel")
    torch.testing.assert_close(network.maps(image).mean(dim=(2, 3)), means, **close)
    torch.testing.assert_close(network.embed(image), GOLDEN.tensor(f"{case}/out/cluster_features"), **close)

    for key in GOLDEN.keys(f"{case}/out/probe_conv"):
        conv = int(key.removeprefix(f"{case}/out/probe_conv"))
        inputs = LayerFeatures(network, conv)(image)
        probe = nn.ModuleDict({"linear": nn.Linear(inputs.shape[1], GOLDEN[key].shape[1])})
        probe.load_state_dict(hash_filled(probe.state_dict(), f"conv{conv}:"))
        torch.testing.assert_close(probe["linear"](inputs), GOLDEN.tensor(key), **close)


def test_two_epochs_of_training(tmp_path):
    """The top layer's optimiser starts again in the second epoch, the body's goes on."""
    weights = GOLDEN.state_dict("train_toy/sd/")
    body, top_layer = (nn.Linear(*weights[f"{name}.weight"].shape[::-1]) for name in ("features", "top_layer"))
    for name, layer in (("features", body), ("top_layer", top_layer)):
        layer.load_state_dict({k: weights[f"{name}.{k}"] for k in ("weight", "bias")})
    network = nn.Sequential(body, nn.ReLU())
    lr, decay = GOLDEN.scalar("train_toy/in/lr"), 10 ** GOLDEN.number("train_toy", "wd_pow")
    optimizer = build_sgd(network, lr, 0.9, decay)
    x, targets = GOLDEN.tensor("train_toy/in/x"), GOLDEN.tensor("train_toy/in/y")
    indices = torch.arange(targets.numel()).view(targets.shape)
    batches = [([views], None, batch) for views, batch in zip(x, indices, strict=True)]
    for epoch in (1, 2):
        optimizers = optimizer, build_sgd(top_layer, lr, 0, decay)
        run = LoopRun(tmp_path, len(batches), epochs=2, epoch=epoch - 1)
        train_one_epoch(network, top_layer, targets.flatten(), batches, optimizers, run, numbered_every=0)
        expected = GOLDEN.scalar(f"train_toy/out/loss_epoch{epoch}")
        assert run.log_epoch()["train_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for name, layer in (("features", body), ("top_layer", top_layer)):
            for key, value in layer.state_dict().items():
                expected = GOLDEN.tensor(f"train_toy/out/epoch{epoch}/{name}.{key}")
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_learning_rate_of_the_probes():
    lr, decay = GOLDEN.scalar("bottou_lr/in/lr0"), GOLDEN.scalar("bottou_lr/in/wd")
    found = [learning_rate(lr, decay, step) for step in GOLDEN["bottou_lr/in/t"].tolist()]
    np.testing.assert_allclose(found, GOLDEN["bottou_lr/out/lr"], rtol=1e-5)


def test_ten_crop_scores():
    logits, target = GOLDEN.tensor("tencrop_eval/in/logits"), GOLDEN.tensor("tencrop_eval/in/target")
    loss, hits1, hits5 = (value / len(target) for value in score_crops(logits, target))
    torch.testing.assert_close(loss, GOLDEN.tensor("tencrop_eval/out/loss"), rtol=0, atol=1e-4)
    torch.testing.assert_close(100 * hits1, GOLDEN.tensor("tencrop_eval/out/prec1"), rtol=0, atol=1e-4)
    torch.testing.assert_close(100 * hits5, GOLDEN.tensor("tencrop_eval/out/prec5"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", GOLDEN.cases("", "rmac_regions"))
def test_rmac_regions(case):
    regions = rmac_regions(*(GOLDEN.scalar(f"{case}/in/{name}") for name in "HWL"))
    assert regions == [tuple(row) for row in GOLDEN[f"{case}/out/xywh"].tolist()]


def test_rmac_descriptor():
    maps, vectors = GOLDEN.tensor("rmac/in/features")[0], GOLDEN.tensor("rmac/out/regions_desc")[0]
    levels = next(n for n in range(1, 10) if len(rmac_regions(*maps.shape[1:], n)) == len(vectors))
    torch.testing.assert_close(region_vectors(maps, levels), vectors, rtol=0, atol=1e-4)
    expected = GOLDEN.tensor("rmac/out/pca_abs")
    whitening = Whitening.fit(GOLDEN.tensor("rmac/in/train"), len(expected))
    torch.testing.assert_close(whitening.mean[None], GOLDEN.tensor("rmac/out/pca_mean"), rtol=0, atol=1e-4)
    torch.testing.assert_close(whitening.matrix.abs(), expected, rtol=0, atol=1e-4)
    descriptor = rmac(region_vectors(maps, levels), whitening)
    torch.testing.assert_close(descriptor.abs(), GOLDEN.tensor("rmac/out/rmac")[0].abs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", GOLDEN.cases("", "voc_map"))
def test_average_precision_of_voc(case):
    found = average_precisions(GOLDEN[f"{case}/in/scores"].sum(axis=0), GOLDEN[f"{case}/in/gts"])
    np.testing.assert_allclose(found, GOLDEN[f"{case}/out/ap"], atol=1e-4)
    assert np.mean(found) == pytest.approx(GOLDEN.scalar(f"{case}/out/mean_ap"), abs=1e-4)


def test_pictures_of_filters():
    found, expected = deprocess(GOLDEN["deprocess/in/x"]), GOLDEN["deprocess/out/image"]
    assert found.dtype == expected.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_every_array_of_deepcluster_was_compared():
    assert not [key for key in GOLDEN.unread() if not key.startswith("v2/")]
