"""RegNetY beside torchvision's and timm's, its largest size, and recomputation."""

import pytest
import torch
from timm.models.regnet import RegNet as TimmRegNet
from timm.models.regnet import RegNetCfg
from torchvision.models.regnet import BlockParams
from torchvision.models.regnet import RegNet as TorchvisionRegNet

from seer.convert_checkpoint import to_timm
from seer.hub import build
from seer.regnet import SIZES, RegNet, Sizes
from tests.seer.tiny import small_network

SMALL = Sizes(9, 16, 12.1, 1.8, 8)  # four stages, as timm wants them


def of_torchvision(classes: int) -> torch.nn.Module:
    params = BlockParams.from_init_params(
        depth=SMALL.depth, w_0=SMALL.w_0, w_a=SMALL.w_a, w_m=SMALL.w_m, group_width=SMALL.group_width, se_ratio=0.25
    )
    return TorchvisionRegNet(params, num_classes=classes)


def of_timm(classes: int) -> torch.nn.Module:
    config = RegNetCfg(
        depth=SMALL.depth, w0=SMALL.w_0, wa=SMALL.w_a, wm=SMALL.w_m, group_size=SMALL.group_width, se_ratio=0.25
    )
    return TimmRegNet(config, num_classes=classes)


@pytest.mark.parametrize(("build_theirs", "rename"), [(of_torchvision, str), (of_timm, to_timm)])
def test_the_same_weights_give_the_same_logits_and_gradients_elsewhere(build_theirs, rename):
    ours, images = small_network(SMALL, num_classes=5), torch.randn(6, 3, 48, 40)
    theirs = build_theirs(5)
    theirs.load_state_dict({rename(name): value for name, value in ours.state_dict().items()})
    torch.testing.assert_close(theirs.eval()(images), ours(images), rtol=1e-5, atol=1e-5)
    for network in (ours, theirs):
        network.train()(images).square().sum().backward()
    gradients = {rename(name): p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-3 * float(p.grad.abs().max() + 1e-3))


@pytest.mark.parametrize(
    ("arch", "name"),
    [("regnet32Gf", "regnety_320"), ("regnet128Gf", "regnety_1280"), ("regnet256Gf_1", "regnety_2560")],
)
def test_timm_has_networks_of_these_shapes(arch, name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = build(arch, num_classes=10).state_dict()
        try:
            theirs = timm.create_model(name, num_classes=10).state_dict()
        except NotImplementedError as error:
            pytest.skip(f"timm does not build it without memory: {error}")
    assert {to_timm(key): value.shape for key, value in ours.items()} == {k: v.shape for k, v in theirs.items()}


def kept_bytes(network: RegNet, images: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Of what autograd keeps of a pass, and the output."""
    own = {t.untyped_storage().data_ptr() for t in [images, *network.parameters(), *network.buffers()]}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        output = network(images)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own), output


def test_recomputation_keeps_less_and_changes_nothing():
    sizes = Sizes(9, 16, 12.1, 1.8, 8)
    torch.manual_seed(0)
    images, results = torch.randn(4, 3, 64, 64), []
    state = RegNet(sizes).state_dict()
    for recompute in (False, True):
        network = RegNet(sizes, recompute=recompute).train()
        network.load_state_dict(state)
        size, output = kept_bytes(network, images)
        output.square().sum().backward()
        results.append((size, output, [p.grad for p in network.parameters()], network.state_dict()))
    (plain, *others), (recomputed, *again) = results
    assert recomputed < 0.5 * plain
    for one, other in zip(others, again, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)  # running statistics count each image once
    assert (
        again[-1]["stem.1.num_batches_tracked"] == again[-1]["trunk_output.block1.block1-0.f.a.1.num_batches_tracked"]
    )


@pytest.mark.parametrize("values", [(4, 12, 10.0, 2.0, 4), (4, 16, -1.0, 2.0, 4), (4, 16, 10.0, 1.0, 4)])
def test_sizes_outside_of_the_design_space_are_refused(values):
    with pytest.raises(ValueError, match="divisible by 8"):
        Sizes(*values).stages()
    with pytest.raises(ValueError, match="--arch regnet9Gf is none of regnet8Gf"):
        build("regnet9Gf")
    assert set(SIZES) >= {"regnet8Gf", "regnet16Gf", "regnet10B"}
