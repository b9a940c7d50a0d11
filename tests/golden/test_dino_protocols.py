"""DINO's evaluation protocols against arrays measured on the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.eval_copy_detection import CopyDescriptor, Whitening, resize_and_normalize
from dino.eval_image_retrieval import MultiScale, score_ranks
from dino.eval_linear import FrozenFeatures
from dino.eval_video_segmentation import (
    hard_mask,
    neighborhood_window,
    normalize_frame,
    one_hot,
    patch_features,
    propagate_masks,
)
from dino.ground_truth import GroundTruth
from dino.vision_transformer import VisionTransformer
from shared.evaluation.knn import knn_classify
from shared.evaluation.ranking import average_precision
from shared.images.loading import EvalDataset
from shared.images.sources import FileSource
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("dino")
CONFIG = GOLDEN.json("config")
GROUPS = ("knn/", "multiscale/", "retrieval/", "pca/", "copy/", "vos/", "linear/")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def vit():
    img_size, patch_size, embed_dim, depth, num_heads = GOLDEN["vit/meta"].tolist()
    model = VisionTransformer(
        img_size=[img_size],
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        qkv_bias=True,
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )
    model.load_state_dict(GOLDEN.state_dict("vit/sd/"))
    return model.eval().requires_grad_(False)


def test_weighted_knn():
    names = ("train_features", "train_labels", "test_features", "test_labels")
    data = [GOLDEN.tensor(f"knn/{name}") for name in names]
    cases = [case for case in GOLDEN.cases("knn/") if case.startswith("k")]
    assert cases
    for case in cases:
        k, temperature = case.removeprefix("k").split("_T")
        accuracy = knn_classify(*data, int(k), float(temperature), num_classes=CONFIG["knn"]["nc"])
        np.testing.assert_allclose(accuracy, GOLDEN[f"knn/{case}"], atol=0.01)


def test_multiscale_features(vit):
    """The reference divides by the norm of the whole batch; ours makes every row of unit length."""
    for case in [case for case in GOLDEN.cases("multiscale/") if case.startswith("x_")]:
        expected = GOLDEN.tensor(f"multiscale/{case.replace('x_', 'out_')}")
        torch.testing.assert_close(expected.norm(), torch.tensor(1.0))
        features = MultiScale(vit)(GOLDEN.tensor(f"multiscale/{case}"))
        torch.testing.assert_close(features, F.normalize(expected, dim=1), **CLOSE)


def test_retrieval_scores():
    ranks = np.argsort(-GOLDEN["retrieval/sim_db_by_query"], axis=0).T
    labels = GOLDEN["retrieval/labels_0neutral_1easy_2hard_3junk"]
    relevance = [
        {name: np.flatnonzero(row == label).tolist() for label, name in ((1, "easy"), (2, "hard"), (3, "junk"))}
        for row in labels
    ]
    truth = GroundTruth([""] * ranks.shape[1], [""] * len(ranks), relevance)
    for protocol in ("medium", "hard"):
        result = score_ranks(ranks, truth, protocol)
        np.testing.assert_allclose(result.mean_ap, GOLDEN[f"retrieval/{protocol}/map"], rtol=1e-5)
        np.testing.assert_allclose(result.ap, GOLDEN[f"retrieval/{protocol}/aps"], rtol=1e-5)
        np.testing.assert_allclose(result.mean_precision, GOLDEN[f"retrieval/{protocol}/mpr"], rtol=1e-5)
        np.testing.assert_allclose(result.precision, GOLDEN[f"retrieval/{protocol}/prs"], rtol=1e-5)


def test_whitening():
    features = GOLDEN.tensor("pca/features")
    whitened = GOLDEN.tensor("pca/whitened_gram")
    rows = Whitening(features)(features[: len(whitened)])
    torch.testing.assert_close(rows @ rows.t(), whitened, rtol=1e-3, atol=1e-3)
    rows = F.normalize(rows, dim=1)
    torch.testing.assert_close(rows @ rows.t(), GOLDEN.tensor("pca/cosine_gram"), rtol=1e-3, atol=1e-4)


def test_copy_descriptors_of_image_files(vit, tmp_path):
    names = [case for case in GOLDEN.cases("copy/") if case.startswith("img")]
    for name in names:
        Image.fromarray(GOLDEN[f"copy/{name}"]).save(tmp_path / f"{name}.png")
    imsize = GOLDEN.scalar("copy/imsize")
    source = FileSource("copies", tmp_path, [f"{name}.png" for name in names])
    dataset = EvalDataset(source, lambda pixels: resize_and_normalize(pixels, imsize))
    descriptors = CopyDescriptor(vit)(torch.stack([image for image, *_ in dataset]))
    torch.testing.assert_close(descriptors, GOLDEN.tensor("copy/features"), rtol=1e-4, atol=1e-4)


def test_average_precision():
    cases = zip(GOLDEN["copy/ap_ranks"], GOLDEN["copy/ap_nres"].tolist(), GOLDEN["copy/ap_cases"].tolist(), strict=True)
    for padded, num_positives, expected in cases:
        assert average_precision(padded[padded >= 0], num_positives) == pytest.approx(expected, rel=1e-6)


def test_mask_propagation(vit):
    neighborhood, topk, height, width, num_classes = GOLDEN["vos/params"].tolist()
    num_context = len(GOLDEN.keys("vos/frame")) - 1
    frames = [GOLDEN.tensor(f"vos/frame{i}") for i in range(num_context + 1)]
    *context, target = (patch_features(vit, frame) for frame in frames)
    torch.testing.assert_close(target.t(), GOLDEN.tensor("vos/feat_tar"), **CLOSE)

    window = neighborhood_window(height, width, neighborhood)
    assert torch.equal(window, GOLDEN.tensor("vos/mask_neighborhood").bool())
    masks = torch.cat([GOLDEN.tensor(f"vos/seg{i}") for i in range(num_context)])
    soft_mask = propagate_masks(target, torch.stack(context), masks, window, topk)
    assert soft_mask.shape == (num_classes, height, width)
    torch.testing.assert_close(soft_mask[None], GOLDEN.tensor("vos/seg_tar"), **CLOSE)
    mismatches = hard_mask(soft_mask, CONFIG["vit"]["patch"]) != GOLDEN.tensor("vos/upsampled_normed_argmax")
    assert mismatches.float().mean() < 0.01


def test_video_frames_and_first_masks():
    half = GOLDEN.tensor("vos/color_normalize_of_half")
    torch.testing.assert_close(normalize_frame(torch.full((3, 1, 1), 0.5)), half.view(3, 1, 1), rtol=1e-5, atol=1e-6)
    masks, expected = GOLDEN.tensor("vos/one_hot_in"), GOLDEN.tensor("vos/one_hot_out")
    assert torch.equal(torch.stack([one_hot(mask, expected.shape[1]) for mask in masks]), expected)


def test_linear_features(vit):
    images = GOLDEN.tensor("vit/{}x{}/x".format(*CONFIG["res"][0]))
    for case in GOLDEN.cases("linear/"):
        n, avgpool = case.removeprefix("feat_n").split("_avg")
        features = FrozenFeatures(vit, int(n), bool(int(avgpool)))
        torch.testing.assert_close(features(images), GOLDEN.tensor(f"linear/{case}"), **CLOSE)


def test_every_array_was_compared():
    assert not [key for group in GROUPS for key in GOLDEN.unread(group)]
