"""Linear probe, fine-tuning, corruptions and other test sets, measures by group."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seer import eval_groups, eval_linear, eval_robustness, fine_tune
from seer.eval_groups import Image, groups_of, measures, nearest_labels, retrieval
from seer.eval_robustness import CORRUPTIONS, corrupt, load_classifier, open_set
from seer.hub import build
from shared.images.sources import open_source
from shared.networks.weights import WeightMismatch
from tests.pictures import COLOURS, picture, write_image, write_train_and_val
from tests.seer.tiny import add_small_size

QUICK = ["--image_size", "32", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images of three colours, weights, and a network that was fine-tuned on them."""
    add_small_size()
    folder = tmp_path_factory.mktemp("seer")
    data = write_train_and_val(folder / "images")
    torch.manual_seed(0)
    torch.save(build("regnet_test").state_dict(), folder / "trunk.pth")
    flags = ["--arch", "regnet_test", "--pretrained", str(folder / "trunk.pth"), "--data_path", str(data), *QUICK]
    tuning = [*flags, "--num_labels", "3", "--batch_size", "6", "--lr", "2", "--colours", "false"]
    args = fine_tune.parse_args([*tuning, "--epochs", "4", "--decay_epochs", "3", "--output_dir", f"{folder}/tuned"])
    return folder, data, flags, fine_tune.fine_tune(args)


def test_fine_tuning_learns_and_takes_a_share_of_the_labels(trained, monkeypatch):
    folder, _, flags, result = trained
    assert result["acc1"] > 60
    learnt_from, training = [], fine_tune.frozen.LabelledTraining

    def record(args, card, network, features, sources, *more, **options):
        learnt_from.append(["/".join(Path(sources[0].path(i)).parts[-2:]) for i in range(len(sources[0]))])
        return training(args, card, network, features, sources, *more, **options)

    monkeypatch.setattr(fine_tune.frozen, "LabelledTraining", record)
    few = ["--num_labels", "3", "--batch_size", "3", "--epochs", "1", "--decay_epochs", "9", "--labels_perc", "34"]
    fine_tune.fine_tune(fine_tune.parse_args([*flags, *few, "--output_dir", str(folder / "few")]))
    assert [name.split("/")[0] for name in learnt_from[0]] == ["blue", "blue", "green", "green", "red", "red"]
    (folder / "list.txt").write_text("blue/000.png\nred/001.png\n")
    listed = ["--subset_list", str(folder / "list.txt"), "--output_dir", str(folder / "listed")]
    fine_tune.fine_tune(fine_tune.parse_args([*flags, *few, *listed]))
    assert learnt_from[1] == ["blue/000.png", "red/001.png"]


@pytest.mark.parametrize("layer", ["res4", "avgpool"])
def test_a_linear_classifier_learns_on_a_frozen_map(layer, trained, tmp_path):
    _folder, _, flags, _ = trained
    training = ["--num_labels", "3", "--batch_size", "6", "--epochs", "6", "--decay_epochs", "5", "--lr", "2"]
    args = eval_linear.parse_args([*flags, *training, "--layer", layer, "--output_dir", str(tmp_path)])
    assert eval_linear.eval_linear(args)["acc1"] > 60
    args.layer = "res5"
    with pytest.raises(ValueError, match="--layer res5: the last stage of this network is res4"):
        eval_linear.eval_linear(args)


# --- Robustness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_same_every_time_and_grows(name):
    pixels = picture(3, (90, 140, 60), 64, 64)
    changes = []
    for severity in range(1, 6):
        corrupted = corrupt(pixels, name, severity)
        assert corrupted.shape == pixels.shape and corrupted.dtype == np.uint8
        assert (corrupted == corrupt(pixels, name, severity)).all()
        changes.append(np.abs(corrupted.astype(float) - pixels).mean())
    assert changes[0] > 0 and changes[-1] > 1.2 * changes[0], changes


