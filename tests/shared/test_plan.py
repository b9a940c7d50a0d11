"""Plans of memory and operations against formulas, published numbers and tensors that are really kept."""

import pytest
import timm
import torch
from torch import nn

from shared import plan
from shared.plan import count_parameters, main, make_plan, measure_pass, repeated_blocks
from vit22b.scaled_vit import ScaledViT


def test_the_largest_network_has_its_published_size_and_utilisation(capsys):
    """21,743 million weights; 1,150 tokens/s and device of 275 TFLOP/s are 54.9 %, of the blocks alone."""
    flags = ["--mesh", "64", "16", "--batch_size", "65536", "--images_per_s", str(1150 / 256), "--peak_tflops", "275"]
    found = main(["vit22b", "vit_22b", *flags])
    printed = capsys.readouterr().out
    assert "48 x Block 21,745,348,608, their matrices 21,743,271,936" in printed and "are 55.1% of 275" in printed
    n, d, f, depth = 256, 6144, 24576, 48
    blocks = 3 * depth * n * (2 * (4 * d * d + 2 * d * f) + 4 * n * d)
    assert 1150 / n * blocks / 275e12 == pytest.approx(0.549, abs=5e-4)
    pool = 3 * 2 * (2 * d * d * n + 2 * d * d + 2 * d * f + 2 * n * d) + 3 * 2 * n * 3 * 14 * 14 * d
    assert found.flops_per_image == pytest.approx(blocks + pool, rel=1e-9)
    assert found.weights == pytest.approx(4 * (21_745_348_608 / 16 + 22_203_580_416 - 21_745_348_608) / 64, rel=2e-3)
    assert found.optimiser == 2 * found.gradients == 2 * found.weights


def test_activations_are_the_tensors_that_a_pass_really_keeps():
    for build in (lambda: ScaledViT(32, 3, 64, 4, 4, 16, 5), lambda: timm.create_model("resnet10t", num_classes=7)):
        torch.manual_seed(0)
        network, images = build(), torch.randn(4, 3, 32, 32)[..., :16, :16].contiguous()
        own = {t.untyped_storage().data_ptr() for t in [images, *network.parameters(), *network.buffers()]}
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ):
            network(images)
        really = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
        with torch.device("meta"):
            found = measure_pass(build(), torch.empty_like(images, device="meta"))
        assert found.activations == pytest.approx(really, rel=0.03)  # small buffers of kernels differ
        assert found.recomputed < 0.8 * found.activations


def test_blocks_that_repeat_are_found():
    with torch.device("meta"):
        for name, kind, count in (("vit_tiny_patch16_224", "Block", 12), ("regnety_002", "Bottleneck", 13)):
            blocks = repeated_blocks(timm.create_model(name))
            assert (type(blocks[0]).__name__, len(blocks)) == (kind, count)
    assert repeated_blocks(nn.Linear(2, 2)) == []
    layer = nn.Linear(2, 3)
    assert (count_parameters(layer), count_parameters(layer, matrices_only=True)) == (9, 6)


def test_a_mesh_divides_what_it_can():
    def build(parts: int) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", num_classes=0)

    one, four = (make_plan(build, (3, 224, 224), 8, (data, 1)) for data in (1, 4))
    assert four.weights == pytest.approx(one.weights / 4, rel=1e-3) and one.gathered == 0 < four.gathered
    assert four.activations == pytest.approx(one.activations / 4, rel=1e-6)
    assert four.total == four.weights * 4 + four.gathered + four.activations
    with pytest.raises(ValueError, match=r"--batch_size 6 cannot be divided among the 4 groups of --mesh 4 1"):
        make_plan(build, (3, 224, 224), 6, (4, 1))
    with pytest.raises(ValueError, match="--mesh 1 2: dino has no model axis"):
        main(["dino", "vit_small", "--mesh", "1", "2"])
    with pytest.raises(ValueError, match="48 heads cannot be divided among 32"):
        main(["vit22b", "vit_22b", "--mesh", "1", "32"])
    assert plan.get_args_parser().parse_args(["dino", "vit_small"]).moments == 2


def test_views_of_several_sizes_are_passes_of_their_own():
    def build(parts: int) -> nn.Module:
        return timm.create_model("resnet10t", num_classes=0)

    def planned(views=(), side: int = 64) -> plan.Plan:
        return make_plan(build, (3, side, side), 4, moments=1, views=views)

    both, large, small = planned([(2, 64), (4, 32)]), planned([(2, 64)]), planned([(4, 32)])
    assert both.activations == large.activations + small.activations
    assert both.flops_per_image == large.flops_per_image + small.flops_per_image == 3 * large.flops_per_image / 2
    assert large.flops_per_image == 2 * planned().flops_per_image and large.optimiser == large.weights
    with pytest.raises(ValueError, match="--views 2 64 4: expected pairs of a number and a side"):
        main(["dino", "vit_small", "--views", "2", "64", "4"])
    with pytest.raises(ValueError, match=r"sear is none of deepcluster, .*seer"):
        main(["sear", "regnet_micro"])


def test_the_fewest_devices_are_those_whose_memory_suffices(capsys):
    def plan_of(devices: int) -> plan.Plan:
        return make_plan(lambda _: timm.create_model("resnet10t"), (3, 64, 64), devices, (devices, 1))

    one, four = plan_of(1), plan_of(4)
    assert plan.fewest_devices(plan_of, one.total).mesh == (1, 1)
    assert plan.fewest_devices(plan_of, four.total).mesh == (4, 1)
    assert plan.fewest_devices(plan_of, four.activations, most=8) is None
    main(["seer", "regnet_micro", "--views", "2", "32", "--batch_size", "8", "--device_gib", "1", "--moments", "1"])
    assert "it fits on 1 devices of 1 GiB" in capsys.readouterr().out
    text = plan.fitting_text(lambda devices: one, 1e-6)
    assert text == "it does not fit on devices of 1e-06 GiB, however many"
