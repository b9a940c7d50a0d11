"""The smallest runs of ResMLP, on images and on sentences."""

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--model resmlp_12 --embed-dim 16 --depth 2 --input-size 16 --patch-size 4 --batch-size 4 --epochs 2 "
    "--warmup-epochs 0 --num_workers 0 --log_freq 1 --no-repeated-aug --pictures off --device cpu --drop-path 0.2 "
    "--saveckp_steps 1"
)
TRANSLATION_FLAGS = (
    "--vocabulary_size 100 --dim 8 --hidden_dim 16 --depth 1 --heads 2 --epochs 2 --max_tokens 128 --dropout 0.1 "
    "--log_freq 1 --device cpu --beam 2 --saveckp_steps 1"
)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training on images in this process."""
    from resmlp import main

    main.train_resmlp(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def few_sentences() -> None:
    """Give translation/main.py 60 pairs of sentences."""
    from resmlp.translation import main

    main.GENERATED_PAIRS = {"train": 60, "valid": 4, "test": 2}


SMALL_NETWORK = ("resmlp_12", {"img_size": 32})
TRAININGS = {
    "resmlp": Training(
        "resmlp.main",
        tuple(FLAGS.split()),
        pair=("--batch-size", "2"),
        exact=("--drop-path", "0"),
        launcher=("resmlp.run_with_submitit", "main"),
        job=("--epochs", "20"),
    ),
    "translation": Training(
        "resmlp.translation.main",
        tuple(TRANSLATION_FLAGS.split()),
        data=(),
        prepare=few_sentences,
        has_workers=False,
        exact=("--dropout", "0"),
    ),
}
