"""Masks, sizes of the published networks, and what a mask saves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msn import vision_transformer
from msn.vision_transformer import (
    ProjectionHead,
    Trunk,
    VisionTransformer,
    build,
    draw_kept_patches,
    num_kept_patches,
)

# Parameters of the encoder, and with a head of 2048 and 256 with batch norms.
PARAMETERS = {
    "deit_small": (21_665_664, 27_183_232),
    "deit_small_p8": (21_670_272, 27_187_840),
    "deit_small_p7": (21_745_152, 27_262_720),
    "deit_base": (85_798_656, 92_102_656),
    "deit_base_p8": (85_807_872, 92_111_872),
    "deit_base_p7": (85_957_632, 92_261_632),
    "deit_base_p4": (87_503_616, 93_807_616),
    "deit_large": (303_301_632, 310_129_920),
    "deit_large_p8": (303_313_920, 310_142_208),
    "deit_large_p7": (303_513_600, 310_341_888),
    "deit_huge": (630_918_400, 638_270_976),
    "deit_huge_p8": (630_933_760, 638_286_336),
    "deit_huge_p7": (631_183_360, 638_535_936),
    "deit_huge_p10": (630_688_000, 638_040_576),
    "vitc_4gf": (17_369_136, 17_369_136 + 5_517_568),
    "deit_small_convstem": (27_113_904, 32_631_472),
}


def small_vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        **({"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | kwargs)
    )


@pytest.mark.parametrize(("name", "sizes"), PARAMETERS.items(), ids=PARAMETERS)
def test_published_networks_have_their_sizes(name, sizes):
    with torch.device("meta"):
        encoder = build(name)
        assert sum(p.numel() for p in encoder.parameters()) == sizes[0]
        encoder.fc = ProjectionHead(encoder.embed_dim)
        assert sum(p.numel() for p in encoder.parameters()) == sizes[1]


def test_every_architecture_is_checked_against_its_size():
    ours = {"deit_micro", "deit_tiny"}  # the latter is smaller in these tests
    assert {*PARAMETERS, *ours} == set(vision_transformer.ARCHITECTURES)


@pytest.mark.parametrize(
    ("num_patches", "patch_drop", "kept"),
    [(196, 0.15, 166), (196, 0, 196), (1024, 0.7, 307), (4, 0.5, 2), (10, 0.3, 7)],
)
def test_kept_patches_are_rounded_down(num_patches, patch_drop, kept):
    assert num_kept_patches(num_patches, patch_drop) == kept
    drawn = draw_kept_patches(num_patches, patch_drop)
    assert len(set(drawn.tolist())) == kept and drawn.min() >= 0 and drawn.max() < num_patches


def test_a_masked_image_gives_what_attention_over_the_kept_patches_alone_gives(monkeypatch):
    encoder, images = small_vit().eval(), torch.randn(2, 3, 32, 32)
    kept = torch.tensor([7, 2, 11])
    monkeypatch.setattr(vision_transformer, "draw_kept_patches", lambda *_: kept)
    masked = encoder(images, 0.8)
    changed = images.clone()
    for patch in set(range(16)) - set(kept.tolist()):
        row, column = divmod(patch, 4)
        changed[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 100.0
    torch.testing.assert_close(encoder(changed, 0.8), masked)  # what is dropped has no influence
    tokens = encoder.prepare_tokens(images)[:, [0, *(kept + 1).tolist()]]
    for block in encoder.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(masked, encoder.norm(tokens[:, 0]))


def test_only_the_first_size_is_masked_and_sizes_are_apart():
    encoder = small_vit().eval()
    large, small = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)
    torch.manual_seed(1)
    both = encoder([large, small], 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(both, torch.cat([encoder(large, 0.5), encoder(small)]))
    torch.testing.assert_close(encoder([large[:1], large[1:], small]), encoder([large, small]))


def flops(encoder: VisionTransformer, images: torch.Tensor, patch_drop: float) -> int:
    with FlopCounterMode(display=False) as counter:
        encoder(images, patch_drop).sum().backward()
    return counter.get_total_flops()


def test_the_cost_of_a_pass_falls_with_the_share_of_kept_patches():
    encoder, images = small_vit(img_size=64, patch_size=4, embed_dim=48, depth=4), torch.randn(2, 3, 64, 64)
    whole = flops(encoder, images, 0.0)
    for patch_drop in (0.3, 0.5, 0.7):
        assert flops(encoder, images, patch_drop) < (1 - patch_drop + 0.08) * whole


def test_what_backward_keeps_falls_with_the_share_of_kept_patches():
    encoder, images = small_vit(img_size=64, patch_size=4, embed_dim=48, depth=4), torch.randn(2, 3, 64, 64)

    def kept_elements(patch_drop: float) -> int:
        sizes = []
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(images, patch_drop)
        return sum(sizes)

    assert kept_elements(0.7) < 0.45 * kept_elements(0.0)


def test_the_trunk_is_the_encoder_without_its_head():
    encoder, images = small_vit().eval(), torch.randn(2, 3, 32, 32)
    expected = encoder(images)
    encoder.fc = ProjectionHead(24, 8, 4)
    torch.testing.assert_close(Trunk(encoder)(images), expected)


def test_convolutional_stem_and_grey_images():
    encoder = small_vit(img_size=32, patch_size=16, conv_stem=True, in_chans=1)
    names = {name for name in encoder.state_dict() if name.startswith("patch_embed")}
    assert {"patch_embed.stem.0.weight", "patch_embed.stem.10.running_var", "patch_embed.stem.12.bias"} <= names
    assert encoder(torch.zeros(2, 1, 40, 33)).shape == (2, 24)  # pixels that fill no patch are cut off
    with pytest.raises(ValueError, match="a convolutional stem makes patches of 16"):
        small_vit(conv_stem=True)
