"""The smallest runs of DeepCluster."""

from tests.tiny_training import Training

FLAGS = (
    "--arch test_resnet --crop_size 32 --k 5 --pca_dim 4 --batch 4 --epochs 2 --device cpu --workers 0 --log_freq 2 "
    "--eval_knn_freq 0 --pictures off --saveckp_steps 1 --checkpoints 5"
)


def check_clusters(state: dict) -> None:
    assert state["clustered_epoch"] == 1


TRAININGS = {
    "deepcluster": Training(
        "deepcluster.main",
        tuple(FLAGS.split()),
        data=("{images}",),  # its batch is that of all processes together
        check_pair=check_clusters,
        rounding=0.1,
        launcher=("deepcluster.run_with_submitit", "main"),
        job=("--epochs", "20", "--checkpoints", "0"),
    )
}
