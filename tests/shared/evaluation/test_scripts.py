"""What the evaluation scripts of all folders do alike, on pictures of three colours and the files of small runs."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from deepcluster import hub as deepcluster_hub
from deepcluster.checkpoints import official_names
from dino.vision_transformer import vit_micro
from msn import vision_transformer as msn_networks
from resmlp.resmlp_models import ResMLP
from shared.evaluation import linear
from shared.images.decode import ImageError
from swav import hub as swav_hub
from tests.interruption import interrupted
from tests.msn.tiny import small_networks
from tests.pictures import picture, write_class_folders, write_image, write_train_and_val

DEVICE = ["--device", "cpu", "--num_workers", "0"]
# script: flag of its weights, flags of the run besides, a flag that contradicts it and what the message names
KNN = {
    "dino": ("--pretrained_weights", "--arch vit_micro --patch_size 8 --image_size 16", "--image_size 24", "16"),
    "swav": ("--pretrained", "--arch test_resnet --image_size 32", "--image_size 224", "32"),
    "msn": ("--pretrained", "--model_name deit_tiny --image_size 32", "--image_size 224", "32"),
    "resmlp": ("--pretrained_weights", "--image_size 16", "--image_size 24", "16"),
}
PROBES = {
    "dino.eval_linear": "--num_labels 3 --lr 5 --batch_size_per_gpu 6",
    "swav.eval_linear": "--num_labels 3 --lr 0.1 --batch_size 6",
    "swav.eval_semisup": "--num_labels 3 --lr 0.001 --lr_last_layer 0.02 --batch_size 6 --labels_perc 100",
    "resmlp.eval_linear": "--lr 5 --batch_size_per_gpu 6",
    "deepcluster.eval_linear": "--lr 0.05 --batch_size 6 --conv 2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints by the names of the folders."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)

    def in_backbone(network):
        return {f"backbone.{name}": value for name, value in network.state_dict().items()}

    vit = vit_micro(patch_size=8, img_size=[16])
    flags = {"arch": "vit_micro", "patch_size": 8, "global_crop_size": 16}
    torch.save({"teacher": in_backbone(vit), "args": flags}, folder / "dino")
    convnet = swav_hub.build_network("test_resnet").state_dict()
    torch.save({"state_dict": convnet, "args": {"arch": "test_resnet", "size_crops": [32, 16]}}, folder / "swav")
    with small_networks():
        encoder = msn_networks.build("deit_tiny", img_size=32).state_dict()
    torch.save({"target_encoder": encoder, "args": {"model_name": "deit_tiny", "rand_size": 32}}, folder / "msn")
    mlp = ResMLP(16, 4, embed_dim=16, depth=2, init_scale=0.1).state_dict()
    torch.save({"model": mlp, "args": {"input_size": 16}}, folder / "resmlp")
    clustered = official_names(deepcluster_hub.build_network("test_resnet", img_size=32).state_dict())
    state = {"arch": "test_resnet", "state_dict": clustered, "args": {"crop_size": 32}}
    torch.save(state, folder / "deepcluster")
    return folder


@pytest.fixture(autouse=True)
def small_vits():
    with small_networks():
        yield


def call(module: str, *flags):
    script = importlib.import_module(module)
    return getattr(script, module.partition(".")[2])(script.parse_args([*map(str, flags), *DEVICE]))


def knn(folder: str, weights: Path, data: Path, *flags):
    return call(f"{folder}.eval_knn", KNN[folder][0], weights / folder, "--data_path", data, "--nb_knn", 3, *flags)


def probe(name: str, weights: Path, data: Path, output_dir: Path, *flags):
    folder = name.partition(".")[0]
    network = ["--model" if folder == "deepcluster" else KNN[folder][0], weights / folder]
    where = ["--data" if folder == "deepcluster" else "--data_path", data, "--output_dir", output_dir]
    return call(name, *network, *where, *PROBES[name].split(), "--epochs", 2, *flags)


def log_of(output_dir: Path) -> list[dict]:
    (log,) = output_dir.glob("*log.txt")
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("folder", KNN)
def test_open_flags_take_the_values_of_the_run_and_others_may_not_contradict_them(folder, weights, data, capsys):
    _, of_run, contradiction, value = KNN[folder]
    found = knn(folder, weights, data)
    printed = capsys.readouterr().out
    assert f"{of_run}, as in the training\n" in printed
    assert re.search(r"^3-NN classifier result: Top1: \d+.\d\d, Top5: \d+.\d\d$", printed, re.M)
    assert found == knn(folder, weights, data, *of_run.split()) and found[3][0] > 50  # chance is 33
    assert "as in the training" not in capsys.readouterr().out
    flag, given = contradiction.split()
    if folder == "resmlp":
        knn(folder, weights, data, flag, given)
        assert "cross-patch layers for 4x4 patches, interpolated to 6x6" in capsys.readouterr().out
        return
    with pytest.raises(ValueError, match=rf"{flag} {given} contradicts the checkpoint, .* {value}$"):
        knn(folder, weights, data, flag, given)


def test_a_file_that_is_no_checkpoint_of_a_run_takes_any_image_size(weights, data, tmp_path):
    for folder in ("dino", "resmlp"):
        checkpoint = torch.load(weights / folder, weights_only=True)
        torch.save({name: value for name, value in checkpoint.items() if name != "args"}, tmp_path / folder)
    flags = ("--arch", "vit_micro", "--patch_size", 8)
    assert knn("dino", tmp_path, data, *flags, "--image_size", 24)[3][0] > 50
    assert knn("resmlp", tmp_path, data, "--image_size", 24)[3][0] > 50


@pytest.mark.parametrize("folder", ["dino", "swav", "msn"])
def test_random_networks_are_a_function_of_the_seed(folder, data, tmp_path):
    flag, of_run, *_ = KNN[folder]
    features = []
    for seed, state in ((1, 0), (1, 1), (2, 1)):
        torch.manual_seed(state)
        flags = (flag, "random", *of_run.split(), "--data_path", data, "--nb_knn", 3, "--seed", seed)
        call(f"{folder}.eval_knn", *flags, "--dump_features", tmp_path)
        features.append(torch.load(tmp_path / "testfeat.pth", weights_only=True))
    assert torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])


# --- Images that cannot be read, and classes that differ --------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """One unreadable image of each part; their paths."""
    root = write_train_and_val(tmp_path / "damaged")
    files = [root / "train" / "green" / "002.png", root / "val" / "red" / "001.png"]
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    return root, *files


@pytest.mark.parametrize("folder", KNN)
def test_the_neighbours_of_readable_images_are_counted(folder, damaged, weights, capsys):
    root, train, val = damaged
    assert knn(folder, weights, root)[3][0] > 50
    printed = capsys.readouterr().out
    for number, file in ((18, train), (9, val)):
        assert re.search(rf"1 of {number} images of .* cannot be read, the first is {file}; others take", printed)
    with pytest.raises(ImageError, match=str(train)):
        knn(folder, weights, root, "--on_bad_image", "error")


@pytest.mark.parametrize("name", PROBES)
def test_unreadable_images_of_probes_are_replaced_and_listed(name, damaged, weights, tmp_path):
    root, train, val = damaged
    probe(name, weights, root, tmp_path / "run")
    for listed, file in (("bad_images.txt", train), ("bad_images_val.txt", val)):
        assert (tmp_path / "run" / listed).read_text().split("\t")[0] == str(file)
    assert [line["bad_images"] for line in log_of(tmp_path / "run")] == [1, 1]
    with pytest.raises(ImageError, match=str(train)):
        probe(name, weights, root, tmp_path / "strict", "--on_bad_image", "error")


def test_parts_with_other_classes_are_scored_over_those_that_both_have(data, weights, tmp_path, capsys):
    write_class_folders(tmp_path / "train", 6)
    write_class_folders(tmp_path / "val", 3, seed=1)
    (tmp_path / "val" / "blue").rename(tmp_path / "val" / "amber")
    message = r"missing blue, additional amber; --shared_classes_only true scores over the 2 classes that both have"
    with pytest.raises(ValueError, match=message):
        knn("swav", weights, tmp_path)
    shared = ("--shared_classes_only", "true")
    found = knn("swav", weights, tmp_path, *shared, "--dump_features", tmp_path)
    printed = capsys.readouterr().out
    assert all(f"left out 1 classes only in {part}" in printed for part in ("train: blue", "val: amber"))
    for part, images in (("train", 6), ("test", 3)):  # the labels stay those of the train images
        assert torch.load(tmp_path / f"{part}labels.pth", weights_only=True).tolist() == [1] * images + [2] * images
    assert found[3][0] >= 50
    assert probe("swav.eval_linear", weights, tmp_path, tmp_path / "run", *shared)["acc1"] <= 100
    with pytest.raises(ValueError, match="missing blue, additional amber"):
        probe("deepcluster.eval_linear", weights, tmp_path, tmp_path / "other")


def test_classes_are_matched_by_name_not_by_place(weights, tmp_path):
    """A list sorts numbers as numbers, a folder as words."""
    colours = {"2": (200, 40, 40), "10": (40, 40, 200)}
    lines = []
    for i, (name, colour) in enumerate(colours.items()):
        for number in range(3):
            file = write_image(tmp_path / f"{name}-{number}.png", picture(10 * i + number, colour))
            lines.append(f"{file.name}\t{name}\n")
            write_image(tmp_path / "val" / name / f"{number}.png", picture(100 + 10 * i + number, colour))
    (tmp_path / "train.txt").write_text("".join(lines))
    found = knn("dino", weights, tmp_path / "train.txt", "--val_path", tmp_path / "val", "--nb_knn", 1)
    assert found[1][0] == 100


# --- Probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
def test_an_interrupted_probe_ends_like_an_uninterrupted_one(name, data, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear, "SHORT_EPOCH_S", 0)
    result = probe(name, weights, data, tmp_path / "whole")
    log = log_of(tmp_path / "whole")
    assert f"Top-1 accuracy after the last epoch: {result['acc1']:.2f} % (top-5 100.00 %" in capsys.readouterr().out
    assert [line["epoch"] for line in log] == [0, 1] and result["acc1"] == log[-1]["test_acc1"]
    assert log[-1]["best_acc1"] == max(line["test_acc1"] for line in log)
    with interrupted(linear, "train_one_epoch", 2):
        probe(name, weights, data, tmp_path / "parts")
    capsys.readouterr()
    assert probe(name, weights, data, tmp_path / "parts") == result
    assert "resuming at epoch 1" in capsys.readouterr().out
    assert log_of(tmp_path / "parts") == log
    assert probe(name, weights, data, tmp_path / "whole") == result  # there is nothing left to train

    (file,) = (path for path in (tmp_path / "whole").glob("*.pth*") if path.suffix != ".previous")
    state = torch.load(file, weights_only=True)
    other = {"backbone", "pretrained", "network"} & state.keys()
    torch.save(state | dict.fromkeys(other, 1), file)
    with pytest.raises(ValueError, match="started from other weights, or their features; use another --output_dir"):
        probe(name, weights, data, tmp_path / "whole")
    torch.save({"epoch": 3, "optimizer": {}}, file)
    with pytest.raises(ValueError, match="is a checkpoint of another script; choose another --output_dir"):
        probe(name, weights, data, tmp_path / "whole")


def test_a_checkpoint_of_short_epochs_is_written_once_a_minute_and_at_the_end(data, weights, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(linear, "save", lambda file, state: saved.append(state["epoch"]))
    probe("swav.eval_semisup", weights, data, tmp_path, "--epochs", 3)
    assert saved == [3] and len(log_of(tmp_path)) == 3


def test_validation_comes_every_so_many_epochs_and_after_the_last(data, weights, tmp_path):
    probe("resmlp.eval_linear", weights, data, tmp_path, "--epochs", 3, "--val_freq", 2)
    assert ["test_acc1" in line for line in log_of(tmp_path)] == [False, True, True]
    with pytest.raises(SystemExit):
        probe("resmlp.eval_linear", weights, data, tmp_path, "--val_freq", 0)
