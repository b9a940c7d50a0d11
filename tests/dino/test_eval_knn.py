import pytest
import torch

from dino import eval_knn
from dino.vision_transformer import vit_tiny
from tests.dino.tiny import COLOURS, OTHER_ARCHITECTURES, write_class_folders, write_train_and_val

SMALL = ["--arch", "vit_tiny", "--pretrained_weights", "random", "--image_size", "32", "--num_workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_train_and_val(tmp_path_factory.mktemp("data"))


def run(*flags):
    return eval_knn.eval_knn(eval_knn.parse_args([*SMALL, "--device", "cpu", *map(str, flags)]))


def test_dumped_features_give_the_same_accuracy_when_loaded(data, tmp_path):
    extracted = run("--data_path", data, "--nb_knn", 3, "--dump_features", tmp_path)
    assert run("--load_features", tmp_path, "--nb_knn", 3) == extracted
    features, labels = (torch.load(tmp_path / name, weights_only=True) for name in ("testfeat.pth", "testlabels.pth"))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(9))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_training_checkpoint_of_another_image_size_and_grey_images_is_evaluated(data, tmp_path):
    backbone = vit_tiny(patch_size=8, img_size=[16], in_chans=1)
    state = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"student": state, "teacher": state, "epoch": 1}, tmp_path / "checkpoint.pth")
    flags = ["--pretrained_weights", tmp_path / "checkpoint.pth", "--checkpoint_key", "student", "--patch_size", 8]
    assert run("--data_path", data, "--nb_knn", 3, *flags)[3][1] > 0


@pytest.mark.parametrize("arch", OTHER_ARCHITECTURES)
def test_other_networks_are_evaluated(data, arch):
    accuracies = run("--data_path", data, "--nb_knn", 3, "--arch", arch)
    assert accuracies[3][0] > 50


def test_without_a_data_path_the_embedded_images_are_classified(capsys):
    accuracies = run("--nb_knn", 5, "--image_size", 16, "--patch_size", 16)
    assert "embedded materials (val): 360 images" in capsys.readouterr().out
    assert 15 < accuracies[5][0] < 100


def test_a_list_may_hold_absolute_paths_where_that_is_allowed(data, tmp_path):
    lists = []
    for part in ("train", "val"):
        lists.append(tmp_path / f"{part}.txt")
        files = sorted((data / part).rglob("*.png"))
        lists[-1].write_text("".join(f"{file}\t{file.parent.name}\n" for file in files))
    flags = ["--data_path", lists[0], "--val_path", lists[1], "--nb_knn", 1]
    with pytest.raises(ValueError, match=r"is absolute; .* unless --allow_absolute_paths is given"):
        run(*flags)
    assert run(*flags, "--allow_absolute_paths") == {1: (100, 100)}


def test_bad_input_is_one_clear_error(data, tmp_path):
    with pytest.raises(ValueError, match="--nb_knn 19 is more than the 18 images"):
        run("--data_path", data, "--nb_knn", 19)
    with pytest.raises(ValueError, match=r"--data_path .*nowhere: no such file or folder"):
        run("--data_path", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--load_features .*: no trainfeat.pth"):
        run("--load_features", tmp_path)

    write_class_folders(tmp_path / "one", 3, {"blue": COLOURS["blue"]})
    with pytest.raises(ValueError, match="only one class, 'blue'"):
        run("--data_path", tmp_path / "one")


def test_weights_that_give_nan_features_are_refused(data, tmp_path):
    backbone = vit_tiny(img_size=[32])
    torch.nn.init.constant_(backbone.norm.bias, 1e38)
    torch.nn.init.constant_(backbone.norm.weight, 1e38)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="18 of 18 feature vectors are not finite"):
        run("--data_path", data, "--nb_knn", 3, "--pretrained_weights", tmp_path / "weights.pth")
