"""DeeperCluster against arrays measured on the reference."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepercluster.clustering import (
    Clusters,
    Layout,
    Place,
    Whitening,
    epoch_sizes,
    images_for_pca,
    kmeans,
    whiten,
)
from deepercluster.eval_linear import fold_indices, pooled
from deepercluster.eval_pretrain import learning_rate
from deepercluster.hub import body_name
from deepercluster.main import sgd, train_one_epoch, turn
from deepercluster.vgg16 import VGG16, fold_sobel, sobel_filter
from shared.images.cluster_draws import cluster_lists, draw_uniformly
from tests.golden.golden_file import GoldenFile
from tests.golden.hash_fill import hash_filled, hash_input
from tests.loop_run import LoopRun
from tests.processes import run_processes
from tests.run_folders import lines

GOLDEN = GoldenFile("deepercluster")
YFCC100M = 95_920_149  # images of the published list


def read_kmeans(case: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    def get(name):
        return GOLDEN.tensor(f"{case}/in/{name}")

    return get("feats"), get("centroids"), GOLDEN.scalar(f"{case}/in/niter")


def assert_clusters(case: str, labels: torch.Tensor, centroids: torch.Tensor, suffix: str = "") -> None:
    assert torch.equal(labels, GOLDEN.tensor(f"{case}/out/labels{suffix}"))
    torch.testing.assert_close(centroids, GOLDEN.tensor(f"{case}/out/centroids{suffix}"), rtol=0, atol=1e-4)


# --- Clustering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in GOLDEN.cases("", "kmeans") if "_" not in case])
def test_kmeans_on_one_process(case):
    batch_size = GOLDEN.scalar(f"{case}/in/batch_size")
    assert GOLDEN.scalar(f"{case}/in/use_faiss") in (0, 1)  # either search finds the same
    for released in (None, 0):  # no cluster is ever empty here
        found = kmeans(*read_kmeans(case), released=released, batch_size=batch_size)
        assert_clusters(case, *found)


def kmeans_of_rank(rank, features, centroids, iterations, batch_size):
    return kmeans(features.chunk(2)[rank], centroids, iterations, batch_size=batch_size)


def test_kmeans_on_two_processes():
    case = "kmeans_dist2"
    inputs = read_kmeans(case)
    ranks = run_processes(kmeans_of_rank, 2, *inputs, GOLDEN.scalar(f"{case}/in/batch_size"))
    labels = torch.cat([labels for labels, _ in ranks])
    for (_, centroids), suffix in zip(ranks, ("", "_last_rank"), strict=True):
        assert_clusters(case, labels, centroids, suffix)
    assert_clusters(case, *kmeans(*inputs))


@pytest.mark.parametrize("case", GOLDEN.cases("", "kmeans_empty"))
def test_empty_clusters(case):
    number = GOLDEN.scalar(f"{case}/in/world_id")
    assert_clusters(case, *kmeans(*read_kmeans(case), released=number))
    labels, centroids = kmeans(*read_kmeans(case))  # our rule
    assert labels.bincount(minlength=len(centroids)).min() > 0


def test_whitening():
    x, q = GOLDEN.tensor("pca/in/x"), GOLDEN.tensor("pca/in/q")
    whitening = Whitening.fit(x, GOLDEN.scalar("pca/in/dim"))
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(whitening.matrix.t().abs(), GOLDEN.tensor("pca/out/dvt_abs"), **close)
    y = whitening(q)
    torch.testing.assert_close(y.abs(), GOLDEN.tensor("pca/out/y_abs"), **close)
    for name in ("gram", "gram_torch"):
        torch.testing.assert_close(y @ y.t(), GOLDEN.tensor(f"pca/out/{name}"), **close)


def test_cache_of_whitened_features_and_the_first_centroids():
    x, w = GOLDEN.tensor("cache/in/x"), GOLDEN.tensor("cache/in/w")
    fitted = images_for_pca(len(w), x.shape[1], 1)
    assert fitted == x.shape[1] * GOLDEN.scalar("cache/out/n_batches_for_pca")
    rows = whiten((batch @ w.t() for batch in x), fitted // x.shape[1], GOLDEN.scalar("cache/in/dim_pca"))
    close = {"rtol": 0, "atol": 2e-3}
    torch.testing.assert_close(rows @ rows.t(), GOLDEN.tensor("cache/out/cache_gram"), **close)
    torch.testing.assert_close(rows.abs(), GOLDEN.tensor("cache/out/cache_abs"), **close)
    expected = GOLDEN.tensor("cache/out/centroid_cache_gram")
    rng = np.random.RandomState(GOLDEN.scalar("cache/in/np_seed"))
    start = rows[torch.from_numpy(rng.choice(fitted, len(expected), replace=False))]
    torch.testing.assert_close(start @ rows.t(), expected, **close)


@pytest.mark.parametrize("case", GOLDEN.cases("", "groups"))
def test_groups_of_processes(case):
    world_size, super_classes, rotnet = (
        GOLDEN.scalar(f"{case}/in/{name}") for name in ("world_size", "super_classes", "rotnet")
    )
    layout = Layout(world_size, super_classes, bool(rotnet))
    rows = []
    for place in (layout.place(rank) for rank in range(world_size)):
        training = [layout.training_size, place.training_rank, place.super_class, layout.super_clusters]
        rows.append([*training, layout.clustering_size, place.clustering_rank, place.super_cluster, place.rotation])
    assert rows == GOLDEN[f"{case}/out/table"].tolist()


def test_sizes():
    expected = GOLDEN["sizes/out/size_dataset_epoch_size"].tolist()
    for (requested, batch, world, super_classes, rotnet), sizes in zip(
        GOLDEN["sizes/in/cfg"].tolist(), expected, strict=True
    ):
        layout = Layout(world, super_classes, bool(rotnet))
        assert list(epoch_sizes(min(requested, YFCC100M), batch, layout, released=True)) == sizes


def test_sampler():
    labels, total = GOLDEN["sampler/in/labels"], GOLDEN.scalar("sampler/in/total")
    world, rng = GOLDEN.scalar("sampler/in/world"), np.random.RandomState(GOLDEN.scalar("sampler/in/seed"))
    drawn = draw_uniformly(cluster_lists(labels, labels.max() + 1), total, rng)
    for rank in range(world):
        assert np.array_equal(drawn[rank::world], GOLDEN[f"sampler/out/rank{rank}"])


def test_images_of_each_label():
    data, ends = GOLDEN["indices_sparse/in/data"], GOLDEN["indices_sparse/out/offsets"]
    lists = cluster_lists(data, data.max() + 1)
    assert np.array_equal(np.concatenate(lists), GOLDEN["indices_sparse/out/flat"])
    assert [0, *np.cumsum([len(images) for images in lists])] == ends.tolist()


# --- Training ---------------------------------------------------------------------------------------------------------


def test_rotations():
    image = GOLDEN.tensor("rotate/in/img").permute(2, 0, 1)[None]
    for quarter in range(4):
        found = turn(image, Place(0, quarter, 0, 0, quarter))[0].permute(1, 2, 0)
        assert torch.equal(found, GOLDEN.tensor(f"rotate/out/rot{90 * quarter}"))


class State:
    """What the loop looks at of clusters that were found before."""

    def __init__(self, clusters: Clusters, super_class: nn.Linear, sub_class: nn.Linear, lr: float, decay: float):
        self.clusters, self.heads = clusters, nn.Module()
        self.heads.super_class, self.heads.sub_class = super_class, nn.ModuleList([sub_class])
        self.optimizers = tuple(sgd(module, lr, decay) for module in (super_class, self.heads.sub_class))
        self.groups = type("Groups", (), {"training": None, "layout": Layout(1, 1, False)})


def test_three_steps_of_training(tmp_path):
    weights, get = GOLDEN.state_dict("hier_loss/sd/"), GOLDEN.tensor
    body, pred, sub = (nn.Linear(*weights[f"{name}.weight"].shape[::-1]) for name in ("body", "pred", "sub"))
    for name, layer in (("body", body), ("pred", pred), ("sub", sub)):
        layer.load_state_dict({kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")})
    x, targets = get("hier_loss/in/x"), get("hier_loss/in/y")
    clusters = Clusters(torch.zeros(targets.numel(), dtype=torch.long), targets.flatten(), 1, sub.out_features)
    indices = torch.arange(targets.numel()).view(targets.shape)
    batches = [([views], None, batch) for views, batch in zip(x, indices, strict=True)]
    place = Place(0, GOLDEN.scalar("hier_loss/in/super_class"), 0, 0, 0)
    run = LoopRun(tmp_path, len(batches))
    train_one_epoch(run, body, State(clusters, pred, sub, 0.1, 1e-2), [place], batches, sgd(body, 0.1, 1e-2))

    ours = {f"{kind}_{level}": f"{kind}_{level}_class" for kind in ("loss", "prec") for level in ("super", "sub")}
    log = lines(tmp_path)
    for theirs, key in (ours | {"loss": "loss", "prec": "prec"}).items():
        found = [line[key] for line in log if "loss" in line]
        np.testing.assert_allclose(found, GOLDEN[f"hier_loss/out/{theirs}"], rtol=1e-4, atol=1e-6)
    line = run.log_epoch()
    keys = [f"train_{kind}{level}" for level in ("", "_super_class", "_sub_class") for kind in ("prec", "loss")]
    found = [line["epoch"], len(batches), *(line[key] for key in keys)]
    np.testing.assert_allclose(found, GOLDEN["hier_loss/out/scores"], rtol=1e-4, atol=1e-6)
    for name, layer in (("body", body), ("pred", pred), ("sub", sub)):
        expected = get(f"hier_loss/out/after/{name}.weight")
        torch.testing.assert_close(layer.weight.data, expected, rtol=1e-4, atol=1e-6)


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_sobel_filter():
    found = sobel_filter()(F.pad(GOLDEN.tensor("sobel/in/x"), [2] * 4))
    torch.testing.assert_close(found, GOLDEN.tensor("sobel/out/y"), rtol=0, atol=1e-5)


@torch.no_grad()
def test_sobel_folded_into_the_first_convolution():
    def get(name):
        return GOLDEN.tensor(f"sobel2rgb/{name}")

    x, weight, close = get("in/x"), get("in/weight"), {"rtol": 1e-4, "atol": 1e-4}
    convolution = nn.Conv2d(*weight.shape[1::-1], 3, padding=1)
    convolution.load_state_dict({"weight": weight, "bias": get("in/bias")})
    folded = fold_sobel(sobel_filter(), convolution)
    torch.testing.assert_close(folded.weight, get("out/exact_weight5x5"), **close)
    torch.testing.assert_close(folded.weight[:, :, :3, :3], get("out/official_block3x3"), **close)
    torch.testing.assert_close(folded.bias, get("out/bias"), **close)
    bordered = F.pad(x, [2] * 4)
    torch.testing.assert_close(convolution(sobel_filter()(bordered)), get("out/out_sobel_path"), **close)
    torch.testing.assert_close(folded(bordered), get("out/out_exact_merged"), **close)
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(folded(bordered)[inner], get("out/out_sobel_path")[inner], **close)


@pytest.mark.parametrize("case", GOLDEN.cases("", "vgg16"))
@torch.no_grad()
def test_official_network_and_probes(case):
    assert GOLDEN.scalar(f"{case}/in/dummy") == 0
    _, sobel, relu, classes = case.split("_")
    with torch.device("meta"):
        network = VGG16(sobel == "sobel1", relu == "relu1", int(classes[3:]))
    network = network.to_empty(device="cpu")
    if network.sobel is not None:
        network.sobel.load_state_dict(sobel_filter().state_dict())
    assert sum(p.numel() for p in network.parameters()) == GOLDEN.scalar(f"{case}/out/nparams")
    network.load_state_dict(hash_filled(network.state_dict()), assign=True)
    network.eval()
    image, close = hash_input("image", (1, 3, 224, 224)), {"rtol": 2e-3, "atol": 1e-4}
    torch.testing.assert_close(network(image), GOLDEN.tensor(f"{case}/out/output"), **close)
    for key in GOLDEN.keys(f"{case}/out/probe_conv"):
        conv = int(key.removeprefix(f"{case}/out/probe_conv"))
        maps = network.maps(image, conv)
        torch.testing.assert_close(
            maps.mean(dim=(2, 3)), GOLDEN.tensor(f"{case}/out/conv{conv}_mean_per_channel"), **close
        )
        inputs = pooled(maps, conv).flatten(1)
        probe = nn.ModuleDict({"linear": nn.Linear(inputs.shape[1], GOLDEN[key].shape[1])})
        probe.load_state_dict(hash_filled(probe.state_dict(), f"conv{conv}:"))
        torch.testing.assert_close(probe["linear"](inputs), GOLDEN.tensor(key), **close)


def test_names_of_the_body():
    def read(key):
        return bytes(GOLDEN[key]).decode().split("\n")

    assert [body_name(name) for name in read("rename_key/in/names")] == read("rename_key/out/names")


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_learning_rate_of_fine_tuning():
    expected = GOLDEN["pretrain_lr/out/lr"]
    found = [GOLDEN.number("pretrain_lr", "lr") * learning_rate(epoch) for epoch in range(len(expected))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_folds():
    targets, k = GOLDEN["kfold/in/targets"], GOLDEN.scalar("kfold/in/k")
    for fold in range(k):
        train, val = fold_indices(targets, k, fold)
        assert np.array_equal(val, GOLDEN[f"kfold/out/val{fold}"])
        assert np.array_equal(np.sort(train), GOLDEN[f"kfold/out/train{fold}_sorted"])
    folds = [set(fold_indices(targets, k, fold)[1].tolist()) for fold in range(k)]
    assert not any(a & b for a, b in itertools.combinations(folds, 2))


def test_every_array_of_deepercluster_was_compared():
    assert not GOLDEN.unread()
