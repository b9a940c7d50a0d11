"""Every official layout fills its network, and nothing is filled by half."""

import pytest
import safetensors.torch
import torch
import torchvision

import hubconf
from shared.networks import pretrained
from shared.networks.weights import DownloadError, WeightMismatch
from swav import hub
from swav.hub import build_network
from tests.swav.official_layouts import (
    build_small,
    finetuned_checkpoint,
    linear_checkpoint,
    make_network,
    pretraining_file,
    training_checkpoint,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LAYOUTS = {"pre-training file": pretraining_file, "training checkpoint": training_checkpoint}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    build_small(monkeypatch)


def save(tmp_path, contents):
    torch.save(contents, tmp_path / "weights.pth.tar")
    return tmp_path / "weights.pth.tar"


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])  # ours, and a network of torchvision
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trunk_is_filled_and_the_heads_are_counted_apart(layout, arch, tmp_path, capsys):
    source = make_network(arch)
    network = hub.load_backbone(arch, save(tmp_path, LAYOUTS[layout](source)))
    torch.testing.assert_close(network(IMAGES), source.forward_backbone(IMAGES))
    total = len(network.state_dict())
    assert f"{total}/{total} entries of the network matched, 10 of a head left out" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
@pytest.mark.parametrize("heads", [{}, {"nmb_prototypes": [20, 5, 7]}, {"hidden_mlp": 0}], ids=str)
def test_network_gets_the_heads_of_the_file(heads, arch, tmp_path, capsys):
    source = make_network(arch, **heads)
    network = hub.load_network(arch, save(tmp_path, training_checkpoint(source)))
    torch.testing.assert_close(network(IMAGES), source(IMAGES))
    total = len(source.state_dict())
    assert f"{total}/{total} entries of the network matched\n" in capsys.readouterr().out


def test_fine_tuned_networks_are_understood(tmp_path):
    source, checkpoint = finetuned_checkpoint()
    file = save(tmp_path, checkpoint)
    torch.testing.assert_close(hub.load_network("resnet50", file)(IMAGES), source(IMAGES))
    torch.testing.assert_close(hub.load_backbone("resnet50", file)(IMAGES), source.forward_backbone(IMAGES))


def test_safetensors_and_files_of_torchvision_are_understood(tmp_path):
    source = make_network(output_dim=0, hidden_mlp=0, nmb_prototypes=0, normalize=False)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "trunk.safetensors")
    network = hub.load_backbone("resnet50", tmp_path / "trunk.safetensors")
    torch.testing.assert_close(network(IMAGES), source(IMAGES))

    torch.manual_seed(0)
    whole = torchvision.models.resnet18().eval()
    network = hub.load_backbone("resnet18", save(tmp_path, whole.state_dict()))
    whole.fc = torch.nn.Identity()
    torch.testing.assert_close(network(IMAGES), whole(IMAGES))


def test_channels_come_from_the_file(tmp_path):
    file = save(tmp_path, training_checkpoint(make_network(in_chans=1)))
    assert hub.load_backbone("resnet50", file).conv1.in_channels == 1


def test_default_model_has_the_published_entries(monkeypatch):
    monkeypatch.undo()  # the real ResNet-50
    with torch.device("meta"):
        network = build_network("resnet50", 128, 2048, 3000, normalize=True)
    assert len(network.state_dict()) == 328
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["projection_head.3.weight"] == (128, 2048)
    assert shapes["prototypes.weight"] == (3000, 128)
    plain = torchvision.models.resnet50().state_dict()
    assert {name for name in plain if not name.startswith("fc.")} <= shapes.keys()


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_file_that_fills_half_of_the_network_is_refused_unless_told(tmp_path):
    contents = pretraining_file(make_network())
    del contents["module.layer4.0.conv1.weight"]
    file = save(tmp_path, contents)
    for load in (hub.load_backbone, hub.load_network):
        with pytest.raises(WeightMismatch, match=r"1 missing in the file: layer4.0.conv1.weight"):
            load("resnet50", file)
        load("resnet50", file, allow_partial=True)


def test_network_of_another_shape_is_refused(tmp_path, monkeypatch):
    file = save(tmp_path, pretraining_file(make_network()))
    monkeypatch.undo()
    with pytest.raises(WeightMismatch, match=r"of another shape: conv1.weight"):
        hub.load_backbone("resnet50", file)


def test_width_of_a_file_is_named(tmp_path):
    wide = {"conv1.weight": torch.zeros(128, 3, 7, 7), "layer1.0.conv3.weight": torch.zeros(512, 128, 1, 1)}
    for load in (hub.load_backbone, hub.load_network):
        with pytest.raises(WeightMismatch, match=r"a network of the width of resnet50w2, not of --arch resnet50$"):
            load("resnet50", save(tmp_path, wide))


