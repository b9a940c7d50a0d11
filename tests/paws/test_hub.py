"""The networks by name, every official layout that fills them, releases, hub and export."""

import numpy as np
import pytest
import torch
import torchvision

from paws import hub
from paws.encoder import build_encoder
from paws.evaluation import Representation
from paws.heads import classification_head
from paws.hub import CARD
from shared.networks import pretrained
from shared.networks.weights import WeightMismatch

# --- Networks ---------------------------------------------------------------------------------------------------------


def test_supports_and_large_views_share_statistics_and_small_ones_have_their_own():
    torch.manual_seed(0)
    encoder = build_encoder("wide_resnet10w1", 8, use_pred_head=True)
    supports, large, small = torch.randn(4, 3, 16, 16), torch.randn(6, 3, 16, 16), torch.randn(5, 3, 12, 12)
    h, z = encoder([supports, large, small])
    assert h.shape == z.shape == (15, 8) and not torch.equal(h, z)
    together, _ = encoder(torch.cat([supports, large]))
    torch.testing.assert_close(h[:10], together)
    apart, _ = encoder(small)
    torch.testing.assert_close(h[10:], apart)
    assert not torch.allclose(encoder(supports)[0], h[:4], atol=1e-3)


@pytest.mark.parametrize("name", ["wide_resnet10w1", "test_resnet"])
def test_parts_of_an_encoder_share_its_weights(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, 8, use_pred_head=True, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    h, z = encoder(images)
    assert torch.equal(Representation(encoder)(images), h)
    assert torch.equal(Representation(encoder, use_pred=True)(images), z)
    assert encoder.forward_backbone(images).shape == (2, encoder.embed_dim)


@pytest.mark.parametrize(
    ("name", "message"), [("wide_resnet11w1", "6 n \\+ 4 layers, not 11"), ("resnt50", "did you mean .*resnet50")]
)
def test_unknown_networks_are_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, 8)


# --- Files ----------------------------------------------------------------------------------------------------------

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = "wide_resnet10w1"


def make_encoder(name: str = SMALL, seed: int = 0, **options):
    torch.manual_seed(seed)
    encoder = build_encoder(name, **({"output_dim": 16, "use_pred_head": True} | options))
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return encoder.eval().requires_grad_(False)


def training_checkpoint(encoder, prefix: str = "module.") -> dict:
    """A checkpoint of the official training on several GPUs; numbers are numpy's there."""
    return {
        "encoder": {prefix + name: value for name, value in encoder.state_dict().items()},
        "opt": {"state": {}, "param_groups": [{"lr": np.float64(6.4), "LARS_exclude": True, "params": [0]}]},
        "epoch": 300,
        "unlabel_prob": 0.9,
        "loss": 1.0,
        "s_batch_size": 7,
        "u_batch_size": 64,
        "world_size": 64,
        "lr": 6.4,
        "temperature": 0.1,
        "amp": {"scale": 65536.0},
    }


def fine_tuned(encoder, classes: int = 5):
    encoder.fc, encoder.pred = classification_head(encoder.embed_dim, classes).eval().requires_grad_(False), None
    return encoder, {**training_checkpoint(encoder), "sched": {}, "best_top1_acc": 75.5, "batch_size": 256}


def save(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, "test_resnet"])  # ours, and a network of a library
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_training_checkpoint_fills_backbone_and_heads(name, prefix, tmp_path, capsys):
    source = make_encoder(name)
    file = save(tmp_path, training_checkpoint(source, prefix))
    encoder = hub.load_encoder(name, file, use_pred=True)
    for found, expected in zip(encoder(IMAGES), source(IMAGES), strict=True):
        assert torch.equal(found, expected)
    total = len(source.state_dict())
    assert f"{total}/{total} entries of the network matched" in capsys.readouterr().out
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    backbone = pretrained.load_pretrained(CARD, name, file)
    assert torch.equal(backbone(IMAGES), source.forward_backbone(IMAGES))


def test_without_a_prediction_head_in_the_file_there_is_none(tmp_path):
    file = save(tmp_path, training_checkpoint(make_encoder(use_pred_head=False)))
    assert hub.load_encoder(SMALL, file).pred is None
    with pytest.raises(WeightMismatch, match=r"--use_pred: .* holds no prediction head"):
        hub.load_encoder(SMALL, file, use_pred=True)


def test_a_fine_tuned_network_is_a_classifier_and_a_backbone(tmp_path):
    source, checkpoint = fine_tuned(make_encoder())
    file = save(tmp_path, checkpoint)
    assert torch.equal(hub.load_classifier(SMALL, file)(IMAGES)[0], source(IMAGES)[0])
    assert torch.equal(pretrained.load_pretrained(CARD, SMALL, file)(IMAGES), source.forward_backbone(IMAGES))
    with pytest.raises(WeightMismatch, match="holds no projection head"):
        hub.load_encoder(SMALL, file)


def test_a_training_starts_from_the_backbone_of_any_file(tmp_path):
    torch.manual_seed(0)
    library = torchvision.models.resnet18().eval()
    encoder = build_encoder("resnet18", 16)
    head = encoder.fc.fc3.weight.clone()
    hub.load_backbone_into(encoder, "resnet18", save(tmp_path, library.state_dict()))
    assert torch.equal(encoder.backbone.conv1.weight, library.conv1.weight) and torch.equal(encoder.fc.fc3.weight, head)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    contents = training_checkpoint(make_encoder())
    del contents["encoder"]["module.fc.bn1.weight"]
    with pytest.raises(WeightMismatch, match=r"1 missing in the file: fc.bn1.weight"):
        hub.load_encoder(SMALL, save(tmp_path, contents))


def test_the_width_of_a_file_is_named(tmp_path):
    file = save(tmp_path, {"encoder": {"module.conv1.weight": torch.zeros(128, 3, 7, 7)}})
    with pytest.raises(WeightMismatch, match=r"128 channels in its first layer, --model_name resnet50 has 64"):
        hub.load_encoder("resnet50", file)
