"""SwAV's ResNet, its grouping of crops and its blur against arrays measured on the reference."""

from functools import partial

import numpy as np
import pytest
import torch

from shared.images.views import ViewParams, ViewRecipe, apply_fast, apply_pil
from swav.resnet50 import ResNet, resnet50
from tests.golden.golden_file import GoldenFile
from tests.golden.hash_fill import hash_filled, hash_input
from tests.golden.small_resnet import small_resnet

GOLDEN = GoldenFile("swav")
STATE = GOLDEN.state_dict("resnet_small/sd/")
CROPS = [GOLDEN.tensor(key) for key in GOLDEN.keys("resnet_small/in/x")]

assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)


def expected(name: str) -> torch.Tensor:
    return GOLDEN.tensor(f"resnet_small/out/{name}")


def joined_by_size(crops: list[torch.Tensor]) -> list[torch.Tensor]:
    sides = dict.fromkeys(crop.shape[-1] for crop in crops)
    return [torch.cat([crop for crop in crops if crop.shape[-1] == side]) for side in sides]


@pytest.mark.parametrize("arrange", [list, joined_by_size])
def test_embeddings_and_scores_of_all_crops(arrange):
    embeddings, scores = small_resnet(STATE).eval()(arrange(CROPS))
    assert_close(embeddings, expected("emb_eval"))
    assert_close(scores, expected("scores_eval"))


def test_one_tensor_is_a_list_of_one():
    embeddings, _ = small_resnet(STATE).eval()(CROPS[0])
    assert_close(embeddings, expected("emb_eval_single"))


def test_backbone_gives_pooled_features_or_the_map():
    network = small_resnet(STATE).eval()
    assert_close(network.forward_backbone(CROPS[0]), expected("pooled"))
    trunk = {key: value for key, value in STATE.items() if not key.startswith(("projection_head", "prototypes"))}
    bare = ResNet([1, 1, 1, 1], width_per_group=len(STATE["conv1.weight"]), eval_mode=True).eval()
    bare.load_state_dict(trunk)
    assert_close(bare(CROPS[0]), expected("layer4_map"))


def test_training_mode_has_statistics_per_resolution():
    network = small_resnet(STATE).train()
    embeddings, scores = network(CROPS)
    assert_close(embeddings, expected("emb_train"))
    assert_close(scores, expected("scores_train"))
    assert_close(network.bn1.running_mean, expected("bn1_running_mean_after"))
    assert_close(network.bn1.running_var, expected("bn1_running_var_after"))
    assert_close(network.projection_head[1].running_mean, expected("head_bn_running_mean_after"))


def test_only_neighbours_of_equal_size_are_joined():
    embeddings, _ = small_resnet(STATE).train()([CROPS[0], CROPS[2], CROPS[1]])
    assert_close(embeddings, expected("emb_train_mixed_order"))


def test_resnet50_with_weights_made_from_their_names():
    assert GOLDEN.scalar("resnet50_hash/in/dummy") == 0
    dim = GOLDEN["resnet50_hash/out/emb"].shape[1]
    network = resnet50(output_dim=dim, hidden_mlp=2048, nmb_prototypes=3000, normalize=True)
    assert sum(p.numel() for p in network.parameters()) == GOLDEN.scalar("resnet50_hash/out/nparams")
    network.load_state_dict(hash_filled(network.state_dict()))
    crops = [hash_input(f"crop{i}", (1, 3, side, side)) for i, side in enumerate((64, 64, 48))]
    with torch.no_grad():
        embeddings, scores = network.eval()(crops)
        pooled = network.forward_backbone(crops[0])
    first_scores = GOLDEN.tensor("resnet50_hash/out/scores64")
    for found, wanted in (
        (embeddings, GOLDEN.tensor("resnet50_hash/out/emb")),
        (scores[:, : first_scores.shape[1]], first_scores),
        (pooled, GOLDEN.tensor("resnet50_hash/out/pooled")),
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


def blur_difference(case: str, apply) -> np.ndarray:
    """Grey levels between the stored blurred image and ours, far from edges (ours are square, so it has others)."""
    image = GOLDEN[f"{case}/in/image"]
    side = min(image.shape[:2])  # views are square
    radius = GOLDEN.scalar(f"{case}/in/radius")
    view = ViewParams(0, 0, side, side, flip=False, jitter=(), grey=False, blur_radius=radius, solarize=False)
    out = np.empty((side, side, 3), dtype=np.uint8)
    apply(image, view, ViewRecipe(side, (1.0, 1.0)), out)
    margin = 2 + int(3 * radius)
    inside = slice(margin, side - margin)
    return np.abs(out[inside, inside].astype(int) - GOLDEN[f"{case}/out/image"][inside, inside])


@pytest.mark.parametrize("case", [case for case in GOLDEN.cases("") if case.startswith("blur")])
def test_blur(case):
    assert blur_difference(case, apply_pil).max() <= 1
    assert blur_difference(case, apply_fast).mean() < 1.5  # its weights are multiples of 1/256; the image is noise


def test_every_array_was_compared():
    groups = ("resnet_small/", "resnet50_hash/", "blur")
    assert [key for group in groups for key in GOLDEN.unread(group)] == []
