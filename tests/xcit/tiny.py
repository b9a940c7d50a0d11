"""The smallest runs of XCiT."""

import torch

from shared import distributed
from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--model xcit_nano_12_p8 --input-size 16 --batch-size 4 --epochs 2 --warmup-epochs 0 --lr 0.05 --drop-path 0.2 "
    "--clip-grad 1 --num_workers 0 --log_freq 1 --no-repeated-aug --pictures off --device cpu --saveckp_steps 1 "
    "--eval-ema"
)


def shrink_networks() -> None:
    """Give the nano networks two blocks of 32 channels."""
    from xcit.cross_covariance_transformer import SIZES

    SIZES["nano_12"] = dict(embed_dim=32, depth=2, num_heads=2, eta=1.0, tokens_norm=False)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from xcit import main

    main.train_xcit(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def train_on_rank(rank: int, *flags) -> None:
    """One of several processes of ``run_processes``, which have joined already."""
    distributed.init = lambda *_: torch.device("cpu")
    shrink_networks()
    train(*flags)


SMALL_NETWORK = ("xcit_nano_12_p16", {})
TRAININGS = {
    "xcit": Training(
        "xcit.main",
        tuple(FLAGS.split()),
        pair=("--batch-size", "2"),
        prepare=shrink_networks,
        exact=("--drop-path", "0"),
        launcher=("xcit.run_with_submitit", "main"),
        job=("--epochs", "8"),  # steps of a whole nano network are slow enough
    )
}