def test_other_sets_are_classified_among_their_classes(trained, tmp_path):
    folder, data, _, _ = trained
    train = open_source(str(data), "train")
    for name, classes in {"named": ("red", "blue"), "numbered": ("2", "0"), "wrong": ("7", "0")}.items():
        for label in classes:  # green in truth: were it predicted, none would be right
            write_image(tmp_path / name / label / "a.png", picture(7, COLOURS["green"]))
    named, absent = open_set(str(tmp_path / "named"), train)
    assert sorted(named.labels) == [0, 2] and absent == [1]
    numbered, _ = open_set(str(tmp_path / "numbered"), train)
    assert {numbered.path(i).split("/")[-2]: int(numbered.label(i)) for i in range(2)} == {"0": 0, "2": 2}
    with pytest.raises(ValueError, match="there is a class 7, and --data_path has 3"):
        open_set(str(tmp_path / "wrong"), train)

    sets = [str(tmp_path / "named"), str(tmp_path / "numbered")]
    flags = ["--pretrained", str(folder / "tuned"), "--data_path", str(data), *QUICK, "--arch", "regnet_test"]
    flags += ["--corruptions", "blur", "contrast", "--severities", "1", "5", "--output_dir", str(tmp_path / "out")]
    found = eval_robustness.eval_robustness(eval_robustness.parse_args([*flags, "--sets", *sets]))
    corrupted = [found[f"{name} {severity}"] for name in ("blur", "contrast") for severity in (1, 5)]
    assert found["corrupted"] == pytest.approx(np.mean(corrupted)) and found["clean"] > 60
    assert json.loads((tmp_path / "out/robustness.json").read_text()) == found
    assert found["named"] == found["numbered"] == 50 and (tmp_path / "out/corruptions.png").exists()
    for twice in ([*sets, str(tmp_path / "other" / "named")], [str(tmp_path / "clean")]):
        with pytest.raises(ValueError, match=f"there would be two of '{Path(twice[-1]).name}'"):
            eval_robustness.eval_robustness(eval_robustness.parse_args([*flags, "--sets", *twice]))
    with pytest.raises(WeightMismatch, match=r"has no classifier: fine_tune\.py makes one"):
        load_classifier("regnet_test", str(folder / "trunk.pth"))


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_measures_by_group_are_those_of_a_slow_loop():
    rng = np.random.default_rng(0)
    images, predicted = [], []
    for i in range(40):
        groups = {"light": ("day", "night")[i % 2]} | ({"place": str(rng.integers(3))} if i % 5 else {})
        images.append(Image(str(i), ("a", "b")[: rng.integers(3)], groups))
        predicted.append(
            [(str(label), float(p)) for label, p in zip(rng.permutation([*"abcdefg"]), rng.random(7), strict=True)]
        )
    features = torch.randn(40, 6)
    rows = measures(images, predicted, features, "place", {"set": {"c", "d"}})
    assert [row["group"] for row in rows] == ["all", "day", "night", "0", "1", "2"]
    vectors = F.normalize(features, dim=1)
    for row in rows:
        inside = [i for i in range(40) if row["column"] == "all" or images[i].groups.get(row["column"]) == row["group"]]
        known = [i for i in inside if images[i].labels]
        hits = [predicted[i][0][0] in images[i].labels for i in known]
        assert row["n"] == len(inside) and row["n_top1"] == len(known)
        assert row["top1"] == pytest.approx(100 * sum(hits) / len(hits))
        best = [any(label in images[i].labels for label, _ in predicted[i][:5]) for i in known]
        assert row["top5"] == pytest.approx(100 * sum(best) / len(best))
        in_set = [any(label in "cd" for label, _ in predicted[i][:5]) for i in inside]
        assert row["in set"] == pytest.approx(100 * sum(in_set) / len(in_set))
        queries, precisions = [i for i in inside if "place" in images[i].groups], []
        for i in queries:
            others = [j for j in range(40) if j != i and "place" in images[j].groups]
            nearest = sorted(others, key=lambda j, i=i: -float(vectors[i] @ vectors[j]))[:5]
            precisions.append(sum(images[j].groups["place"] == images[i].groups["place"] for j in nearest) / 5)
        assert row["precision@5"] == pytest.approx(100 * sum(precisions) / len(precisions))
    assert next(iter(groups_of(images))) == ("all", "all")
    with pytest.raises(ValueError, match="fewer than two images"):
        retrieval(features, [None] * 40)


def test_the_likeliest_label_is_that_of_the_neighbours():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    found = nearest_labels(torch.tensor([[1.0, 0.05]]), train, torch.tensor([1, 1, 0]), ["cat", "dog"], k=2)
    assert found == [[("dog", 1.0)]]


