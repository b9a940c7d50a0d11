"""The smallest run of NaViT."""

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--arch navit_test --patch_size 4 --max_side 16 --resolution 8 14 --sequence_length 12 --batch_size 2 --epochs 2 "
    "--max_open 2 --drop beta --drop_rate 0.3 --num_workers 0 --log_freq 1 --pictures off "
    "--device cpu --saveckp_steps 1 --loss softmax"
)


def add_small_size() -> None:
    """Make a network of two blocks of 32 channels known."""
    from navit.native_resolution_vit import SIZES

    SIZES["test"] = (32, 2, 2)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from navit import main

    add_small_size()
    main.train_navit(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


SMALL_NETWORK = ("navit_micro", {"patch_size": 8})
TRAININGS = {
    "navit": Training(
        "navit.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "1"),
        prepare=add_small_size,
        whole=("--arch", "navit_micro"),
        launcher=("navit.run_with_submitit", "main"),
        job=("--epochs", "20"),
    )
}
