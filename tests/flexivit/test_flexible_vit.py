"""The network of FlexiViT, its resizes and the files it is filled from; arrays of the reference: tests/golden."""

import re

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F

from dino.vision_transformer import vit_tiny
from flexivit import checkpoints, export
from flexivit.checkpoints import load_flexible, start_from
from flexivit.flexible_vit import AtPatchSize, FlexiViT, pi_resize, resize_positions
from flexivit.hub import build
from flexivit.resize_patch import parse_args, resize_patch
from shared.images.loading import EvalTransform
from shared.networks.weights import WeightMismatch


def small(**options) -> FlexiViT:
    torch.manual_seed(0)
    network = FlexiViT(32, 2, 2, **{"patch_size": 6, "grid": (3, 3), "num_classes": 5} | options)
    torch.nn.init.normal_(network.head.weight)
    return network


def with_patches_resized(images: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Every patch resized by itself: a resize of the whole image would mix neighbours at their borders."""
    patches = images.unfold(2, old, old).unfold(3, old, old)  # (B, C, rows, columns, old, old)
    resized = F.interpolate(patches.flatten(0, 3)[:, None], size=new, mode="bilinear")
    return resized.view(*patches.shape[:4], new, new).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def as_of_imagenet(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] with ImageNet's mean and std instead."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((images + 1) / 2 - mean) / std


def test_resizing_a_patch_embedding_minimises_the_change_of_the_tokens():
    """Of smaller patches: no other kernel gives tokens nearer to the old ones, for patches of white noise."""
    torch.manual_seed(0)
    kernel = torch.randn(1, 1, 6, 6)
    found = pi_resize(kernel, (4, 4))
    patches = torch.randn(100_000, 1, 6, 6)
    smaller = F.interpolate(patches, size=(4, 4), mode="bilinear").flatten(1)
    wanted = (patches * kernel).sum(dim=(1, 2, 3))
    best = torch.linalg.lstsq(smaller, wanted[:, None]).solution.view(1, 1, 4, 4)
    torch.testing.assert_close(found, best, rtol=0, atol=0.06)  # the draw's
    error = (smaller @ found.flatten() - wanted).square().mean()
    plain = F.interpolate(kernel, size=(4, 4), mode="bilinear").flatten()
    assert error < 0.8 * (smaller @ plain - wanted).square().mean()


def test_grids_are_compared_and_not_their_numbers_of_patches():
    positions = torch.arange(36.0).view(1, 36, 1)
    found = resize_positions(positions, (6, 6), (4, 9))
    assert not torch.equal(found, positions)
    rows = found.view(4, 9)
    assert (rows.diff(dim=0) > 0).all() and (rows.diff(dim=1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"pool": "gap"}, {"pool": "map"}, {"positions": "sincos2d"}])
def test_a_patch_size_and_its_grid_are_the_same_call(options):
    network, images = small(**options).eval(), torch.randn(2, 3, 24, 24)
    logits = network(images, patch_size=4)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(network(images, grid=6), logits)
    torch.testing.assert_close(AtPatchSize(network, patch_size=4)(images), logits)
    assert (network(images, patch_size=8) - logits).abs().max() > 1e-3
    assert network(torch.randn(1, 3, 24, 36), patch_size=(4, 6)).shape == (1, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"patch_size": 25}, "an image of 24x24 pixels cannot have patches of 25x25 pixels"),
        ({"grid": 25}, "an image of 24x24 pixels cannot have 25 patches a side"),
        ({"grid": 2, "patch_size": 12}, "only one of the two"),
    ],
)
def test_patches_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(1, 3, 24, 24), **call)


def test_published_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        count = {s: sum(p.numel() for p in build(f"flexivit_{s}", num_classes=1000).parameters()) for s in "sbl"}
    assert count == {"s": 22_878_568, "b": 88_223_464, "l": 306_534_376}
    with pytest.raises(ValueError, match="vit_s is none of flexivit_micro, flexivit_ti"):
        build("vit_s")


# --- Files ------------------------------------------------------------------------------------------------------------


def published_file(network: FlexiViT, path, prefix: str = "", **further) -> None:
    """The network as a published ``.npz`` file, written from the layout in the other direction.

    Args:
        prefix: Of all names.
        further: Arrays beside them.
    """
    arrays, heads = {}, 64
    for name, tensor in network.state_dict().items():
        value = tensor.numpy()
        if name.startswith("patch_embed"):
            name = "embedding/" + ("kernel" if value.ndim == 4 else "bias")
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        elif match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, matrix in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                kind = "kernel" if match[2] == "weight" else "bias"
                where = f"Transformer/encoderblock_{match[1]}/MultiHeadDotProductAttention_0/{part}/{kind}"
                arrays[where] = matrix.T.reshape(*matrix.T.shape[:-1], -1, heads)
            continue
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name):
            part = {
                "norm1": "LayerNorm_0",
                "norm2": "LayerNorm_1",
                "attn.proj": "MultiHeadDotProductAttention_0/out",
                "mlp.fc1": "MlpBlock_0/Dense_0",
                "mlp.fc2": "MlpBlock_0/Dense_1",
            }[match[2]]
            kind = "bias" if match[3] == "bias" else "scale" if "Norm" in part else "kernel"
            value = value.T.reshape(-1, heads, len(value)) if part.endswith("out") and kind == "kernel" else value.T
            name = f"Transformer/encoderblock_{match[1]}/{part}/{kind}"
        else:
            names = {"cls_token": "cls", "pos_embed": "pos_embedding", "head.weight": "head/kernel"}
            names |= {"norm.weight": "Transformer/encoder_norm/scale", "norm.bias": "Transformer/encoder_norm/bias"}
            value = value.T if name == "head.weight" else value
            name = names.get(name, name.replace(".", "/"))
        arrays[name] = value
    np.savez(path, **{prefix + name: array for name, array in arrays.items()}, **further)


def published(patch_size: int = 8) -> FlexiViT:
    torch.manual_seed(0)
    network = FlexiViT(128, 2, 2, patch_size=patch_size, grid=(7, 7), num_classes=6)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_published_files_fill_the_network_completely(prefix, tmp_path):
    network, images = published(), torch.randn(2, 3, 40, 40)
    state = {"opt/0/mu/params/head/kernel": np.zeros((128, 6)), "opt/0/count": np.array(3)}  # of the optimiser
    published_file(network, tmp_path / "flexivit.npz", prefix, **(state if prefix else {}))
    found = load_flexible(tmp_path / "flexivit.npz")
    torch.testing.assert_close(found(images, grid=5), network(images, grid=5), rtol=1e-4, atol=1e-4)


NETWORKS = {  # of which no tensor shows all: four heads at a width of 128, the tanh GELU, fixed positions
    "micro": ("runs/checkpoint.pth", {}),
    "fixed positions": ("runs/checkpoint.pth", {"positions": "sincos2d"}),
    "published": ("flexivit.npz", {}),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_resizing_to_the_old_size_changes_nothing(name, suffix, tmp_path):
    file, options = NETWORKS[name]
    (tmp_path / "runs").mkdir()
    if name == "published":
        network = published()
        published_file(network, tmp_path / file)
    else:
        network = build("flexivit_micro", patch_size=8, grid=(4, 4), num_classes=5, **options).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        flags = {"arch": "flexivit_micro", "grids": [2, 4], "posemb_grid": 4}
        torch.save({"model": network.state_dict(), "args": flags}, tmp_path / file)
    out, images = tmp_path / f"out{suffix}", torch.randn(2, 3, 48, 48)
    before = load_flexible(tmp_path / file)(images)
    torch.testing.assert_close(before, network(images), rtol=1e-4, atol=1e-4)
    assert resize_patch(parse_args([str(tmp_path / file), str(out), "--patch", "8"])) > 0.9999
    assert torch.equal(load_flexible(out)(images), before)


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")])  # timm's, and the paper's files
def test_a_deit_iii_is_a_teacher_of_images_in_minus_1_to_1(names, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}
    theirs = timm.create_model("deit3_base_patch16_224", **sizes).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = theirs.state_dict()
    for block in range(2):
        for number, name in enumerate(names, start=1):
            tensors[f"blocks.{block}.{name}"] = tensors.pop(f"blocks.{block}.ls{number}.gamma")
    torch.save({"model": tensors}, tmp_path / "deit3.pth")
    images = 2 * torch.rand(2, 3, 32, 32) - 1
    found = load_flexible(tmp_path / "deit3.pth", "--teacher")
    torch.testing.assert_close(found(images), theirs(as_of_imagenet(images)), rtol=1e-4, atol=1e-4)
    assert "deit3.pth: made for images of mean 0.485 0.456 0.406, std 0.229" in capsys.readouterr().out
    found = load_flexible(tmp_path / "deit3.pth", "--teacher", "half")
    torch.testing.assert_close(found(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_a_mean_of_tokens_that_is_normalised_is_an_error(tmp_path):
    options = {"img_size": 32, "patch_size": 8, "num_classes": 0}
    for name, further in (("after", {"global_pool": "avg"}), ("before", {"global_pool": "avg", "fc_norm": False})):
        theirs = timm.create_model("vit_tiny_patch16_224", class_token=False, **options, **further).eval()
        torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    with pytest.raises(WeightMismatch, match=r"after\.pth normalises the mean of its tokens"):
        load_flexible(tmp_path / "after.pth")
    images = torch.randn(2, 3, 32, 32)
    found = load_flexible(tmp_path / "before.pth")
    torch.testing.assert_close(found(images), theirs(as_of_imagenet(images)), rtol=1e-4, atol=1e-5)


def test_other_vits_are_taken_with_the_position_of_their_class_token(tmp_path):
    torch.manual_seed(0)
    others = {
        "dino": vit_tiny(patch_size=8, img_size=[32]),
        "timm": timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, num_classes=0),
    }
    for name, other in others.items():
        torch.nn.init.normal_(other.pos_embed, std=0.1)
        torch.save(other.state_dict(), tmp_path / f"{name}.pth")
        images = torch.randn(
            2, 3, other.patch_embed.img_size[0] if name == "timm" else 32, 48 if name == "timm" else 32
        )
        found = load_flexible(tmp_path / f"{name}.pth")
        torch.testing.assert_close(found.represent(images), other.eval()(as_of_imagenet(images)), rtol=1e-4, atol=1e-5)
    torch.save(others["dino"].state_dict() | {"register_tokens": torch.zeros(1, 4, 192)}, tmp_path / "registers.pth")
    with pytest.raises(WeightMismatch, match="register_tokens belongs to a ViT of another kind"):
        load_flexible(tmp_path / "registers.pth")


@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "vit_so400m_patch14_siglip_224", "vit_giant_patch14_224"])
def test_vits_have_the_heads_of_their_size(name, monkeypatch):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        monkeypatch.setattr(checkpoints, "load_completely", lambda *_: None)
        assert (
            checkpoints.network_of(theirs.state_dict(), {}, "file").blocks[0].attn.num_heads
            == theirs.blocks[0].attn.num_heads
            == 16
        )


@pytest.mark.parametrize("width", [100, 1536])
def test_heads_that_cannot_be_known_are_an_error(width, tmp_path):
    network = FlexiViT(width, 1, 4, patch_size=4, hidden_dim=8)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"file.pth: how many heads a ViT of width {width} and 1 blocks has is not"):
        load_flexible(tmp_path / "file.pth")


def test_a_student_starts_as_its_teacher():
    """On images that are twice as large, in patches that are."""
    teacher, images = small(patch_size=4, grid=(6, 6)).eval(), torch.randn(2, 3, 24, 24)
    student = small(patch_size=8, grid=(6, 6)).eval()
    start_from(student, teacher)
    larger = with_patches_resized(images, 4, 8)
    torch.testing.assert_close(student(larger), teacher(images), rtol=1e-3, atol=1e-4)
    student = small(patch_size=8, grid=(3, 3), num_classes=7).eval()
    head = student.head.weight.clone()
    start_from(student, teacher)
    assert torch.equal(student.head.weight, head) and student.pos_embed.shape == (1, 9, 32)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_vit_gets_larger_patches_without_loss(suffix, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    seen = []  # how images are normalised
    monkeypatch.setattr(
        "flexivit.resize_patch.EvalTransform", lambda *a, **k: seen.append(k["mean"]) or EvalTransform(*a, **k)
    )
    network = vit_tiny(patch_size=4, img_size=[32])
    torch.nn.init.normal_(network.pos_embed, std=0.1)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "dino.pth")
    out = tmp_path / f"patch8{suffix}"
    arguments = [str(tmp_path / "dino.pth"), str(out), "--patch", "8"]
    assert resize_patch(parse_args(arguments)) > 0.999 and seen == [(0.485, 0.456, 0.406)]
    printed = capsys.readouterr().out
    assert "of different images 0." in printed  # beside which the cosine of an image with itself says something
    assert "patches of 4 pixels, 8x8 positions" in printed and "patches of 8 pixels, 8x8 positions" in printed
    found, images = load_flexible(out), torch.randn(2, 3, 32, 32)
    larger = with_patches_resized(images, 4, 8)
    torch.testing.assert_close(found.represent(larger), network.eval()(as_of_imagenet(images)), rtol=1e-3, atol=1e-4)
    options = {"img_size": 64, "patch_size": 8, "num_classes": 0, "checkpoint_path": str(out)}
    twin = timm.create_model("vit_tiny_patch16_224", **options).eval()  # in the images of the old file
    torch.testing.assert_close(twin(larger), network(images), rtol=1e-3, atol=1e-4)
    assert resize_patch(parse_args([*arguments[:3], "2", "--image_size", "32"])) < 1
    assert load_flexible(out).grid == (16, 16)
    with pytest.raises(SystemExit):
        parse_args([str(out), str(out), "--patch", "4"])
    assert "is the file that is read" in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_exports_are_the_network_at_one_patch_size(pool, tmp_path):
    torch.manual_seed(0)
    network = build("flexivit_micro", patch_size=8, grid=(3, 3), num_classes=5, pool=pool).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flags = {"arch": "flexivit_micro", "posemb_grid": 3, "input_size": 32}
    torch.save({"model": network.state_dict(), "args": flags}, tmp_path / "run.pth")
    words = ["--pretrained", str(tmp_path / "run.pth"), "--output_dir", str(tmp_path)]
    files = export.export(export.get_args_parser().parse_args([*words, "--patch_size", "6"]))
    images = torch.randn(3, 3, 32, 32)
    expected = AtPatchSize(network, patch_size=6)(images)
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(load_flexible(files["safetensors"])(images), expected, rtol=1e-4, atol=1e-5)
    assert files["timm"].name == "flexivit_patch6_timm.pth"  # which the export compares
    for flags, message in (("--patch_size 33", "cannot have patches of 33x33"), ("--image_size 16 24", "a square")):
        with pytest.raises(ValueError, match=message):
            export.export(export.get_args_parser().parse_args([*words, *flags.split()]))
