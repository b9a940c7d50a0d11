"""The smallest runs of DeeperCluster."""

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--sobel 1 --width 2 --image_size 32 --super_classes 8 --k 6 --dim_pca 4 --batch_size 1 --epochs 2 --niter 3 "
    "--reassignment 1 --device cpu --workers 0 --log_freq 2 --eval_knn_freq 0 --pictures off --saveckp_steps 1"
)
BODY = {"sobel": True, "width": 2, "img_size": 32}  # arguments of the network


def check_clusters(state: dict) -> None:
    assert state["clustered_epoch"] == 1 and len(state["sub_classes"][0]) == 4


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from deepercluster import main

    main.train_deepercluster(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


SMALL_NETWORK = ("deepercluster_vgg16", {"width": 2, "img_size": 32})
TRAININGS = {
    "deepercluster": Training(
        "deepercluster.main",
        (*FLAGS.split(), *"--super_classes 4 --k 3".split()),
        check_pair=check_clusters,
        rounding=0.1,
        launcher=("deepercluster.run_with_submitit", "main"),
        job=("--epochs", "20", "--checkpoint_freq", "0"),
    )
}
