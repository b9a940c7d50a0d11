"""Weights of any layout, torch.hub, and files for other programs."""

import pytest
import torch

import hubconf
from shared.networks.classifiers import fill_classifier
from shared.networks.weights import WeightMismatch
from xcit.cross_covariance_transformer import build_xcit
from xcit.hub import load_network, read_weights, to_timm

NAME = "xcit_nano_12_p8"


@pytest.fixture
def network(small_networks):
    torch.manual_seed(0)
    return build_xcit(NAME, num_classes=3).eval()


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: state,
        lambda state: {"model": state, "model_ema": {}, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        to_timm,
    ],
    ids=["bare", "training checkpoint", "of DistributedDataParallel", "timm"],
)
def test_files_of_every_layout_fill_the_network(layout, network, tmp_path):
    torch.save(layout(network.state_dict()), tmp_path / "weights.pth")
    loaded = load_network(NAME, tmp_path / "weights.pth")
    torch.testing.assert_close(loaded.state_dict(), network.state_dict())
    assert not loaded.training and loaded.num_classes == 3


def test_backbones_of_dino_have_no_classifier(network, tmp_path, capsys):
    network.reset_classifier(0)
    state = {"teacher": {f"module.backbone.{name}": value for name, value in network.state_dict().items()}}
    torch.save(state, tmp_path / "checkpoint.pth")
    loaded = load_network(NAME, tmp_path / "checkpoint.pth", key="teacher")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), network(images))
    classifier = build_xcit(NAME, num_classes=5)
    assert not fill_classifier(classifier, read_weights(tmp_path / "checkpoint.pth", "teacher"), "the backbone")
    assert "ours stays random" in capsys.readouterr().out


def test_other_networks_and_bad_weights_are_refused(network, tmp_path):
    state = network.state_dict()
    with pytest.raises(WeightMismatch, match=r"does not fill the network.*blocks\.0\.gamma1"):
        fill_classifier(
            network, {name: value for name, value in state.items() if name != "blocks.0.gamma1"}, "the file"
        )
    with pytest.raises(WeightMismatch, match=r"norm\.weight holds values that are not finite"):
        fill_classifier(network, state | {"norm.weight": torch.full((32,), torch.nan)}, "the file")


def test_hub_entries_are_classifiers_of_a_variant(tmp_path, monkeypatch, network):
    monkeypatch.setenv("XCIT_WEIGHTS_URL", tmp_path.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save({"model": network.state_dict()}, tmp_path / "xcit_nano_12_p8_384_dist.pth")
    loaded = hubconf.xcit_nano_12_p8(num_classes=3, variant="384_dist")
    torch.testing.assert_close(loaded.state_dict(), network.state_dict())
    own = hubconf.xcit_nano_12_p8(tmp_path / "xcit_nano_12_p8_384_dist.pth", num_classes=5, drop_rate=0.2)
    assert own.head.out_features == 5 and own.pos_drop.p == 0.2


def test_files_without_positions_have_their_two_unused_tensors(small_networks):
    """The published network has them in any case; its files load, and they change nothing."""
    network = build_xcit(NAME, num_classes=3, use_pos=False).eval()
    reference = build_xcit(NAME, num_classes=3).eval()
    assert list(network.state_dict()) == list(reference.state_dict())
    fill_classifier(network, reference.state_dict(), "the file")
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(network(images), reference(images))
    network.pos_embeder.token_projection.weight.data += 1
    before = network(images)
    network.pos_embeder.token_projection.weight.data -= 2
    assert torch.equal(network(images), before)
    assert not any(parameter.requires_grad for parameter in network.pos_embeder.parameters())
