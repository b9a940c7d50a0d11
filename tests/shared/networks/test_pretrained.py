"""Weights by card: which file is meant, where it comes from, and a network of the sizes that it tells."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from shared.networks import pretrained
from shared.networks.card import Card, Release
from shared.networks.weights import DownloadError, WeightMismatch


def build(arch: str, in_chans: int = 3, patch_size: int = 2, width: int = 4) -> nn.Module:
    patches = nn.Conv2d(in_chans, 8 if arch == "wide" else width, patch_size)
    return nn.Sequential(OrderedDict(stem=patches, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


CARD = Card(
    name="paper",
    build=build,
    releases={
        "paper_wide": Release("wide", "files/wide.pth", "Wide.", "paper_of_eight"),
        "paper_p2": Release("narrow", "p2.pth", "Patches of 2.", options={"patch_size": 2}),
        "paper_p3": Release("narrow", "p3.pth", options={"patch_size": 3}, cached_as="paper_p3.pth"),
    },
    address="https://nowhere.invalid/",
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bicubic",
    embedded_run="runs/materials/checkpoint.pth",
    main="main_paper.py",
    sizes=lambda arch, tensors: {"patch_size": tensors["stem.weight"].shape[2]},
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in place of the published address; downloads go to an empty hub folder."""
    monkeypatch.setenv("PAPER_WEIGHTS_URL", (tmp_path / "published").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name, release in CARD.releases.items():
        path = tmp_path / "published" / release.file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(len(name))
        torch.save({"teacher": build(release.arch, 1, **release.options).state_dict()}, path)
    return tmp_path / "published"


@pytest.mark.parametrize(
    ("arch", "weights", "options", "message"),
    [
        ("narrow", "", {"patch_size": 4}, "no weights are released for --arch narrow --patch_size 4; give a file, or"),
        ("narrow", "paper_wide", {}, "--pretrained paper_wide is a wide, not a narrow: change --arch"),
        ("narrow", "a.pth", {}, r"--pretrained a.pth is neither a file nor a release \(paper_wide, paper_p2, paper_p3"),
        ("narrow", "runs/materials/checkpoint.pth", {}, "is not there: run python main_paper.py first"),
    ],
)
def test_absent_weights_are_one_clear_error(arch, weights, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained.load_pretrained(CARD, arch, weights, **options)


def test_the_first_release_that_fits_is_taken_and_fetched_once(published, capsys):
    assert pretrained.find_release(CARD, "wide", patch_size=7) == "paper_wide"
    assert pretrained.find_release(CARD, "narrow") == "paper_p2"
    for _ in range(2):
        assert pretrained.find_file(CARD, "narrow", patch_size=3).name == "paper_p3.pth"
    assert pretrained.find_file(CARD, "wide").name == "wide.pth"
    assert capsys.readouterr().out.count("downloading") == 2


def test_sizes_and_channels_come_from_the_file_unless_they_are_given(published, capsys):
    network = pretrained.load_pretrained(CARD, "narrow", "paper_p3")
    assert network[0].weight.shape == (4, 1, 3, 3)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert "2/2 entries of the network matched" in capsys.readouterr().out
    with pytest.raises(WeightMismatch, match=r"1/2 entries"):
        pretrained.load_pretrained(CARD, "narrow", "paper_p3", patch_size=2)
    pretrained.load_pretrained(CARD, "narrow", "paper_p3", allow_partial=True, patch_size=2)


def test_entries_have_the_names_and_descriptions_of_the_card(published):
    entries = pretrained.hub_entries(CARD)
    assert {name: entry.__doc__ for name, entry in entries.items()} == {
        "paper_of_eight": "Wide.",
        "paper_p2": "Patches of 2.",
    }
    assert entries["paper_p2"](pretrained=False, width=5)(torch.zeros(2, 3, 4, 4)).shape == (2, 5)
    expected = torch.load(published / "p2.pth", weights_only=True)["teacher"]
    torch.testing.assert_close(dict(entries["paper_p2"](in_chans=1).state_dict()), dict(expected))
    (published / "files" / "wide.pth").unlink()
    with pytest.raises(DownloadError, match=r"files/wide\.pth"):
        entries["paper_of_eight"]()
