"""The smallest runs of MSN, their images, and what they write."""

from pathlib import Path
from unittest import mock

from tests.run_folders import lines
from tests.tiny_training import Training

TINY_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = (
    "--model_name deit_tiny --patch_size 8 --rand_size 32 --focal_size 16 --focal_views 2 --patch_drop 0.5 "
    "--drop_path_rate 0.2 --num_proto 16 --hidden_dim 16 --output_dim 8 --batch_size 4 --warmup 0 --epochs 2 "
    "--num_workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off --device cpu --checkpoint_freq 1 --saveckp_steps 1"
)
ONE_EPOCH = (
    f"{FLAGS} --patch_drop 0.25 --drop_path_rate 0 --batch_size 8 --epochs 1 --log_freq 1 --checkpoint_freq 0 "
    "--saveckp_steps 0"
).split()
CHECKPOINT = "msn-latest.pth.tar"


def shrink_networks() -> None:
    """Make deit_tiny a ViT of 30 thousand parameters."""
    from msn import vision_transformer

    vision_transformer.ARCHITECTURES["deit_tiny"] = TINY_VIT


def check_names(state: dict) -> None:
    assert state["world_size"] == 2 and all(name.startswith("module.") for name in state["encoder"])


SMALL_NETWORK = ("deit_tiny", {"patch_size": 8, "img_size": 16})
TRAININGS = {
    "msn": Training(
        "msn.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "2"),
        prepare=shrink_networks,
        whole=("--model_name", "deit_micro"),
        check_pair=check_names,
        exact=("--drop_path_rate", "0"),
        launcher=("msn.main_distributed", "main"),
        job=("--epochs", "20", "--checkpoint_freq", "0"),
    )
}


# --- Runs in the process of a test ------------------------------------------------------------------------------------


def small_networks():
    """:func:`shrink_networks` for a while."""
    from msn import vision_transformer

    return mock.patch.dict(vision_transformer.ARCHITECTURES, deit_tiny=TINY_VIT)


def train(output_dir: Path, *flags) -> list[dict]:
    """Lines of the log of a run of three steps, if these flags do not make it longer."""
    from msn.main import parse_args, train_msn

    train_msn(parse_args([*ONE_EPOCH, "--folder", str(output_dir), *map(str, flags)]))
    return lines(output_dir)
