"""The smallest run of FlexiViT."""

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--arch flexivit_test --input_size 16 --patch_size 4 --posemb_grid 3 --grids 2 3 4 --batch_size 4 --epochs 2 "
    "--num_workers 0 --log_freq 1 --pictures off --device cpu --saveckp_steps 1 --mixup 0.2 --aa none"
)


def add_small_size() -> None:
    """Make a network of two blocks of 32 channels known."""
    from flexivit.flexible_vit import SIZES

    SIZES["test"] = (32, 2, 2)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from flexivit import main

    add_small_size()
    main.train_flexivit(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


SMALL_NETWORK = ("flexivit_micro", {"patch_size": 8, "grid": (2, 2)})
TRAININGS = {
    "flexivit": Training(
        "flexivit.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "2"),
        prepare=add_small_size,
        whole=("--arch", "flexivit_micro"),
        launcher=("flexivit.run_with_submitit", "main"),
        job=("--epochs", "20"),
    )
}
