"""The smallest runs of SwAV and DeepCluster-v2."""

from tests.tiny_training import Training

FLAGS = (
    "--arch test_resnet --nmb_crops 2 2 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 "
    "--feat_dim 4 --hidden_mlp 8 --batch_size 4 --base_lr 0.5 --warmup_epochs 0 --epochs 2 "
    "--freeze_prototypes_niters 3 --device cpu --workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off "
    "--checkpoint_freq 1 --saveckp_steps 1"
)
PAIR, JOB = ("--batch_size", "2"), ("--epochs", "20", "--checkpoint_freq", "0")
LAUNCHER = ("swav.run_with_submitit", "main")


def check_queue(state: dict) -> None:
    assert state["queue"]["embeddings"].shape == (2, 2, 8, 4)


def check_memory(state: dict) -> None:
    assert state["memory"]["embeddings"].shape == (2, 2, 12, 4)


TRAININGS = {
    "swav": Training(
        "swav.main_swav",
        (*FLAGS.split(), *"--nmb_prototypes 6 --queue_length 16 --epoch_queue_starts 0".split()),
        pair=PAIR,
        check_pair=check_queue,
        rounding=0.01,
        launcher=LAUNCHER,
        job=JOB,
    ),
    "deepclusterv2": Training(
        "swav.main_deepclusterv2",
        (*FLAGS.split(), "--nmb_prototypes", "6", "5"),
        pair=PAIR,
        check_pair=check_memory,
        rounding=0.05,
        launcher=LAUNCHER,
        launch_flags=("--method", "deepclusterv2"),
        job=JOB,
    ),
}
