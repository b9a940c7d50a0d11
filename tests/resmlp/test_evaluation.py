"""Pictures and export; self-supervised training by DINO."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from dino import main_dino
from resmlp import visualize_cross_patch
from resmlp.export import export
from resmlp.hub import load_network
from resmlp.resmlp_models import ResMLP
from resmlp.visualize_cross_patch import locality, rows_as_maps, to_colors
from shared.networks.weights import safe_load
from tests.resmlp.test_resmlp_models import randomize


@pytest.mark.slow
def test_dino_trains_resmlp_and_the_checkpoint_is_evaluated_here(images, tmp_path, capsys):
    command = (
        f"--arch resmlp_12 --global_crop_size 32 --local_crop_size 32 --local_crops_number 1 --out_dim 16 "
        f"--batch_size_per_gpu 20 --epochs 1 --warmup_epochs 0 --num_workers 0 --log_freq 1 --eval_knn_freq 0 "
        f"--pictures off --device cpu --data_path {images} --output_dir {tmp_path}"
    )
    main_dino.train_dino(main_dino.parse_args(command.split()))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    network = load_network(tmp_path / "checkpoint.pth")
    teacher = {k.removeprefix("backbone."): v for k, v in safe_load(tmp_path / "checkpoint.pth")["teacher"].items()}
    twin = timm.create_model("resmlp_12_224", img_size=32, num_classes=0).eval()
    twin.load_state_dict({name: value for name, value in teacher.items() if not name.startswith("head.")})
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(pictures), twin(pictures), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        main_dino.parse_args(["--arch", "resmlp_12", "--data_path", "x"])
    assert "--local_crop_size 96 differs from --global_crop_size 224" in capsys.readouterr().err


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_a_row_of_the_matrix_is_shown_at_the_place_of_its_patch():
    weight = torch.zeros(9, 9)
    weight[5, 7] = -2.0  # patch (1, 2) takes from patch (2, 1)
    weight[5, 0] = 1.0
    maps = rows_as_maps(weight)
    assert maps.shape == (11, 11)
    shown = np.argwhere(np.nan_to_num(maps) != 0)
    assert shown.tolist() == [[1 * 4 + 0, 2 * 4 + 0], [1 * 4 + 2, 2 * 4 + 1]]
    assert maps[6, 9] == -1 and maps[4, 8] == 0.5
    assert np.isnan(maps[3]).all() and np.isnan(maps[:, 7]).all()
    colors = to_colors(maps)
    assert colors[6, 9].tolist() == [0, 0, 255] and colors[0, 0].min() >= 254 and colors[3, 3].tolist() == [200] * 3


def test_locality_tells_neighbours_from_everything():
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).float()
    neighbours = (torch.cdist(places, places) == 1).float()
    sparse, distance = locality(neighbours)
    assert distance == 1 and abs(sparse - (1 - neighbours.mean().item())) < 1e-6
    sparse, distance = locality(torch.ones(36, 36))
    assert sparse == 0 and abs(distance - torch.cdist(places, places).mean().item()) < 1e-5


def test_pictures_of_all_layers_are_written(finished, tmp_path, monkeypatch, capsys):
    written = {path.name for path in (finished / "pictures").iterdir()}
    assert written == {"curves.png", "layers.png", "layer01.png", "layer02.png", "locality.png"}
    flags = ["--pretrained_weights", str(finished / "checkpoint.pth"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["visualize_cross_patch.py", *flags])
    visualize_cross_patch.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == written - {"curves.png"}
    assert str(tmp_path / "out" / "layers.png") in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "layer01.png").size[0] > 600


# --- Export ----------------------------------------------------------------------------------------


def test_a_classifier_of_no_published_size_is_exported_too(tmp_path, capsys):
    network = randomize(ResMLP(16, 8, in_chans=1, embed_dim=8, depth=2, num_classes=5))
    files = export(network, tmp_path)
    assert set(files) == {"safetensors", "onnx", "card"}
    images = torch.randn(3, 1, 16, 16)
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": images.numpy()})
    np.testing.assert_allclose(found, network(images).numpy(), rtol=1e-3, atol=1e-4)
    again = load_network(files["safetensors"], classifier=True)
    torch.testing.assert_close(again(images), network(images))
    assert "no file for torchvision and timm" in capsys.readouterr().out
