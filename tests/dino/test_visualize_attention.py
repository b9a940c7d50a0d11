"""Attention maps: any image and size, files that show what they say, and thresholds by a slow loop."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.xcit import Xcit

from dino.attention import class_row
from dino.augmentations import MEAN, STD, dino_views
from dino.vision_transformer import VisionTransformer
from dino.visualize_attention import parse_args, training_views, visualize_attention
from shared.evaluation import neighbours
from shared.networks.classifiers import fill_classifier
from shared.networks.weights import WeightMismatch
from shared.pictures.attention import class_attention, save_attention
from tests.dino.tiny import write_checkpoint
from xcit.cross_covariance_transformer import XCiT
from xcit.hub import from_timm

HEADS = 3


def make_vit(in_chans: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=[16], patch_size=4, in_chans=in_chans, embed_dim=24, depth=2, num_heads=HEADS, qkv_bias=True
    ).eval()


def read(path) -> np.ndarray:
    return np.array(Image.open(path))


def test_attention_and_class_token_share_sum_to_one():
    model, images = make_vit(), torch.randn(2, 3, 18, 23)
    attention = class_attention(model, images)
    assert attention.shape == (2, HEADS, 4, 5)
    own = model.get_last_selfattention(images)[:, :, 0, 0]
    torch.testing.assert_close(attention.sum(dim=(2, 3)) + own, torch.ones(2, HEADS))


def test_every_file_is_written_and_shows_its_map(tmp_path):
    model = make_vit()
    image = torch.randn(3, 18, 23, generator=torch.Generator().manual_seed(0))
    paths = save_attention(model, image, tmp_path / "out", MEAN, STD, threshold=0.6)
    names = [*(f"head{j}" for j in range(HEADS)), "mean"]
    expected = ["attention.png", "img.png"]
    expected += [f"{kind}{name}.png" for kind in ("attn-", "overlay-", "mask_th0.6_") for name in names]
    assert sorted(path.name for path in paths) == sorted(expected)
    assert paths[0].name == "attention.png"
    assert {read(path).shape for path in paths[1:]} == {(240, 300, 3)}  # 4 x 5 patches, magnified 15 times

    attention = class_attention(model, image[None])[0]
    for j in range(HEADS):
        colours = read(tmp_path / "out" / f"attn-head{j}.png").astype(int)
        brightest = np.unravel_index(colours[:, :, :2].sum(axis=2).argmax(), colours.shape[:2])
        assert (brightest[0] // 60, brightest[1] // 60) == divmod(int(attention[j].argmax()), 5)


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "checkpoint.pth", patch_size=4)


def test_any_image_and_checkpoint(checkpoint, tmp_path):
    Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 20).convert("RGBA").save(tmp_path / "image.png")
    flags = f"--arch vit_tiny --patch_size 4 --pretrained_weights {checkpoint} --image_path {tmp_path / 'image.png'}"
    flags += f" --image_size 33 --threshold 0.5 --output_dir {tmp_path / 'out'}"
    paths = visualize_attention(parse_args(flags.split()))
    assert read(tmp_path / "out" / "img.png").shape[:2] == (256, 352)  # 32 x 44 pixels, magnified 8 times
    assert all(path.exists() for path in paths)


def test_without_anything_it_is_an_embedded_image_and_its_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neighbours, "MOST_IMAGES", 40)
    run = tmp_path / "runs/materials"
    run.mkdir(parents=True)
    drawn = {"global_crop_size": 24, "local_crop_size": 8, "local_crops_number": 3, "global_crops_scale": (0.5, 1.0)}
    state = torch.load(checkpoint, weights_only=True)
    flags = argparse.Namespace(**drawn, arch="vit_tiny", patch_size=4)
    torch.save(state | {"args": flags}, run / "checkpoint.pth")
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.0}\n')
    assert training_views(str(run / "checkpoint.pth")) == dino_views((0.5, 1.0), (0.05, 0.4), 3, 24, 8)
    assert training_views("") == dino_views((0.4, 1.0), (0.05, 0.4), 8)
    paths = visualize_attention(parse_args([]))
    assert [path.name for path in paths[:4]] == ["attention.png", "views.png", "neighbours.png", "curves.png"]
    assert all(read(path).std() > 0 for path in paths)


def test_other_architecture_is_refused(checkpoint, tmp_path):
    flags = f"--arch vit_small --patch_size 4 --pretrained_weights {checkpoint} --output_dir {tmp_path}"
    with pytest.raises(WeightMismatch, match="looks like a vit_tiny/4"):
        visualize_attention(parse_args(flags.split()))


# --- XCiT -------------------------------------------------------------------------------------------------------------


def make_xcit() -> Xcit:
    torch.manual_seed(0)
    return Xcit(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0, tokens_norm=True).eval()


def test_class_attention_of_xcit_makes_the_output_of_its_last_attention():
    model, images = make_xcit(), torch.randn(2, 3, 24, 40)
    layer, seen = model.cls_attn_blocks[-1].attn, []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    weights = class_row(model, images)
    (tokens, output), values = seen[0], layer.v(seen[0][0]).unflatten(2, (2, 16))
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 2))
    expected = layer.proj(torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1))
    torch.testing.assert_close(output[:, 0], expected)
    assert tokens.shape == (2, 16, 32)
    torch.testing.assert_close(class_attention(model, images, class_row), weights[:, :, 1:].unflatten(2, (3, 5)))


def test_class_attention_is_that_of_the_xcit_folder_with_the_same_weights():
    model, images = make_xcit(), torch.randn(1, 3, 24, 16)
    network = XCiT(patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    fill_classifier(network, from_timm(model.state_dict()), "timm")
    torch.testing.assert_close(class_attention(model, images, class_row), network.eval().class_attention(images))
