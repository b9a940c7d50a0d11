"""Plans of memory and operations against formulas, published numbers and tensors that are really kept."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared import plan
from shared.plan import count_parameters, main, make_plan, measure_pass, repeated_blocks
from shared.run.memory import memory_of
from tests.benchmarks.harness import allocated_bytes
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


def really_at_most(network: nn.Module, images: torch.Tensor) -> int:
    """Most bytes that a pass and its backward pass take at a time, as the profiler sees them allocated."""
    network(images).sum().backward()
    network.zero_grad(set_to_none=True)
    return allocated_bytes(lambda: network(images).sum().backward())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "build",
    [lambda: ScaledViT(32, 3, 64, 4, 4, 16, 5), lambda: timm.create_model("resnet10t", num_classes=7)],
    ids=["transformer", "convolutions"],
)
def test_the_peak_of_a_pass_is_the_memory_that_it_really_takes(build, recompute):
    torch.manual_seed(0)
    network, images = build(), torch.randn(16, 3, 32, 32)[..., :16, :16].contiguous()
    with torch.device("meta"):
        planned, whole = (measure_pass(build(), images.to("meta"), again) for again in (recompute, False))
    if recompute:
        for block in repeated_blocks(network):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        assert planned.kept < 0.8 * whole.kept
    assert planned.peak() == pytest.approx(really_at_most(network, images), rel=0.06)  # buffers of kernels differ
    assert planned.highest[-1][0] == 4 * count_parameters(network)


def test_blocks_that_repeat_are_found():
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
    assert four.weights == pytest.approx(one.weights / 4, rel=1e-3)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    block, whole = (sum(p.numel() for p in module.parameters()) for module in (network.blocks[0], network))
    assert four.copies == one.copies + 4 * (2 * block + whole - 12 * block)  # float32: two blocks, and what is in none
    again = make_plan(build, (3, 224, 224), 8, (4, 1), recompute=True)
    assert again.copies == four.copies - one.copies + 2 * block  # bfloat16: of one block only
    assert four.activations == pytest.approx(one.activations / 4, rel=0.01)
    assert (
        four.weights * 3 + four.copies + four.activations
        < four.peak
        < four.weights * 4 + four.copies + four.activations + 4 * block
    )
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
    assert both.passed.kept == large.passed.kept + small.passed.kept - 2  # one sum of the outputs, in bfloat16
    assert both.flops_per_image == large.flops_per_image + small.flops_per_image == 3 * large.flops_per_image / 2
    assert large.flops_per_image == 2 * planned().flops_per_image and large.optimiser == large.weights
    with pytest.raises(ValueError, match="--views 2 64 4: expected pairs of a number and a side"):
        main(["dino", "vit_small", "--views", "2", "64", "4"])
    with pytest.raises(ValueError, match=r"sear is none of deepcluster, .*seer"):
        main(["sear", "regnet_micro"])


def test_the_fewest_devices_are_those_whose_memory_suffices(capsys):
    def planned(devices: int) -> plan.Plan:
        return make_plan(lambda _: timm.create_model("resnet10t"), (3, 64, 64), 8 * devices, (devices, 1))

    one, four = planned(1), planned(4)
    assert one.on(4) == four and four.on(1) == one
    assert f"on 1 devices of {one.peak / 2**30:g} GiB" in four.fitting_text(one.peak / 2**30)
    assert f"on 4 devices of {four.peak / 2**30:g} GiB" in one.fitting_text(four.peak / 2**30)
    assert one.fitting_text(four.activations / 2**30, most=8).endswith("GiB, however many")
    main(["seer", "regnet_micro", "--views", "2", "32", "--batch_size", "8", "--device_gib", "1", "--moments", "1"])
    assert "it fits on 1 devices of 1 GiB" in capsys.readouterr().out


def test_a_network_that_cannot_fit_is_told_before_it_is_built(capsys, monkeypatch):
    """400 million weights with AdamW's moments are 6.4 GB, on four devices 1.6."""
    cpu = torch.device("cpu")

    def build() -> nn.Module:
        return nn.Linear(20_000, 20_000, bias=False)

    monkeypatch.setattr(plan, "memory_of", lambda device: 6_000_000_000)
    with pytest.raises(ValueError, match=r"400,000,000 weights .*: 6.4 GB on each of 1 device\(s\) of 6.0 GB.* --mesh"):
        plan.tell_large(build, cpu, 1, 2, "--mesh")
    plan.tell_large(build, cpu, 4, 2, "--mesh")
    assert "400,000,000 weights with their gradients and moments: 1.6 GB of 6.0 GB" in capsys.readouterr().out
    plan.tell_large(lambda: nn.Linear(20, 20), cpu, 1, 2, "--mesh")
    assert not capsys.readouterr().out
    assert 1e8 < memory_of(cpu) < 1e15
