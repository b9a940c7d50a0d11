"""Every official layout fills its network, and nothing is filled by half; releases, hub and export."""

import functools

import numpy as np
import pytest
import torch
import torchvision

import hubconf
from paws import hub, resnet
from paws.heads import classification_head
from paws.hub import CARD, build_encoder
from shared.networks import pretrained
from shared.networks.export import export_backbone
from shared.networks.weights import DownloadError, WeightMismatch

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


def test_channels_come_from_the_file(tmp_path):
    file = save(tmp_path, training_checkpoint(make_encoder(in_chans=1)))
    assert hub.load_encoder(SMALL, file).conv1.in_channels == 1


def test_a_training_starts_from_the_backbone_of_any_file(tmp_path):
    torch.manual_seed(0)
    library = torchvision.models.resnet18().eval()
    encoder = build_encoder("resnet18", 16)
    head = encoder.fc.fc3.weight.clone()
    hub.load_backbone_into(encoder, "resnet18", save(tmp_path, library.state_dict()))
    assert torch.equal(encoder.backbone.conv1.weight, library.conv1.weight) and torch.equal(encoder.fc.fc3.weight, head)


def test_default_network_has_the_published_entries():
    with torch.device("meta"):
        encoder = build_encoder("resnet50", 2048, use_pred_head=True)
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    plain = torchvision.models.resnet50().state_dict()
    assert {name for name in plain if not name.startswith("fc.")} <= shapes.keys()
    assert shapes["fc.fc3.weight"] == (2048, 2048) and shapes["pred.fc1.weight"] == (512, 2048)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_a_file_that_fills_half_of_the_network_is_refused_unless_told(tmp_path):
    contents = training_checkpoint(make_encoder())
    del contents["encoder"]["module.layer3.0.conv1.weight"]
    file = save(tmp_path, contents)
    for load in (hub.load_encoder, functools.partial(pretrained.load_pretrained, CARD)):
        with pytest.raises(WeightMismatch, match=r"1 missing in the file: layer3.0.conv1.weight"):
            load(SMALL, file)
    with pytest.raises(WeightMismatch, match="1 missing"):
        hub.load_backbone_into(build_encoder(SMALL, 16), SMALL, file)
    hub.load_backbone_into(build_encoder(SMALL, 16), SMALL, file, allow_partial=True)


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    contents = training_checkpoint(make_encoder())
    del contents["encoder"]["module.fc.bn1.weight"]
    with pytest.raises(WeightMismatch, match=r"1 missing in the file: fc.bn1.weight"):
        hub.load_encoder(SMALL, save(tmp_path, contents))


def test_the_width_of_a_file_is_named(tmp_path):
    file = save(tmp_path, {"encoder": {"module.conv1.weight": torch.zeros(128, 3, 7, 7)}})
    with pytest.raises(WeightMismatch, match=r"128 channels in its first layer, --model_name resnet50 has 64"):
        hub.load_encoder("resnet50", file)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50", "nowhere.pth.tar", "--pretrained nowhere.pth.tar is neither a file nor a release .paws_imgnt_10"),
        ("resnet50w2", "paws_imgnt_1percent_100ep", "is a resnet50, not a resnet50w2"),
        (SMALL, hub.RUN_ON_DIGITS, "is not there: run python main.py first"),
    ],
)
def test_absent_weights_are_an_error(name, weights, message):
    with pytest.raises(ValueError, match=message):
        hub.load_encoder(name, weights)


# --- Releases, hub, export --------------------------------------------------------------------------------------------

HUB = {
    "paws_resnet50": "paws_imgnt_10percent_300ep.pth.tar",
    "paws_resnet50_1percent": "paws_imgnt_1percent_300ep.pth.tar",
}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in place of the published address; downloads go to an empty hub folder; small networks."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setenv("PAWS_WEIGHTS_URL", folder.as_uri() + "/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(resnet.BLOCKS, 50, (1, 1, 1, 1))
    return folder


def test_released_files_have_the_published_names(monkeypatch):
    urls = []
    monkeypatch.delenv("PAWS_WEIGHTS_URL", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    monkeypatch.setattr(pretrained, "download", lambda url, path: urls.append(url.rpartition("/")[2]))
    for name in CARD.releases:
        pretrained.fetch_release(CARD, name)
    expected = {f"paws_imgnt_{p}percent_{e}ep.pth.tar" for p in (1, 10) for e in (100, 200, 300)}
    assert set(urls) == expected | {f"paws_imgnt_{p}percent_300ep_finetuned.pth.tar" for p in (1, 10)}


def test_every_hub_entry_is_tested():
    assert set(HUB) == {name for name in dir(hubconf) if name.startswith("paws_")}


@pytest.mark.parametrize(("entry", "file"), HUB.items())
def test_hub_entries_are_filled_from_their_file_once(entry, file, published, capsys):
    with pytest.raises(DownloadError, match=f"published/{file}"):
        getattr(hubconf, entry)()
    source = make_encoder("resnet50")
    torch.save(training_checkpoint(source), published / file)
    for _ in range(2):
        backbone = getattr(hubconf, entry)().eval()
        torch.testing.assert_close(backbone(IMAGES), source.forward_backbone(IMAGES))
    assert capsys.readouterr().out.count("downloading") == 2  # one for the failure
    assert getattr(hubconf, entry)(pretrained=False).embed_dim == 2048


def test_releases_are_weights_by_name(published):
    source = make_encoder("resnet50")
    torch.save(training_checkpoint(source), published / "paws_imgnt_1percent_200ep.pth.tar")
    encoder = hub.load_encoder("resnet50", "paws_imgnt_1percent_200ep")
    assert torch.equal(encoder(IMAGES)[0], source(IMAGES)[0])


@pytest.mark.parametrize(("name", "libraries"), [(SMALL, set()), ("resnet18", {"torchvision", "timm"})])
def test_exported_files_compute_the_same(name, libraries, tmp_path):
    source = make_encoder(name)
    backbone = pretrained.load_pretrained(CARD, name, save(tmp_path, training_checkpoint(source)))
    files = export_backbone(CARD, backbone, name, tmp_path / "out", (32, 32), arch_key="model_name")
    assert set(files) == {"safetensors", "onnx"} | libraries
    again = pretrained.load_pretrained(CARD, name, files["safetensors"])
    assert torch.equal(again(IMAGES), source.forward_backbone(IMAGES))