def test_linear_classifier_is_told_from_a_network(tmp_path):
    file = save(tmp_path, linear_checkpoint())
    with pytest.raises(WeightMismatch, match=r"holds a linear classifier .* --linear_weights"):
        hub.load_backbone("resnet50", file)


@pytest.mark.parametrize(
    ("arch", "weights", "message"),
    [
        ("resnet18", "", "no weights are released for --arch resnet18"),
        ("resnet50", "nowhere.pth.tar", "--pretrained nowhere.pth.tar is neither a file nor a release .swav_800ep, "),
        ("resnet50", "swav_RN50w2_400ep", "--pretrained swav_RN50w2_400ep is a resnet50w2, not a resnet50"),
        ("resnet18", hub.RUN_ON_DIGITS, "is not there: run python main_swav.py first"),
        ("resnet51", "random", "--arch resnet51 is unknown"),
    ],
)
def test_absent_weights_are_an_error(arch, weights, message):
    with pytest.raises(ValueError, match=message):
        hub.load_backbone(arch, weights)


def test_random_weights_are_asked_for_by_name():
    assert hub.load_backbone("resnet50", "random")(IMAGES).shape == (2, 256)
    with pytest.raises(ValueError, match="--pretrained random: a file is needed here"):
        hub.load_network("resnet50", "random")


# --- Releases and hub -------------------------------------------------------------------------------------------------

HUB = {
    "swav_resnet50": "swav_800ep_pretrain.pth.tar",
    "swav_resnet50w2": "swav_RN50w2_400ep_pretrain.pth.tar",
    "swav_resnet50w4": "swav_RN50w4_400ep_pretrain.pth.tar",
    "swav_resnet50w5": "swav_RN50w5_400ep_pretrain.pth.tar",
    "deepclusterv2_resnet50": "deepclusterv2_800ep_pretrain.pth.tar",
    "selav2_resnet50": "selav2_400ep_pretrain.pth.tar",
}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in place of the published address; downloads go to an empty hub folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setenv("SWAV_WEIGHTS_URL", folder.as_uri() + "/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return folder


def test_address_and_file_names_are_the_published_ones(monkeypatch):
    urls = []
    monkeypatch.delenv("SWAV_WEIGHTS_URL", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    monkeypatch.setattr(pretrained, "download", lambda url, path: urls.append(url))
    for name in hub.CARD.releases:
        pretrained.fetch_release(hub.CARD, name)
    hub.fetch(hub.LINEAR_CLASSIFIER)
    base = "https://dl.fbaipublicfiles.com/deepcluster/"
    names = ["swav_100ep", "swav_200ep", "swav_400ep", "swav_800ep", "swav_200ep_bs256", "swav_400ep_bs256"]
    names += ["swav_400ep_2x224", "deepclusterv2_800ep", "deepclusterv2_400ep", "deepclusterv2_400ep_2x224"]
    names += ["selav2_400ep", "selav2_400ep_2x224", *(f"swav_RN50w{w}_400ep" for w in (2, 4, 5))]
    expected = {f"{base}{name}_pretrain.pth.tar" for name in names} | {f"{base}swav_800ep_eval_linear.pth.tar"}
    assert set(urls) == expected


def test_every_hub_entry_is_tested():
    assert set(HUB) == {name for name in dir(hubconf) if name.startswith(("swav_", "deepclusterv2_", "selav2_"))}


@pytest.mark.parametrize(("entry", "file"), HUB.items())
def test_hub_entry_builds_offline_and_asks_for_its_file(entry, file, published):
    with torch.device("meta"):
        assert getattr(hubconf, entry)(pretrained=False).embed_dim in (256, 4096, 8192, 10240)
        with pytest.raises(DownloadError, match=f"published/{file}"):
            getattr(hubconf, entry)()


def test_hub_entry_is_filled_from_the_published_file_once(published, capsys):
    source = make_network()
    torch.save(pretraining_file(source), published / "swav_800ep_pretrain.pth.tar")
    for _ in range(2):
        backbone = hubconf.swav_resnet50().eval()
        torch.testing.assert_close(backbone(IMAGES), source.forward_backbone(IMAGES))
    assert capsys.readouterr().out.count("downloading") == 1


def test_scripts_take_the_first_release_of_an_architecture_or_one_by_name(published):
    first, other = make_network(seed=0), make_network(seed=1)
    torch.save(pretraining_file(first), published / "swav_800ep_pretrain.pth.tar")
    torch.save(pretraining_file(other), published / "deepclusterv2_400ep_pretrain.pth.tar")
    for name, source in (("", first), ("deepclusterv2_400ep", other)):
        network = hub.load_backbone("resnet50", name)
        torch.testing.assert_close(network(IMAGES), source.forward_backbone(IMAGES))
