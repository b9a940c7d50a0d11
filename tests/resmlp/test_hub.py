"""Official layouts, timm's names, hub entries, and networks that are built from what a file holds."""

import pytest
import timm
import torch

import hubconf
from resmlp.hub import from_timm, load_network, to_timm
from resmlp.resmlp_models import ARCHITECTURES, ResMLP
from shared.networks.weights import WeightMismatch
from tests.resmlp.test_resmlp_models import randomize

SMALL = {"img_size": 32, "embed_dim": 8, "depth": 2}


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """A folder that plays the server; downloads go to an empty hub folder."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("RESMLP_WEIGHTS_URL", f"file://{tmp_path / 'server'}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "server"


ENTRIES = [
    ("resmlp_12", {"dist": True, "dino": True}, "resmlp_12_dist"),  # dist comes first, as in the official code
    ("resmlp_24", {"dino": True}, "resmlp_24_dino"),
    ("resmlp_36", {"dist": True}, "resmlp_36_dist"),
    ("resmlpB_24", {"in_22k": True}, "resmlpB_24_22k"),
    ("resmlpB_24", {"dist": True}, "resmlpB_24_dist"),
]


@pytest.mark.parametrize(("entry", "flags", "release"), ENTRIES)
def test_flags_of_the_hub_entries_choose_the_release(entry, flags, release, releases):
    source = randomize(ARCHITECTURES[entry](**SMALL, num_classes=0 if "dino" in release else 5))
    torch.save(source.state_dict(), releases / f"{release}.pth")  # flat, as released
    network = getattr(hubconf, entry)(**flags, **SMALL)
    torch.testing.assert_close(network.state_dict(), source.state_dict())


@pytest.mark.parametrize("wrap", ["flat", "model", "timm", "teacher", "ddp"])
def test_files_of_any_layout_give_the_network_that_they_hold(wrap, tmp_path):
    source = randomize(ResMLP(24, 4, in_chans=1, num_classes=7, embed_dim=8, depth=3))
    state = source.state_dict()
    contents = {
        "flat": state,
        "model": {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}, "epoch": 3},
        "timm": to_timm(state),
        "teacher": {
            "student": {f"module.backbone.{k}": v + 1 for k, v in to_timm(state).items()},
            "teacher": {f"backbone.{k}": v for k, v in to_timm(state).items()}
            | {"head.mlp.0.weight": state["norm.alpha"]},
        },
        "ddp": {"model": {f"module.{k}": v for k, v in state.items()}},
    }[wrap]
    torch.save(contents, tmp_path / "file.pth")
    network = load_network(tmp_path / "file.pth", classifier=wrap != "teacher")
    images = torch.randn(2, 1, 24, 24)
    expected = source.forward_features(images) if wrap == "teacher" else source(images)
    torch.testing.assert_close(network(images), expected)
    if wrap != "teacher":
        own = hubconf.resmlp_12(tmp_path / "file.pth", drop_path_rate=0.1).eval()
        torch.testing.assert_close(own(images), expected)
    assert load_network(tmp_path / "file.pth")(images).shape == (2, 8)
    assert load_network(tmp_path / "file.pth", img_size=16)(images[..., :16, :16]).shape == (2, 8)
    if wrap == "model":
        average = load_network(tmp_path / "file.pth", key="model_ema")
        torch.testing.assert_close(average.norm.beta.data, state["norm.beta"] + 1)


def test_timms_names_there_and_back():
    state = randomize(ResMLP(16, 8, embed_dim=8, depth=2, num_classes=3)).state_dict()
    torch.testing.assert_close(from_timm(to_timm(state)), state)
    with torch.device("meta"):
        names = timm.create_model("resmlp_12_224", num_classes=3).state_dict()
        ours = ARCHITECTURES["resmlp_12"](num_classes=3).state_dict()
    assert {k: v.shape for k, v in to_timm(ours).items()} == {k: v.shape for k, v in names.items()}


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightMismatch, match="holds no ResMLP"):
        load_network(tmp_path / "other.pth")
