"""Official checkpoint layouts, strictly; hub entries and the released files; jobs."""

import torch

from msn import linear_eval, main_distributed
from msn import main as main_msn
from msn.hub import load_pretrained
from msn.vision_transformer import ProjectionHead, build


def official_file(path, model_name: str = "deit_tiny", **sizes):
    """A training checkpoint as released: both encoders with their heads, names of several processes."""
    torch.manual_seed(0)
    encoder = build(model_name, **sizes)
    encoder.fc = ProjectionHead(encoder.embed_dim, 16, 8)
    state = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    other = {name: value + 1 for name, value in state.items()}
    torch.save(
        {"encoder": other, "target_encoder": state, "prototypes": torch.zeros(4, 8), "opt": {}, "epoch": 3}, path
    )
    return encoder


def test_released_files_fill_the_encoder_and_sizes_come_from_the_file(tmp_path):
    source = official_file(tmp_path / "a.pth.tar", patch_size=4, img_size=24, in_chans=1)
    encoder = load_pretrained("deit_tiny", tmp_path, "a.pth.tar").encoder
    images = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(encoder(images), source.eval().forward_backbone(images))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    other = load_pretrained("deit_tiny", tmp_path / "a.pth.tar", checkpoint_key="encoder").encoder
    torch.testing.assert_close(other.norm.bias, source.norm.bias + 1)


# --- Jobs -------------------------------------------------------------------------------------------------------------


def test_the_official_launch_is_understood(submitted):
    main_distributed.main(
        "--fname msn/configs/pretrain/msn_vits16.yaml --folder /logs --partition gpu --nodes 2 --tasks-per-node 8 "
        "--time 4300 --data_path /imagenet/train --output_dir /runs/%j".split()
    )
    train, args = submitted[0]
    assert train is main_msn.train_msn
    assert (args.job_dir, args.partition, args.nodes, args.ngpus, args.timeout) == ("/logs", "gpu", 2, 8, 4300)
    assert (args.output_dir, args.num_proto, args.job_name) == ("/runs/%j", 1024, "msn")
    assert not hasattr(args, "linear_eval")


def test_linear_evaluation_is_a_job_too(submitted):
    main_distributed.main(
        "--linear-eval --fname msn/configs/eval/lineval_msn_vits16.yaml --tasks-per-node=8 --data_path /images".split()
    )
    train, args = submitted[0]
    assert train is linear_eval.linear_eval
    assert (args.ngpus, args.lr, args.job_name) == (8, 6.4, "msn-linear")