def test_groups_of_a_table_are_evaluated_with_any_network(trained, tmp_path, capsys):
    folder, data, _, _ = trained
    shutil.copytree(data / "val", tmp_path / "val")
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "val").rglob("*.png"))
    rows = ["image,label,kind"] + [f"{file},{file.parent.name},{'ab'[i % 2]}" for i, file in enumerate(files)]
    (tmp_path / "groups.csv").write_text("\n".join(rows))
    (tmp_path / "sets.csv").write_text("label,set\nred,warm\n")
    flags = [str(folder / "trunk.pth"), "--folder", "seer", "--arch", "regnet_test", "--data_path", str(data), *QUICK]
    flags += ["--groups", str(tmp_path / "groups.csv"), "--attribute", "kind", "--output_dir", str(tmp_path / "out")]
    found = eval_groups.eval_groups(
        eval_groups.parse_args([*flags, "--associations", str(tmp_path / "sets.csv"), "--nb_knn", "3"])
    )
    assert [row["n"] for row in found] == [9, 5, 4] and {"top1", "precision@5", "in warm"} <= found[0].keys()
    with open(tmp_path / "out/groups.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["top1"]) == pytest.approx(found[0]["top1"])
    assert "kind: a, 5 images: top1" in capsys.readouterr().out
    flags[flags.index("--data_path") + 1] = str(tmp_path / "val")  # an image that finds itself is always right
    with pytest.raises(ValueError, match=r"images are in --data_path too and would be their own neighbours"):
        eval_groups.eval_groups(eval_groups.parse_args(flags))
    predictions = "\n".join(["image,label,confidence", *(f"{file},red,0.9" for file in files)])
    (tmp_path / "predictions.csv").write_text(predictions)
    flags = ["--groups", str(tmp_path / "groups.csv"), "--predictions", str(tmp_path / "predictions.csv")]
    found = eval_groups.eval_groups(eval_groups.parse_args([*flags, "--output_dir", str(tmp_path / "out2")]))
    assert found[0]["top1"] == pytest.approx(100 / 3)


def test_layouts_of_two_public_sets_of_groups(tmp_path):
    heading = "imageRelPath,imagenet_synonyms,income,region.id,country.name"
    lines = [
        "a.jpg,\"['stove', 'oven']\",30,af,Kenya",
        "b.jpg,\"['bed']\",300,as,Nepal",
        "c.jpg,\"['bed']\",9000,eu,Italy",
    ]
    (tmp_path / "street.csv").write_text("\n".join([heading, *lines]))
    street = eval_groups.read_dollar_street(tmp_path / "street.csv")
    assert [image.groups["income"] for image in street] == ["low", "medium", "high"]
    assert street[0].labels == ("stove", "oven") and street[1].groups["region"] == "as"
    subjects = {
        "1": {"label": {"age": "17", "gender": "Female", "skin-type": "2"}, "files": ["x/1.mp4", "x/2.mp4"]},
        "2": {"label": {"age": "N/A", "gender": "Other", "skin-type": "6"}, "files": ["y.mp4"]},
    }
    (tmp_path / "cc.json").write_text(json.dumps(subjects))
    found = eval_groups.read_casual_conversations(tmp_path / "cc.json")
    assert [image.path for image in found] == ["x/1.mp4.jpg", "x/2.mp4.jpg", "y.mp4.jpg"]
    assert found[0].groups == {"gender": "Female", "gender x skin type": "Female, lighter", "age": "<18"}
    assert found[2].groups == {"gender": "Other", "gender x skin type": "Other, darker"}
    assert [eval_groups.age_group(age) for age in (18, 30, 45, 69, 70)] == ["18-30", "30-45", "45-70", "45-70", "70+"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,b\n", "no column image; it has name, label"),
        ("image,label\n", "has no lines"),
        ("image,kind\na.png\n", "line 2: 1 cells instead of 2"),
        ("image,kind\na.png,b\n", "1 images are not there, the first is /.*/a.png"),
    ],
)
def test_a_table_of_groups_that_cannot_be_read_is_named(text, message, tmp_path):
    (tmp_path / "groups.csv").write_text(text)
    args = eval_groups.parse_args(["--groups", str(tmp_path / "groups.csv"), "--predictions", "x.csv"])
    with pytest.raises(ValueError, match=message):
        eval_groups.eval_groups(args)
    (tmp_path / "sure.csv").write_text("image,label,confidence\na.png,b,very\n")
    with pytest.raises(ValueError, match=r"sure\.csv, a\.png: a confidence is no number"):
        eval_groups.read_predictions(tmp_path / "sure.csv", [Image("a.png")])
    (tmp_path / "cc.json").write_text("[1]")
    with pytest.raises(ValueError, match="another layout than Casual Conversations"):
        eval_groups.read_casual_conversations(tmp_path / "cc.json")


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: no GPU is visible"):
        eval_groups.eval_groups(eval_groups.parse_args(["--device", "cuda"]))
