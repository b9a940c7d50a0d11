"""Pictures and export; self-supervised training by DINO."""

import pytest
import timm
import torch

from dino import main_dino
from resmlp import eval_knn
from resmlp.flags import load_frozen
from resmlp.hub import load_network
from resmlp.visualize_cross_patch import locality
from shared.networks.weights import safe_load


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


def test_own_runs_are_evaluated_at_another_resolution(finished, capsys):
    weights = ["--pretrained_weights", str(finished / "checkpoint.pth"), "--data_path", "x"]
    for size, grid in (([], 4), (["--image_size", "24"], 6)):
        network, _ = load_frozen(eval_knn.parse_args([*weights, *size]))
        assert network.grid == grid
    assert "cross-patch layers for 4x4 patches, interpolated to 6x6" in capsys.readouterr().out


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_locality_tells_neighbours_from_everything():
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).float()
    neighbours = (torch.cdist(places, places) == 1).float()
    sparse, distance = locality(neighbours)
    assert distance == 1 and abs(sparse - (1 - neighbours.mean().item())) < 1e-6
    sparse, distance = locality(torch.ones(36, 36))
    assert sparse == 0 and abs(distance - torch.cdist(places, places).mean().item()) < 1e-5
